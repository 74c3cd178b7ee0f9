"""Files that are made as they are written: whole or not at all, and never in memory as a whole.

`write_streamed` is `edgemed.files.write_atomically` for what is too large for that. `Parts` is what pydicom writes as
pixels without holding them.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from edgemed.errors import CannotWrite
from edgemed.files import write_atomically

Write = Callable[[IO[bytes]], object]
"""Writes a file into a stream, which can seek."""


def write_streamed(path: Path, write: Write) -> None:
    """Call `write` with a file that takes the name `path` when it is complete; a reader sees the old one or the new.

    What is not a regular file (a folder, a pipe) is left to `write_atomically`.

    Raises CannotWrite if the system refuses, and what `write` raises; nothing half-written is left.
    """
    target = Path(os.path.realpath(path))
    if (target.exists() and not target.is_file()) or not target.parent.is_dir():
        held = io.BytesIO()
        write(held)
        write_atomically(path, held.getvalue())
        return
    temporary = target.parent / f".{os.urandom(8).hex()}.part"
    try:
        with open(temporary, "xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise CannotWrite(f"cannot write {path}: {error.strerror or 'refused'}") from error
        raise


class Parts(io.BufferedIOBase):
    """A file to read of known length whose bytes are made on the way; at its start it can be read again.

    length: in bytes. parts: gives the bytes in pieces, anew at each call.
    """

    def __init__(self, length: int, parts: Callable[[], Iterator[bytes]]) -> None:
        self._length, self._parts = length, parts
        self._left = parts()
        self._held = b""
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to the start or the end, and return where that is. Raises ValueError for any other place."""
        place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if place not in (0, self._at, self._length):
            raise ValueError(f"byte {place}: only the start and the end can be gone to")
        if place != self._at:
            self._left = self._parts() if place == 0 else iter(())
            self._held, self._at = b"", place
        return place

    def read(self, size: int | None = -1) -> bytes:
        """Return the next `size` bytes, fewer at the end, all for None or a negative size."""
        wanted = self._length if size is None or size < 0 else size
        pieces = [self._held]
        there = len(self._held)
        while there < wanted and (piece := next(self._left, None)) is not None:
            pieces.append(piece)
            there += len(piece)
        whole = b"".join(pieces)
        self._held = whole[wanted:]
        self._at += min(wanted, there)
        return whole[:wanted]
