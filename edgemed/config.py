"""Settings of an installation: one TOML file, below the environment (EDGEMED_*), below options.

The file is $EDGEMED_CONFIG, else the system's (/etc/edgemed/config.toml), else the user's; only the first of them
counts. Covers the table of settings, where each value came from, and files that hold secrets. A new section is rows of
`SETTINGS`; a section that holds tables of its own is a row of `SECTIONS`, and the part that it is for checks it. Does
not cover what a bundle or a question needs: manifests and options do.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from edgemed.errors import CannotRead, EdgemedError
from edgemed.user_folders import own_folder

_MAX_BYTES = 1 << 20
Kind = Literal["flag", "number", "decimal", "text", "texts", "path", "secret"]
_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Setting:
    """A row of the table: `section.key`, what kind of value it has, its default, its meaning in one line.

    number: a whole one, decimal: any one, neither negative. texts: a TOML array, or text with commas in the
    environment. path: relative to the folder of the file that holds it, or to the current one. secret: the path of a
    file that only its owner may read (`read_secret`); its name ends in _file, and no other way of giving it exists.
    allowed: the values of text and texts, if not empty.
    """

    name: str
    kind: Kind
    default: Any
    meaning: str
    allowed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert (self.kind == "secret") == self.name.endswith("_file"), self.name

    @property
    def variable(self) -> str:
        """The name of its environment variable."""
        return "EDGEMED_" + self.name.upper().replace(".", "_")


SETTINGS = (
    Setting("bundles.require_signature", "flag", False, "Refuse bundles without the signatures of required_roles."),
    Setting("bundles.trusted_keys", "path", None, "The signed list of keys whose signatures count."),
    Setting("bundles.root_keys", "texts", (), "Ids of the keys that may sign that list."),
    Setting(
        "bundles.required_roles",
        "texts",
        (),
        "One signature by a key of each role is needed, of two keys where a role is named twice; empty: any one.",
        ("vendor", "site"),
    ),
    Setting("bundles.shared", "path", None, "Folder of the bundles of the whole machine; they go before a user's own."),
    Setting(
        "results.to",
        "texts",
        (),
        "What infer -o and batch write where --to is not given; empty: json, or seg and sr.",
        ("json", "seg", "sr", "gsps", "sc", "pdf", "nifti", "fhir", "png"),
    ),
    Setting("audit.folder", "path", None, "Where the audit trail is kept; where it is not set, nothing is recorded."),
    Setting(
        "audit.server", "text", "", "HOST:PORT of the syslog server (TLS); empty: the trail stays on this machine."
    ),
    Setting(
        "audit.authorities", "path", None, "Certificates (PEM) of the authorities that the server's is checked by."
    ),
    Setting("audit.certificate", "path", None, "Certificate (PEM) that this machine shows to the server."),
    Setting("audit.key_file", "secret", None, "The private key (PEM, no pass phrase) of that certificate."),
    Setting("audit.pseudonym_file", "secret", None, "Key of the hashed UIDs (32 bytes or more), else one made here."),
    Setting("audit.source", "text", "", "What the messages call this machine; empty: its host name."),
    Setting("audit.site", "text", "", "What the messages call the site; empty: nothing."),
    Setting("audit.file_mib", "decimal", 64.0, "A file of the trail that would be larger goes on in a new one."),
    Setting("audit.seconds", "decimal", 5.0, "How long the server may take over each step of a delivery."),
)
"""Every setting there is, but those of `SECTIONS`."""

SECTIONS = {
    "serve": (
        "edgemed.serve.settings:NodeSettings",
        "The node of 'edgemed serve', with tables [[serve.sender]], [[serve.target]], [[serve.rule]] and [serve.tls].",
    )
}
"""Sections that `read_settings` leaves alone -> the dataclass of their keys, their meaning. The part that one is for
reads it with `read_section` and refuses what it does not know."""


@dataclass(frozen=True)
class Value:
    """What a setting is set to, and where: "default", "option", "environment NAME" or "file PATH"."""

    value: Any
    origin: str


def config_file() -> Path | None:
    """Return the configuration file that counts, or None if there is none.

    Raises CannotRead if EDGEMED_CONFIG names a file that is not there, or this user may not look for one: what the
    machine is told must not be passed over.
    """
    if named := os.environ.get("EDGEMED_CONFIG"):
        if not os.path.isfile(named):
            raise CannotRead(f"EDGEMED_CONFIG names {named}, which is no file; correct or unset it")
        return Path(named)
    try:
        return next((place for place in _places() if place.is_file()), None)
    except OSError as error:  # of rights alone: `is_file` tells of a file that is not there by False
        raise CannotRead(
            f"cannot look for the configuration {error.filename}: {error.strerror or 'refused'}; its folder is for all "
            "to read (chmod 755)"
        ) from error


def system_file() -> Path:
    """Return where the configuration of the whole machine lies; it goes before a user's own."""
    if sys.platform == "win32":
        return Path(os.environ.get("PROGRAMDATA") or r"C:\ProgramData") / "edgemed" / "config.toml"
    return Path("/etc/edgemed/config.toml")


def _places() -> tuple[Path, Path]:
    return system_file(), own_folder("settings") / "config.toml"


def read_settings(options: Mapping[str, Any] | None = None) -> dict[str, Value]:
    """Return every setting's value and origin, by name; those of `SECTIONS` are not among them.

    options: name -> value given on the command line; one that is None was not given.

    Raises EdgemedError (usage) naming an unknown key or a value of the wrong kind, CannotRead if the file cannot be
    read or other users may write to it.
    """
    found = {setting.name: Value(setting.default, "default") for setting in SETTINGS}
    by_name = {setting.name: setting for setting in SETTINGS}
    if (file := config_file()) is not None:
        for name, given in _entries(file):
            if name.partition(".")[0] not in SECTIONS:
                found[name] = _from_file(by_name, name, given, file)
    for section in {name.partition(".")[0] for name in by_name}:
        found |= _from_environment(by_name, section)
    for name, given in (options or {}).items():
        if given is not None:
            found[name] = Value(_checked(by_name[name], given, Path.cwd(), "an option"), "option")
    return found


def read_section(
    section: str, kinds: Mapping[str, Kind], options: Mapping[str, Any] | None = None, file: Path | None = None
) -> dict[str, Value]:
    """Return what is set in a section of `SECTIONS`, by key without the section, in the types of TOML.

    kinds: its plain keys (`kinds_of`); these may be in the environment (EDGEMED_SECTION_KEY) and among the options too.
    Any other key comes as it is, from the file alone: the part that the section is for refuses what it does not know.
    file: read instead of the configuration file; then the whole of it is the section.

    Raises what `read_settings` raises, but not for an unknown key in the file.
    """
    rows = {f"{section}.{key}": Setting(f"{section}.{key}", kind, None, "") for key, kind in kinds.items()}
    found: dict[str, Value] = {}
    if (place := file or config_file()) is not None:
        for name, given in _entries(place, section if file else ""):
            if name in rows:
                found[name] = _from_file(rows, name, given, place)
            elif name.startswith(f"{section}."):
                found[name] = Value(given, f"file {place}")
    found |= _from_environment(rows, section)
    for key, given in (options or {}).items():
        if given is not None:
            name = f"{section}.{key}"
            found[name] = Value(_checked(rows[name], given, Path.cwd(), "an option"), "option")
    return {name.removeprefix(f"{section}."): Value(_as_toml(v.value), v.origin) for name, v in found.items()}


def kinds_of(dataclass: type) -> dict[str, Kind]:
    """Return the kinds of a dataclass's plain fields, for `read_section`; others are tables.

    Its annotations must be texts (from __future__ import annotations).
    """
    kinds: dict[str, Kind] = {
        "bool": "flag", "int": "number", "float": "decimal", "str": "text", "tuple[str, ...]": "texts", "Path": "path",
    }  # fmt: skip
    return {f.name: kinds[str(f.type)] for f in fields(dataclass) if str(f.type) in kinds}


def _as_toml(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _from_file(rows: Mapping[str, Setting], name: str, given: Any, file: Path) -> Value:
    if name not in rows:
        raise EdgemedError(f"{file} sets {name!r}, which is no setting; known: {', '.join(rows)}")
    return Value(_checked(rows[name], given, file.parent, str(file)), f"file {file}")


def _from_environment(rows: Mapping[str, Setting], section: str) -> dict[str, Value]:
    """Return what the variables of a section set. Raises EdgemedError for one that is none."""
    known = {setting.variable: setting for setting in rows.values()}
    found = {}
    for variable in sorted(name for name in os.environ if name.startswith(f"EDGEMED_{section.upper()}_")):
        if variable not in known:
            raise EdgemedError(f"the environment sets {variable}, which is no setting; known: {', '.join(known)}")
        setting = known[variable]
        parsed = _from_text(setting, os.environ[variable])
        found[setting.name] = Value(_checked(setting, parsed, Path.cwd(), variable), f"environment {variable}")
    return found


def _entries(file: Path, section: str = "") -> list[tuple[str, Any]]:
    """Return (section.key, value) of the file's lines; those of a file that is one section, if it is named."""
    import tomllib

    try:
        with open(file, "rb") as stream:
            if os.name == "posix" and os.fstat(stream.fileno()).st_mode & stat.S_IWOTH:
                raise CannotRead(f"{file} may be written by every user; take that right away (chmod o-w)")
            data = stream.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise CannotRead(f"{file} has more than {_MAX_BYTES >> 20} MiB; a configuration was expected")
        table = tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise CannotRead(f"cannot read {file}: {error.strerror or 'refused'}") from error
    except (ValueError, RecursionError) as error:  # of TOML and of UTF-8; the line may hold anything, so it is not told
        raise EdgemedError(f"{file} is no TOML file in UTF-8 ({type(error).__name__})") from error
    entries: list[tuple[str, Any]] = []
    sections: dict[str, Any] = {section: table} if section else table
    for name, values in sections.items():
        if not isinstance(values, dict):
            raise EdgemedError(f"{file} sets {name!r} outside of a section; [section] was expected before it")
        entries += [(f"{name}.{key}", value) for key, value in values.items()]
    return entries


def _from_text(setting: Setting, text: str) -> Any:
    """Return the value that an environment variable's text stands for; what is none is told by `_checked`."""
    if setting.kind == "flag":
        return _FLAGS.get(text.strip().lower(), text)
    if setting.kind == "number" and text.isascii() and text.isdecimal() and len(text) < 19:
        return int(text)
    if setting.kind == "decimal" and re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,9})?", text):
        return float(text)
    if setting.kind == "texts":
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _checked(setting: Setting, value: Any, folder: Path, where: str) -> Any:
    """Return the value as its kind: bool, int, float, text, tuple of texts, or absolute Path."""
    if setting.kind == "flag" and isinstance(value, bool):
        return value
    if setting.kind == "number" and type(value) is int and value >= 0:
        return value
    if setting.kind == "decimal" and type(value) in (int, float) and 0 <= value < float("inf"):
        return float(value)
    if setting.kind == "text" and isinstance(value, str):
        return _allowed(setting, (value,), where)[0]
    if setting.kind in ("path", "secret") and isinstance(value, str | Path) and str(value) and "\0" not in str(value):
        return folder / value
    if setting.kind == "texts" and isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
        return _allowed(setting, tuple(value), where)
    raise EdgemedError(f"{where}: {setting.name} is not {_EXPECTED[setting.kind]}")


_EXPECTED = {
    "flag": "true or false",
    "number": "a whole number",
    "decimal": "a number from 0",
    "text": "a text",
    "texts": "a list of texts",
    "path": "the path of a file",
    "secret": "the path of a file",
}


def _allowed(setting: Setting, texts: tuple[str, ...], where: str) -> tuple[str, ...]:
    for text in texts:
        if setting.allowed and text not in setting.allowed:
            raise EdgemedError(
                f"{where}: {setting.name} has {text[:60]!r}, one of {', '.join(setting.allowed)} expected"
            )
    return texts


def read_secret(path: str | Path, limit: int = 64 << 10) -> bytes:
    """Return the bytes of a file that only its owner may read: a key or a pass phrase. Nothing of it is ever printed.

    Raises CannotRead if it is a link, larger than `limit`, belongs to another user, or others have any right to it.
    Windows has no such rights in the mode of a file; there they are not checked.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as stream:
            info = os.fstat(stream.fileno())
            if not stat.S_ISREG(info.st_mode) or info.st_size > limit:
                raise CannotRead(f"{path} is no plain file of at most {limit} bytes; a secret was expected")
            _refuse_open_secret(path, info)
            if os.name == "posix" and info.st_uid not in (0, os.geteuid()):
                raise CannotRead(f"{path} holds a secret and belongs to another user; chown it")
            return stream.read(limit + 1)
    except OSError as error:
        raise CannotRead(f"cannot read {path}: {error.strerror or 'refused'}") from error


def check_secret(path: str | Path) -> None:
    """Raise CannotRead where others than its owner have any right to the file of a secret, without opening it.

    For settings that name one and are also read by who does not use it: a file that is missing, or out of reach of this
    user, is told by what opens it.
    """
    with contextlib.suppress(OSError, ValueError):
        _refuse_open_secret(path, os.stat(path))


def _refuse_open_secret(path: str | Path, info: os.stat_result) -> None:
    if os.name == "posix" and info.st_mode & 0o077:
        raise CannotRead(f"{path} holds a secret and others have rights to it; chmod 600 it")
