"""One NVIDIA GPU: finding it without touching it, and memory, copies and one stream on it, without torch.

Covers what is missing where there is no GPU to run on (driver, its age, the device), told at once, and the few calls of
the driver that a Runner needs, through cuda-bindings. Does not cover kernels or engines. Nothing here has run on a GPU
yet; the tests put functions over the host's memory in place of the driver.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemed.errors import BackendUnavailable, DeviceOutOfMemory, OutOfMemory

LEAST_DRIVER = 13000
"""The CUDA version that a driver must support (times 1000, 13.0), since cuda-bindings 13 asks for it: release 580."""

_OUT_OF_MEMORY, _NO_DEVICE = 2, 100  # CUDA_ERROR_OUT_OF_MEMORY, CUDA_ERROR_NO_DEVICE
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_ADVICE = "or use --backend onnxruntime --device cpu"


@dataclass(frozen=True)
class Gpu:
    """A GPU that the driver sees: its number, its name, its compute capability times 10."""

    index: int
    name: str
    capability: int

    @property
    def target(self) -> str:
        """The name of its compute capability, such as "sm_89"."""
        return f"sm_{self.capability}"


def find_gpu(index: int = 0, driver: Any = None) -> Gpu:
    """Return GPU `index` after asking the driver for no more than its name. driver: default, the one installed.

    By ctypes, and before cuda-core is asked for anything: without a driver its `Device()` waits for ever (1.2.2).

    Raises BackendUnavailable naming what is missing: the driver, one that is new enough, a GPU, or this one.
    """
    driver = driver or _load_driver()
    if code := driver.cuInit(0):
        found = "sees no GPU" if code == _NO_DEVICE else f"does not start (cuInit: error {code})"
        raise BackendUnavailable(f"the NVIDIA driver {found}: run nvidia-smi to see why, {_ADVICE}")
    version, count, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    _call(driver.cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
    if version.value < LEAST_DRIVER:
        raise BackendUnavailable(
            f"the NVIDIA driver supports CUDA {_version(version.value)}, {_version(LEAST_DRIVER)} is needed: install "
            f"release 580 or newer, {_ADVICE}"
        )
    _call(driver.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    if index >= count.value:
        there = f"{count.value}, the last is gpu:{count.value - 1}" if count.value else "none"
        raise BackendUnavailable(
            f"there is no GPU {index}: the NVIDIA driver sees {there}. Use another --device, {_ADVICE}"
        )
    _call(driver.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        _call(driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device), "cuDeviceGetAttribute")
        numbers.append(value.value)
    name = ctypes.create_string_buffer(256)
    _call(driver.cuDeviceGetName(name, len(name), device), "cuDeviceGetName")
    return Gpu(index, name.value.decode(errors="replace"), 10 * numbers[0] + numbers[1])


def _load_driver() -> Any:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise BackendUnavailable(f"no NVIDIA driver: {name} was not found. Install the driver, {_ADVICE}") from error


def _call(code: int, what: str) -> None:
    if code:
        raise BackendUnavailable(
            f"the NVIDIA driver fails ({what}: error {code}): run nvidia-smi to see why, {_ADVICE}"
        )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _load_bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendUnavailable(
            "the GPU needs the 'cuda-bindings' package; install the extra: edgemed[gpu]"
        ) from error
    return driver


@dataclass(frozen=True, eq=False)
class Pinned:
    """Memory of the host that a GPU copies from and to without a detour; `view` is uint8 [size] of it."""

    address: int
    view: npt.NDArray[np.uint8]


class CudaStream:
    """Memory of a GPU and one stream, on which everything happens in the order it is asked for.

    Addresses are integers. `use` comes first in every thread. driver: `cuda.bindings.driver`, or what stands for it.

    Raises BackendUnavailable where cuda-bindings is missing or the GPU fails.
    """

    def __init__(self, gpu: Gpu, driver: Any = None) -> None:
        driver = driver or _load_bindings()
        self.gpu = gpu
        self._driver: Any = driver
        self._done(driver.cuInit(0))
        # The context that libraries share. It is never released: they may hold on to it longer than a Runner.
        self._context = self._done(driver.cuDevicePrimaryCtxRetain(self._done(driver.cuDeviceGet(gpu.index))))
        self.use()
        self._stream = self._done(driver.cuStreamCreate(int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)))

    @property
    def handle(self) -> int:
        """The address of the stream, for libraries."""
        return int(self._stream)

    def use(self) -> None:
        """Make the GPU's context that of the calling thread."""
        self._done(self._driver.cuCtxSetCurrent(self._context))

    def allocate(self, size: int, what: str) -> int:
        """Return `size` bytes of the GPU, of any content. Raises DeviceOutOfMemory naming `what`."""
        code, address = self._driver.cuMemAlloc(size)
        if int(code) == _OUT_OF_MEMORY:
            raise DeviceOutOfMemory(f"{what} needs {size / 1e6:.0f} MB, {self.memory()}")
        self._done((code,))
        return int(address)

    def free(self, address: int) -> None:
        """Give back what `allocate` gave."""
        self._done(self._driver.cuMemFree(address))

    def pin(self, size: int) -> Pinned:
        """Return `size` bytes of the host. Raises OutOfMemory."""
        code, address = self._driver.cuMemAllocHost(size)
        if int(code) == _OUT_OF_MEMORY:
            raise OutOfMemory(f"the host has no {size / 1e6:.0f} MB that can be pinned for the GPU")
        self._done((code,))
        return Pinned(int(address), np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(address))))

    def unpin(self, memory: Pinned) -> None:
        """Give back what `pin` gave; its view is no longer to be used."""
        self._done(self._driver.cuMemFreeHost(memory.address))

    def upload(self, address: int, source: Pinned, size: int) -> None:
        """Copy `size` bytes to the GPU; `source` must stay as it is until `wait`."""
        self._done(self._driver.cuMemcpyHtoDAsync(address, source.address, size, self._stream))

    def download(self, target: Pinned, address: int, size: int) -> None:
        """Copy `size` bytes from the GPU; they are there after `wait`."""
        self._done(self._driver.cuMemcpyDtoHAsync(target.address, address, size, self._stream))

    def zero(self, address: int, size: int) -> None:
        """Set `size` bytes to 0."""
        self._done(self._driver.cuMemsetD8Async(address, 0, size, self._stream))

    def wait(self) -> None:
        """Return when all that was asked for is done."""
        self._done(self._driver.cuStreamSynchronize(self._stream))

    def memory(self) -> str:
        """Return how much of the GPU's memory is free, and what to do where it is too little."""
        code, free, total = self._driver.cuMemGetInfo()
        there = f"{free / 1e6:.0f} of {total / 1e6:.0f} MB are free" if not int(code) else "less is free"
        return f"on GPU {self.gpu.index} ({self.gpu.name}) {there}: close other programs, or use a smaller bundle"

    def close(self) -> None:
        """Give back the stream."""
        self._done(self._driver.cuStreamDestroy(self._stream))

    def _done(self, result: tuple[Any, ...]) -> Any:
        """Return what a call of the driver gave. Raises BackendUnavailable where it failed."""
        if int(result[0]):
            name = getattr(result[0], "name", result[0])
            raise BackendUnavailable(f"GPU {self.gpu.index} ({self.gpu.name}) fails: {name}. Run nvidia-smi to see why")
        return result[1] if len(result) > 1 else None
