"""What the NVIDIA driver says of its GPUs, asked in a child process: a broken driver may hang or crash whoever asks.

Covers version, names, compute capability and memory, through the driver's own library. Does not cover running anything
on a GPU (`edgemed.backends`), or telling why one cannot be used. Standard library only; the child imports nothing else.

Source of the functions and numbers: cuda.h of CUDA 13 (driver API).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

LIMIT_S = 5.0
"""How long the child may take. Starting up GPUs that sleep takes a second or two."""

_KILLED_S = 1.0  # a process that waits inside the kernel cannot be killed, and is not waited for either

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, ..._MINOR
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class GpuState:
    """One GPU: its number, name, compute capability ("8.9") and memory.

    free_bytes is what a process still has that has opened the GPU, so that the driver's own share is gone already; None
    where the GPU could not be opened.
    """

    index: int
    name: str
    capability: str
    total_bytes: int
    free_bytes: int | None


@dataclass(frozen=True)
class Driver:
    """The driver: the newest CUDA version it knows ("13.0"), its GPUs, and why there are none, where it tells."""

    version: str
    gpus: tuple[GpuState, ...] = ()
    problem: str = ""


def ask_driver(limit_s: float = LIMIT_S, library: str = LIBRARY) -> Driver | None:
    """Return what the driver says, or None where there is no driver; never raises, never takes longer than `limit_s`.

    A driver that hangs or crashes is a Driver without GPUs, with a `problem`.
    """
    command = [sys.executable, "-I", "-S", __file__, library]
    try:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError as error:
        return Driver("unknown", (), f"it could not be asked: {error.strerror or 'refused'}")
    assert child.stdout is not None
    try:
        said, _ = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_KILLED_S)
        return Driver("unknown", (), f"it gave no answer in {limit_s:g} s")
    try:
        told = json.loads(said)
        if told is None:
            return None
        return Driver(**{**told, "gpus": tuple(GpuState(**gpu) for gpu in told["gpus"])})
    except (ValueError, TypeError, KeyError):
        return Driver("unknown", (), f"asking it ended with code {child.returncode}")


def _read_driver(driver: Any) -> Driver:
    """Return what the functions of the driver's library say."""
    number = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(number))
    version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    if code := driver.cuInit(0):
        return Driver(version, (), "it sees no GPU" if code == _NO_DEVICE else f"it does not start (error {code})")
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    return Driver(version, tuple(_read_gpu(driver, index) for index in range(count.value)))


def _read_gpu(driver: Any, index: int) -> GpuState:
    device, total, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        numbers.append(str(value.value))
    context, free = ctypes.c_void_p(), ctypes.c_size_t()
    opened = not (
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        or driver.cuCtxSetCurrent(context)
        or driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    )
    text = name.value.decode(errors="replace")
    return GpuState(index, text, ".".join(numbers), total.value, free.value if opened else None)


def _main(library: str) -> None:
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        print("null")
        return
    print(json.dumps(asdict(_read_driver(driver))))


if __name__ == "__main__":
    _main(sys.argv[1])
