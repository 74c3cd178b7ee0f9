"""Where bundles lie: those that came with the program, the machine's (bundles.shared), the user's own.

Covers finding the folders and what rights they need. Does not cover what a bundle is, or which of a name counts
(`bundle`).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from edgemed.config import read_settings
from edgemed.errors import CannotRead, CannotWrite, EdgemedError
from edgemed.manifest import MANIFEST
from edgemed.user_folders import own_folder

EMBEDDED = Path(__file__).with_name("bundles")


def user_folder() -> Path:
    """Return the folder of installed bundles: $EDGEMED_HOME/bundles, else the platform's place for user data."""
    return own_folder("data") / "bundles"


def shared_setting() -> Path | None:
    """Return the value of bundles.shared."""
    folder: Path | None = read_settings()["bundles.shared"].value
    return folder


def is_shared(folder: Path) -> bool:
    """Return whether a bundle lies in the folder of the machine's bundles."""
    shared = shared_setting()
    return shared is not None and same_folder(folder.parent, shared)


def shared_folder() -> Path | None:
    """Return the folder of the machine's bundles (bundles.shared), None where it is not set or not there yet.

    Raises CannotRead if it cannot be read, or others than its owner may write to it; what `read_settings` raises.
    """
    folder = shared_setting()
    if folder is None:
        return None
    try:
        info = folder.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CannotRead(f"cannot read {folder} (bundles.shared): {error.strerror or 'refused'}") from error
    if not stat.S_ISDIR(info.st_mode) or not os.access(folder, os.R_OK | os.X_OK):
        raise CannotRead(f"{folder} (bundles.shared) is no folder that this user may read; chmod 755 was expected")
    refuse_writable(folder, info)
    return folder


def refuse_writable(path: Path, info: os.stat_result) -> None:
    """Raise CannotRead where others than the owner may write; Windows has no such rights in the mode of a file."""
    if os.name == "posix" and info.st_mode & 0o022:
        raise CannotRead(f"{path} is of the machine's bundles and others may write to it; take that away (chmod go-w)")


def folder_of(name: str, *places: Path | None) -> Path | None:
    """Return the folder of this name in the first place that has a bundle of it."""
    found = (place / name for place in places if place is not None)
    return next((folder for folder in found if os.path.isfile(folder / MANIFEST)), None)


def shared_target() -> Path:
    """Return where the machine's bundles are to be. Raises EdgemedError (usage) where bundles.shared is not set."""
    folder = shared_setting()
    if folder is None:
        raise EdgemedError("bundles.shared is not set; name the folder of the machine's bundles in the configuration")
    return folder


def made_shared() -> Path:
    """Return the folder of the machine's bundles, made where it is missing: readable whatever the umask is."""
    folder = shared_target()
    try:
        for part in [part for part in (folder, *folder.parents) if not os.path.lexists(part)][::-1]:
            part.mkdir()
            part.chmod(0o755)
    except OSError as error:
        raise CannotWrite(
            f"cannot make {folder} (bundles.shared): {error.strerror or 'refused'}; who looks after the machine may"
        ) from error
    shared_folder()
    return folder


def same_folder(one: Path, other: Path) -> bool:
    """Return whether two paths lead to one folder."""
    return os.path.realpath(one) == os.path.realpath(other)
