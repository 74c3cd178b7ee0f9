"""Verbs of the build half: their libraries are in extras, and one that is missing is told by the extra's name."""

from __future__ import annotations

import importlib.util

from edgemed.errors import BackendUnavailable


def need(libraries: tuple[str, ...], extra: str, verb: str) -> None:
    """Raise BackendUnavailable naming the extra if one of `libraries` is not installed; imports none of them."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailable(f"edgemed {verb} needs {', '.join(missing)}; pip install 'edgemed[{extra}]'")
