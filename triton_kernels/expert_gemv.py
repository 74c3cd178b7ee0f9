"""expert_gemv: what the chosen expert makes of one token, reading that expert's weights alone.

Meaning, with gate_up [experts, 2 * inner, width] (gate first) and down [experts, width, inner]:

    for j in range(inner):
        gate = sum(gate_up[chosen][j][k] * x[k] for k in range(width))
        up = sum(gate_up[chosen][inner + j][k] * x[k] for k in range(width))
        activated[j] = gate / (1 + exp(-gate)) * up
    for i in range(width):
        out[i] = probability * sum(down[chosen][i][j] * activated[j] for j in range(inner))

`chosen` and `probability` are read on the device, where the router left them: no round trip to the host before the
weights are known. Two launches; `activated` stays in float32 between them. Covers one token; a prompt needs grouping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgemed.errors import InvalidInput
from edgemed.triton_kernels.variants import Buffer, Grid, Launcher, Variant
from edgemed.triton_kernels.weights import POINTERS, LoadedMatrix, Matrix, load_matrix

if TYPE_CHECKING:
    import triton.language as tl

FORMATS = ("fp16", "int8_block32", "int4_block32")
TILE = 4
CHUNK = {"fp16": 1024, "int8_block32": 1024, "int4_block32": 2048}  # 128 threads x 16 bytes are one or two rows of it


def expert_gemv(
    x: npt.NDArray[np.floating], gate_up: Matrix, down: Matrix, chosen: int, probability: float
) -> npt.NDArray[np.float32]:
    """Return float32 [width]: probability * down(silu(gate x) * up x) of expert `chosen`. NumPy reference.

    Raises InvalidInput where shapes do not fit or there is no such expert.
    """
    experts = gate_up.values.shape[0]
    _check(x.shape, gate_up.rows, gate_up.width, down.rows, down.width)
    if not 0 <= chosen < experts:
        raise InvalidInput(f"expert {chosen}; 0 to {experts - 1} were expected")
    both = expert(gate_up, chosen).to_float32() @ x.astype(np.float32)
    gate, up = np.split(both, 2)
    with np.errstate(over="ignore"):  # exp(-gate) = inf: the product is 0, which is right
        activated = gate / (1 + np.exp(-gate)) * up
    out: npt.NDArray[np.float32] = expert(down, chosen).to_float32() @ activated * np.float32(probability)
    return out


def expert(matrix: Matrix, chosen: int) -> Matrix:
    """Return one expert's matrix of [experts, rows, width]."""
    scales = matrix.scales if matrix.format == "fp16" else matrix.scales[chosen]
    return Matrix(matrix.format, matrix.width, matrix.values[chosen], scales)


def row_sums(
    vector: tl.pointer_type,
    values: tl.pointer_type,
    scales: tl.pointer_type,
    row: tl.tensor,
    needed: tl.tensor,
    width: tl.int32,
    stride: tl.int32,
    form: tl.constexpr,
    tile: tl.constexpr,
    chunk: tl.constexpr,
) -> tl.tensor:
    """Return float32 [tile]: the matrix's `row`s times vector [width], in float32; rows not `needed` are not read.

    Threads sum products of their own: a block's scale then multiplies one sum, not 32 weights. 0x4B000000 | q are the
    bits of 2 ** 23 + q: no conversion, for which sm_80, 100 and 120 use a slow unit (I2F in the machine code).
    """
    base = row.to(tl.int64) * stride  # [tile]
    blocks = (width + 31) // 32
    sums = tl.zeros([tile, chunk // 32], tl.float32)
    for start in range(0, width, chunk):
        block = start // 32 + tl.arange(0, chunk // 32)
        if form == "int4_block32":
            half = block[:, None] * 16 + tl.arange(0, 16)[None, :]  # [blocks, 16]: two weights a byte
            there = needed[:, None, None] & (block < blocks)[None, :, None]
            byte = tl.load(values + base[:, None, None] + half[None, :, :], mask=there, other=0).to(tl.uint32)
            column = half[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]  # [blocks, 16, 2]
            even, odd = tl.split(tl.load(vector + column, mask=column < width, other=0.0).to(tl.float32))
            low = ((byte & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
            high = ((byte >> 4) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
            product = tl.sum(low * even[None, :, :] + high * odd[None, :, :], axis=2)  # [tile, blocks]
        else:
            column = block[:, None] * 32 + tl.arange(0, 32)[None, :]  # [blocks, 32]
            there = needed[:, None, None] & (column < width)[None, :, :]
            stored = tl.load(values + base[:, None, None] + column[None, :, :], mask=there, other=0)
            if form == "fp16":
                weight = stored.to(tl.float32)
            else:
                weight = (stored.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
            entry = tl.load(vector + column, mask=column < width, other=0.0).to(tl.float32)
            product = tl.sum(weight * entry[None, :, :], axis=2)
        if form != "fp16":
            known = needed[:, None] & (block < blocks)[None, :]
            product *= tl.load(scales + row[:, None] * blocks + block[None, :], mask=known, other=0.0)
        sums += product
    return tl.sum(sums, axis=1)


def expert_up(
    x: tl.pointer_type,
    values: tl.pointer_type,
    scales: tl.pointer_type,
    chosen: tl.pointer_type,
    activated: tl.pointer_type,
    inner: tl.int32,
    width: tl.int32,
    stride: tl.int32,
    form: tl.constexpr,
    tile: tl.constexpr,
    chunk: tl.constexpr,
) -> None:
    """Write `tile` entries of `activated`."""
    entry = tl.program_id(0) * tile + tl.arange(0, tile)
    live = entry < inner
    row = tl.load(chosen).to(tl.int64) * 2 * inner + entry
    gate = row_sums(x, values, scales, row, live, width, stride, form, tile, chunk)
    up = row_sums(x, values, scales, row + inner, live, width, stride, form, tile, chunk)
    both = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(activated + entry, both, mask=live)


def expert_down(
    activated: tl.pointer_type,
    values: tl.pointer_type,
    scales: tl.pointer_type,
    chosen: tl.pointer_type,
    probability: tl.pointer_type,
    out: tl.pointer_type,
    rows: tl.int32,
    inner: tl.int32,
    stride: tl.int32,
    form: tl.constexpr,
    tile: tl.constexpr,
    chunk: tl.constexpr,
) -> None:
    """Write `tile` entries of `out`."""
    entry = tl.program_id(0) * tile + tl.arange(0, tile)
    live = entry < rows
    row = tl.load(chosen).to(tl.int64) * rows + entry
    total = row_sums(activated, values, scales, row, live, inner, stride, form, tile, chunk)
    tl.store(out + entry, (total * tl.load(probability)).to(tl.float16), mask=live)


def variants() -> list[Variant]:
    """Return what is compiled: both halves in each format."""
    return [half for form in FORMATS for half in _halves(form)]


def _halves(form: str) -> tuple[Variant, Variant]:
    constants: dict[str, int | str] = {"form": form, "tile": TILE, "chunk": CHUNK[form]}
    matrix = {"values": POINTERS[form], "scales": "*fp32", "chosen": "*i32"}
    up = Variant(
        name=f"expert_gemv.{form}.up",
        op="expert_gemv",
        kernel="expert_up",
        uses=(("expert_gemv", "row_sums"),),
        arguments={"x": "*fp16", **matrix, "activated": "*fp32", **dict.fromkeys(("inner", "width", "stride"), "i32")},
        constants=constants,
        grid=Grid("inner", TILE),
        divisible=("width", "stride"),
    )
    down = Variant(
        name=f"expert_gemv.{form}.down",
        op="expert_gemv",
        kernel="expert_down",
        uses=(("expert_gemv", "row_sums"),),
        arguments={
            "activated": "*fp32",
            **matrix,
            "probability": "*fp32",
            "out": "*fp16",
            **dict.fromkeys(("rows", "inner", "stride"), "i32"),
        },
        constants=constants,
        grid=Grid("rows", TILE),
        divisible=("inner", "stride"),
    )
    return up, down


def launch_expert_gemv(
    launcher: Launcher, x: Buffer, gate_up: LoadedMatrix, down: LoadedMatrix, chosen: Buffer, probability: Buffer
) -> Buffer:
    """Start both kernels and return where the result will be: float16 [width].

    x: float16 [width]; chosen: int32 [1], an expert that exists; probability: float32 [1]; all on the device.

    Raises InvalidInput where shapes or formats do not fit.
    """
    _check(tuple(x.shape), gate_up.rows, gate_up.width, down.rows, down.width)
    if gate_up.format != down.format or down.format not in FORMATS:
        raise InvalidInput(f"experts in {gate_up.format} and {down.format}; one of {', '.join(FORMATS)} was expected")
    up_half, down_half = _halves(gate_up.format)
    inner = down.width
    activated, out = launcher.empty((inner,), np.float32), launcher.empty((down.rows,), np.float16)
    launcher.launch(
        up_half,
        x=x,
        values=gate_up.values,
        scales=gate_up.scales,
        chosen=chosen,
        activated=activated,
        inner=inner,
        width=gate_up.width,
        stride=gate_up.stride,
    )
    launcher.launch(
        down_half,
        activated=activated,
        values=down.values,
        scales=down.scales,
        chosen=chosen,
        probability=probability,
        out=out,
        rows=down.rows,
        inner=inner,
        stride=down.stride,
    )
    return out


def run_expert_gemv(
    launcher: Launcher, x: npt.NDArray[np.float16], gate_up: Matrix, down: Matrix, chosen: int, probability: float
) -> npt.NDArray[np.float16]:
    """Return `expert_gemv` as float16, by the kernels: everything goes to the device and comes back."""
    routed = launcher.upload(np.array([chosen], np.int32)), launcher.upload(np.array([probability], np.float32))
    matrices = load_matrix(launcher, gate_up), load_matrix(launcher, down)
    return launcher.download(launch_expert_gemv(launcher, launcher.upload(x), *matrices, *routed))


def _check(x: tuple[int, ...], gate_up_rows: int, width: int, down_rows: int, inner: int) -> None:
    if x != (width,) or down_rows != width or gate_up_rows != 2 * inner:
        raise InvalidInput(
            f"x {x}, gate and up [{gate_up_rows}, {width}], down [{down_rows}, {inner}]; "
            "[width], [2 * inner, width] and [width, inner] were expected"
        )
