"""What `box_head` and `masked_argmax` share: rows of the LM head times hidden states, joining partial results.

Kernels are plain functions here; `triton_launcher.jit` makes them Triton's. They read `tl`, which it gives them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgemed.errors import InvalidInput
from edgemed.triton_kernels.variants import LAST, Grid, Variant

if TYPE_CHECKING:
    import triton.language as tl

MOST_POSITIONS = 8


def row_dots(
    hidden: tl.pointer_type,
    values: tl.pointer_type,
    scales: tl.pointer_type,
    row: tl.tensor,
    needed: tl.tensor,
    width: tl.int32,
    stride: tl.int32,
    positions: tl.int32,
    form: tl.constexpr,
    tile: tl.constexpr,
    chunk: tl.constexpr,
    places: tl.constexpr,
    split: tl.constexpr,
) -> tl.tensor:
    """Return float32 [tile, places]: `row`s of the matrix times hidden [positions, width]. Not `needed`: not read.

    Weights become float16 and meet `hidden` in the matrix unit, which sums in float32. float16 holds each stored value
    of fp16, int8 and fp8; of int8_block32 it rounds value * scale. One position costs what eight do: reading decides.
    split: parts of a chunk that warps take, as a batch of products. Without, four warps would repeat a 16-row tile.
    """
    base = row.to(tl.int64) * stride  # [tile]
    place = tl.arange(0, places)
    part: tl.constexpr = chunk // split
    sums = tl.zeros([split, tile, places], tl.float32)
    for start in range(0, width, chunk):
        column = start + tl.arange(0, split)[:, None] * part + tl.arange(0, part)[None, :]  # [split, part]
        inside = column < width
        there = needed[None, :, None] & inside[:, None, :]
        stored = tl.load(values + base[None, :, None] + column[:, None, :], mask=there, other=0)  # [split, tile, part]
        if form == "fp16":
            weight = stored
        elif form == "fp8":
            weight = stored.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        else:
            # 0x6400 | q are the bits of 1024 + q: two cheap operations for two weights, where a conversion takes a
            # slow unit (I2F in the machine code) for each.
            weight = (stored.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
        if form == "int8_block32":
            block = start // 32 + tl.arange(0, split)[:, None] * (part // 32) + tl.arange(0, part // 32)[None, :]
            blocks = (width + 31) // 32
            at = row.to(tl.int64)[None, :, None] * blocks + block[:, None, :]
            known = needed[None, :, None] & (block < blocks)[:, None, :]
            scale = tl.load(scales + at, mask=known, other=0.0)  # [split, tile, part / 32]
            grouped = tl.reshape(weight.to(tl.float32), [split, tile, part // 32, 32]) * scale[:, :, :, None]
            weight = tl.reshape(grouped, [split, tile, part]).to(tl.float16)
        known = inside[:, :, None] & (place < positions)[None, None, :]
        vector = tl.load(hidden + place[None, None, :] * width + column[:, :, None], mask=known, other=0.0)
        sums = tl.dot(weight, vector, sums)
    total = tl.sum(sums, axis=0)  # [tile, places]
    if form == "int8" or form == "fp8":
        total *= tl.load(scales + row, mask=needed, other=0.0)[:, None]
    return total


def combine(
    part_index: tl.pointer_type,
    part_numbers: tl.pointer_type,
    index: tl.pointer_type,
    numbers: tl.pointer_type,
    programs: tl.int32,
    positions: tl.int32,
    moments: tl.constexpr,
    most: tl.constexpr,
    none: tl.constexpr,
) -> None:
    """Join the partial results of a position: the best index, and [peak, log-sum-exp, mean, spread] or its first two.

    part_index: int32 [positions, programs]. part_numbers: float32 [2 or 4, positions, programs]: peak, mass relative to
    it, mean and variance of the offset.
    """
    place = tl.program_id(0)
    part = tl.arange(0, most)
    there = part < programs
    at = place * programs + part
    size = positions * programs
    best = tl.load(part_index + at, mask=there, other=none)
    peak = tl.load(part_numbers + at, mask=there, other=-float("inf"))
    mass = tl.load(part_numbers + size + at, mask=there, other=0.0)
    top = tl.max(peak, axis=0)
    shift = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.where(mass == 0.0, 0.0, mass * tl.exp(peak - shift))  # a NaN stays one, also under a peak of -inf
    total = tl.sum(weight, axis=0)
    tl.store(index + place, tl.min(tl.where(peak == top, best, none), axis=0))
    if moments:
        mean = tl.load(part_numbers + 2 * size + at, mask=there, other=0.0)
        variance = tl.load(part_numbers + 3 * size + at, mask=there, other=0.0)
        middle = tl.sum(weight * mean, axis=0) / total
        away = mean - middle
        # Around the mean, not E[x^2] - E[x]^2: at offsets near 1000 float32 would leave nothing of a spread of 1.
        tl.store(numbers + place * 4 + 2, middle)
        tl.store(numbers + place * 4 + 3, tl.sqrt(tl.sum(weight * (variance + away * away), axis=0) / total))
        tl.store(numbers + place * 4, top)
        tl.store(numbers + place * 4 + 1, shift + tl.log(total))
    else:
        tl.store(numbers + place * 2, top)
        tl.store(numbers + place * 2 + 1, shift + tl.log(total))


def combine_variant(op: str, most: int, *, moments: bool) -> Variant:
    """Return the variant of `combine` that belongs to `op` and joins up to `most` partial results in registers."""
    return Variant(
        name=f"{op}.combine",
        op="row_tiles",
        kernel="combine",
        arguments={
            "part_index": "*i32",
            "part_numbers": "*fp32",
            "index": "*i32",
            "numbers": "*fp32",
            "programs": "i32",
            "positions": "i32",
        },
        constants={"moments": int(moments), "most": most, "none": LAST},
        grid=Grid("positions"),
    )


def pack_mask(allowed: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Return the bits of bool [positions, entries] as int32 [positions, words]: entry i is bit i % 32 of word i / 32.

    Raises InvalidInput where a position allows nothing.
    """
    if not allowed.any(axis=1).all():
        raise InvalidInput("no token is allowed at some position; a grammar must always allow one")
    positions, entries = allowed.shape
    padded = np.zeros((positions, -(-entries // 32) * 32), np.bool_)
    padded[:, :entries] = allowed
    return np.packbits(padded, axis=1, bitorder="little").view("<i4").astype(np.int32, copy=False)


def check_positions(positions: int) -> None:
    """Raise InvalidInput where a kernel does not take so many positions at once."""
    if not 1 <= positions <= MOST_POSITIONS:
        raise InvalidInput(f"{positions} positions; 1 to {MOST_POSITIONS} were expected")


def check_programs(programs: int, most: int, tile: int) -> None:
    """Raise InvalidInput where there are more partial results than `combine` joins."""
    if programs > most:
        raise InvalidInput(f"more than {most * tile} rows of the head; up to that many were expected")


def check_finite(log_sum_exp: npt.NDArray[np.float32]) -> None:
    """Raise InvalidInput where an allowed logit was NaN or infinite: its position's log-sum-exp is then neither."""
    if not np.isfinite(log_sum_exp).all():
        raise InvalidInput("the decoder's logits are not finite; the weights or the image features are damaged")
