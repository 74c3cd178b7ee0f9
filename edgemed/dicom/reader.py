"""The parent's side: start the child, ask for frames, turn its replies into Scans or errors.

A child serves files one after another. If one of them kills it (memory, CPU or clock limit, a crash in a codec) that
file gets its error and the next file a fresh child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemed.core import SCAN_WARNINGS, Scan, Window
from edgemed.dicom.limits import DEFAULT_LIMITS, Limits
from edgemed.dicom.sniff import sniff
from edgemed.dicom.voi import parse_window
from edgemed.errors import (
    CannotRead,
    CannotWrite,
    EdgemedError,
    InvalidInput,
    NoInput,
    OutOfMemory,
    ResourceLimit,
    UnsupportedDicom,
)

_MAX_LINE = 1 << 16
_ERRORS: dict[str, type[EdgemedError]] = {
    kind.__name__: kind
    for kind in (CannotRead, CannotWrite, InvalidInput, NoInput, ResourceLimit, UnsupportedDicom, EdgemedError)
}


class Reader:
    """Reads scans through one child process; use it as a context manager.

    `start()` only launches the child (about 0.4 s until it can serve) and returns at once, so that a caller can open
    its model meanwhile. Not for use from several threads. worker: the module that the child runs.
    """

    worker = "edgemed.dicom.worker"

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._child: subprocess.Popen[bytes] | None = None
        self._crashed = False

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Launch the child unless it runs."""
        if self._child is not None and self._child.poll() is None:
            return
        self.close()
        # One thread a library: the work is one frame, and every thread's stack counts against the memory limit.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPJ_NUM_THREADS"), "1")
        # -P: a folder named like a module, beside the scan, must never be imported.
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", self.worker],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **threads},
        )
        self._write(asdict(self._limits))

    def read(self, path: str | os.PathLike[str], *, frame: int = 0, window: str | None = None) -> Scan:
        """Return the Scan with frame `frame` (0-based) of the file at `path`; the errors are listed in `edgemed.dicom`.

        window: a preset's name or "center,width"; None takes the file's own.
        """
        name = os.path.abspath(os.fspath(path))
        asked = parse_window(window) if window is not None else None
        if frame < 0:
            raise InvalidInput(f"frame {frame} was asked for; frames count from 0")
        sniff(name)
        try:
            self.start()
            try:
                return self._ask(name, frame, asked)
            except InvalidInput:
                if not self._crashed:
                    raise
            self.start()  # gdcm ends its process on what it does not expect, where another decoder may well read on
            return self._ask(name, frame, asked, skip=("gdcm",))
        except EdgemedError as error:
            raise type(error)(f"{os.fspath(path)}: {error}") from None

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was still buffered for a child that is gone
                    pipe.close()
        child.wait()

    def _write(self, message: dict[str, Any]) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        with suppress(OSError):  # the child is gone: reading its reply tells how
            self._child.stdin.write(json.dumps(message).encode() + b"\n")
            self._child.stdin.flush()

    def _ask(self, path: str, frame: int, window: Window | None, skip: tuple[str, ...] = ()) -> Scan:
        """Return the child's Scan. skip: decoders that are not to be tried."""
        self._crashed = False
        child = self._child
        assert child is not None
        assert child.stdout is not None
        expired = threading.Event()

        def stop() -> None:
            expired.set()
            child.kill()

        clock = threading.Timer(self._limits.wall_seconds, stop)
        clock.daemon = True
        clock.start()
        try:
            asked = asdict(window) if window else None
            self._write({"path": path, "frame": frame, "window": asked, "skip": skip})
            return self._reply(child)
        except EOFError:
            raise self._ended(child, expired.is_set()) from None
        finally:
            clock.cancel()
            if expired.is_set():
                self.close()

    def _ended(self, child: subprocess.Popen[bytes], expired: bool) -> EdgemedError:
        """Return the error for a child that ended instead of answering."""
        try:
            code = child.wait(5)
        except subprocess.TimeoutExpired:
            code = 0
        self.close()
        if expired:
            return ResourceLimit(f"reading it took longer than {self._limits.wall_seconds:g} s")
        if code < 0 and -code == _signal("SIGXCPU"):
            return ResourceLimit(f"reading it took more than {self._limits.cpu_seconds} s of CPU time")
        if code < 0 and -code == _signal("SIGKILL"):
            return ResourceLimit("the system ended the decoder; there is too little memory for the file")
        if code < 0:
            self._crashed = True
            return InvalidInput(f"the decoder crashed on it (signal {-code}); the file is damaged")
        if code == 1 and _memory_is_limited():
            return OutOfMemory("the decoding process could not start; allow this process more memory (ulimit -v)")
        return CannotRead(f"the decoding process ended with code {code}; check the installation with 'edgemed doctor'")

    def _reply(self, child: subprocess.Popen[bytes]) -> Scan:
        assert child.stdout is not None
        line = child.stdout.readline(_MAX_LINE)
        if not line.endswith(b"\n"):
            raise EOFError
        facts = json.loads(line)
        if "error" in facts:
            raise _ERRORS.get(facts["error"], InvalidInput)(str(facts["message"]))
        shape, dtype = tuple(int(n) for n in facts.pop("shape")), np.dtype(facts.pop("dtype"))
        if dtype not in (np.dtype(np.float32), np.dtype(np.uint8)) or np.prod(shape[:3]) > self._limits.max_pixels:
            raise ResourceLimit("the decoding process sent more than the limits allow")
        pixels: npt.NDArray[Any] = np.empty(shape, dtype)
        _fill(child.stdout, pixels.data.cast("B"))
        window, spacing = facts.pop("window"), facts.pop("pixel_spacing_mm")
        told = facts.pop("warnings")
        warnings = tuple(key for key in SCAN_WARNINGS if key in told)
        return Scan(
            pixels,
            window=Window(**window) if window else None,
            pixel_spacing_mm=(spacing[0], spacing[1]) if spacing else None,
            warnings=warnings,
            **facts,
        )


def _fill(pipe: Any, target: memoryview) -> None:
    at = 0
    while at < len(target):
        count = pipe.readinto(target[at:])
        if not count:
            raise EOFError
        at += count


def _memory_is_limited() -> bool:
    """Tell whether this process, and so its child, may have only so much address space."""
    try:
        import resource
    except ImportError:
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _signal(name: str) -> int:
    """Return the number of a signal, 0 where the platform has none of that name."""
    import signal

    return int(getattr(signal, name, 0))


def read_scan(
    path: str | os.PathLike[str], *, frame: int = 0, window: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> Scan:
    """Return the Scan with frame `frame` (0-based) of a DICOM file or a PNG or JPEG picture.

    window: a preset's name (lung, bone, brain, soft-tissue ...) or "center,width"; None takes the file's own window.
    Decoding runs in a child process within `limits`; the errors are listed in `edgemed.dicom`.
    """
    with Reader(limits) as reader:
        return reader.read(path, frame=frame, window=window)


def read_scans(
    paths: Iterable[str | os.PathLike[str]],
    *,
    frame: int = 0,
    window: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[tuple[str, Scan | EdgemedError]]:
    """Yield (path, Scan or the error that it ended in) for each of `paths`, in order, through one child process."""
    with Reader(limits) as reader:
        for path in paths:
            try:
                yield os.fspath(path), reader.read(path, frame=frame, window=window)
            except EdgemedError as error:
                yield os.fspath(path), error
