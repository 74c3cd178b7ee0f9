"""Files written as they are made: whole or not at all; and pixels that pydicom reads without holding them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from edgemed.errors import CannotWrite, InvalidInput
from edgemed.report.streamed import Parts, write_streamed


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def write(stream: IO[bytes]) -> None:
        stream.write(b"new")
        assert path.read_bytes() == b"old"
        assert len(list(tmp_path.iterdir())) == 2

    write_streamed(path, write)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("raised", "told"), [(InvalidInput, InvalidInput), (OSError, CannotWrite)])
def test_what_fails_half_way_leaves_nothing(tmp_path: Path, raised: type[Exception], told: type[Exception]) -> None:
    def write(stream: IO[bytes]) -> None:
        stream.write(b"half")
        raise raised

    with pytest.raises(told):
        write_streamed(tmp_path / "a", write)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="it is a folder"):
        write_streamed(tmp_path, lambda stream: stream.write(b"x"))
    with pytest.raises(CannotWrite, match="does not exist"):
        write_streamed(tmp_path / "b" / "a", lambda stream: stream.write(b"x"))


def test_a_link_keeps_pointing_at_its_target(tmp_path: Path) -> None:
    target, link = tmp_path / "a", tmp_path / "b"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_streamed(link, lambda stream: stream.write(b"new"))
    assert (target.read_bytes(), link.is_symlink()) == (b"new", True)


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
