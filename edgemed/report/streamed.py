"""`Parts`: what pydicom writes as pixels without holding them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator


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
