"""Runs the kernels through Triton itself: on a GPU for benchmarks, under TRITON_INTERPRET=1 on the CPU for tests.

Needs triton and torch, which the run time does not; there `launch` starts what `aot` compiled.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemed.triton_kernels.variants import Buffer, Variant


@cache
def kernel(op: str, name: str, uses: tuple[tuple[str, str], ...] = ()) -> Any:
    """Return the function `name` of module `op` as a Triton kernel. uses: (module, function) of what it calls."""
    helpers = {called: kernel(module, called) for module, called in uses}
    return jit(getattr(import_module(f"edgemed.triton_kernels.{op}"), name), helpers)


def jit(function: FunctionType, helpers: dict[str, Any]) -> Any:
    """Return a copy of `function` for Triton, which finds `tl` and `helpers` among its globals.

    A copy, because the modules of the kernels are imported where triton is not installed.
    """
    import triton
    import triton.language

    scope = {**function.__globals__, "tl": triton.language, **helpers}
    if triton.knobs.runtime.interpret:
        scope["range"] = _range
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    copy.__annotations__ = function.__annotations__
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return triton.jit(copy)


def _range(*bounds: Any) -> range:
    """Return `range` of the interpreter's scalars, arrays of one element. NumPy 2.4 refuses its own int() of them."""
    return range(*(int(bound.handle.data.item()) if hasattr(bound, "handle") else int(bound) for bound in bounds))


class TritonLauncher:
    """A `variants.Launcher` whose buffers are torch tensors on `device`."""

    def __init__(self, device: str = "cuda") -> None:
        self._device = device

    def upload(self, array: npt.NDArray[Any]) -> Buffer:
        """Return a copy of `array` on the device."""
        import torch

        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, copy=True)

    def empty(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Buffer:
        """Return an array of NaN, or of the smallest int32: what a kernel leaves out is seen."""
        return self.upload(np.full(shape, -(2**31) if np.issubdtype(dtype, np.integer) else np.nan, dtype))

    def download(self, buffer: Buffer) -> npt.NDArray[Any]:
        """Return a copy on the host."""
        array: npt.NDArray[Any] = buffer.cpu().numpy().copy()
        return array

    def launch(self, variant: Variant, **arguments: Any) -> None:
        """Run `variant`. Sizes that it was not compiled for are allowed here: Triton specializes anew."""
        grid = (variant.grid.programs(arguments),)
        kernel(variant.op, variant.kernel, variant.uses)[grid](
            **arguments, **variant.constants, num_warps=variant.warps, num_stages=variant.stages
        )
