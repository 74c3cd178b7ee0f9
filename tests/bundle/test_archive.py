"""An archive survives broken copies and lets nothing else in."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgemed import archive
from edgemed.archive import pack, read_index, unpack
from edgemed.bundle import install_bundle, open_bundle
from edgemed.errors import BundleError, CannotWrite, EdgemedError, SignatureError


def parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar.*"))


def packed(hospital: Any, folder: Path, part_bytes: int = 1024) -> Path:
    return pack(hospital.template, folder, part_bytes)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("part_bytes", [512, 1024, 2560, archive.DEFAULT_PART_BYTES])
def test_unpacked_is_what_was_packed_whatever_the_parts(hospital: Any, tmp_path: Path, part_bytes: int) -> None:
    index = packed(hospital, tmp_path / "a", part_bytes)
    assert all(p.stat().st_size <= part_bytes for p in parts_of(tmp_path / "a"))
    bundle = unpack(index, tmp_path / "b", hospital.policy)
    assert bundle == dataclasses.replace(open_bundle(hospital.template), path=tmp_path / "b")
    assert content(tmp_path / "b") == content(hospital.template)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "home"] or sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_same_bundle_gives_the_same_archive_and_tar_can_list_it(hospital: Any, tmp_path: Path) -> None:
    packed(hospital, tmp_path / "a")
    packed(hospital, tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    whole = b"".join(p.read_bytes() for p in parts_of(tmp_path / "a"))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        assert tar.getnames()[:2] == ["bundle.json", "bundle.sig"]
        assert set(tar.getnames()) == set(content(hospital.template))


def test_sizes_over_8_gb_have_a_header_of_their_own(tmp_path: Path) -> None:
    header = archive._header("graphs/decoder.onnx.data", 12_000_000_000)
    assert len(header) == 512
    assert tarfile.TarInfo.frombuf(header, "utf-8", "strict").size == 12_000_000_000
    with pytest.raises(BundleError, match="100 bytes"):
        archive._header("肝" * 40, 1)


def test_archive_is_not_overwritten_and_a_target_neither(hospital: Any, tmp_path: Path) -> None:
    index = packed(hospital, tmp_path / "a")
    with pytest.raises(CannotWrite, match="is there already"):
        packed(hospital, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis").write_text("precious")
    with pytest.raises(CannotWrite, match="is there already"):
        unpack(index, tmp_path / "b", hospital.policy)
    with pytest.raises(CannotWrite, match="multiple of 512"):
        pack(hospital.template, tmp_path / "c", 1000)


@pytest.mark.parametrize("broken", range(0, 10, 3))
@pytest.mark.parametrize("how", ["cut", "changed", "missing", "link"])
def test_a_broken_part_is_named_and_unpacking_goes_on_from_there(
    hospital: Any, tmp_path: Path, broken: int, how: str
) -> None:
    index = packed(hospital, tmp_path / "a")
    part = parts_of(tmp_path / "a")[broken]
    data = part.read_bytes()
    part.unlink()
    if how == "cut":
        part.write_bytes(data[:-1])
    elif how == "changed":
        part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        part.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match=f"part {part.name} .*{broken} of {len(parts_of(tmp_path / 'a'))}|is missing"):
        unpack(index, tmp_path / "b", hospital.policy)
    assert not (tmp_path / "b").exists()
    part.unlink(missing_ok=True)
    part.write_bytes(data)
    for done in parts_of(tmp_path / "a")[:broken]:
        done.unlink()  # what was taken is not needed again
    unpack(index, tmp_path / "b", hospital.policy)
    assert content(tmp_path / "b") == content(hospital.template)


def test_parts_may_come_one_by_one(hospital: Any, tmp_path: Path) -> None:
    index = packed(hospital, tmp_path / "a", 2048)
    parts = {p: p.read_bytes() for p in parts_of(tmp_path / "a")}
    for part in parts:
        part.unlink()
    for part, data in list(parts.items())[:-1]:
        part.write_bytes(data)
        with pytest.raises(BundleError, match="is missing"):
            unpack(index, tmp_path / "b", hospital.policy)
        part.unlink()
    part, data = list(parts.items())[-1]
    part.write_bytes(data)
    unpack(index, tmp_path / "b", hospital.policy)
    assert content(tmp_path / "b") == content(hospital.template)


@pytest.mark.parametrize("stop", range(1, 40, 4))
def test_stopped_at_any_write_it_goes_on(
    hospital: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    index = packed(hospital, tmp_path / "a")
    real, calls = os.fsync, 0

    def fails(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    for _ in range(2):
        try:
            unpack(index, tmp_path / "b", hospital.policy)
        except CannotWrite:
            assert not (tmp_path / "b").exists()
        else:
            break
    assert content(tmp_path / "b") == content(hospital.template)


@pytest.mark.skipif(os.name == "nt", reason="signals are those of POSIX")
def test_killed_at_any_write_it_goes_on(hospital: Any, tmp_path: Path) -> None:
    index = packed(hospital, tmp_path / "a", 2048)
    code = """
import os, signal, sys
from edgemed import archive
from edgemed.signing import NO_POLICY
real, left = os.fsync, [int(sys.argv[3])]
def fsync(descriptor):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
os.fsync = fsync
archive.unpack(sys.argv[1], sys.argv[2], NO_POLICY)
"""
    for stop in (1, 3, 4, 6, 9):
        done = subprocess.run([sys.executable, "-c", code, str(index), str(tmp_path / "b"), str(stop)], check=False)
        assert done.returncode in (0, -9)
        if done.returncode:
            assert not (tmp_path / "b").exists()
    unpack(index, tmp_path / "b", hospital.policy) if not (tmp_path / "b").exists() else None
    assert content(tmp_path / "b") == content(hospital.template)


def test_progress_that_was_tampered_with_does_not_come_through(hospital: Any, tmp_path: Path) -> None:
    index = packed(hospital, tmp_path / "a")
    last = parts_of(tmp_path / "a")[-1]
    data = last.read_bytes()
    last.unlink()
    for number in range(4):
        with pytest.raises(BundleError, match="is missing"):
            unpack(index, tmp_path / "b", hospital.policy)
        working = tmp_path / ".b.unpack"
        if number == 0:
            (working / "content" / "NOTICE").write_bytes(b"other")
        elif number == 1:
            (working / "content" / "NOTICE").unlink()
            (working / "content" / "NOTICE").symlink_to("/etc/hostname")
        elif number == 2:
            (working / "content" / "more").write_bytes(b"x")
        else:
            (working / "progress.json").write_text('{"index": 1')
        last.write_bytes(data)
        if number == 0:
            with pytest.raises(BundleError, match="NOTICE has sha256"):
                unpack(index, tmp_path / "b", hospital.policy)
            assert not working.exists()
        else:
            unpack(index, tmp_path / "b", hospital.policy)
            assert content(tmp_path / "b") == content(hospital.template)
            (tmp_path / "b").rename(tmp_path / f"done{number}")
        last.unlink()


def test_signatures_are_checked_before_the_first_file_is_written(
    hospital: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = hospital.make(tmp_path / "unsigned")
    index = pack(made.path, tmp_path / "a")
    written: list[str] = []
    real = archive._State._path
    monkeypatch.setattr(archive._State, "_path", lambda self, name: (written.append(name), real(self, name))[1])
    with pytest.raises(SignatureError):
        unpack(index, tmp_path / "b", hospital.policy)
    assert set(written) <= {"bundle.json", "bundle.sig"}
    assert sorted(os.listdir(tmp_path)) == ["a", "unsigned"]


def test_older_version_than_the_installed_is_unpacked_only_when_forced(hospital: Any, tmp_path: Path) -> None:
    index = packed(hospital, tmp_path / "a")
    install_bundle(hospital.make(tmp_path / "new", versions={"bundle": "2"}).path)
    with pytest.raises(BundleError, match="pass --force"):
        unpack(index, tmp_path / "b", hospital.policy)
    unpack(index, tmp_path / "b", hospital.policy, force=True)


# --- attacks ----------------------------------------------------------------------------------------------------------


def member(name: str, data: bytes = b"", **changes: Any) -> bytes:
    form = changes.pop("format", tarfile.GNU_FORMAT)
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    return info.tobuf(form) + data + bytes(-len(data) % 512)


def whole(folder: Path) -> list[bytes]:
    """Return an archive's bytes as members, and its end."""
    data = b"".join(p.read_bytes() for p in parts_of(folder))
    members, at = [], 0
    while any(data[at : at + 512]):
        size = tarfile.TarInfo.frombuf(data[at : at + 512], "utf-8", "strict").size
        end = at + 512 + -(-size // 512) * 512
        members.append(data[at:end])
        at = end
    return [*members, data[at:]]


def rewrite(folder: Path, members: list[bytes]) -> Path:
    """Write another archive over the one in `folder`, with an index that fits it."""
    index = read_index(folder / "tiny.index.json")
    for part in parts_of(folder):
        part.unlink()
    data = b"".join(members)
    (folder / "tiny.tar.000").write_bytes(data)
    part = archive.Part("tiny.tar.000", len(data), hashlib.sha256(data).hexdigest())
    (folder / "tiny.index.json").write_bytes(archive._index_bytes(dataclasses.replace(index, parts=(part,))))
    return folder / "tiny.index.json"


NOTICE = 2  # bundle.json, bundle.sig, NOTICE, graphs/...
MEMBERS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "symbolic link": lambda m: [*m[:NOTICE], member("NOTICE", type=tarfile.SYMTYPE, linkname="/etc/passwd"), *m[3:]],
    "hard link": lambda m: [*m[:NOTICE], member("NOTICE", type=tarfile.LNKTYPE, linkname="bundle.json"), *m[3:]],
    "folder": lambda m: [*m[:NOTICE], member("graphs", type=tarfile.DIRTYPE), *m[NOTICE:]],
    "device": lambda m: [*m[:NOTICE], member("NOTICE", type=tarfile.CHRTYPE, devmajor=1, devminor=3), *m[3:]],
    "pipe": lambda m: [*m[:NOTICE], member("NOTICE", type=tarfile.FIFOTYPE), *m[3:]],
    "sparse": lambda m: [*m[:NOTICE], member("NOTICE", b"terms", type=tarfile.GNUTYPE_SPARSE), *m[3:]],
    "long name": lambda m: [*m[:NOTICE], member("././@LongLink", b"x" * 600, type=tarfile.GNUTYPE_LONGNAME), *m[2:]],
    "pax header": lambda m: [*m[:NOTICE], member("x", b"20 path=../../evil\n", type=tarfile.XHDTYPE), *m[2:]],
    "global pax header": lambda m: [member("x", b"16 path=/etc/x\n", type=tarfile.XGLTYPE), *m],
    "path above": lambda m: [*m[:NOTICE], member("../evil", b"x"), *m[NOTICE:]],
    "absolute path": lambda m: [*m[:NOTICE], member("/tmp/evil", b"x"), *m[NOTICE:]],
    "path in place of a file": lambda m: [*m[:NOTICE], member("../NOTICE", b"terms"), *m[3:]],
    "program": lambda m: [*m[:NOTICE], member("NOTICE", b"terms", mode=0o755), *m[3:]],
    "owner": lambda m: [*m[:NOTICE], member("NOTICE", b"terms", uid=1000), *m[3:]],
    "ustar": lambda m: [*m[:NOTICE], member("NOTICE", b"terms", format=tarfile.USTAR_FORMAT), *m[3:]],
    "same file twice": lambda m: [*m[:3], m[NOTICE], *m[3:]],
    "manifest twice": lambda m: [m[0], *m],
    "signature twice": lambda m: [*m[:2], *m[1:]],
    "signature last": lambda m: [m[0], *m[2:-1], m[1], m[-1]],
    "manifest last": lambda m: [*m[1:-1], m[0], m[-1]],
    "two files swapped": lambda m: [*m[:2], m[3], m[2], *m[4:]],
    "file left out": lambda m: [*m[:NOTICE], *m[3:]],
    "last file left out": lambda m: [*m[:-2], m[-1]],
    "extra file": lambda m: [*m[:-1], member("more", b"x"), m[-1]],
    "file after the end": lambda m: [*m, member("more", b"x")],
    "no end": lambda m: m[:-1],
    "half an end": lambda m: [*m[:-1], m[-1][:512]],
    "long end": lambda m: [*m, bytes(512)],
    "end first": lambda m: [m[-1], *m],
    "empty": lambda m: [m[-1]],
    "manifest alone": lambda m: [m[0], m[-1]],
    "bytes between members": lambda m: [*m[:NOTICE], m[NOTICE][:-1] + b"x", *m[3:]],
    "broken header": lambda m: [*m[:NOTICE], b"x" * 512, *m[3:]],
    "broken sum": lambda m: [*m[:NOTICE], m[NOTICE][:148] + b"000000\0 " + m[NOTICE][156:], *m[3:]],
    "negative size": lambda m: [*m[:NOTICE], sized(-512), *m[3:]],
    "huge size": lambda m: [*m[:NOTICE], sized(1 << 60), *m[NOTICE:]],
    "huge manifest": lambda m: [member("bundle.json", bytes(9 << 20)), *m[1:]],
    "other content": lambda m: [*m[:NOTICE], member("NOTICE", b"Terms"), *m[3:]],
    "empty manifest": lambda m: [member("bundle.json"), *m[1:]],
    "huge signature": lambda m: [m[0], member("bundle.sig", bytes(65 << 10)), *m[2:]],
    "other manifest": lambda m: [member("bundle.json", b"{}"), *m[1:]],
}


UNSIGNED = {"other manifest", "manifest twice", "manifest alone", "signature last", "empty manifest"}
"""Told by the signature, which is looked at before the manifest is read."""


def sized(size: int) -> bytes:
    info = tarfile.TarInfo("NOTICE")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("name", MEMBERS)
def test_archive_with_another_content_is_refused_and_leaves_nothing(hospital: Any, tmp_path: Path, name: str) -> None:
    packed(hospital, tmp_path / "a")
    index = rewrite(tmp_path / "a", MEMBERS[name](whole(tmp_path / "a")))
    with pytest.raises(BundleError) as caught:
        unpack(index, tmp_path / "b", hospital.policy)
    assert caught.value.exit_code == (81 if name in UNSIGNED else 80)
    assert os.listdir(tmp_path) == ["a"]


def test_the_parts_of_the_rewritten_archive_would_pass_unchanged(hospital: Any, tmp_path: Path) -> None:
    packed(hospital, tmp_path / "a")
    unpack(rewrite(tmp_path / "a", whole(tmp_path / "a")), tmp_path / "b", hospital.policy)


INDEXES: dict[str, Callable[[dict[str, Any]], object]] = {
    "part above": lambda v: v["parts"][0].update(name="../tiny.tar.000"),
    "part of another name": lambda v: v["parts"][0].update(name="x"),
    "parts swapped": lambda v: v["parts"].reverse(),
    "no parts": lambda v: v["parts"].clear(),
    "part left out": lambda v: v["parts"].pop(0),
    "last part left out": lambda v: v["parts"].pop(),
    "one part twice": lambda v: v["parts"].append(v["parts"][-1]),
    "negative size": lambda v: v["parts"][0].update(size=-512),
    "no size": lambda v: v["parts"][0].update(size=0),
    "odd size": lambda v: v["parts"][0].update(size=513),
    "true as size": lambda v: v["parts"][0].update(size=True),
    "size as text": lambda v: v["parts"][0].update(size="512"),
    "other hash": lambda v: v["parts"][0].update(sha256="0" * 64),
    "no hash": lambda v: v["parts"][0].update(sha256=""),
    "name above": lambda v: v.update(name="../x"),
    "other name": lambda v: v.update(name="other"),
    "other bundle": lambda v: v.update(bundle="0" * 64),
    "unknown key": lambda v: v.update(more=1),
    "format 2": lambda v: v.update(format=2),
    "other kind": lambda v: v.update(kind="x"),
    "parts are a number": lambda v: v.update(parts=7),
    "part with another key": lambda v: v["parts"][0].update(url="x"),
    "too many parts": lambda v: v.update(parts=v["parts"] * 5000),
}


@pytest.mark.parametrize("name", INDEXES)
def test_index_that_was_changed_is_refused(hospital: Any, tmp_path: Path, name: str) -> None:
    index = packed(hospital, tmp_path / "a")
    values = json.loads(index.read_bytes())
    INDEXES[name](values)
    index.write_text(json.dumps(values, sort_keys=True, separators=(",", ":")) + "\n")
    with pytest.raises(BundleError):
        unpack(index, tmp_path / "b", hospital.policy)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b"[" * 9999, b"null", b'{"name":1,"name":2}'])
def test_file_that_is_no_index_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "i").write_bytes(data)
    with pytest.raises(BundleError, match="no index"):
        read_index(tmp_path / "i")
    with pytest.raises(EdgemedError):
        read_index(tmp_path)
