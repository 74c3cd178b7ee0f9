"""Blocks of 4- and 8-bit weights: what comes back, and that onnxruntime reads them as they are meant."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemed import blocks
from edgemed.blocks import BITS, as_float32, pack_rows, unpack_rows
from edgemed.errors import InvalidInput

LARGEST = {8: 127, 4: 7}


def random_matrix(outputs: int, inputs: int, seed: int, decades: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = 10.0 ** rng.integers(-decades, decades + 1, (outputs, 1))
    return (rng.normal(0, 1, (outputs, inputs)) * rows).astype(np.float32)


@given(
    st.integers(1, 9), st.integers(1, 140), st.sampled_from([16, 32, 128]), st.sampled_from(BITS), st.integers(0, 1000)
)
def test_every_weight_comes_back_within_half_a_step(
    outputs: int, inputs: int, block: int, bits: int, seed: int
) -> None:
    matrix = random_matrix(outputs, inputs, seed, decades=6)
    packed, scales = pack_rows(matrix, block, bits)
    blocks_of_row = -(-inputs // block)
    assert packed.shape == (outputs, blocks_of_row, block * bits // 8)
    assert scales.shape == (outputs, blocks_of_row)
    assert (packed.dtype, scales.dtype) == (np.uint8, np.float32)
    back = unpack_rows(packed, scales, bits)
    assert back.shape == (outputs, blocks_of_row * block)
    assert (back[:, inputs:] == 0).all()
    step = np.repeat(scales, block, axis=1)[:, :inputs]
    # 4 bits have no +8: a weight that is nearly as large as the largest one and of the other sign becomes 7 steps.
    allowed = np.where(matrix / step > LARGEST[bits] + 0.5, 1.0001, 0.5001) * np.abs(step)
    assert (np.abs(back[:, :inputs] - matrix) <= allowed).all()


@given(st.integers(1, 40), st.sampled_from([-1.0, 1.0]), st.integers(0, 1000))
def test_in_4_bits_the_largest_weight_of_a_block_is_exact_whatever_its_sign(
    inputs: int, sign: float, seed: int
) -> None:
    matrix = random_matrix(3, inputs, seed)
    matrix[:, 0] = sign * 9
    packed, scales = pack_rows(matrix, 64, 4)
    assert (packed[:, 0, 0] & 15 == 0).all()
    assert (unpack_rows(packed, scales, 4)[:, 0] == sign * 9).all()


@pytest.mark.parametrize(("bits", "zero"), [(8, 0x80), (4, 0x88)])
def test_a_block_of_zeros_stays_zero(bits: int, zero: int) -> None:
    packed, scales = pack_rows(np.zeros((2, 40), np.float32), 32, bits)
    assert (packed == zero).all()
    assert (scales == 0).all()
    assert (unpack_rows(packed, scales, bits) == 0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("inputs", "block"), [(64, 32), (70, 16), (33, 128)])
def test_the_runtime_reads_the_blocks_as_they_are_meant(bits: int, inputs: int, block: int) -> None:
    matrix = random_matrix(24, inputs, seed=1, decades=1)
    packed, scales = pack_rows(matrix, block, bits)
    h, to_tensor = onnx.helper, onnx.numpy_helper.from_array
    node = h.make_node(
        "MatMulNBits", ["x", "packed", "scales"], ["y"], domain="com.microsoft", K=inputs, N=24, bits=bits,
        block_size=block, accuracy_level=0,
    )  # fmt: skip
    graph = h.make_graph(
        [node],
        "g",
        [h.make_tensor_value_info("x", 1, ["n", inputs])],
        [h.make_tensor_value_info("y", 1, ["n", 24])],
        [to_tensor(packed, "packed"), to_tensor(scales, "scales")],
    )
    model = h.make_model(
        graph, opset_imports=[h.make_opsetid("", 21), h.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(2).normal(0, 1, (5, inputs)).astype(np.float32)
    expected = x @ unpack_rows(packed, scales, bits)[:, :inputs].T
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_packs_as_its_float32_values_do(bits: int, dtype: type) -> None:
    half = random_matrix(7, 70, seed=3).astype(dtype)
    whole = half.astype(np.float32)
    assert np.array_equal(as_float32(half), whole)
    for ours, expected in zip(pack_rows(half, 32, bits), pack_rows(whole, 32, bits), strict=True):
        assert np.array_equal(ours, expected)
    turned = np.ascontiguousarray(half.T).T  # rows that do not lie one after the other in memory
    assert np.array_equal(pack_rows(turned, 32, bits)[0], pack_rows(whole, 32, bits)[0])


@pytest.mark.parametrize("bits", BITS)
def test_chunks_make_no_difference(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_matrix(23, 50, seed=4)
    whole = pack_rows(matrix, 16, bits)
    monkeypatch.setattr(blocks, "_CHUNK", 5 * 64)
    for ours, expected in zip(pack_rows(matrix, 16, bits), whole, strict=True):
        assert np.array_equal(ours, expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_weight_that_is_no_number_is_refused(bits: int, bad: float, dtype: type) -> None:
    matrix = random_matrix(6, 40, seed=5)
    matrix[4, 37] = bad
    with pytest.raises(InvalidInput, match="not a finite number"):
        pack_rows(matrix.astype(dtype), 32, bits)


@pytest.mark.parametrize(("block", "bits"), [(24, 8), (8, 4), (0, 4), (32, 2)])
def test_a_format_that_the_runtime_lacks_is_refused(block: int, bits: int) -> None:
    with pytest.raises(InvalidInput, match="4 or 8 bits in blocks of a power of two from 16 on"):
        pack_rows(np.ones((2, 32), np.float32), block, bits)
