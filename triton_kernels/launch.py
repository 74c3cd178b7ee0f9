"""Launches kernels that `aot` compiled, through cuda-core: neither torch nor triton is needed.

Covers finding the driver, choosing the folder for a GPU, checking hashes, and one stream of one GPU. The kernels are
launched by the functions of the operations (`launch_box_head` and so on), which take this launcher. Nothing here has
run on a GPU yet; what can be checked without one is tested.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemed.errors import BackendUnavailable, BundleError, DeviceOutOfMemory
from edgemed.triton_kernels.variants import DESCRIPTION, Buffer, Variant

_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_WARP = 32


def check_driver() -> None:
    """Raise BackendUnavailable unless a driver is here that sees a GPU.

    By ctypes, and before cuda-core is asked for anything: without a driver its `Device()` waits for ever (1.2.2).
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError as error:
        raise BackendUnavailable(f"no NVIDIA driver: {name} cannot be loaded. Install it, or run on the CPU") from error
    code = driver.cuInit(0)
    if code:
        found = "sees no GPU" if code == _NO_DEVICE else f"does not start (cuInit: error {code})"
        raise BackendUnavailable(f"the NVIDIA driver {found}. Run nvidia-smi, or run on the CPU")


def target_for(capability: int, targets: Collection[int]) -> int:
    """Return which of `targets` runs on a GPU of `capability` (times 10): its own, or of the 8 series one below it.

    Code for 9.0 and later uses instructions that the next GPU need not have, so nothing else is taken.

    Raises BackendUnavailable where there is none.
    """
    fitting = [t for t in targets if t == capability or (t // 10 == capability // 10 == 8 and t < capability)]
    if not fitting:
        raise BackendUnavailable(
            f"no kernels for compute capability {capability / 10}; compiled are {sorted(targets)}. Run edgemed compile"
        )
    return max(fitting)


def targets_in(folder: Path) -> list[int]:
    """Return the targets whose kernels lie in a folder."""
    return sorted(int(place.name[3:]) for place in folder.glob("sm_*") if place.name[3:].isdigit())


def read_kernels(folder: Path, target: int) -> dict[str, Mapping[str, Any]]:
    """Return variant name -> entry of `kernels.json` of a target. Raises BundleError where it cannot be read."""
    file = folder / f"sm_{target}" / DESCRIPTION
    try:
        return {entry["name"]: entry for entry in json.loads(file.read_text(encoding="utf-8"))["kernels"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"sm_{target}/{DESCRIPTION} cannot be read. Run edgemed compile again") from error


def read_cubin(folder: Path, entry: Mapping[str, Any], variant: Variant) -> bytes:
    """Return the machine code of an entry.

    Raises BundleError where the file was changed, or was compiled from another version of the kernel.
    """
    expected = dict(variant.arguments), dict(variant.constants), variant.warps
    if (entry["arguments"], entry["constants"], entry["num_warps"]) != expected or entry["scratch_bytes"]:
        raise BundleError(
            f"kernel {variant.name} was compiled by another version of edgemed. Run edgemed compile again"
        )
    try:
        code = (folder / f"sm_{entry['target']}" / f"{variant.name}.cubin").read_bytes()
    except OSError as error:
        raise BundleError(f"kernel {variant.name}.cubin cannot be read. Run edgemed compile again") from error
    found = hashlib.sha256(code).hexdigest()
    if found != entry["sha256"]:
        raise BundleError(
            f"{variant.name}.cubin has sha256 {found[:8]}..., {DESCRIPTION} says {entry['sha256'][:8]}.... "
            "The file was changed; run edgemed compile again"
        )
    return code


def typed_arguments(variant: Variant, entry: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[Any]:
    """Return what the kernel is launched with: addresses, 32-bit integers, then no address for each scratch memory."""
    typed = [
        arguments[name].buffer if kind.startswith("*") else np.int32(arguments[name])
        for name, kind in variant.arguments.items()
    ]
    return typed + [np.uint64(0)] * entry["extra_pointers"]


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """An array in GPU memory."""

    buffer: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class CubinLauncher:
    """A `variants.Launcher` on GPU `index`, of the kernels in `folder`.

    Raises BackendUnavailable, at once, where the driver, a GPU, cuda-core or kernels for this GPU are missing.
    """

    def __init__(self, folder: Path, index: int = 0) -> None:
        check_driver()
        try:
            from cuda import core
            from cuda.bindings import driver
        except ImportError as error:
            raise BackendUnavailable("kernels need the 'cuda-core' package (extra: edgemed[gpu])") from error
        self._core, self._driver, self._folder = core, driver, folder
        self._device: Any = core.Device(index)
        self._device.set_current()
        self._stream: Any = self._device.create_stream()
        capability = self._device.compute_capability
        target = target_for(capability.major * 10 + capability.minor, targets_in(folder))
        self._entries = read_kernels(folder, target)
        self._kernels: dict[str, Any] = {}

    def upload(self, array: npt.NDArray[Any]) -> Buffer:
        """Return a copy of `array` on the device. Raises DeviceOutOfMemory."""
        self._device.set_current()  # of this thread, which need not be the one that opened the GPU
        host = np.ascontiguousarray(array)
        made = self.empty(host.shape, host.dtype.type)
        handle = int(made.buffer.handle), host.ctypes.data, host.nbytes, self._stream.handle
        self._done(self._driver.cuMemcpyHtoDAsync(*handle))
        return made

    def empty(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Buffer:
        """Return an array of any content on the device. Raises DeviceOutOfMemory."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        try:
            buffer = self._device.memory_resource.allocate(size, stream=self._stream)
        except Exception as error:
            if "OUT_OF_MEMORY" in str(error):  # cuda-core has one class for all of the driver's errors
                raise DeviceOutOfMemory(f"the GPU has no {size / 1e6:.0f} MB free for a kernel's arrays") from error
            raise
        return DeviceArray(buffer, shape, np.dtype(dtype))

    def download(self, buffer: Buffer) -> npt.NDArray[Any]:
        """Return a copy on the host; waits for what was launched before."""
        host = np.empty(buffer.shape, buffer.dtype)
        handle = host.ctypes.data, int(buffer.buffer.handle), host.nbytes, self._stream.handle
        self._done(self._driver.cuMemcpyDtoHAsync(*handle))
        self._stream.sync()
        return host

    def launch(self, variant: Variant, **arguments: Any) -> None:
        """Start `variant`; returns before it is done. Raises InvalidInput as `Variant.check`, BundleError."""
        variant.check(arguments)
        if variant.name not in self._entries:
            raise BackendUnavailable(f"kernel {variant.name} is not compiled for this GPU; choose the int8 weights")
        entry = self._entries[variant.name]
        if variant.name not in self._kernels:
            code = read_cubin(self._folder, entry, variant)
            self._kernels[variant.name] = self._core.ObjectCode.from_cubin(code).get_kernel(entry["entry"])
        config = self._core.LaunchConfig(
            grid=variant.grid.programs(arguments), block=_WARP * variant.warps, shmem_size=entry["shared_bytes"]
        )
        typed = typed_arguments(variant, entry, arguments)
        self._core.launch(self._stream, config, self._kernels[variant.name], *typed)

    def _done(self, result: tuple[Any, ...]) -> None:
        if result[0] != self._driver.CUresult.CUDA_SUCCESS:
            raise BackendUnavailable(f"the GPU failed to copy: {result[0].name}. Run nvidia-smi")
