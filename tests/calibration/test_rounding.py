"""Sums over activations, and rounding for outputs, on matrices of a few rows."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from edgemed.calibration.rounding import measure_products, rounded
from edgemed.graphs import DimRange, GraphSpec, TensorSpec

SPEC = GraphSpec(
    role="projector",
    inputs=(TensorSpec("x", "float32", (1, "n", 3)),),
    outputs=(TensorSpec("y", "float32", (1, "n", 3)),),
    dims={"n": DimRange(1, 2, 8)},
)
ROWS = np.array([[[300, 400, 0], [0, 0.6, 0.8]]], np.float32)  # one 500 long, one 1 long


def doubler() -> onnx.ModelProto:
    h = onnx.helper
    fed, returned = (h.make_tensor_value_info(t.name, 1, list(t.shape)) for t in (*SPEC.inputs, *SPEC.outputs))
    graph = h.make_graph([h.make_node("Add", ["x", "x"], ["y"])], "g", [fed], [returned])
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize(("tensor", "times"), [("x", 1), ("y", 4)])  # one that is fed, one that is computed
def test_sums_of_squares_are_those_of_all_rows(tensor: str, times: int) -> None:
    sums = measure_products(doubler(), SPEC, {tensor: 2}, [[{"x": ROWS}], [{"x": ROWS}]], threads=1)
    expected = 2 * times * (ROWS[0].T @ ROWS[0])
    np.testing.assert_allclose(sums[tensor], expected, rtol=1e-6)


def test_rows_of_the_same_length_count_the_same_however_long_they_were() -> None:
    sums = measure_products(doubler(), SPEC, {"y": 2}, [[{"x": ROWS}]], threads=1, same_length=True)
    unit = np.array([[0.6, 0.8, 0], [0, 0.6, 0.8]])
    np.testing.assert_allclose(sums["y"], 3 * unit.T @ unit, rtol=1e-5)  # mean square 1: length sqrt(3)


def test_a_row_of_zeros_adds_nothing() -> None:
    sums = measure_products(doubler(), SPEC, {"x": 2}, [[{"x": 0 * ROWS}]], threads=1, same_length=True)
    assert not sums["x"].any()


def test_with_much_damping_each_weight_is_rounded_by_itself() -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 3, (5, 200)).astype(np.float32)
    x = rng.normal(0, 1, (300, 200)) @ rng.normal(0, 1, (200, 200))
    products = (x.T @ x).astype(np.float32)
    ones = np.ones_like(weights)
    nearest = np.rint(weights).clip(-8, 7)
    assert np.array_equal(rounded(weights, ones, products, -8, 7, damping=1e6), nearest)
    for_outputs = rounded(weights, ones, products, -8, 7)
    lost, most = (float(np.linalg.norm(x @ (v - weights).T)) for v in (for_outputs, nearest))
    assert lost < 0.75 * most
