"""box_head: the best coordinate of each position, its probability and the spread, from the allowed rows of the LM head.

Meaning, for each position p, with rows[0..n) the token ids that a coordinate can be:

    best[p], peak[p], mass[p], first[p], second[p] = none, -inf, 0, 0, 0
    for i, t in enumerate(rows):
        if allowed[p][i]:
            logit = sum(hidden[p][k] * head[t][k] for k in range(width))
            if logit > peak[p] or logit == peak[p] and t < best[p]:
                best[p], peak[p] = t, logit
            mass[p] += exp(logit)                     # computed relative to the peak, so that nothing overflows
            first[p] += exp(logit) * i
            second[p] += exp(logit) * i * i
    log_sum_exp[p] = log(mass[p])
    expected[p] = first[p] / mass[p]                  # an offset in rows: a coordinate in bins where rows is a range
    spread[p] = sqrt(second[p] / mass[p] - expected[p] ** 2)

Rows of the head that no position allows are not read, and logits are never written: a program keeps those of `tile`
rows in registers and writes one partial result a position, which `row_tiles.combine` joins. Covers 1 to 8 positions and
16384 rows; `masked_argmax` is for whole vocabularies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from edgemed.errors import InvalidInput
from edgemed.triton_kernels.masked_argmax import masked_argmax
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

Rows: TypeAlias = range | npt.NDArray[np.integer]
"""The token ids that are allowed at all: a range of step 1 (coordinates) or a list (digits and separators)."""

FORMATS = ("fp16", "int8", "fp8", "int8_block32")
TILE = 16  # rows; the smaller side of a matrix instruction, so that 1000 coordinates are 63 programs
MOST_PROGRAMS = 1024


@dataclass(frozen=True, eq=False)
class BoxBest:
    """Per position: token id (int64), logit, log-sum-exp, expected offset in the rows and its spread (float32)."""

    index: npt.NDArray[np.int64]
    peak: npt.NDArray[np.float32]
    log_sum_exp: npt.NDArray[np.float32]
    expected: npt.NDArray[np.float32]
    spread: npt.NDArray[np.float32]


def box_head(hidden: npt.NDArray[np.floating], head: Matrix, rows: Rows, allowed: npt.NDArray[np.bool_]) -> BoxBest:
    """Return the best allowed token of each position and how sure it is. NumPy reference, and the path of the CPU.

    hidden: [positions, width]; head: [vocabulary, width]; allowed: bool [positions, rows].

    Raises InvalidInput where rows are none or outside the vocabulary, where a position allows nothing, or where an
    allowed logit is NaN or infinite.
    """
    ids = _checked_ids(rows, head.rows)
    order = np.argsort(ids, kind="stable")  # so that a tie keeps the smaller token
    taken = head.take(slice(rows.start, rows.stop) if isinstance(rows, range) else ids)
    logits = hidden.astype(np.float32, copy=False) @ taken.to_float32().T  # [positions, rows]
    best = masked_argmax(logits[:, order], allowed[:, order])
    share = np.where(allowed, np.exp(logits - best.log_sum_exp[:, None]), np.float32(0)).astype(np.float64)
    offset = np.arange(len(ids))
    expected = (share * offset).sum(axis=1) / share.sum(axis=1)
    variance = (share * (offset - expected[:, None]) ** 2).sum(axis=1) / share.sum(axis=1)
    return BoxBest(
        ids[order][best.index].astype(np.int64),
        best.peak,
        best.log_sum_exp,
        expected.astype(np.float32),
        np.sqrt(variance).astype(np.float32),
    )


def box_head_tile(
    hidden: tl.pointer_type,
    values: tl.pointer_type,
    scales: tl.pointer_type,
    ids: tl.pointer_type,
    mask: tl.pointer_type,
    part_index: tl.pointer_type,
    part_numbers: tl.pointer_type,
    first: tl.int32,
    listed: tl.int32,
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
    """Write the partial result of `tile` rows for each position; see `row_tiles.combine`. listed: 0 for a range."""
    program = tl.program_id(0)
    offset = program * tile + tl.arange(0, tile)
    place = tl.arange(0, places)
    live = offset < rows
    token = tl.load(ids + offset, mask=live & (listed != 0), other=0)
    token = tl.where(listed != 0, token, first + offset)
    known = place < positions
    word = tl.load(
        mask + place[None, :] * words + (offset // 32)[:, None], mask=live[:, None] & known[None, :], other=0
    )
    allowed = ((word >> (offset % 32)[:, None]) & 1) != 0  # [tile, places]
    needed = tl.max(allowed.to(tl.int32), axis=1) != 0
    logit = row_dots(
        hidden, values, scales, token, needed, width, stride, positions, form, tile, chunk, places, split
    )  # [tile, places]
    logit = tl.where(allowed, logit, -float("inf"))
    peak = tl.max(logit, axis=0)  # [places]
    best = tl.min(tl.where(allowed & (logit == peak[None, :]), token[:, None], none), axis=0)
    shift = tl.where(peak == -float("inf"), 0.0, peak)
    weight = tl.where(allowed, tl.exp(logit - shift[None, :]), 0.0)
    mass = tl.sum(weight, axis=0)
    whole = tl.where(mass == 0.0, 1.0, mass)
    mean = tl.sum(weight * offset.to(tl.float32)[:, None], axis=0) / whole
    away = offset.to(tl.float32)[:, None] - mean[None, :]
    variance = tl.sum(weight * away * away, axis=0) / whole
    programs = tl.num_programs(0)
    at = place * programs + program
    size = positions * programs
    tl.store(part_index + at, best, mask=known)
    tl.store(part_numbers + at, peak, mask=known)
    tl.store(part_numbers + size + at, mass, mask=known)
    tl.store(part_numbers + 2 * size + at, mean, mask=known)
    tl.store(part_numbers + 3 * size + at, variance, mask=known)


def variants() -> list[Variant]:
    """Return what is compiled: each format, and the join."""
    return [*map(_variant, FORMATS), combine_variant("box_head", MOST_PROGRAMS, moments=True)]


def _variant(form: str) -> Variant:
    return Variant(
        name=f"box_head.{form}",
        op="box_head",
        kernel="box_head_tile",
        uses=(("row_tiles", "row_dots"),),
        arguments={
            "hidden": "*fp16",
            "values": POINTERS[form],
            "scales": "*fp32",
            "ids": "*i32",
            "mask": "*i32",
            "part_index": "*i32",
            "part_numbers": "*fp32",
            **dict.fromkeys(("first", "listed", "rows", "width", "stride", "positions", "words"), "i32"),
        },
        constants={"form": form, "tile": TILE, "chunk": 256, "places": MOST_POSITIONS, "split": 4, "none": LAST},
        grid=Grid("rows", TILE),
        divisible=("width", "stride"),
        stages=4,
        lowest=LOWEST.get(form, 80),
    )


@dataclass(frozen=True, eq=False)
class LoadedRows:
    """Rows on a device; ids is a buffer of one 0 where they are a range."""

    first: int
    count: int
    listed: bool
    ids: Buffer


def load_rows(launcher: Launcher, rows: Rows, vocabulary: int) -> LoadedRows:
    """Return `rows` on the launcher's device. Raises InvalidInput as `box_head`."""
    ids = _checked_ids(rows, vocabulary)
    listed = not isinstance(rows, range)
    return LoadedRows(int(ids[0]), len(ids), listed, launcher.upload(ids if listed else np.zeros(1, np.int32)))


@dataclass(frozen=True, eq=False)
class BoxBuffers:
    """Results on a device: index int32 [positions]; numbers float32 [positions, 4] as in `BoxBest`."""

    index: Buffer
    numbers: Buffer

    def download(self, launcher: Launcher) -> BoxBest:
        """Return the results on the host. Raises InvalidInput where an allowed logit was NaN or infinite."""
        numbers = launcher.download(self.numbers)
        check_finite(numbers[:, 1])
        return BoxBest(launcher.download(self.index).astype(np.int64), *np.ascontiguousarray(numbers.T))


def launch_box_head(
    launcher: Launcher, hidden: Buffer, head: LoadedMatrix, rows: LoadedRows, allowed: npt.NDArray[np.bool_]
) -> BoxBuffers:
    """Start `box_head` and return where its results will be. hidden: float16 [positions, width] on the device.

    Raises InvalidInput where shapes or the format do not fit, or a position allows nothing.
    """
    positions = hidden.shape[0]
    if head.format not in FORMATS or hidden.shape[1] != head.width or allowed.shape != (positions, rows.count):
        raise InvalidInput(
            f"hidden {tuple(hidden.shape)}, head {head.format} [{head.rows}, {head.width}], allowed {allowed.shape}; "
            f"[positions, {head.width}], one of {', '.join(FORMATS)} and [positions, {rows.count}] go together"
        )
    check_positions(positions)
    variant = _variant(head.format)
    programs = variant.grid.programs({"rows": rows.count})
    check_programs(programs, MOST_PROGRAMS, TILE)
    mask = pack_mask(allowed)
    part_index = launcher.empty((positions, programs), np.int32)
    part_numbers = launcher.empty((4, positions, programs), np.float32)
    found = BoxBuffers(launcher.empty((positions,), np.int32), launcher.empty((positions, 4), np.float32))
    launcher.launch(
        variant,
        hidden=hidden,
        values=head.values,
        scales=head.scales,
        ids=rows.ids,
        mask=launcher.upload(mask),
        part_index=part_index,
        part_numbers=part_numbers,
        first=rows.first,
        listed=int(rows.listed),
        rows=rows.count,
        width=head.width,
        stride=head.stride,
        positions=positions,
        words=mask.shape[1],
    )
    launcher.launch(
        combine_variant("box_head", MOST_PROGRAMS, moments=True),
        part_index=part_index,
        part_numbers=part_numbers,
        index=found.index,
        numbers=found.numbers,
        programs=programs,
        positions=positions,
    )
    return found


def run_box_head(
    launcher: Launcher, hidden: npt.NDArray[np.float16], head: Matrix, rows: Rows, allowed: npt.NDArray[np.bool_]
) -> BoxBest:
    """Return what `box_head` returns, by the kernel: everything goes to the device and comes back."""
    loaded = load_matrix(launcher, head), load_rows(launcher, rows, head.rows)
    return launch_box_head(launcher, launcher.upload(hidden), *loaded, allowed).download(launcher)


def _checked_ids(rows: Rows, vocabulary: int) -> npt.NDArray[np.int32]:
    ids = np.asarray(rows, np.int32)
    if ids.ndim != 1 or not len(ids) or (isinstance(rows, range) and rows.step != 1):
        raise InvalidInput("no rows of the head are allowed; a range of step 1 or a list of token ids was expected")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise InvalidInput(f"rows {ids.min()} to {ids.max()} of the head; it has {vocabulary}")
    return ids
