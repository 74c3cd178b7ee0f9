"""The folder of a bundle: written beside its place and named at the end, so that it is whole or not there.

Covers what a killed process leaves, two processes at once and replacing an older bundle. Does not cover what is
written.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgemed.errors import CannotWrite
from edgemed.manifest import MANIFEST


@contextlib.contextmanager
def new_folder(target: Path, replace: bool) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its name at the end; on an error nothing is left of it.

    What is replaced stays until the new folder has its name, and is on the disk: it is there again if the power fails.
    """
    target = Path(os.path.abspath(target))
    _sweep(target)
    taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if taken and not (replace and (target / MANIFEST).is_file()):
        hint = "it holds something that is not a bundle" if replace else "it exists already"
        raise CannotWrite(f"cannot write a bundle to {target}: {hint}; choose another folder")
    with contextlib.ExitStack() as stack:
        try:
            temporary = _part_of(target, stack)
            new, old = temporary / "new", temporary / "old"
            new.mkdir()
            yield new
            if target.exists():
                _sync(new)
                if _exchanged(new, target):
                    return
                os.replace(target, old)
            try:
                os.replace(new, target)
            except OSError:
                if old.exists():
                    os.replace(old, target)
                raise
        except OSError as error:
            raise CannotWrite(f"cannot write the bundle {target}: {error.strerror or 'refused'}") from error


@contextlib.contextmanager
def working_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder on the disk of `target`, for what `write_bundle` takes; it is gone at the end.

    If the process is killed, the next `write_bundle` to `target` removes it. Raises OSError.
    """
    target = Path(os.path.abspath(target))
    with contextlib.ExitStack() as stack:
        yield _part_of(target, stack)


def _part_of(target: Path, stack: contextlib.ExitStack) -> Path:
    """Return a new folder beside `target` that `_sweep` leaves alone until the stack is unwound, and that goes then."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    stack.callback(_clear, temporary, target)
    with contextlib.suppress(OSError):  # a share without locks
        stack.callback(os.close, _locked(temporary))
    return temporary


def _clear(temporary: Path, target: Path) -> None:
    """Remove a folder of `new_folder`, unless it holds the bundle that was `target` and nothing has that name now."""
    if target.exists() or not (temporary / "old").exists():
        shutil.rmtree(temporary, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove what runs that were killed left beside `target`; a bundle that lost its name to one gets it back."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.{'[!.]' * 8}.part"):  # as mkdtemp names them
        with contextlib.suppress(OSError):  # BlockingIOError: of a run that goes on
            descriptor = _locked(left)
            try:
                if not target.exists() and (left / "old" / MANIFEST).is_file():
                    os.replace(left / "old", target)
                _clear(left, target)
            finally:
                os.close(descriptor)


def _locked(folder: Path) -> int:
    """Return a descriptor that keeps others' `_sweep` away from a folder while it is open. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)  # Windows refuses this, and so nothing is swept there
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sync(folder: Path) -> None:
    """Bring a folder and all below it to the disk."""
    for root, _, files in os.walk(folder) if os.name == "posix" else ():
        for name in (*files, "."):
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step; False where the system cannot (other than Linux, some shares)."""
    if sys.platform != "linux":
        return False
    import ctypes

    try:
        exchange = ctypes.CDLL(None).renameat2
    except AttributeError:  # a libc before 2018
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: renameat2(2)
    return bool(exchange(here, os.fsencode(one), here, os.fsencode(other), swap) == 0)
