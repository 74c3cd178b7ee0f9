"""Whole files or none, and digests."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import IO

import pytest

from edgemed.errors import CannotRead, CannotWrite, InvalidInput
from edgemed.files import sha256_of, write_atomically


def test_content_is_written_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_atomically(target, b"one")
    write_atomically(target, b"two")
    assert target.read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_failed_replacement_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.json"
    target.write_bytes(b"old")

    def refuse(source: object, destination: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CannotWrite, match="No space left on device"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_missing_folder_is_named_as_the_reason(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="folder does not exist") as caught:
        write_atomically(tmp_path / "none" / "a.json", b"")
    assert caught.value.exit_code == 40


def test_folder_is_refused_as_a_target(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite, match="it is a folder"):
        write_atomically(tmp_path, b"")


@pytest.mark.skipif(os.name != "posix", reason="modes and links are those of POSIX")
def test_mode_follows_the_umask_and_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(target)
    before = os.umask(0o027)
    try:
        write_atomically(link, b"data")
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert target.read_bytes() == b"data"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs /dev/null")
def test_device_is_written_to_and_not_replaced() -> None:
    write_atomically("/dev/null", b"data")
    write_atomically("/dev/null", lambda stream: stream.write(b"data"))
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_digest_of_a_missing_file_is_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(CannotRead):
        sha256_of(tmp_path / "none")


def test_what_is_written_in_pieces_takes_the_name_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def write(stream: IO[bytes]) -> None:
        stream.write(b"new")
        assert path.read_bytes() == b"old"
        assert len(list(tmp_path.iterdir())) == 2

    write_atomically(path, write)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("raised", "told"), [(InvalidInput, InvalidInput), (OSError, CannotWrite)])
def test_what_fails_half_way_leaves_nothing(tmp_path: Path, raised: type[Exception], told: type[Exception]) -> None:
    def write(stream: IO[bytes]) -> None:
        stream.write(b"half")
        raise raised

    with pytest.raises(told):
        write_atomically(tmp_path / "a", write)
    assert list(tmp_path.iterdir()) == []
