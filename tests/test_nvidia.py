"""Asking the NVIDIA driver: its numbers are read right, and one that is missing, hangs or crashes holds nothing up.

The driver is a library that the test compiles: no machine that runs the tests needs a GPU.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgemed.nvidia import GpuState, ask_driver

DRIVER = """
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int cuInit(unsigned flags) { INIT }
int cuDriverGetVersion(int *version) { *version = 13010; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = index + 7; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "A GPU", size); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)24 << 30; return 0; }
int cuDeviceGetAttribute(int *value, int what, int device) { *value = what == 75 ? 8 : what == 76 ? 9 : -1; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)0x100000007; return device == 7 ? 0 : 2; }
int cuCtxSetCurrent(void *context) { return context == (void *)0x100000007 ? 0 : 201; }
int cuMemGetInfo_v2(size_t *free, size_t *total) { *free = (size_t)20 << 30; *total = (size_t)24 << 30; return 0; }
"""


def driver(folder: Path, init: str) -> str:
    """Return the path of a driver's library whose cuInit does `init`; skips the test where nothing compiles it."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform == "win32":
        pytest.skip("no C compiler to make a library with")
    library = folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=DRIVER.replace("INIT", init).encode(), check=True)
    return str(library)


def test_gpus_are_told_with_their_memory(tmp_path: Path) -> None:
    told = ask_driver(library=driver(tmp_path, "return 0;"), limit_s=60)
    assert told is not None
    assert (told.version, told.problem) == ("13.1", "")
    assert told.gpus == (
        GpuState(0, "A GPU", "8.9", 24 << 30, 20 << 30),
        GpuState(1, "A GPU", "8.9", 24 << 30, None),  # it cannot be opened
    )


@pytest.mark.parametrize(
    ("init", "problem"),
    [
        ("return 100;", "it sees no GPU"),
        ("return 999;", "it does not start (error 999)"),
        ("abort();", "asking it ended"),
    ],
)
def test_a_driver_that_does_not_work_says_why(tmp_path: Path, init: str, problem: str) -> None:
    told = ask_driver(library=driver(tmp_path, init), limit_s=60)
    assert told is not None
    assert told.gpus == ()
    assert problem in told.problem


def test_a_driver_that_hangs_is_left_after_the_limit(tmp_path: Path) -> None:
    library = driver(tmp_path, "for (;;) pause();")
    start = time.monotonic()
    told = ask_driver(library=library, limit_s=1)
    assert time.monotonic() - start < 30
    assert told is not None
    assert "no answer in 1 s" in told.problem


def test_without_a_driver_there_is_nothing_to_tell(tmp_path: Path) -> None:
    assert ask_driver(library=str(tmp_path / "libcuda.so.1"), limit_s=60) is None
