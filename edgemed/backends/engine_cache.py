"""Built engines as files: each with what it was built from and a checksum, readable by its owner only.

Covers names, the user's folder, writing whole or not at all, and refusing a file that is stale, damaged or open to
others. Does not cover building (`engine_build`) or running engines (`tensorrt_runner`).

A file is one line of text (`MAGIC`), one line of JSON (the `EngineKey`, size and SHA-256 of the engine), the engine.
An engine holds machine code that a driver runs, hence the care about who could have written it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgemed.errors import BundleError, CannotRead, CannotWrite
from edgemed.user_folders import own_folder

MAGIC = b"edgemed engine 1\n"
_MAX_HEADER = 1 << 16


@dataclass(frozen=True)
class EngineKey:
    """What an engine is made from; one that differs in any of these is another engine.

    graph: SHA-256 over the ONNX file and its weights. library: name and version of what built it. target: a compute
    capability such as "sm_89", or "any". precision: of the graph. profile: SHA-256 of the GraphSpec, whose dims give
    the optimisation profile.
    """

    role: str
    graph: str
    library: str
    target: str
    precision: str
    profile: str

    @property
    def file_name(self) -> str:
        """The name of its file in a cache folder: one for each graph and target."""
        return f"{self.role}.{self.precision}.{self.target}.{self.graph[:12]}.engine"


@dataclass(frozen=True)
class KernelsKey(EngineKey):
    """The same for what TensorRT-RTX compiles for a GPU when an engine is opened: a file beside the engine's."""

    @property
    def file_name(self) -> str:
        return f"{super().file_name.removesuffix('engine')}kernels"


def engines_folder() -> Path:
    """Return the user's folder of engines: $EDGEMED_HOME/engines, else the platform's place for what can be made again.

    What `edgemed compile -o FOLDER` wrote elsewhere is used once its files are copied here.
    """
    return own_folder("cache") / "engines"


def write_cached(folder: str | Path, key: EngineKey, engine: bytes) -> Path:
    """Return the file that was written, in a folder that only its owner may enter if it is made here.

    Raises CannotWrite; nothing half-written is left.
    """
    path = Path(folder) / key.file_name
    header = {**asdict(key), "size": len(engine), "sha256": hashlib.sha256(engine).hexdigest()}
    temporary: str | None = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)  # its owner's only
        with os.fdopen(descriptor, "wb") as stream:
            stream.writelines((MAGIC, json.dumps(header).encode() + b"\n", engine))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise CannotWrite(f"cannot write {path}: {error.strerror or 'refused'}") from error
        raise
    return path


def load_cached(folder: str | Path, key: EngineKey) -> bytes:
    """Return the engine for `key`.

    Raises CannotRead if there is none, BundleError naming what is wrong if the file was built from something else, was
    changed, or could have been written by another user.
    """
    path = Path(folder) / key.file_name
    again = "build it again with `edgemed compile`"
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(descriptor, "rb") as stream:
            if reason := _open_to_others(os.fstat(stream.fileno())):
                raise BundleError(f"{path.name} {reason}; remove it and {again}")
            if stream.readline(len(MAGIC)) != MAGIC:
                raise BundleError(f"{path.name} is not an engine of this version of edgemed; {again}")
            header = _header(stream.readline(_MAX_HEADER))
            engine = stream.read()
    except FileNotFoundError as error:
        raise CannotRead(f"there is no engine {path.name} in {path.parent}; {again}") from error
    except OSError as error:
        raise CannotRead(f"cannot read {path}: {error.strerror or 'refused'}") from error
    if header is None or len(engine) != header["size"] or hashlib.sha256(engine).hexdigest() != header["sha256"]:
        raise BundleError(f"{path.name} was changed after it was built, or is cut short; {again}")
    for field in fields(EngineKey):
        found, wanted = header[field.name], getattr(key, field.name)
        if found != wanted:
            raise BundleError(
                f"{path.name} is stale: it was built for {field.name} {found[:24]}, {wanted[:24]} is needed; {again}"
            )
    return engine


def _open_to_others(info: os.stat_result) -> str:
    """Return why a file may not be trusted, "" where it may; systems without user ids protect by folder."""
    if not stat.S_ISREG(info.st_mode):
        return "is not a plain file"
    if not hasattr(os, "getuid"):
        return ""
    if info.st_uid != os.getuid():
        return "belongs to another user"
    return "can be read or written by other users" if info.st_mode & 0o077 else ""


def _header(line: bytes) -> dict[str, Any] | None:
    """Return the values of a header, or None if it is not one."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    names = {field.name for field in fields(EngineKey)} | {"sha256"}
    if not isinstance(values, dict) or set(values) != names | {"size"}:
        return None
    return values if all(isinstance(values[name], str) for name in names) else None
