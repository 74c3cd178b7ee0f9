"""Audit messages of DICOM: what happened, as the XML of PS3.15 A.5, without anything of a patient.

    to_xml(accessed(["1.2.3"], "infer"), source, pseudonym)

Covers the events that edgemed reports and their form. What they say of patients: each Study Instance UID becomes a UID
that only the holder of the key can tell (`pseudonym`); the patient, whom the standard wants named by a number, is
"withheld"; no name, no date, no file name, no text of an error. Does not cover keeping and sending (`trail`, `syslog`).

    event                  message of A.5.3            action  type
    started, stopped       Application Activity        E       Application Start, Application Stop
    accessed               DICOM Instances Accessed    R
    exported               Export                      R
    received, sent         DICOM Instances Transferred C, R
    log_used               Audit Log Used              R
    configured             Security Alert              E       Software Configuration; outcome 0: for information
    refused                Security Alert              E       Node Authentication, Software Configuration or
                                                               Use of Restricted Function; outcome 8
    damaged                Security Alert              E       Object Security Attributes Changed; outcome 12

Source: DICOM PS3.15 A.5.1.1 (schema), A.5.2 (fields), A.5.3 (messages); PS3.16 CID 400 to 405 (codes).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

Outcome = int
SUCCESS, MINOR, SERIOUS, MAJOR = 0, 4, 8, 12
"""Of an event: it did what it should; in part; it was ended or refused; the system itself may be harmed."""

Code = tuple[str, str, str]
"""csd-code, codeSystemName, originalText."""

APPLICATION_ACTIVITY = ("110100", "DCM", "Application Activity")
AUDIT_LOG_USED = ("110101", "DCM", "Audit Log Used")
INSTANCES_ACCESSED = ("110103", "DCM", "DICOM Instances Accessed")
INSTANCES_TRANSFERRED = ("110104", "DCM", "DICOM Instances Transferred")
EXPORT = ("110106", "DCM", "Export")
SECURITY_ALERT = ("110113", "DCM", "Security Alert")

APPLICATION_START = ("110120", "DCM", "Application Start")
APPLICATION_STOP = ("110121", "DCM", "Application Stop")
NODE_AUTHENTICATION = ("110126", "DCM", "Node Authentication")
SOFTWARE_CONFIGURATION = ("110131", "DCM", "Software Configuration")
RESTRICTED_FUNCTION = ("110132", "DCM", "Use of Restricted Function")
SECURITY_ATTRIBUTES = ("110135", "DCM", "Object Security Attributes Changed")

_APPLICATION = ("110150", "DCM", "Application")
_LAUNCHER = ("110151", "DCM", "Application Launcher")
_DESTINATION = ("110152", "DCM", "Destination Role ID")
_SOURCE = ("110153", "DCM", "Source Role ID")
_DESTINATION_MEDIA = ("110154", "DCM", "Destination Media")
_MEDIA_URI = ("110037", "DCM", "URI")
_STUDY_UID = ("110180", "DCM", "Study Instance UID")
_NODE_ID = ("110182", "DCM", "Node ID")
_PATIENT_NUMBER = ("2", "RFC-3881", "Patient Number")
_URI = ("12", "RFC-3881", "URI")

WITHHELD = "withheld"
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Other:
    """Another party: an AE on the network, or where results went. role: of the codes above."""

    name: str
    role: Code
    address: str = ""
    media: bool = False
    requests: bool = False


@dataclass(frozen=True)
class Event:
    """Something to be recorded; made by the functions below.

    studies: Study Instance UIDs, or the absolute paths of files that have none; they leave here as pseudonyms. subject:
    a URI, or a node's name. told: further facts, which must not be of a patient.
    """

    id: Code
    action: str
    type: Code | None = None
    outcome: Outcome = SUCCESS
    verb: str = ""
    aet: str = ""
    own_role: Code = _APPLICATION
    user_role: Code | None = None
    others: tuple[Other, ...] = ()
    studies: tuple[str, ...] = ()
    instances: int | None = None
    subject: str = ""
    subject_code: Code = _URI
    told: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """Who reports: host, process, the user it runs as ("login"), and what the configuration calls machine and site."""

    host: str
    process: int
    login: str
    source: str
    site: str = ""


# --- events -----------------------------------------------------------------------------------------------------------


def started(verb: str, aet: str = "") -> Event:
    """Return the start of a command. aet: its AE title, if it has one."""
    return Event(APPLICATION_ACTIVITY, "E", APPLICATION_START, verb=verb, aet=aet, user_role=_LAUNCHER)


def stopped(verb: str, outcome: Outcome = SUCCESS, aet: str = "") -> Event:
    """Return the end of a command."""
    return replace(started(verb, aet), type=APPLICATION_STOP, outcome=outcome)


def accessed(studies: Iterable[str], verb: str, outcome: Outcome = SUCCESS, instances: int | None = None) -> Event:
    """Return the use of scans: a model was, or was to be, asked about them."""
    return Event(
        INSTANCES_ACCESSED, "R", outcome=outcome, verb=verb, studies=tuple(dict.fromkeys(studies)), instances=instances
    )


def exported(studies: Iterable[str], verb: str, kinds: Iterable[str], outcome: Outcome = SUCCESS) -> Event:
    """Return the writing of results into files of this machine. kinds: as "seg", "json"; where to is not told."""
    media = Other("file:results", _DESTINATION_MEDIA, media=True)
    told = {"Results": ",".join(kinds)}
    return Event(
        EXPORT, "R", outcome=outcome, verb=verb, own_role=_SOURCE, user_role=_SOURCE, others=(media,),
        studies=tuple(dict.fromkeys(studies)), told=told,
    )  # fmt: skip


def received(studies: Iterable[str], sender: str, address: str, instances: int, aet: str) -> Event:
    """Return that instances came over the network and are kept."""
    other = Other(sender, _SOURCE, address, requests=True)
    return Event(
        INSTANCES_TRANSFERRED, "C", verb="serve", aet=aet, own_role=_DESTINATION, others=(other,),
        studies=tuple(dict.fromkeys(studies)), instances=instances,
    )  # fmt: skip


def sent(studies: Iterable[str], target: str, address: str, instances: int, aet: str, outcome: Outcome) -> Event:
    """Return that results were sent to a target of the configuration, or that it did not take them."""
    return Event(
        INSTANCES_TRANSFERRED, "R", outcome=outcome, verb="serve", aet=aet, own_role=_SOURCE,
        others=(Other(target, _DESTINATION, address),), studies=tuple(dict.fromkeys(studies)), instances=instances,
    )  # fmt: skip


def configured(what: str, bundle: str, digest: str = "") -> Event:
    """Return a change of the bundles of this machine. what: as "imported"."""
    subject = f"urn:edgemed:bundle:{bundle}" + (f"?sha256={digest}" if digest else "")
    return Event(SECURITY_ALERT, "E", SOFTWARE_CONFIGURATION, subject=subject, told=_alert(f"bundle {what}"))


def refused(kind: Code, why: str, *, subject: str = "", verb: str = "") -> Event:
    """Return something that was not let in. why: words of edgemed's own, never those of a message."""
    return Event(
        SECURITY_ALERT, "E", kind, SERIOUS, verb=verb, subject=subject, told=_alert(why),
        subject_code=_NODE_ID if kind == NODE_AUTHENTICATION else _URI,
    )  # fmt: skip


def damaged(why: str) -> Event:
    """Return that the trail itself is not what it was."""
    return Event(SECURITY_ALERT, "E", SECURITY_ATTRIBUTES, MAJOR, subject="urn:edgemed:audit", told=_alert(why))


def log_used(verb: str) -> Event:
    """Return that somebody looked into the trail."""
    return Event(AUDIT_LOG_USED, "R", verb=verb, subject="urn:edgemed:audit")


def _alert(text: str) -> dict[str, str]:
    return {"Alert Description": text}


# --- their form -------------------------------------------------------------------------------------------------------


def to_xml(event: Event, origin: Origin, pseudonym: Callable[[str], str], at: datetime) -> str:
    """Return the message on one line. pseudonym: what a study of the event is called. at: with a time zone."""
    from xml.etree import ElementTree  # here: an installation without an audit trail need not load it

    message = ElementTree.Element("AuditMessage")
    head = _add(
        message, "EventIdentification", EventActionCode=event.action, EventDateTime=to_time(at),
        EventOutcomeIndicator=str(event.outcome),
    )  # fmt: skip
    _code(head, "EventID", event.id)
    if event.type is not None:
        _code(head, "EventTypeCode", event.type)
    _participants(message, event, origin)
    site = {"AuditEnterpriseSiteID": origin.site} if origin.site else {}
    source = _add(message, "AuditSourceIdentification", **site, AuditSourceID=origin.source)
    _add(source, "AuditSourceTypeCode", **{"csd-code": "4" if event.verb == "serve" else "1"})
    for study in event.studies:
        told = _object(message, _STUDY_UID, pseudonym(study), ("2", "3"), "hashed", event.told)
        if event.instances is not None and len(event.studies) == 1:
            described = _add(told, "ParticipantObjectDescription")
            _add(described, "SOPClass", NumberOfInstances=str(event.instances))
    if event.studies:
        _object(message, _PATIENT_NUMBER, WITHHELD, ("1", "1"), WITHHELD)
    elif event.subject or event.told:
        subject = event.subject or f"urn:edgemed:{event.verb or 'input'}"
        name = "Security Audit Log" if event.id == AUDIT_LOG_USED else event.subject_code[2]
        _object(message, event.subject_code, subject, ("2", "13"), name, event.told)
    return ElementTree.tostring(message, "unicode").replace("\n", " ").replace("\r", " ")


def to_time(at: datetime) -> str:
    """Return a time as RFC 3339 has it, in UTC and with milliseconds.

    >>> to_time(datetime(2026, 11, 22, 8, 0, tzinfo=UTC))
    '2026-11-22T08:00:00.000Z'
    """
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _participants(message: Element, event: Event, origin: Origin) -> None:
    """Add the process, its user, and the others; one at most is the requestor."""
    asked = any(other.requests for other in event.others)
    titles = {"AlternativeUserID": f"AETITLES={event.aet}"} if event.aet else {}
    process = _add(
        message, "ActiveParticipant", UserID=str(origin.process), **titles,
        UserName=f"edgemed {event.verb}".strip(), UserIsRequestor="false", NetworkAccessPointID=origin.host,
        NetworkAccessPointTypeCode="1",
    )  # fmt: skip
    _code(process, "RoleIDCode", event.own_role)
    if not event.others or not asked:
        user = _add(message, "ActiveParticipant", UserID=f"{origin.login}@{origin.host}", UserIsRequestor="true")
        if event.user_role is not None:
            _code(user, "RoleIDCode", event.user_role)
    for other in event.others:
        title = {} if other.media else {"AlternativeUserID": f"AETITLES={other.name}"}
        place = {"NetworkAccessPointID": other.address, "NetworkAccessPointTypeCode": "2"} if other.address else {}
        party = _add(
            message, "ActiveParticipant", UserID=other.name, **title,
            UserIsRequestor="true" if other.requests else "false", **place,
        )  # fmt: skip
        _code(party, "RoleIDCode", other.role)
        if other.media:
            _code(_add(party, "MediaIdentifier"), "MediaType", _MEDIA_URI)


def _object(
    message: Element,
    code: Code,
    name: str,
    kind: tuple[str, str],
    label: str,
    told: Mapping[str, str] | None = None,
) -> Element:
    """Add an object. kind: ParticipantObjectTypeCode and its role."""
    from base64 import b64encode

    made = _add(
        message, "ParticipantObjectIdentification", ParticipantObjectID=name, ParticipantObjectTypeCode=kind[0],
        ParticipantObjectTypeCodeRole=kind[1],
    )  # fmt: skip
    _code(made, "ParticipantObjectIDTypeCode", code)
    _add(made, "ParticipantObjectName").text = label
    for key, value in (told or {}).items():
        _add(made, "ParticipantObjectDetail", type=key, value=b64encode(value.encode("utf-8", "replace")).decode())
    return made


def _code(parent: Element, tag: str, code: Code) -> None:
    _add(parent, tag, **{"csd-code": code[0], "codeSystemName": code[1], "originalText": code[2]})


def _add(parent: Element, tag: str, **attributes: str) -> Element:
    """Add an element; what XML cannot hold is replaced."""
    clean = {key: " ".join(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text).split()) for key, text in attributes.items()}
    child = parent.makeelement(tag, clean)
    parent.append(child)
    return child
