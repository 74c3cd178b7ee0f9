"""Where a user's own files lie: settings, data, and what can be made again, as each platform wants it.

Sources: XDG Base Directory Specification 0.8; Apple's File System Programming Guide; Windows' known folders.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

Kind = Literal["settings", "data", "cache"]

_UNIX = {
    "settings": ("XDG_CONFIG_HOME", ".config"),
    "data": ("XDG_DATA_HOME", ".local/share"),
    "cache": ("XDG_CACHE_HOME", ".cache"),
}
_LOCAL = ("LOCALAPPDATA", "AppData/Local")
_PLACES = {
    "win32": {"settings": ("APPDATA", "AppData/Roaming"), "data": _LOCAL, "cache": _LOCAL},
    "darwin": {
        "settings": _UNIX["settings"],  # where programs of the command line have them
        "data": ("", "Library/Application Support"),
        "cache": ("", "Library/Caches"),
    },
}
"""Platform -> kind -> (variable that names the folder, or "", and where it is below the home without that)."""


def own_folder(kind: Kind) -> Path:
    """Return edgemed's folder of this user, which need not be there: $EDGEMED_HOME for all kinds, if that is set."""
    if home := os.environ.get("EDGEMED_HOME"):
        return Path(home)
    variable, below = _PLACES.get(sys.platform, _UNIX)[kind]
    return Path(os.environ.get(variable) or Path.home() / below) / "edgemed"
