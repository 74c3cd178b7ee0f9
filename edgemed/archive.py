"""A bundle as parts that fit any medium, and back: an uncompressed tar, cut into files, with an index of their hashes.

    NAME.index.json  canonical JSON: name, SHA-256 of bundle.json, and size and SHA-256 of every part
    NAME.tar.000 ... the parts; `cat NAME.tar.* | tar t` lists them

The first member is bundle.json, the second bundle.sig where there is one, then the files by name. Unpacking reads one
part at a time, after its hash, and takes only members whose header is, byte for byte, the one packing writes for a file
of the manifest that is not there yet: so no path, link, device, sparse file or second copy can come in, and nothing
grows. The signatures are checked before the first file is written, the whole bundle before it takes its name.

The index is not signed: it tells a broken copy. What it says wrongly ends in a bundle that does not hold.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from edgemed.bundle import MANIFEST, SIGNATURE, Bundle, open_bundle, read_manifest, refuse_downgrade
from edgemed.errors import BundleError, CannotRead, CannotWrite, SignatureError
from edgemed.files import sha256_of, write_atomically
from edgemed.manifest import BUNDLE_NAME, MAX_MANIFEST_BYTES, MAX_SIGNATURE_BYTES
from edgemed.signing import NO_POLICY, Policy, check_signatures, read_policy

DEFAULT_PART_BYTES = 3_999_999_488
"""Under 4 GB, the limit of a FAT file system, and whole blocks of tar."""

_BLOCK = 512
_MAX_PARTS = 10_000
_MAX_INDEX_BYTES = 4 << 20
_CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """One file of an archive: its name, bytes and SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What NAME.index.json says: the bundle's name, the SHA-256 of its bundle.json, and the parts in order."""

    name: str
    bundle: str
    parts: tuple[Part, ...]


# --- pack -------------------------------------------------------------------------------------------------------------


def pack(name_or_folder: str | Path, folder: str | Path, part_bytes: int = DEFAULT_PART_BYTES) -> Path:
    """Return the index of the archive written to `folder`, after checking the bundle, but not who signed it.

    part_bytes: the size of a part, a multiple of 512. The same bundle gives the same bytes.

    Raises BundleError if the bundle does not hold or a file has a name or size that tar has no room for, CannotWrite if
    the archive is there already or the disk refuses.
    """
    if part_bytes < _BLOCK or part_bytes % _BLOCK:
        raise CannotWrite(f"a part of {part_bytes} bytes was asked for; a multiple of {_BLOCK} was expected")
    bundle = open_bundle(name_or_folder, NO_POLICY)
    name, target = bundle.manifest.name, Path(folder)
    index = target / f"{name}.index.json"
    if index.exists():
        raise CannotWrite(f"{index} is there already; remove the archive or choose another folder")
    parts: list[Part] = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        blocks, carry = _blocks(bundle), b""
        while len(parts) < _MAX_PARTS:
            part = target / _part_name(name, len(parts))
            digest, size = hashlib.sha256(), 0
            with open(part, "wb") as stream:
                while size < part_bytes and (chunk := carry or next(blocks, b"")):
                    piece, carry = chunk[: part_bytes - size], chunk[part_bytes - size :]
                    stream.write(piece)
                    digest.update(piece)
                    size += len(piece)
                stream.flush()
                os.fsync(stream.fileno())
            if not size:
                part.unlink()
                break
            parts.append(Part(part.name, size, digest.hexdigest()))
        else:
            raise CannotWrite(f"the bundle needs more than {_MAX_PARTS} parts; make them larger")
        write_atomically(index, _index_bytes(Index(name, bundle.digest, tuple(parts))))
    except OSError as error:
        raise CannotWrite(f"cannot write the archive to {folder}: {error.strerror or 'refused'}") from error
    return index


def _part_name(name: str, number: int) -> str:
    return f"{name}.tar.{number:03d}"


def _blocks(bundle: Bundle) -> Iterator[bytes]:
    """Yield the bytes of the tar file."""
    names = [MANIFEST, *([SIGNATURE] if (bundle.path / SIGNATURE).is_file() else []), *sorted(bundle.manifest.files)]
    for name in names:
        with open(bundle.path.joinpath(*PurePosixPath(name).parts), "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            yield _header(name, size)
            left = size
            while left and (chunk := stream.read(min(left, _CHUNK))):
                left -= len(chunk)
                yield chunk
            if left:
                raise BundleError(f"{name} became shorter while it was packed")
        if size % _BLOCK:
            yield bytes(_BLOCK - size % _BLOCK)
    yield bytes(2 * _BLOCK)


def _header(name: str, size: int) -> bytes:
    """Return the one header of tar for a plain file of this name and size; a size over 8 GB is in GNU's form."""
    if len(name.encode("utf-8")) > 100:
        raise BundleError(f"the file name {name[:40]!r}... has more than the 100 bytes that an archive has room for")
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def _index_bytes(index: Index) -> bytes:
    data = {"format": 1, "kind": "edgemed-archive", **asdict(index)}
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"


# --- unpack -----------------------------------------------------------------------------------------------------------


def read_index(path: str | Path) -> Index:
    """Return the index in a file. Raises BundleError unless it is exactly what `pack` writes."""
    try:
        with open(path, "rb") as stream:
            data = stream.read(_MAX_INDEX_BYTES + 1)
        values = json.loads(data)
        index = Index(values["name"], values["bundle"], tuple(Part(**part) for part in values["parts"]))
        good = (
            BUNDLE_NAME.fullmatch(index.name)
            and _SHA256.fullmatch(index.bundle)
            and 0 < len(index.parts) <= _MAX_PARTS
            and all(part.name == _part_name(index.name, i) for i, part in enumerate(index.parts))
            and all(type(part.size) is int and part.size > 0 for part in index.parts)
            and all(part.size % _BLOCK == 0 and _SHA256.fullmatch(part.sha256) for part in index.parts)
            and _index_bytes(index) == data
        )
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or 'refused'}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{path} is no index of an archive ({type(error).__name__})") from error
    if not good:
        raise BundleError(f"{path} is no index of an archive, or was changed; copy it again")
    return index


def unpack(
    index_file: str | Path,
    target: str | Path,
    policy: Policy | None = None,
    tell: Tell = lambda line: None,
    *,
    force: bool = False,
) -> Bundle:
    """Return the bundle unpacked to the folder `target`, all of it or nothing; run again, it goes on where it stopped.

    What is done lies in a hidden folder beside `target`. A part that was taken is not needed any more, so parts may
    come one by one. force: a version older than that of the installed bundle of this name is taken.

    Raises BundleError if a part is missing or broken (it is named) or the bundle does not hold, SignatureError if the
    policy is not met, CannotWrite if `target` holds anything or the disk refuses.
    """
    index_file, target = Path(index_file), Path(os.path.abspath(target))
    index = read_index(index_file)
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        raise CannotWrite(f"{target} is there already; choose another folder")
    working = target.with_name(f".{target.name}.unpack")
    try:
        state = _State.resumed(working, hashlib.sha256(_index_bytes(index)).hexdigest(), policy)
        _check_room(target.parent, sum(part.size for part in index.parts[state.part :]))
        for number in range(state.part, len(index.parts)):
            part = index.parts[number]
            with _dropping(working) if number == 0 else contextlib.nullcontext():
                _check_part(index_file.parent / part.name, part, f"{number} of {len(index.parts)} parts are unpacked")
            with _dropping(working), open(index_file.parent / part.name, "rb") as stream:
                state.take(stream, part.size)
            state.save()
            tell(f"{part.name} unpacked, {number + 1} of {len(index.parts)}")
        with _dropping(working):
            if state.end_blocks != 2:
                raise BundleError("the archive ends in the middle of a file; pack the bundle again")
            bundle = open_bundle(state.content, policy)
            if bundle.digest != index.bundle:
                raise BundleError("the archive holds another bundle than its index says; get both anew")
            if not force:
                refuse_downgrade(bundle.manifest)
        if target.is_dir():
            target.rmdir()
        os.replace(state.content, target)
        shutil.rmtree(working)
    except OSError as error:
        raise CannotWrite(f"cannot unpack to {target}: {error.strerror or 'refused'}") from error
    return Bundle(target, bundle.manifest, bundle.digest)


@contextlib.contextmanager
def _dropping(working: Path) -> Iterator[None]:
    """Remove what was unpacked if it is refused: its parts were as the index says, so going on would not help.

    Not where the system could not read it this time: the medium of its parts may be gone.
    """
    try:
        yield
    except BundleError as error:
        if not isinstance(error.__cause__, OSError | CannotRead):
            shutil.rmtree(working, ignore_errors=True)
        raise


def _check_part(path: Path, part: Part, done: str) -> None:
    again = f"copy it again and repeat the command: {done} and stay"
    if not path.is_file() or path.is_symlink():
        raise BundleError(f"part {part.name} is missing or no plain file; {again}")
    if (size := path.stat().st_size) != part.size:
        raise BundleError(f"part {part.name} has {size} bytes, the index says {part.size}; {again}")
    if (found := sha256_of(path)) != part.sha256:
        raise BundleError(f"part {part.name} has sha256 {found[:8]}..., the index says {part.sha256[:8]}...; {again}")


def _check_room(folder: Path, size: int) -> None:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if (free := shutil.disk_usage(there).free) < size:
        raise CannotWrite(f"unpacking takes {size / 1e6:.1f} MB, {there} has {free / 1e6:.1f} MB free; make room")


class _State:
    """How far unpacking came: the parts taken, the members begun or done, and what is left of the last of them.

    Kept on disk after each part. Parts are whole blocks, so a header and the zeros after a member are never cut.
    """

    def __init__(self, working: Path, index: str, policy: Policy | None) -> None:
        self.working, self.content, self.index, self.policy = working, working / "content", index, policy
        self.part = self.left = self.end_blocks = 0
        self.members: list[str] = []
        self.order: list[str] = []

    @classmethod
    def resumed(cls, working: Path, index: str, policy: Policy | None) -> _State:
        """Return the state that `save` left in `working`, or a new one where it belongs to another archive."""
        state = cls(working, index, policy)
        try:
            if stat.S_ISDIR(working.lstat().st_mode) and stat.S_ISDIR(state.content.lstat().st_mode):
                saved = json.loads((working / "progress.json").read_bytes())
                if saved["index"] == index:
                    state._restore(saved)
                    return state
        except SignatureError:
            raise
        except (OSError, ValueError, LookupError, TypeError, RecursionError, BundleError):
            pass  # nothing there, or nothing that this program left: it starts anew
        if os.path.lexists(working):
            shutil.rmtree(working)
        state = cls(working, index, policy)
        state.content.mkdir(parents=True)
        return state

    def _restore(self, saved: dict[str, Any]) -> None:
        self.part, self.left, self.end_blocks = int(saved["part"]), int(saved["left"]), int(saved["end_blocks"])
        members = [str(name) for name in saved["members"]]
        if self.left and members == [MANIFEST]:
            raise ValueError("stopped before the manifest was there")
        for name in members:
            self._expect(name)
        for path in self.content.rglob("*"):
            if path.is_symlink():
                raise ValueError("not left by this program")
            if not path.is_dir() and path.relative_to(self.content).as_posix() not in members:
                path.unlink()  # begun by the part that was not taken to its end
        if self.left:
            os.truncate(self._path(members[-1]), int(saved["written"]))

    def save(self) -> None:
        """Note on disk that one more part was taken."""
        self.part += 1
        written = self._path(self.members[-1]).stat().st_size if self.left else 0
        told = {"index": self.index, "part": self.part, "left": self.left, "written": written}
        told |= {"members": self.members, "end_blocks": self.end_blocks}
        write_atomically(self.working / "progress.json", json.dumps(told).encode("utf-8"))

    def take(self, stream: BinaryIO, size: int) -> None:
        """Write the members, or pieces of members, that a part of `size` bytes holds. Raises BundleError."""
        while size:
            if self.left:
                size -= self._take_content(stream, size)
            else:
                self._begin(_exactly(stream, _BLOCK))
                size -= _BLOCK

    def _take_content(self, stream: BinaryIO, size: int) -> int:
        took = 0
        with open(self._path(self.members[-1]), "ab") as output:
            while took < size and self.left:
                chunk = _exactly(stream, min(size - took, self.left, _CHUNK))
                output.write(chunk)
                took += len(chunk)
                self.left -= len(chunk)
            output.flush()
            os.fsync(output.fileno())
        if not self.left:
            padding = (size - took) % _BLOCK
            if any(_exactly(stream, padding)):
                raise BundleError("the archive has bytes between two members; pack the bundle again")
            took += padding
        return took

    def _begin(self, header: bytes) -> None:
        """Make room for the next member; a block of zeros is half of the archive's end."""
        if not any(header):
            self.end_blocks += 1
            if self._next() or self.end_blocks > 2:
                raise BundleError("the archive ends before the last file of its bundle, or goes on after its end")
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
            plain = info.size >= 0 and _header(info.name, info.size) == header
        except (tarfile.TarError, ValueError) as error:
            raise BundleError(f"the archive has a broken header ({type(error).__name__}); get it anew") from error
        if info.size > {MANIFEST: MAX_MANIFEST_BYTES, SIGNATURE: MAX_SIGNATURE_BYTES}.get(info.name, info.size):
            raise BundleError(f"the archive has a {info.name} of {info.size} bytes, more than any bundle has")
        if not plain or self.end_blocks:
            raise BundleError("the archive has a member that is no plain file as packing writes it; get it anew")
        self._expect(info.name)
        path = self._path(info.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("xb").close()
        self.left = info.size

    def _expect(self, name: str) -> None:
        """Note the next member. Raises BundleError unless it is the one that packing puts here."""
        wanted = SIGNATURE if name == SIGNATURE and self.members == [MANIFEST] else self._next()
        if name != wanted:
            raise BundleError(f"the archive has the member {name[:60]!r} where another one was expected; get it anew")
        self.members.append(name)

    def _next(self) -> str | None:
        """Return the member that has to come now, a signature aside, or None after the last.

        Raises SignatureError if the policy is not met: after bundle.json and bundle.sig, before any other file.
        """
        if not self.members:
            return MANIFEST
        if not self.order:
            self._check_signatures()
            self.order = [MANIFEST, *sorted(read_manifest(self.content).files)]
        taken = len(self.members) - (SIGNATURE in self.members[1:2])
        return self.order[taken] if taken < len(self.order) else None

    def _check_signatures(self) -> None:
        policy = read_policy() if self.policy is None else self.policy
        signed = self._path(SIGNATURE).read_bytes() if SIGNATURE in self.members else None
        check_signatures(self._path(MANIFEST).read_bytes(), signed, policy)

    def _path(self, name: str) -> Path:
        return self.content.joinpath(*PurePosixPath(name).parts)


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise BundleError("a part became shorter while it was read; copy it again")
    return data
