"""The audit trail: who did what with which scan or bundle on this machine, for the hospital's audit server.

    with audit.application("infer"):                         start and stop
        audit.record(audit.accessed(studies, "infer"))       before the answer is shown
        audit.record(audit.exported(studies, "infer", ["seg"]))

Off, and then free (the settings are read, nothing else), unless the configuration sets audit.folder. What is recorded
is on the disk when `record` returns; if that cannot be, CannotWrite is raised: what cannot be recorded is not done.
Records go to the server of audit.server in `drain`, at the end of a command or from time to time in a node, and with
`edgemed audit send`; until then they wait. Each user has a trail of their own below audit.folder, named by the user's
number, for no user may read another's; root reads and sends them all.

    message     events, and their form (DICOM PS3.15 A.5)
    trail       the chained file
    syslog      RFC 5424 and 5425
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.audit.message import EXPORT as _EXPORT
from edgemed.audit.message import (
    INSTANCES_ACCESSED,
    MAJOR,
    MINOR,
    NODE_AUTHENTICATION,
    RESTRICTED_FUNCTION,
    SERIOUS,
    SOFTWARE_CONFIGURATION,
    SUCCESS,
    Event,
    Origin,
    accessed,
    configured,
    damaged,
    exported,
    log_used,
    received,
    refused,
    sent,
    started,
    stopped,
    to_time,
    to_xml,
)
from edgemed.config import Value, read_secret, read_settings
from edgemed.errors import (
    BatchPartlyFailed,
    BundleError,
    CannotRead,
    CannotWrite,
    EdgemedError,
    InvalidInput,
    ResourceLimit,
    SignatureError,
    UnsupportedDicom,
)

if TYPE_CHECKING:
    from edgemed.audit.syslog import Server
    from edgemed.audit.trail import Trail

__all__ = [
    "MAJOR",
    "MINOR",
    "NODE_AUTHENTICATION",
    "RESTRICTED_FUNCTION",
    "SERIOUS",
    "SOFTWARE_CONFIGURATION",
    "SUCCESS",
    "Event",
    "Settings",
    "accessed",
    "application",
    "configured",
    "drain",
    "exported",
    "log_used",
    "named",
    "own_trail",
    "pseudonyms",
    "read_audit",
    "received",
    "record",
    "record_refusal",
    "refused",
    "send",
    "sent",
    "trails",
]

_STUDIES = 50
"""In one message at most: it stays below the 32 KiB that every receiver must take (PS3.15 A.6)."""
_BATCH = 500
RETRY_SECONDS = 60.0
"""How long a command that ends leaves a server alone that was away; so long no later one waits for it."""


@dataclass(frozen=True)
class Settings:
    """The section [audit]. server: None where records stay here. file_bytes: of a file of the trail, about."""

    folder: Path
    server: Server | None = None
    pseudonym: Path | None = None
    source: str = ""
    site: str = ""
    file_bytes: int = 64 << 20


def read_audit() -> Settings | None:
    """Return the section [audit], None where it is not there.

    Raises EdgemedError (usage) if it lacks a key, and what `edgemed.config.read_settings` raises.
    """
    found = {name.partition(".")[2]: v for name, v in read_settings().items() if name.startswith("audit.")}
    values = {name: value.value for name, value in found.items()}
    if values["folder"] is None:
        if named := next((name for name, value in found.items() if value.origin != "default"), None):
            raise EdgemedError(f"audit.{named} is set and audit.folder is not; it switches the audit trail on")
        return None
    told = values["pseudonym_file"], values["source"], values["site"]
    return Settings(values["folder"], _server(found), *told, file_bytes=int(values["file_mib"] * (1 << 20)))


def _server(found: dict[str, Value]) -> Server | None:
    values: dict[str, Any] = {name: value.value for name, value in found.items()}
    if not values["server"]:
        return None
    from edgemed.audit.syslog import Server, to_address

    if missing := [name for name in ("authorities", "certificate", "key_file") if values[name] is None]:
        raise EdgemedError(f"audit.server is set and audit.{missing[0]} is not; both sides show a certificate")
    return Server(
        *to_address(values["server"]), values["authorities"], values["certificate"], values["key_file"],
        values["seconds"],
    )  # fmt: skip


def named(study_instance_uid: str | None, path: str | os.PathLike[str]) -> str:
    """Return what a scan is recorded under: its study, or the file where it has none. It is hashed later."""
    return study_instance_uid or os.path.abspath(os.fspath(path))


# --- recording --------------------------------------------------------------------------------------------------------


def record(event: Event, settings: Settings | None = None) -> None:
    """Write an event into this user's trail; nothing where there is no section [audit].

    An access or an export without a scan is none. settings: those of `read_audit`, read anew if not given.

    Raises CannotWrite if the trail cannot be written, CannotRead if its key cannot be used, what `read_audit` raises.
    """
    settings = settings or read_audit()
    if settings is None:
        return
    from edgemed.audit.syslog import NOTICE, WARNING, to_syslog

    if event.id in (INSTANCES_ACCESSED, _EXPORT) and not event.studies:
        return
    trail = own_trail(settings)
    origin = _origin(settings)
    severity = WARNING if event.outcome >= SERIOUS else NOTICE
    to_pseudonym = pseudonyms(trail, settings)
    for first in range(0, max(len(event.studies), 1), _STUDIES):
        at = datetime.now(UTC)
        xml = to_xml(replace(event, studies=event.studies[first : first + _STUDIES]), origin, to_pseudonym, at)
        who = (to_time(at), origin.host, origin.process, severity)
        trail.append(partial(to_syslog, xml, *who))


def own_trail(settings: Settings) -> Trail:
    """Return the trail of this user. Raises CannotWrite."""
    from edgemed.audit.trail import open_trail

    return open_trail(settings.folder / _user(), settings.file_bytes)


def trails(settings: Settings) -> list[Trail]:
    """Return the trails that this user may read, sorted: the own one, or for root all there are."""
    from edgemed.audit.trail import Trail

    try:
        folders = sorted(path for path in settings.folder.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []
    return [Trail(folder) for folder in folders if os.access(folder, os.R_OK | os.X_OK)]


def pseudonyms(trail: Trail, settings: Settings) -> Callable[[str], str]:
    """Return what gives a study its name in the trail: a UID made of a keyed hash, always the same for one key.

    Without audit.pseudonym_file the key is the trail's own, so that the same study has another name elsewhere. The hash
    is HMAC-SHA-256, cut to the 122 bits of a UID that is made from a UUID of version 8 (PS3.5 B.2, RFC 9562).

    Raises CannotRead, CannotWrite.
    """
    import hmac  # here, since it loads OpenSSL

    key: list[bytes] = []

    def to_pseudonym(study: str) -> str:
        if not key:
            key.append(_site_key(settings.pseudonym) if settings.pseudonym else trail.key())
        digest = int.from_bytes(hmac.digest(key[0], study.encode("utf-8", "surrogateescape"), "sha256")[:16])
        digest = digest & ~(0xF << 76) & ~(0x3 << 62) | 0x8 << 76 | 0x2 << 62
        return f"2.25.{digest}"

    return to_pseudonym


def _site_key(path: Path) -> bytes:
    key = read_secret(path)
    if len(key) < 32:
        raise CannotRead(f"{path} (audit.pseudonym_file) has {len(key)} bytes; 32 or more of chance were expected")
    return key


def _origin(settings: Settings) -> Origin:
    import socket

    host = socket.gethostname() or "localhost"
    return Origin(host, os.getpid(), _login(), settings.source or host, settings.site)


def _login() -> str:
    """Return the user's login name; not from the environment, which the user may set."""
    with contextlib.suppress(ImportError, KeyError):
        import pwd

        return pwd.getpwuid(os.geteuid()).pw_name
    return _user()


def _user() -> str:
    if os.name == "posix":
        return str(os.geteuid())
    import getpass
    import re

    return re.sub(r"[^A-Za-z0-9_-]", "_", getpass.getuser())


@contextlib.contextmanager
def application(verb: str, aet: str = "") -> Iterator[None]:
    """Record the start and the stop of a command, whose outcome is the block's; send what waits at the end."""
    record(started(verb, aet))
    outcome = SUCCESS
    try:
        yield
    except BatchPartlyFailed:
        outcome = MINOR
        raise
    except Exception:
        outcome = SERIOUS
        raise
    finally:
        with contextlib.suppress(EdgemedError) if outcome else contextlib.nullcontext():
            record(stopped(verb, outcome, aet))
        drain()


def record_refusal(error: BaseException, verb: str = "") -> None:
    """Record an error that means that something was not let in, by its class alone; others are none.

    Never raises: the error itself is what the caller has to tell.
    """
    if not isinstance(error, BundleError | InvalidInput | UnsupportedDicom | ResourceLimit):
        return
    why = next(words for kind, words in _REFUSALS.items() if isinstance(error, kind))
    kind = SOFTWARE_CONFIGURATION if isinstance(error, BundleError) else RESTRICTED_FUNCTION
    subject = "urn:edgemed:bundle" if isinstance(error, BundleError) else "urn:edgemed:input"
    with contextlib.suppress(EdgemedError):
        record(refused(kind, f"{why} (code {error.exit_code})", subject=subject, verb=verb))
        drain()


_REFUSALS: dict[type[EdgemedError], str] = {
    SignatureError: "a bundle without the signatures that are required",
    BundleError: "a bundle that is damaged or does not fit",
    ResourceLimit: "an input beyond the limits",
    UnsupportedDicom: "DICOM of a kind that is not supported",
    InvalidInput: "an input that is not what it must be",
}


# --- sending ----------------------------------------------------------------------------------------------------------


def drain() -> None:
    """Send what waits in this user's trail, unless the server was away a moment ago. Never raises: it is kept."""
    with contextlib.suppress(EdgemedError):
        if (settings := read_audit()) is not None and settings.server is not None:
            trail = own_trail(settings)
            if not 0 <= time.time() - trail.sent().at < RETRY_SECONDS:
                send(trail, settings)


def send(trail: Trail, settings: Settings) -> int:
    """Return how many records were sent, and confirmed; 0 while another process sends.

    Records that do not hold are sent too; an alert that names the first is recorded then.

    Raises EdgemedError if there is no audit.server, CannotRead if a TLS file cannot be used, CannotWrite if the server
    is away or did not confirm.
    """
    from edgemed.audit.syslog import deliver

    if settings.server is None:
        raise EdgemedError("audit.server is not set; there is nowhere to send the records to")
    count = 0
    broken = None
    with trail.sending() as ours:
        while ours and (batch := list(itertools.islice(trail.unsent(), _BATCH))):
            before = trail.sent()
            messages = [r.text for r in batch if r.number > 0]
            try:
                if messages:
                    deliver(settings.server, messages)
            except (CannotRead, CannotWrite):
                trail.note_sent(replace(before, at=time.time()))
                raise
            trail.note_sent(batch[-1].end)
            count += len(messages)
            if broken is None:
                broken = next((i for i, r in enumerate(batch) if not r.holds), None)
                broken = None if broken is None else before.number + broken + 1
    if broken is not None:
        record(damaged(f"record {broken} of the audit trail or one near it was changed"), settings)
    return count
