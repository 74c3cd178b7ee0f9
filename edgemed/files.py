"""Files written whole or not at all, and their digests. Standard library only."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from edgemed.errors import CannotRead, CannotWrite

Write = Callable[[IO[bytes]], object]
"""Writes a file into a stream, which can seek."""


def write_atomically(path: str | Path, data: bytes | Write, *, through: Path | None = None) -> None:
    """Write `data`, or what it writes, to `path` so that a reader sees the old content or the new, never a part.

    The bytes go to a hidden file in the same folder (or in `through`, on the same disk), are flushed to the disk, and
    take the name last. A link keeps pointing at its target, which is replaced. What is not a regular file (a pipe,
    /dev/null) is written to directly.

    Raises CannotWrite if the folder is missing or the system refuses, and what `data` raises; nothing half-written is
    left.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file() and not target.is_dir():
            target.write_bytes(data if isinstance(data, bytes) else _written(data))
            return
        if target.is_dir():
            raise CannotWrite(f"cannot write {path}: it is a folder, a file name was expected")
        _replace(target, data, through or target.parent)
    except OSError as error:
        reason = error.strerror or "refused"
        if not target.parent.is_dir():
            reason = "its folder does not exist; make it first"
        raise CannotWrite(f"cannot write {path}: {reason}") from error


def _written(write: Write) -> bytes:
    held = io.BytesIO()
    write(held)
    return held.getvalue()


def _replace(target: Path, data: bytes | Write, folder: Path) -> None:
    temporary = folder / f".{os.urandom(8).hex()}.part"
    # 0o666 less the umask, as a plain open would give; tempfile would leave 0o600 on a result meant for others.
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as stream:
            if isinstance(data, bytes):
                stream.write(data)
            else:
                data(stream)
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
