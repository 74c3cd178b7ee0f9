"""What a compiled kernel is called, takes and is launched with; what a launcher can do.

A variant is a kernel with its types and sizes fixed. The same variants are compiled ahead of time (`aot`), launched
through cuda-core (`launch`) and run by Triton itself (`triton_launcher`), so a grid or an argument is written once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edgemed.errors import InvalidInput

TARGETS = (80, 86, 89, 90, 100, 120)
"""Compute capabilities that kernels are compiled for: 8.0 (A100) to 12.0 (RTX 50)."""

ALIGNMENT = 16  # bytes of one 128-bit load; every buffer and row starts at a multiple
DESCRIPTION = "kernels.json"  # beside the cubins of a target
LAST = 2**31 - 1  # the index where nothing was allowed

Buffer: TypeAlias = Any
"""A launcher's array on its device. It has `shape`."""


@dataclass(frozen=True)
class Grid:
    """How many programs run: one for each `tile` of the argument `over`, begun or whole. over None: one."""

    over: str | None = None
    tile: int = 1

    def programs(self, arguments: Mapping[str, Any]) -> int:
        """Return the number of programs for these arguments."""
        return 1 if self.over is None else -(-int(arguments[self.over]) // self.tile)


@dataclass(frozen=True, eq=False)
class Variant:
    """One kernel with its types and sizes fixed.

    op: the module; kernel: the function in it. arguments: name -> Triton type, in order; constants follow them.
    divisible: integers that are multiples of 16, which 128-bit loads need (addresses always are).
    lowest: the first target whose instructions it needs. uses: (module, function) of what the kernel calls.
    """

    name: str
    op: str
    kernel: str
    arguments: Mapping[str, str]
    constants: Mapping[str, int | str]
    grid: Grid
    divisible: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 1
    lowest: int = 80
    uses: tuple[tuple[str, str], ...] = ()

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise InvalidInput where names, integers or divisibility are not what was compiled."""
        if list(arguments) != list(self.arguments):
            raise InvalidInput(f"kernel {self.name} got {list(arguments)}; {list(self.arguments)} were expected")
        for name in self.divisible:
            if arguments[name] % ALIGNMENT:
                raise InvalidInput(
                    f"kernel {self.name}: {name} is {arguments[name]}; a multiple of {ALIGNMENT} was expected. "
                    "Pad the matrix, or use the CPU path"
                )


class Launcher(Protocol):
    """Holds arrays on a device and starts kernels on one stream, in order."""

    def upload(self, array: npt.NDArray[Any]) -> Buffer:
        """Return a copy of `array` on the device."""

    def empty(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Buffer:
        """Return an array of any content on the device."""

    def download(self, buffer: Buffer) -> npt.NDArray[Any]:
        """Return a copy on the host; waits for what was launched before."""

    def launch(self, variant: Variant, **arguments: Any) -> None:
        """Start `variant`; returns before it is done. Raises InvalidInput as `Variant.check`."""
