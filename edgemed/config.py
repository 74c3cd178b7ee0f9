"""Settings of an installation: one TOML file, below the environment (EDGEMED_*), below options.

The file is $EDGEMED_CONFIG, else the system's (/etc/edgemed/config.toml), else the user's; only the first of them
counts. Covers the table of settings, where each value came from, and files that hold secrets. A new section is rows of
`SETTINGS`. Does not cover what a bundle or a question needs: manifests and options do.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgemed.errors import CannotRead, EdgemedError

_MAX_BYTES = 1 << 20
_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Setting:
    """A row of the table: `section.key`, what kind of value it has, its default, its meaning in one line.

    number: a whole one, not negative. texts: a TOML array, or text with commas in the environment. path: relative to
    the folder of the file that holds it, or to the current one. allowed: the values of text and texts, if not empty.
    """

    name: str
    kind: Literal["flag", "number", "text", "texts", "path"]
    default: Any
    meaning: str
    allowed: tuple[str, ...] = ()

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
)
"""Every setting there is."""


@dataclass(frozen=True)
class Value:
    """What a setting is set to, and where: "default", "option", "environment NAME" or "file PATH"."""

    value: Any
    origin: str


def config_file() -> Path | None:
    """Return the configuration file that counts, or None if there is none.

    Raises CannotRead if EDGEMED_CONFIG names a file that is not there.
    """
    if named := os.environ.get("EDGEMED_CONFIG"):
        if not os.path.isfile(named):
            raise CannotRead(f"EDGEMED_CONFIG names {named}, which is no file; correct or unset it")
        return Path(named)
    return next((place for place in _places() if place.is_file()), None)


def system_file() -> Path:
    """Return where the configuration of the whole machine lies; it goes before a user's own."""
    if sys.platform == "win32":
        return Path(os.environ.get("PROGRAMDATA") or r"C:\ProgramData") / "edgemed" / "config.toml"
    return Path("/etc/edgemed/config.toml")


def _places() -> tuple[Path, Path]:
    if home := os.environ.get("EDGEMED_HOME"):
        own = Path(home)
    elif sys.platform == "win32":
        own = Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming") / "edgemed"
    else:
        own = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "edgemed"
    return system_file(), own / "config.toml"


def read_settings(options: Mapping[str, Any] | None = None) -> dict[str, Value]:
    """Return every setting's value and origin, by name.

    options: name -> value given on the command line; one that is None was not given.

    Raises EdgemedError (usage) naming an unknown key or a value of the wrong kind, CannotRead if the file cannot be
    read or other users may write to it.
    """
    found = {setting.name: Value(setting.default, "default") for setting in SETTINGS}
    by_name = {setting.name: setting for setting in SETTINGS}
    if (file := config_file()) is not None:
        for name, given in _entries(file):
            if name not in by_name:
                raise EdgemedError(f"{file} sets {name!r}, which is no setting; known: {', '.join(by_name)}")
            found[name] = Value(_checked(by_name[name], given, file.parent, str(file)), f"file {file}")
    by_variable = {setting.variable: setting for setting in SETTINGS}
    sections = tuple({"EDGEMED_" + name.split(".")[0].upper() + "_" for name in by_name})
    for variable in sorted(name for name in os.environ if name.startswith(sections)):
        if variable not in by_variable:
            raise EdgemedError(f"the environment sets {variable}, which is no setting; known: {', '.join(by_variable)}")
        setting = by_variable[variable]
        parsed = _from_text(setting, os.environ[variable])
        found[setting.name] = Value(_checked(setting, parsed, Path.cwd(), variable), f"environment {variable}")
    for name, given in (options or {}).items():
        if given is not None:
            found[name] = Value(_checked(by_name[name], given, Path.cwd(), "an option"), "option")
    return found


def _entries(file: Path) -> list[tuple[str, Any]]:
    """Return (section.key, value) of the file's lines."""
    import tomllib

    try:
        with open(file, "rb") as stream:
            if os.name == "posix" and os.fstat(stream.fileno()).st_mode & stat.S_IWOTH:
                raise CannotRead(f"{file} may be written by every user; take that right away (chmod o-w)")
            data = stream.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise CannotRead(f"{file} has more than {_MAX_BYTES >> 20} MiB; a configuration was expected")
        sections = tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise CannotRead(f"cannot read {file}: {error.strerror or 'refused'}") from error
    except (ValueError, RecursionError) as error:  # of TOML and of UTF-8; the line may hold anything, so it is not told
        raise EdgemedError(f"{file} is no TOML file in UTF-8 ({type(error).__name__})") from error
    entries = []
    for section, values in sections.items():
        if not isinstance(values, dict):
            raise EdgemedError(f"{file} sets {section!r} outside of a section; [section] was expected before it")
        entries += [(f"{section}.{key}", value) for key, value in values.items()]
    return entries


def _from_text(setting: Setting, text: str) -> Any:
    """Return the value that an environment variable's text stands for; what is none is told by `_checked`."""
    if setting.kind == "flag":
        return _FLAGS.get(text.strip().lower(), text)
    if setting.kind == "number" and text.isascii() and text.isdecimal() and len(text) < 19:
        return int(text)
    if setting.kind == "texts":
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _checked(setting: Setting, value: Any, folder: Path, where: str) -> Any:
    """Return the value as its kind: bool, int, text, tuple of texts, or absolute Path."""
    if setting.kind == "flag" and isinstance(value, bool):
        return value
    if setting.kind == "number" and type(value) is int and value >= 0:
        return value
    if setting.kind == "text" and isinstance(value, str):
        return _allowed(setting, (value,), where)[0]
    if setting.kind == "path" and isinstance(value, str | Path) and str(value) and "\0" not in str(value):
        return folder / value
    if setting.kind == "texts" and isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
        return _allowed(setting, tuple(value), where)
    raise EdgemedError(f"{where}: {setting.name} is not {_EXPECTED[setting.kind]}")


_EXPECTED = {
    "flag": "true or false",
    "number": "a whole number",
    "text": "a text",
    "texts": "a list of texts",
    "path": "the path of a file",
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
            if os.name == "posix":
                if info.st_mode & 0o077:
                    raise CannotRead(f"{path} holds a secret and others have rights to it; chmod 600 it")
                if info.st_uid not in (0, os.geteuid()):
                    raise CannotRead(f"{path} holds a secret and belongs to another user; chown it")
            return stream.read(limit + 1)
    except OSError as error:
        raise CannotRead(f"cannot read {path}: {error.strerror or 'refused'}") from error
