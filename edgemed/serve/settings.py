"""What the node is told: who may send, what is asked about a study, where results go. One TOML file fills it, or the
section [serve] of the configuration file (`edgemed.config`), with [[serve.sender]] and so on.

    folder = "/var/lib/edgemed"
    [[sender]]
    aet = "CT1"
    addresses = ["10.1.0.0/24"]
    [[target]]
    name = "pacs"
    aet = "ORTHANC"
    host = "10.1.0.2"
    port = 104
    [[rule]]
    name = "liver"
    prompt = "Segment the liver."
    select = {conditions = {Modality = "CT"}}
    kinds = ["seg", "sr"]
    targets = ["pacs"]

Everything is checked when it is made; an unknown key is an error. Standard library only.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from edgemed.config import check_secret
from edgemed.errors import EdgemedError, InvalidInput

MIB = 1 << 20
_AET = re.compile(r"[ -\[\]-~]{1,16}")  # PS3.5, VR AE: no backslash, no control characters
_DEVICE = re.compile(r"auto|cpu|gpu(:\d+)?")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

T = TypeVar("T")


def check_aet(aet: str) -> None:
    """Raise InvalidInput unless `aet` can be an AE title."""
    if not _AET.fullmatch(aet) or not aet.strip() or aet != aet.strip():
        raise InvalidInput(f"AE title {aet!r} is not 1 to 16 printable ASCII characters without a backslash")


@dataclass(frozen=True)
class Sender:
    """An AE that may open associations, and the addresses (or networks) that it may come from."""

    aet: str
    addresses: tuple[str, ...]

    def __post_init__(self) -> None:
        check_aet(self.aet)
        if not self.addresses:
            raise InvalidInput(f"sender {self.aet} has no addresses; an address or network was expected")
        for address in self.addresses:
            try:
                ipaddress.ip_network(address, strict=False)
            except ValueError:
                raise InvalidInput(f"sender {self.aet}: {address!r} is no address and no network") from None

    def may_come_from(self, host: str) -> bool:
        """Return whether `host` (an address) is one of those allowed."""
        try:
            address = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None) or address
        return any(mapped in ipaddress.ip_network(allowed, strict=False) for allowed in self.addresses)


@dataclass(frozen=True)
class Target:
    """Where results go and studies come from: an AE (aet, host, port), or a DICOMweb service (url)."""

    name: str
    aet: str = ""
    host: str = ""
    port: int = 104
    tls: bool = False
    url: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidInput(f"target name {self.name!r} is not letters, digits, '-' and '_'")
        if self.url:
            if self.aet or self.host or not re.match(r"https?://[^\s@]+$", self.url):
                raise InvalidInput(f"target {self.name}: url is http(s)://HOST/PATH, without aet, host and credentials")
            return
        check_aet(self.aet)
        if not self.host or not 1 <= self.port <= 65535:
            raise InvalidInput(f"target {self.name} needs a host and a port from 1 to 65535, or a url")


@dataclass(frozen=True)
class Rule:
    """What is asked about a study: series that `select` fits (rules as of --select) are asked `prompt`.

    senders: whose studies this is for, calling AE titles and names of targets that they are pulled from; all where
    empty. kinds: as of `edgemed.report.results`. targets: names. slices: as of --slices.
    """

    name: str
    prompt: str
    kinds: tuple[str, ...]
    targets: tuple[str, ...] = ()
    senders: tuple[str, ...] = ()
    select: Mapping[str, Any] = field(default_factory=dict)
    language: str = "auto"
    slices: str = "auto"
    window: str | None = None
    bundle: str = "nano"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidInput(f"rule name {self.name!r} is not letters, digits, '-' and '_'")
        if not self.prompt.strip() or not self.kinds:
            raise InvalidInput(f"rule {self.name} needs a prompt and kinds of results")
        if self.language not in ("auto", "en", "zh"):
            raise InvalidInput(f"rule {self.name}: language {self.language!r} is none of auto, en, zh")


@dataclass(frozen=True)
class Tls:
    """Files (PEM) of the node's certificate and key, and of the authorities whose certificates others must show.

    Raises CannotRead if others than its owner have rights to the key.
    """

    certificate: str
    key: str
    authorities: str

    def __post_init__(self) -> None:
        check_secret(self.key)


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """How a node runs.

    folder: the store and its journal. beyond_loopback: must be set for a bind that other machines can reach.
    quiet_seconds: a study without a new instance for so long is complete. max_pdu: bytes. network_seconds: for one PDU,
    a TLS handshake, or between two messages. min_free_mib: of the disk; below, instances are refused (0xA700). queue:
    studies that are not answered yet; a further one is refused likewise. max_attempts: of a job, and of a delivery that
    the target refuses; one that cannot be reached is tried for ever, retry_seconds doubled up to retry_cap_seconds.
    stop_seconds: what is running may take so long after a stop. keep_hours: how long a study stays after all of it is
    done. workers: the device of each inference process (cpu, gpu:0 ...; one that is named twice has two), empty: one
    for each GPU, or one. job_seconds: a worker that takes longer is ended. storage: names as "CTImageStorage"
    (pydicom's) that are accepted; every storage class of DICOM where empty.
    """

    folder: Path
    aet: str = "EDGEMED"
    bind: str = "127.0.0.1"
    port: int = 11112
    beyond_loopback: bool = False
    tls: Tls | None = None
    senders: tuple[Sender, ...] = ()
    targets: tuple[Target, ...] = ()
    rules: tuple[Rule, ...] = ()
    storage: tuple[str, ...] = ()
    quiet_seconds: float = 30.0
    max_associations: int = 10
    max_pdu: int = 131_072
    max_instance_mib: float = 2048.0
    min_free_mib: float = 2048.0
    queue: int = 200
    network_seconds: float = 30.0
    retry_seconds: float = 10.0
    retry_cap_seconds: float = 3600.0
    max_attempts: int = 5
    stop_seconds: float = 30.0
    keep_hours: float = 24.0
    workers: tuple[str, ...] = ()
    job_seconds: float = 7200.0

    def __post_init__(self) -> None:
        check_aet(self.aet)
        if not 0 <= self.port <= 65535:
            raise InvalidInput(f"port {self.port} is not 0 to 65535")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise InvalidInput(f"{name} is {getattr(self, name)}; {least} or more was expected")
        if wrong := [d for d in self.workers if not _DEVICE.fullmatch(d)]:
            raise InvalidInput(f"workers has {wrong[0]!r}; cpu, gpu, gpu:N or auto was expected")
        if not is_loopback(self.bind) and not self.beyond_loopback:
            raise InvalidInput(
                f"bind is {self.bind}, which other machines can reach; set beyond_loopback = true to allow that"
            )
        _unique("sender", [s.aet for s in self.senders])
        _unique("target", [t.name for t in self.targets])
        _unique("rule", [r.name for r in self.rules])
        known = {t.name for t in self.targets}
        for rule in self.rules:
            if missing := sorted(set(rule.targets) - known):
                raise InvalidInput(f"rule {rule.name} names target {missing[0]!r}, which is not there")
        if self.tls is None and any(t.tls for t in self.targets):
            raise InvalidInput("a target has tls = true; [tls] with certificate, key and authorities was expected")

    def rule(self, name: str) -> Rule | None:
        """Return the rule of this name, None if the configuration has it no more."""
        return next((r for r in self.rules if r.name == name), None)

    def target(self, name: str) -> Target | None:
        """Return the target of this name, None if the configuration has it no more."""
        return next((t for t in self.targets if t.name == name), None)

    def sender(self, aet: str) -> Sender | None:
        """Return the sender with this AE title."""
        return next((s for s in self.senders if s.aet == aet), None)


_LEAST = {
    "quiet_seconds": 0, "max_associations": 1, "max_pdu": 4096, "max_instance_mib": 0.001, "min_free_mib": 0,
    "queue": 1, "network_seconds": 0.01, "retry_seconds": 0, "retry_cap_seconds": 0, "max_attempts": 1,
    "stop_seconds": 0, "keep_hours": 0, "job_seconds": 1,
}  # fmt: skip


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_settings(path: str | os.PathLike[str] | None = None, **more: Any) -> NodeSettings:
    """Return the settings of a TOML file; without one, those of the section [serve] of the configuration file.

    Variables EDGEMED_SERVE_KEY go before the file, and `more` (None is none) before those. Raises CannotRead;
    InvalidInput if the file is no TOML, has an unknown key, or a value does not fit; EdgemedError (usage) if nothing is
    set anywhere.
    """
    from edgemed.config import kinds_of, read_section

    where = "[serve] of the configuration" if path is None else os.fspath(path)
    try:
        found = read_section("serve", kinds_of(NodeSettings), more, None if path is None else Path(path))
    except EdgemedError as error:
        raise (InvalidInput(str(error)) if type(error) is EdgemedError else error) from None
    if path is None and not found:
        raise EdgemedError("--config is missing; the node's TOML file was expected, or [serve] in the configuration")
    try:
        return to_settings({key: value.value for key, value in found.items()})
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None


def to_settings(table: Mapping[str, Any]) -> NodeSettings:
    """Return the settings of a TOML table, with tables [[sender]], [[target]], [[rule]] and [tls].

    Raises InvalidInput as `read_settings`.
    """
    values = dict(table)
    if "folder" not in values:
        raise InvalidInput("the key folder is missing; where instances and the journal are kept was expected")
    for key, kind in (("sender", Sender), ("target", Target), ("rule", Rule)):
        rows = values.pop(key, [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InvalidInput(f"{key} is no list of tables; [[{key}]] was expected")
        values[f"{key}s"] = tuple(_made(kind, row, f"[[{key}]]") for row in rows)
    if (tls := values.pop("tls", None)) is not None:
        values["tls"] = to_tls(tls)
    return _made(NodeSettings, values, "the node")


def to_tls(table: Any) -> Tls:
    """Return the files of a table [tls]. Raises InvalidInput if it is none, CannotRead if others may read the key."""
    return _made(Tls, table, "[tls]")


def _made(kind: type[T], row: Any, where: str) -> T:
    """Return `kind` of the values in `row`, each of the type that its field has."""
    if not isinstance(row, dict):
        raise InvalidInput(f"{where} is no table")
    known = {f.name: str(f.type) for f in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in row.items():
        if key not in known:
            raise InvalidInput(f"{where} has the unknown key {key!r}; known are {', '.join(known)}")
        values[key] = _checked(value, known[key], f"{key} of {where}")
    try:
        return kind(**values)
    except TypeError:
        missing = [f.name for f in fields(kind) if f.name not in values]  # type: ignore[arg-type]
        raise InvalidInput(f"{where} lacks a key; it has room for {', '.join(missing)}") from None


def _checked(value: Any, kind: str, what: str) -> Any:
    if kind == "tuple[str, ...]":
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise InvalidInput(f"{what} is no list of texts")
        return tuple(value)
    if kind == "Path":
        return Path(_checked(value, "str", what))
    kinds: dict[str, type] = {"str": str, "str | None": str, "bool": bool, "int": int, "float": float}
    wanted = kinds.get(kind, object)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise InvalidInput(f"{what} has the wrong type; {kind} was expected")
    return value


def _unique(what: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InvalidInput(f"there are two of {what} {name!r}")
