"""Every message has the form of PS3.15 A.5, and says nothing of a patient."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from edgemed import audit
from edgemed.audit import message
from edgemed.audit.message import Event
from edgemed.errors import (
    CannotWrite,
    EdgemedError,
    InvalidInput,
    ResourceLimit,
    SignatureError,
    UnsupportedDicom,
)

STUDY = "1.2.826.0.1.3680043.8.498.1"
Check = Callable[[str], ElementTree.Element]
Configure = Callable[..., Path]

EVENTS: dict[str, Event] = {
    "started": message.started("serve", "EDGEMED"),
    "stopped": message.stopped("infer", message.SERIOUS),
    "accessed": message.accessed([STUDY], "infer", instances=20),
    "accessed, failed": message.accessed([STUDY, "/scans/Doe^John.png"], "batch", message.SERIOUS),
    "exported": message.exported([STUDY], "infer", ["seg", "sr"]),
    "received": message.received([STUDY], "CT1", "10.1.0.7", 120, "EDGEMED"),
    "sent": message.sent([STUDY], "PACS", "10.1.0.2", 2, "EDGEMED", message.SUCCESS),
    "configured": message.configured("imported", "nano", "ab" * 32),
    "refused, association": message.refused(message.NODE_AUTHENTICATION, "unknown sender", subject="CT9", verb="serve"),
    "refused, bundle": message.refused(message.SOFTWARE_CONFIGURATION, "no signature", subject="urn:edgemed:bundle"),
    "refused, input": message.refused(message.RESTRICTED_FUNCTION, "beyond the limits"),
    "damaged": message.damaged("record 3 was changed"),
    "log used": message.log_used("audit show"),
}


def texts(folder: Path) -> list[str]:
    (trail,) = folder.iterdir()
    return [record.text for record in audit.own_trail(audit.Settings(trail.parent)).records()]


@pytest.mark.parametrize("name", EVENTS)
def test_message_has_the_form_of_the_standard(name: str, configure: Configure, check: Check) -> None:
    folder = configure(site="Ward 3 <&>", source="WS-7")
    audit.record(EVENTS[name])
    (text,) = texts(folder)
    root = check(text)
    assert STUDY not in text
    assert "Doe" not in text
    assert root.find("AuditSourceIdentification").attrib["AuditEnterpriseSiteID"] == "Ward 3 <&>"  # type: ignore[union-attr]


def test_many_studies_become_several_messages_below_the_size_that_all_take(configure: Configure, check: Check) -> None:
    folder = configure()
    audit.record(message.accessed([f"{STUDY}.{n}" for n in range(120)], "infer"))
    found = texts(folder)
    assert [len(check(text).findall("ParticipantObjectIdentification")) for text in found] == [51, 51, 21]
    assert max(len(text.encode()) for text in found) < 32_768


def test_a_study_has_one_name_for_one_key_and_another_for_another(
    configure: Configure, check: Check, tmp_path: Path
) -> None:
    def name_in(folder: Path) -> str:
        return check(texts(folder)[-1])[-2].attrib["ParticipantObjectID"]

    folder = configure()
    audit.record(message.accessed([STUDY], "infer"))
    own = name_in(folder)
    audit.record(message.exported([STUDY], "infer", ["json"]))
    assert name_in(folder) == own
    assert own.startswith("2.25.")
    assert len(own) <= 64
    key = tmp_path / "site.key"
    key.touch(0o600)
    key.write_bytes(b"k" * 32)
    configure(pseudonym_file=str(key))
    audit.record(message.accessed([STUDY], "infer"))
    assert name_in(folder) != own
    key.write_bytes(b"short")
    with pytest.raises(EdgemedError, match="32 or more"):
        audit.record(message.accessed([STUDY], "infer"))


def test_text_that_xml_cannot_hold_is_replaced() -> None:
    origin = message.Origin("host", 1, "user", "WS\x00\x1f 7\ud800\n", "")
    xml = message.to_xml(message.started("infer\x01"), origin, str, datetime.now(UTC))
    source = ElementTree.fromstring(xml).find("AuditSourceIdentification")
    assert source is not None
    assert source.attrib["AuditSourceID"] == "WS\ufffd\ufffd 7\ufffd"
    assert "\n" not in xml


def test_nothing_is_recorded_where_no_folder_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty = tmp_path / "c.toml"
    empty.touch()
    monkeypatch.setenv("EDGEMED_CONFIG", str(empty))
    with audit.application("infer"):
        audit.record(message.accessed([STUDY], "infer"))
    audit.record_refusal(SignatureError("x"))
    assert list(tmp_path.iterdir()) == [empty]


def test_an_access_to_nothing_is_none(configure: Configure) -> None:
    folder = configure()
    audit.record(message.accessed([], "infer"))
    audit.record(message.exported([], "infer", ["json"]))
    assert not folder.exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"folder": None, "source": "WS"}, "audit.source is set and audit.folder is not"),
        ({"server": "siem:6514"}, "audit.authorities is not"),
        ({"server": "siem:x"}, "HOST:PORT"),
        ({"server": "siem:70000"}, "HOST:PORT"),
        ({"server": "a b"}, "HOST:PORT"),
    ],
)
def test_section_that_does_not_fit_is_an_error_of_usage(
    keys: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"authorities": "a", "certificate": "c", "key_file": "k"} if "HOST" in message else {}
    rows = {"folder": "audit", **files, **keys}
    file = tmp_path / "c.toml"
    file.write_text("[audit]\n" + "".join(f"{k} = '{v}'\n" for k, v in rows.items() if v is not None))
    monkeypatch.setenv("EDGEMED_CONFIG", str(file))
    with pytest.raises(EdgemedError, match=message) as caught:
        audit.read_audit()
    assert caught.value.exit_code == 1


def test_start_and_stop_tell_how_it_ended(configure: Configure, check: Check) -> None:
    folder = configure()
    with audit.application("infer"):
        pass
    with pytest.raises(InvalidInput, match="Doe"), audit.application("batch"):
        raise InvalidInput("Doe^John is no scan")
    found = texts(folder)
    events = [check(text)[0] for text in found]
    assert [(e[1].attrib["csd-code"], e.attrib["EventOutcomeIndicator"]) for e in events] == [
        ("110120", "0"),
        ("110121", "0"),
        ("110120", "0"),
        ("110121", "8"),
    ]
    assert "Doe" not in "".join(found)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (SignatureError("Doe"), "110131"),
        (ResourceLimit("Doe"), "110132"),
        (InvalidInput("Doe"), "110132"),
        (UnsupportedDicom("Doe"), "110132"),
        (CannotWrite("Doe"), None),
        (ValueError("Doe"), None),
    ],
)
def test_a_refusal_tells_the_class_and_never_the_words(
    error: Exception, kind: str | None, configure: Configure, check: Check
) -> None:
    folder = configure()
    audit.record_refusal(error, "infer")
    if kind is None:
        assert not folder.exists()
        return
    (text,) = texts(folder)
    assert check(text)[0][1].attrib["csd-code"] == kind
    assert "Doe" not in text
