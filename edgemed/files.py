"""Files written whole or not at all, and their digests. Standard library only."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from edgemed.errors import CannotRead, CannotWrite


def write_atomically(path: str | Path, data: bytes, *, through: Path | None = None) -> None:
    """Write `data` to `path` so that a reader sees the old content or the new, never a part.

    The bytes go to a hidden file in the same folder (or in `through`, on the same disk), are flushed to the disk, and
    take the name last. A link keeps pointing at its target, which is replaced. What is not a regular file (a pipe,
    /dev/null) is written to directly.

    Raises CannotWrite if the folder is missing or the system refuses; nothing half-written is left.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file() and not target.is_dir():
            target.write_bytes(data)
            return
        if target.is_dir():
            raise CannotWrite(f"cannot write {path}: it is a folder, a file name was expected")
        _replace(target, data, through or target.parent)
    except OSError as error:
        reason = error.strerror or "refused"
        if not target.parent.is_dir():
            reason = "its folder does not exist; make it first"
        raise CannotWrite(f"cannot write {path}: {reason}") from error


def _replace(target: Path, data: bytes, folder: Path) -> None:
    temporary = folder / f".{os.urandom(8).hex()}.part"
    # 0o666 less the umask, as a plain open would give; tempfile would leave 0o600 on a result meant for others.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits.

    Raises CannotRead if it cannot be read to its end.
    """
    import hashlib  # here, since it loads OpenSSL

    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CannotRead(f"cannot read {path}: {error.strerror or 'refused'}") from error
