"""Progress bars of long commands, on stderr, where that is a terminal."""

from __future__ import annotations

import sys
from typing import Any

import click


class Progress:
    """One bar after another, each from its first call on; nothing where stderr is no terminal or it is not shown."""

    def __init__(self, *, shown: bool) -> None:
        self._bar: Any = None
        self._what = ""
        self._shown = shown and sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def to(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of `what` are done."""
        if not self._shown:
            return
        if self._bar is None or what != self._what:
            self._end()
            self._what = what
            self._bar = click.progressbar(length=total, label=what, file=sys.stderr)
            self._bar.render_progress()
        self._bar.update(done - self._bar.pos)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.render_finish()
        self._bar = None
