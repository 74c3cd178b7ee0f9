"""Weights as blocks of 4- or 8-bit integers with one scale a block, in the layout of onnxruntime's `MatMulNBits`.

Covers packing and unpacking of [outputs, inputs] matrices, symmetric, round to nearest. Does not cover which weights
are packed (`edgemed.calibration`, `edgemed.export`) or graphs.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemed.errors import InvalidInput

Floats = npt.NDArray[np.float32]
Packed = npt.NDArray[np.uint8]

BITS = (4, 8)
_CHUNK = 1 << 22  # weights a thread holds as float32 at a time: 16 MiB, and as much again while it rounds


def pack_rows(matrix: npt.NDArray[Any], block: int, bits: int) -> tuple[Packed, Floats]:
    """Return (uint8 [outputs, blocks, block * bits / 8], float32 scales [outputs, blocks]) of [outputs, inputs].

    A stored value q stands for (q - zero) * scale with zero 128 (8 bits) or 8 (4 bits; the lower half of a byte comes
    first). 8 bits: scale = largest magnitude / 127. 4 bits: the weight of the largest magnitude becomes exactly -8, so
    that all 16 values are used, and a scale may be negative. The inputs are padded with zeros to whole blocks.

    matrix: float16, float32 or bfloat16. Rows are packed in chunks over two threads: one that is mapped from a file is
    never held whole.

    Raises InvalidInput where bits or block are none that the format has, or a weight is not finite.
    """
    if bits not in BITS or block < 16 or block & (block - 1):
        raise InvalidInput(f"{bits} bits in blocks of {block}; 4 or 8 bits in blocks of a power of two from 16 on")
    outputs, inputs = matrix.shape
    blocks = -(-inputs // block)
    packed = np.empty((outputs, blocks, block * bits // 8), np.uint8)
    scales = np.empty((outputs, blocks), np.float32)
    step = max(1, _CHUNK // (blocks * block))

    def pack(start: int) -> None:
        rows = matrix[start : start + step]
        values = np.zeros((len(rows), blocks * block), np.float32)
        values[:, :inputs] = as_float32(rows)
        packed[start : start + step], scales[start : start + step] = _packed(values.reshape(-1, blocks, block), bits)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(pack, range(0, outputs, step)))
    return packed, scales


def as_float32(values: npt.NDArray[Any]) -> Floats:
    """Return `values` as float32; bfloat16, which NumPy does not know itself, by its bits."""
    if values.dtype.name != "bfloat16":
        return values.astype(np.float32, copy=False)
    return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _packed(grouped: Floats, bits: int) -> tuple[Packed, Floats]:
    """Return what `pack_rows` returns of [outputs, blocks, block], and raise what it raises."""
    largest, smallest = grouped.max(axis=2), grouped.min(axis=2)
    if not (np.isfinite(largest) & np.isfinite(smallest)).all():
        raise InvalidInput("a weight is not a finite number; the checkpoint is damaged")
    if bits == 8:
        scales = np.maximum(largest, -smallest) / np.float32(127)
        divisor = np.where(scales > 0, scales, 1)[..., None]
        return (np.rint(grouped / divisor).clip(-127, 127) + 128).astype(np.uint8), scales
    scales = np.where(largest > -smallest, largest, smallest) / np.float32(-8)
    divisor = np.where(scales != 0, scales, 1)[..., None]
    values = (np.rint(grouped / divisor).clip(-8, 7) + 8).astype(np.uint8)
    return np.asarray(values[..., 0::2] | values[..., 1::2] << 4, np.uint8), scales.astype(np.float32)


def unpack_rows(packed: Packed, scales: Floats, bits: int) -> Floats:
    """Return the matrix [outputs, blocks * block] that `pack_rows` stored, padding included."""
    values = packed
    if bits == 4:
        values = np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:2], -1)
    zero = 8 if bits == 4 else 128
    return np.asarray((values.astype(np.float32) - zero) * scales[..., None]).reshape(len(packed), -1)
