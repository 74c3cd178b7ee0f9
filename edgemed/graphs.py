"""GraphSpec: what one graph takes and gives, written once per family and graph.

From it come the ONNX input and output names and dynamic shapes, the TensorRT optimisation profile, sample feeds for
parity tests, calibration shapes, the run-time shape check and the table in the docs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from edgemed.errors import InvalidInput

ROLES = ("vision_encoder", "projector", "decoder", "mask_decoder")
Dim = int | str
Feeds = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, NumPy dtype name, and shape; a str in the shape names a dynamic dim."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class DimRange:
    """The sizes a dynamic dim may take: smallest, the one to optimise for, largest."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max:
            raise InvalidInput(f"dim range {self.min}, {self.opt}, {self.max} is not in order")


@dataclass(frozen=True)
class GraphSpec:
    """Inputs, outputs, dynamic dims and state of one graph.

    state: pairs (output name, input name): the output is the next call's input and never leaves the Runner. A state
    input's dim that is called `cache` is allocated once at its `max` and updated in place.
    """

    role: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, DimRange] = field(default_factory=dict)
    state: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InvalidInput(f"graph role is {self.role!r}; one of {', '.join(ROLES)} was expected")
        used = {d for t in (*self.inputs, *self.outputs) for d in t.shape if isinstance(d, str)}
        if missing := sorted(used - set(self.dims)):
            raise InvalidInput(f"graph {self.role} uses dims {', '.join(missing)} that it does not declare")
        names_in, names_out = {t.name for t in self.inputs}, {t.name for t in self.outputs}
        for out, inp in self.state:
            if out not in names_out or inp not in names_in:
                raise InvalidInput(
                    f"graph {self.role} has state {out} -> {inp}, which are not an output and an input of it"
                )

    @cached_property
    def fed_inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs a caller feeds: all but the state."""
        kept = {inp for _, inp in self.state}
        return tuple(t for t in self.inputs if t.name not in kept)

    @cached_property
    def returned_outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs a caller gets back: all but the state."""
        kept = {out for out, _ in self.state}
        return tuple(t for t in self.outputs if t.name not in kept)

    def check(self, feeds: Feeds) -> None:
        """Raise InvalidInput naming the first tensor of `feeds` whose name, dtype, rank or size does not fit."""
        expected = {t.name for t in self.fed_inputs}
        if feeds.keys() != expected:
            raise InvalidInput(f"graph {self.role} got inputs {sorted(feeds)}, expected {sorted(expected)}")
        sizes: dict[str, int] = {}
        for spec in self.fed_inputs:
            name, array = spec.name, feeds[spec.name]
            if array.dtype != np.dtype(spec.dtype) or array.ndim != len(spec.shape):
                raise InvalidInput(
                    f"graph {self.role}, input {name}: {array.dtype} {list(array.shape)}, "
                    f"expected {spec.dtype} {list(spec.shape)}"
                )
            for dim, size in zip(spec.shape, array.shape, strict=True):
                if isinstance(dim, int):
                    wrong = size != dim
                else:
                    allowed = self.dims[dim]
                    wrong = not allowed.min <= size <= allowed.max or sizes.setdefault(dim, size) != size
                if wrong:
                    wanted = dim if isinstance(dim, int) else f"{dim} = {sizes.get(dim, self.dims[dim])}"
                    raise InvalidInput(
                        f"graph {self.role}, input {name}: size {size} of {list(array.shape)}, expected {wanted}"
                    )


def to_json(spec: GraphSpec) -> dict[str, Any]:
    """Return the spec as plain JSON values, for the manifest."""
    return {
        "role": spec.role,
        "inputs": [[t.name, t.dtype, list(t.shape)] for t in spec.inputs],
        "outputs": [[t.name, t.dtype, list(t.shape)] for t in spec.outputs],
        "dims": {k: [d.min, d.opt, d.max] for k, d in spec.dims.items()},
        "state": [list(pair) for pair in spec.state],
    }


def from_json(data: Mapping[str, Any]) -> GraphSpec:
    """Return the spec that `to_json` wrote."""
    return GraphSpec(
        role=data["role"],
        inputs=tuple(TensorSpec(n, t, tuple(s)) for n, t, s in data["inputs"]),
        outputs=tuple(TensorSpec(n, t, tuple(s)) for n, t, s in data["outputs"]),
        dims={k: DimRange(*v) for k, v in data["dims"].items()},
        state=tuple((a, b) for a, b in data["state"]),
    )
