"""What stands for a GPU where there is none: a driver whose memory is the host's."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest


class Result(int):
    """A code of the driver with its name."""

    name = "CUDA_ERROR_ILLEGAL_ADDRESS"


class Bindings:
    """What `CudaStream` asks of cuda.bindings.driver. The GPU's memory is the host's, of `size` bytes at most."""

    class CUstream_flags:  # noqa: N801
        CU_STREAM_NON_BLOCKING = 1

    def __init__(self, size: int = 1 << 30, host: int = 1 << 30) -> None:
        self.size, self.host, self.fails = size, host, False
        self.memory: dict[int, Any] = {}

    def _result(self) -> Result:
        return Result(700 if self.fails else 0)

    def cuInit(self, flags: int) -> tuple[int]:  # noqa: N802
        return (0,)

    def cuDeviceGet(self, index: int) -> tuple[int, int]:  # noqa: N802
        return 0, index

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int, str]:  # noqa: N802
        return 0, "context"

    def cuCtxSetCurrent(self, context: str) -> tuple[int]:  # noqa: N802
        assert context == "context"
        return (0,)

    def cuStreamCreate(self, flags: int) -> tuple[int, int]:  # noqa: N802
        assert flags == 1
        return 0, 77

    def cuStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802
        return (0,)

    def _allocate(self, size: int, left: int) -> tuple[int, int]:
        if size > left:
            return 2, 0
        block = ctypes.create_string_buffer(b"\xff" * size, size)  # as found: not zero
        self.memory[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cuMemAlloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        return self._allocate(size, self.size)

    def cuMemAllocHost(self, size: int) -> tuple[int, int]:  # noqa: N802
        return self._allocate(size, self.host)

    def cuMemFree(self, address: int) -> tuple[int]:  # noqa: N802
        del self.memory[address]
        return (0,)

    cuMemFreeHost = cuMemFree  # noqa: N815

    def _copy(self, to: int, source: int, size: int, stream: int) -> tuple[Result]:
        assert stream == 77
        ctypes.memmove(to, source, size)
        return (self._result(),)

    cuMemcpyHtoDAsync = cuMemcpyDtoHAsync = _copy  # noqa: N815

    def cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> tuple[int]:  # noqa: N802
        ctypes.memset(address, value, size)
        return (0,)

    def cuStreamSynchronize(self, stream: int) -> tuple[Result]:  # noqa: N802
        return (self._result(),)

    def cuMemGetInfo(self) -> tuple[int, int, int]:  # noqa: N802
        return 0, self.size, 24_000_000_000


@pytest.fixture
def bindings_class() -> type[Bindings]:
    """The class of the driver; test files cannot import this one."""
    return Bindings
