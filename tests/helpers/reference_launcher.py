"""A launcher whose kernels are the NumPy references: what a kernel is given, packed and in tiles, is what it computes.

`choices` runs a KernelHead on any launcher in a process of its own, which Triton's interpreter needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgemed.kernel_head import KernelHead
from edgemed.token_choice import Numbers
from edgemed.triton_kernels.box_head import box_head
from edgemed.triton_kernels.masked_argmax import masked_argmax
from edgemed.triton_kernels.variants import Variant
from edgemed.triton_kernels.weights import Matrix


class ReferenceLauncher:
    """A `variants.Launcher` of the host. launched: (kernel, positions, rows of the head that it may read)."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, int, int]] = []
        self._found: tuple[np.ndarray, np.ndarray] | None = None

    def upload(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array).copy()

    def empty(self, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        return np.full(shape, -1, dtype)

    def download(self, buffer: np.ndarray) -> np.ndarray:
        return buffer.copy()

    def launch(self, variant: Variant, **given: Any) -> None:
        variant.check(given)
        if variant.kernel == "combine":
            assert self._found is not None
            given["index"][:], given["numbers"][:] = self._found
            self._found = None
            return
        hidden, rows = given["hidden"].reshape(given["positions"], given["width"]), given["rows"]
        bits = np.unpackbits(given["mask"].view(np.uint8), bitorder="little").reshape(given["positions"], -1)
        allowed = bits[:, :rows].astype(bool)
        form = variant.constants["form"]
        head = Matrix(str(form), given["width"], given["values"], given["scales"])
        self.launched.append((variant.name, given["positions"], rows))
        if variant.kernel == "box_head_tile":
            ids = given["ids"] if given["listed"] else range(given["first"], given["first"] + rows)
            best = box_head(hidden, head, ids, allowed)
            numbers = np.stack([best.peak, best.log_sum_exp, best.expected, best.spread], axis=1)
        else:
            logits = hidden.astype(np.float32) @ head.to_float32().T
            best = masked_argmax(logits, allowed)
            numbers = np.stack([best.peak, best.log_sum_exp], axis=1)
        self._found = best.index.astype(np.int32), numbers


def choices(
    launcher: Any, head: Matrix, hidden: np.ndarray, masks: Sequence[np.ndarray | None], numbers: dict[int, float]
) -> list[tuple[int, float, float | None] | None]:
    """Return (token, log-probability, spread of a number) of each position, as kernels on `launcher` choose."""
    known, rng = Numbers(numbers), np.random.default_rng(0)
    found: list[tuple[int, float, float | None] | None] = []
    for after, allowed in zip(KernelHead(launcher, head).rows(hidden, masks, known), masks, strict=True):
        if after is None or allowed is None:
            found.append(None)
            continue
        token, log_prob = after.pick(allowed, 0.0, rng)
        found.append((token, log_prob, after.spread(allowed, known) if token in known else None))
    return found
