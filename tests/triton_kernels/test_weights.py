"""Formats against ml_dtypes and against what packing must keep."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from edgemed.errors import InvalidInput
from edgemed.triton_kernels.weights import e4m3_values, pack, to_e4m3

# Of the row's or block's largest magnitude: half a step of 127, of 3 fraction bits, of 8; half a float16 step.
HALF_STEP = {
    "fp32": 0,
    "fp16": 2**-11,
    "int8": 0.5 / 127,
    "int8_block32": 0.5 / 127,
    "fp8": 2**-4,
    "int4_block32": 0.125,
}


def test_every_e4m3_byte_has_the_value_of_ml_dtypes() -> None:
    expected = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(e4m3_values(), expected)


def test_rounding_to_e4m3_equals_ml_dtypes() -> None:
    rng = np.random.default_rng(0)
    sizes = np.sort(np.abs(e4m3_values()[np.isfinite(e4m3_values())]))
    middles = (sizes[1:] + sizes[:-1]) / 2  # ties
    values = np.concatenate([sizes, middles, rng.normal(0, 100, 5000).clip(-448, 448), np.exp(rng.normal(-4, 3, 5000))])
    values = np.concatenate([values, -values]).clip(-448, 448).astype(np.float32)
    np.testing.assert_array_equal(to_e4m3(values), values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def test_beyond_the_range_e4m3_stays_at_its_end() -> None:
    assert e4m3_values()[to_e4m3(np.array([1e9, -500], np.float32))].tolist() == [448, -448]


@pytest.mark.parametrize("form", HALF_STEP)
@pytest.mark.parametrize("shape", [(5, 96), (2, 7, 33)])
def test_packing_keeps_each_weight_to_half_a_step(form: str, shape: tuple[int, ...]) -> None:
    weights = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
    weights[..., 0, :] = 0
    matrix = pack(weights, form)
    assert (matrix.rows, matrix.width) == shape[-2:]
    largest = np.abs(weights).max(axis=-1, keepdims=True)
    assert (np.abs(matrix.to_float32() - weights) <= HALF_STEP[form] * 1.001 * largest).all()


@pytest.mark.parametrize("form", ["fp32", "fp16", "int8", "fp8", "int8_block32"])
def test_some_rows_of_a_matrix_are_those_rows(form: str) -> None:
    matrix = pack(np.random.default_rng(0).normal(0, 1, (9, 40)), form)
    rows = np.array([7, 0, 7])
    np.testing.assert_array_equal(matrix.take(rows).to_float32(), matrix.to_float32()[rows])
    np.testing.assert_array_equal(matrix.take(slice(2, 5)).to_float32(), matrix.to_float32()[2:5])


def test_a_format_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidInput, match="'int3'; one of fp32"):
        pack(np.ones((2, 32)), "int3")


@pytest.mark.parametrize("form", HALF_STEP)
def test_weights_that_are_not_finite_are_refused(form: str) -> None:
    with pytest.raises(InvalidInput, match="not a finite number"):
        pack(np.array([[1, np.nan] * 16], np.float32), form)
