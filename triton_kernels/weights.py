"""The formats in which kernels read a weight matrix, one row an output: a table, packing, and what a stored row means.

    format         stored as                          row[i] stands for
    fp32           float32 [rows, width]              value; for the CPU, no kernel reads it
    fp16           float16 [rows, width]              value
    int8           uint8 [rows, width]                (value - 128) * scale[row]
    fp8            e4m3 bits, uint8 [rows, width]     e4m3(value) * scale[row]
    int8_block32   as `edgemed.blocks`, 8 bits        (value - 128) * scale[row, i / 32]
    int4_block32   as `edgemed.blocks`, 4 bits        (value - 8) * scale[row, i / 32]

fp8 needs a GPU of compute capability 8.9; below it, int8 has the same size. Covers no activations: they are float16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemed.blocks import as_float32, pack_rows, unpack_rows
from edgemed.errors import InvalidInput
from edgemed.triton_kernels.variants import Buffer, Launcher

BLOCK = 32
POINTERS = {"fp16": "*fp16", "int8": "*u8", "fp8": "*u8", "int8_block32": "*u8", "int4_block32": "*u8"}
"""Format -> the Triton type of the stored values."""
LOWEST = {"fp8": 89}
"""Format -> the first compute capability that converts it."""
_E4M3_LARGEST = 448.0
_PLAIN = ("fp32", "fp16")


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight matrix [..., rows, width] in one of the formats; scales are float32, of fp32 and fp16 a single 1."""

    format: str
    width: int
    values: npt.NDArray[Any]
    scales: npt.NDArray[np.float32]

    @property
    def row_axes(self) -> int:
        """How many axes of `values` a row takes: blocks have one of their own."""
        return 2 if self.format.endswith("block32") else 1

    @property
    def rows(self) -> int:
        """How many outputs there are."""
        return int(self.values.shape[-1 - self.row_axes])

    def to_float32(self) -> npt.NDArray[np.float32]:
        """Return float32 [..., rows, width], exactly what is stored."""
        if self.format in _PLAIN:
            return self.values.astype(np.float32, copy=False)
        if self.format == "int8":
            return (self.values.astype(np.float32) - 128) * self.scales[..., None]
        if self.format == "fp8":
            return np.asarray(e4m3_values()[self.values] * self.scales[..., None])
        lead = self.values.shape[:-3]
        flat = self.values.reshape(-1, *self.values.shape[-2:]), self.scales.reshape(-1, self.scales.shape[-1])
        return unpack_rows(*flat, bits=_bits(self.format)).reshape(*lead, self.rows, -1)[..., : self.width]

    def take(self, rows: slice | npt.NDArray[np.integer]) -> Matrix:
        """Return the matrix of these rows alone, of a matrix [rows, width]; of a slice without a copy."""
        scales = self.scales if self.format in _PLAIN else self.scales[rows]
        return Matrix(self.format, self.width, self.values[rows], scales)


@dataclass(frozen=True, eq=False)
class LoadedMatrix:
    """A matrix on a device. stride: stored elements from one row to the next."""

    format: str
    rows: int
    width: int
    stride: int
    values: Buffer
    scales: Buffer


def load_matrix(launcher: Launcher, matrix: Matrix) -> LoadedMatrix:
    """Return `matrix` on the launcher's device."""
    stride = math.prod(matrix.values.shape[-matrix.row_axes :])
    values, scales = launcher.upload(matrix.values), launcher.upload(matrix.scales)
    return LoadedMatrix(matrix.format, matrix.rows, matrix.width, stride, values, scales)


def pack(matrix: npt.NDArray[Any], form: str) -> Matrix:
    """Return `matrix` [..., rows, width] in the format `form`, rounded to the nearest value that it has.

    Raises InvalidInput where the format is unknown or a weight is not finite.
    """
    if form not in (*_PLAIN, *POINTERS):
        raise InvalidInput(f"weight format '{form}'; one of fp32, {', '.join(POINTERS)} was expected")
    width = matrix.shape[-1]
    if form.endswith("block32"):
        packed, scales = pack_rows(matrix.reshape(-1, width), BLOCK, _bits(form))
        lead = matrix.shape[:-1]
        return Matrix(form, width, packed.reshape(*lead, *packed.shape[1:]), scales.reshape(*lead, -1))
    values = as_float32(matrix)
    largest = np.abs(values).max(axis=-1)
    if not np.isfinite(largest).all():
        raise InvalidInput("a weight is not a finite number; the checkpoint is damaged")
    if form in _PLAIN:
        stored = values if form == "fp32" else values.astype(np.float16)
        return Matrix(form, width, stored, np.ones(1, np.float32))
    scales = (largest / np.float32(127 if form == "int8" else _E4M3_LARGEST)).astype(np.float32)
    scaled = (values / np.where(scales > 0, scales, 1)[..., None]).astype(np.float32)
    if form == "int8":
        return Matrix(form, width, (np.rint(scaled).clip(-127, 127) + 128).astype(np.uint8), scales)
    return Matrix(form, width, to_e4m3(scaled), scales)


@cache
def e4m3_values() -> npt.NDArray[np.float32]:
    """Return float32 [256]: what each byte stands for. 1 sign, 4 exponent bits of bias 7, 3 fraction bits.

    There are no infinities; 127 and 255 are NaN. Source: OCP 8-bit floating point specification, revision 1.0.
    """
    byte = np.arange(256)
    exponent, fraction = byte >> 3 & 15, byte & 7
    size = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10))
    size[(byte & 127) == 127] = np.nan
    return np.where(byte < 128, size, -size).astype(np.float32)


def to_e4m3(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Return the bytes of the nearest e4m3 values, an even fraction where two are as near; beyond 448 it is 448."""
    sizes = e4m3_values()[:127]  # ascending
    size = np.minimum(np.abs(values), np.float32(_E4M3_LARGEST))
    above = np.searchsorted(sizes, size).clip(1, 126)
    middle = (sizes[above - 1] + sizes[above]) / 2  # exact: both have four digits
    up = (size > middle) | ((size == middle) & (above % 2 == 0))
    byte = np.where(up, above, above - 1)
    return (byte + np.where(np.signbit(values), 128, 0)).astype(np.uint8)


def _bits(form: str) -> int:
    return 8 if form == "int8_block32" else 4
