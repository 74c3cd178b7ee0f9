"""Pixels that pydicom reads without holding them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from edgemed.report.streamed import Parts


def made() -> Iterator[bytes]:
    yield from (b"ab", b"", b"cdefg", b"h")


def test_parts_are_read_in_any_size_and_from_the_start_again() -> None:
    parts = Parts(8, made)
    assert parts.seek(0, os.SEEK_END) == parts.tell() == 8
    assert parts.read(3) == b""
    parts.seek(0)
    assert [parts.read(3), parts.read(3), parts.read(3), parts.read(3)] == [b"abc", b"def", b"gh", b""]
    parts.seek(0)
    assert parts.read() == b"abcdefgh"


def test_parts_cannot_be_read_from_the_middle() -> None:
    with pytest.raises(ValueError, match="byte 4"):
        Parts(8, made).seek(4)
