"""masked_argmax: the best allowed token of each position, and what its probability needs, in one pass.

Meaning, for each position p:

    best[p], peak[p], mass[p] = none, -inf, 0
    for t in tokens:
        if allowed[p][t]:
            if logits[p][t] > peak[p]:          # a tie keeps the smaller t
                best[p], peak[p] = t, logits[p][t]
            mass[p] += exp(logits[p][t])
    log_sum_exp[p] = log(mass[p])               # computed relative to the peak, so that nothing overflows

so log(probability of best[p] among the allowed tokens) = peak[p] - log_sum_exp[p].

On the CPU logits come from the decoder's graph. On a GPU the kernel is given the hidden state: logits[p][t] is
sum(hidden[p][k] * head[t][k]), `allowed` is a bit a token, rows of the head that no position allows are not read, and
logits are never written. Each program keeps one result a position of `tile` rows; `row_tiles.combine` joins them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgemed.errors import InvalidInput
from edgemed.triton_kernels.row_tiles import (
    MOST_POSITIONS,
    check_finite,
    check_positions,
    check_programs,
    combine_variant,
    pack_mask,
)
from edgemed.triton_kernels.variants import LAST, Buffer, Grid, Launcher, Variant
from edgemed.triton_kernels.weights import LOWEST, POINTERS, LoadedMatrix, Matrix, load_matrix

if TYPE_CHECKING:
    import triton.language as tl

    from edgemed.triton_kernels.row_tiles import row_dots

FORMATS = ("fp16", "int8", "fp8")
TILE = 64  # rows that share one reading of `hidden`: at most a quarter of what their 8-bit weights take
MOST_PROGRAMS = 4096


@dataclass(frozen=True, eq=False)
class Best:
    """Per position: the token id (int64), its logit (float32), log-sum-exp over the allowed logits (float32)."""

    index: npt.NDArray[np.int64]
    peak: npt.NDArray[np.float32]
    log_sum_exp: npt.NDArray[np.float32]


def masked_argmax(logits: npt.NDArray[np.float32], allowed: npt.NDArray[np.bool_]) -> Best:
    """Return the best allowed token of each position. NumPy reference.

    logits: float32 [positions, vocabulary]; allowed: bool, the same shape or broadcast to it.

    Raises InvalidInput where a position allows nothing, or where an allowed logit is NaN or infinite.
    """
    # Written for one position after 150 MB of weights have gone through the cache: 0.1 ms for 49,152 tokens; a masked
    # copy, take_along_axis and an array for each step took 0.3 ms (EPYC, NumPy 2.4).
    if allowed.shape != logits.shape:
        allowed = np.broadcast_to(allowed, logits.shape)
    places = np.arange(len(logits))
    index = logits.argmax(axis=1)
    peak = logits[places, index]
    if not (allowed[places, index].all() and np.isfinite(peak).all()):
        logits = np.where(allowed, logits, np.float32(-np.inf))
        index = logits.argmax(axis=1)
        peak = logits[places, index]
        if not np.isfinite(peak).all():
            if not allowed.any(axis=1).all():
                raise InvalidInput("no token is allowed at some position; a grammar must always allow one")
            raise InvalidInput("the decoder's logits are not finite; the weights or the image features are damaged")
    mass = np.subtract(logits, peak[:, None], dtype=np.float32)  # [positions, vocabulary]
    np.multiply(np.exp(mass, out=mass), allowed, out=mass)
    return Best(index, peak, peak + np.log(mass.sum(axis=1)))


def masked_argmax_tile(
    hidden: tl.pointer_type,
    values: tl.pointer_type,
    scales: tl.pointer_type,
    mask: tl.pointer_type,
    part_index: tl.pointer_type,
    part_numbers: tl.pointer_type,
    rows: tl.int32,
    width: tl.int32,
    stride: tl.int32,
    positions: tl.int32,
    words: tl.int32,
    form: tl.constexpr,
    tile: tl.constexpr,
    chunk: tl.constexpr,
    places: tl.constexpr,
    split: tl.constexpr,
    none: tl.constexpr,
) -> None:
    """Write the partial result of `tile` rows for each position; see `row_tiles.combine`."""
    program = tl.program_id(0)
    place = tl.arange(0, places)
    known = place < positions
    token = program * tile + tl.arange(0, tile)
    live = token < rows
    word = tl.load(mask + place[None, :] * words + (token // 32)[:, None], mask=live[:, None] & known[None, :], other=0)
    allowed = ((word >> (token % 32)[:, None]) & 1) != 0  # [tile, places]
    needed = tl.max(allowed.to(tl.int32), axis=1) != 0
    logit = row_dots(
        hidden, values, scales, token, needed, width, stride, positions, form, tile, chunk, places, split
    )  # [tile, places]
    logit = tl.where(allowed, logit, -float("inf"))
    peak = tl.max(logit, axis=0)  # [places]
    best = tl.min(tl.where(allowed & (logit == peak[None, :]), token[:, None], none), axis=0)
    shift = tl.where(peak == -float("inf"), 0.0, peak)
    mass = tl.sum(tl.where(allowed, tl.exp(logit - shift[None, :]), 0.0), axis=0)
    programs = tl.num_programs(0)
    at = place * programs + program
    tl.store(part_index + at, best, mask=known)
    tl.store(part_numbers + at, peak, mask=known)
    tl.store(part_numbers + positions * programs + at, mass, mask=known)


def variants() -> list[Variant]:
    """Return what is compiled: each format, and the join."""
    return [*map(_variant, FORMATS), combine_variant("masked_argmax", MOST_PROGRAMS, moments=False)]


def _variant(form: str) -> Variant:
    return Variant(
        name=f"masked_argmax.{form}",
        op="masked_argmax",
        kernel="masked_argmax_tile",
        uses=(("row_tiles", "row_dots"),),
        arguments={
            "hidden": "*fp16",
            "values": POINTERS[form],
            "scales": "*fp32",
            "mask": "*i32",
            "part_index": "*i32",
            "part_numbers": "*fp32",
            **dict.fromkeys(("rows", "width", "stride", "positions", "words"), "i32"),
        },
        constants={"form": form, "tile": TILE, "chunk": 128, "places": MOST_POSITIONS, "split": 4, "none": LAST},
        grid=Grid("rows", TILE),
        divisible=("width", "stride"),
        stages=3,
        lowest=LOWEST.get(form, 80),
    )


@dataclass(frozen=True, eq=False)
class BestBuffers:
    """Results on a device: index int32 [positions]; numbers float32 [positions, 2], peak and log-sum-exp."""

    index: Buffer
    numbers: Buffer

    def download(self, launcher: Launcher) -> Best:
        """Return the results on the host. Raises InvalidInput where an allowed logit was NaN or infinite."""
        numbers = launcher.download(self.numbers)
        check_finite(numbers[:, 1])
        return Best(launcher.download(self.index).astype(np.int64), *np.ascontiguousarray(numbers.T))


def launch_masked_argmax(
    launcher: Launcher, hidden: Buffer, head: LoadedMatrix, allowed: npt.NDArray[np.bool_]
) -> BestBuffers:
    """Start the kernel and return where its results will be. hidden: float16 [positions, width] on the device.

    Raises InvalidInput where shapes or the format do not fit, or a position allows nothing.
    """
    positions = hidden.shape[0]
    if head.format not in FORMATS or hidden.shape[1] != head.width or allowed.shape != (positions, head.rows):
        raise InvalidInput(
            f"hidden {tuple(hidden.shape)}, head {head.format} [{head.rows}, {head.width}], allowed {allowed.shape}; "
            f"[positions, {head.width}], one of {', '.join(FORMATS)} and [positions, {head.rows}] go together"
        )
    check_positions(positions)
    variant = _variant(head.format)
    programs = variant.grid.programs({"rows": head.rows})
    check_programs(programs, MOST_PROGRAMS, TILE)
    mask = pack_mask(allowed)
    part_index = launcher.empty((positions, programs), np.int32)
    part_numbers = launcher.empty((2, positions, programs), np.float32)
    found = BestBuffers(launcher.empty((positions,), np.int32), launcher.empty((positions, 2), np.float32))
    launcher.launch(
        variant,
        hidden=hidden,
        values=head.values,
        scales=head.scales,
        mask=launcher.upload(mask),
        part_index=part_index,
        part_numbers=part_numbers,
        rows=head.rows,
        width=head.width,
        stride=head.stride,
        positions=positions,
        words=mask.shape[1],
    )
    launcher.launch(
        combine_variant("masked_argmax", MOST_PROGRAMS, moments=False),
        part_index=part_index,
        part_numbers=part_numbers,
        index=found.index,
        numbers=found.numbers,
        programs=programs,
        positions=positions,
    )
    return found


def run_masked_argmax(
    launcher: Launcher, hidden: npt.NDArray[np.float16], head: Matrix, allowed: npt.NDArray[np.bool_]
) -> Best:
    """Return `masked_argmax` of hidden x head, by the kernel: everything goes to the device and comes back."""
    found = launch_masked_argmax(launcher, launcher.upload(hidden), load_matrix(launcher, head), allowed)
    return found.download(launcher)
