"""Finding a GPU, and memory and copies on it, against a driver whose functions work on the host's memory."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from edgemed.backends.cuda_device import CudaStream, Gpu, find_gpu
from edgemed.errors import BackendUnavailable, DeviceOutOfMemory, OutOfMemory

GPU = Gpu(0, "NVIDIA Test", 89)


class Driver:
    """What `find_gpu` asks of libcuda: C functions that return a code and write through pointers."""

    def __init__(self, *, init: int = 0, version: int = 13000, capabilities: tuple[tuple[int, int], ...] = ((8, 9),)):
        self.init, self.version, self.capabilities = init, version, capabilities

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.init

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = self.capabilities[device.value][attribute - 75]
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = b"NVIDIA Test"
        return 0


def test_a_gpu_is_found_with_its_name_and_capability() -> None:
    driver = Driver(capabilities=((8, 6), (12, 0)))
    assert find_gpu(0, driver) == Gpu(0, "NVIDIA Test", 86)
    assert find_gpu(1, driver).target == "sm_120"


@pytest.mark.parametrize(
    ("driver", "index", "told"),
    [
        (Driver(init=100), 0, "sees no GPU"),
        (Driver(init=803), 0, r"does not start \(cuInit: error 803\)"),
        (Driver(version=12040), 0, r"supports CUDA 12\.4, 13\.0 is needed: install release 580"),
        (Driver(capabilities=()), 0, "there is no GPU 0: the NVIDIA driver sees none"),
        (Driver(), 2, r"there is no GPU 2: the NVIDIA driver sees 1, the last is gpu:0"),
    ],
)
def test_what_is_missing_is_told(driver: Driver, index: int, told: str) -> None:
    with pytest.raises(BackendUnavailable, match=told) as caught:
        find_gpu(index, driver)
    assert "--device cpu" in str(caught.value)


def has_driver() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(has_driver(), reason="an NVIDIA driver is installed")
@pytest.mark.parametrize("backend", ["tensorrt"])
def test_without_a_driver_it_is_told_at_once_and_nothing_hangs(backend: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (extra: edgemed[gpu])")
    code = (
        "import time; from edgemed.backends import open_runner; from edgemed.bundle import open_bundle\n"
        "b = open_bundle('nano'); start = time.monotonic()\n"
        f"try: open_runner({backend!r}, b.graph_path('projector'), b.spec('projector'), device='gpu')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "assert time.monotonic() - start < 3\n"  # 0.2 s, most of it the library's import
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "BackendUnavailable no NVIDIA driver: " in done.stdout
    assert done.stderr == ""


# --- memory -----------------------------------------------------------------------------------------------------------


def test_bytes_go_to_the_gpu_and_back(bindings_class: type[Any]) -> None:
    bindings = bindings_class()
    stream = CudaStream(GPU, bindings)
    there, here, back = stream.allocate(100, "a test"), stream.pin(100), stream.pin(100)
    here.view[:] = np.arange(100)
    stream.upload(there, here, 100)
    stream.zero(there, 10)
    stream.download(back, there, 100)
    stream.wait()
    assert back.view.tolist() == [0] * 10 + list(range(10, 100))
    stream.free(there)
    stream.unpin(here)
    stream.unpin(back)
    stream.close()
    assert bindings.memory == {}


def test_memory_that_is_short_is_told_with_numbers(bindings_class: type[Any]) -> None:
    stream = CudaStream(GPU, bindings_class(size=5_000_000, host=10))
    with pytest.raises(DeviceOutOfMemory, match=r"state k needs 6 MB, on GPU 0 \(NVIDIA Test\) 5 of 24000 MB are free"):
        stream.allocate(6_000_000, "state k")
    with pytest.raises(OutOfMemory, match="6 MB that can be pinned"):
        stream.pin(6_000_000)


def test_a_gpu_that_fails_is_named_with_the_drivers_reason(bindings_class: type[Any]) -> None:
    bindings = bindings_class()
    stream = CudaStream(GPU, bindings)
    bindings.fails = True
    with pytest.raises(BackendUnavailable, match=r"GPU 0 \(NVIDIA Test\) fails: CUDA_ERROR_ILLEGAL_ADDRESS"):
        stream.wait()


def test_the_functions_are_those_of_cuda_bindings(bindings_class: type[Any]) -> None:
    """What stands for the driver here has no function that the real one lacks."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed (extra: edgemed[gpu])")
    for name in (n for n in dir(bindings_class) if n.startswith(("cu", "CU"))):
        assert hasattr(driver, name), name
    assert int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING) == 1
    assert int(driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY) == 2
    assert int(driver.CUresult.CUDA_ERROR_NO_DEVICE) == 100
    assert int(driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) == 75
    assert int(driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR) == 76
