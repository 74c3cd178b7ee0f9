"""Bounds of tensors, against what NumPy says of all values at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgemed.calibration.ranges import BINS, Magnitudes, best_bins, bounds, measure
from edgemed.errors import InvalidInput, NoInput
from edgemed.graphs import DimRange, GraphSpec, TensorSpec

RNG = np.random.default_rng(0)


def counted(*batches: np.ndarray[Any, Any]) -> Magnitudes:
    magnitudes = Magnitudes()
    for batch in batches:
        magnitudes.add(batch.astype(np.float32))
    return magnitudes


def layer() -> tuple[onnx.ModelProto, GraphSpec, np.ndarray[Any, Any]]:
    """x @ w -> relu, x of any number of rows."""
    w = RNG.normal(0, 1, (8, 5)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Relu", ["a"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    spec = GraphSpec(
        "vision_encoder",
        (TensorSpec("x", "float32", ("n", 8)),),
        (TensorSpec("y", "float32", ("n", 5)),),
        {"n": DimRange(1, 4, 100)},
    )
    return model, spec, w


def running_sum() -> tuple[onnx.ModelProto, GraphSpec]:
    """total = state + x: a graph with a state."""
    names = ("x", "past"), ("total", "present")
    infos = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2]) for n in side] for side in names]
    nodes = [helper.make_node("Add", ["x", "past"], ["total"]), helper.make_node("Identity", ["total"], ["present"])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", *infos), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    sides = [tuple(TensorSpec(n, "float32", (1, 2)) for n in side) for side in names]
    return model, GraphSpec("decoder", sides[0], sides[1], {}, (("present", "past"),))


def test_bounds_are_those_of_all_values_at_once() -> None:
    model, spec, w = layer()
    batches = [RNG.normal(0, scale, (n, 8)).astype(np.float32) for scale, n in ((1, 90), (40, 3), (5, 50))]
    found = measure(model, spec, ["x", "a", "y"], [({"x": b},) for b in batches], threads=1)
    x = np.concatenate(batches)
    exact = {"x": x, "a": x @ w, "y": np.maximum(x @ w, 0)}
    assert bounds(found, "minmax") == {n: pytest.approx(np.abs(v).max(), rel=1e-6) for n, v in exact.items()}
    assert all(m.counts.sum() == exact[n].size for n, m in found.items())


def test_the_percentile_is_numpys_to_a_bin() -> None:
    values = RNG.normal(0, 3, 200_000)
    magnitudes = counted(values[:50], values[50:])
    for percentile in (50.0, 99.0, 99.99):
        expected = np.percentile(np.abs(values), percentile)
        width = 2 * magnitudes.largest / BINS
        assert magnitudes.bound("percentile", percentile) == pytest.approx(expected, abs=width)


def test_the_histogram_that_grew_is_that_of_the_final_width() -> None:
    small, large = RNG.uniform(-1, 1, 10_000), RNG.uniform(-37, 37, 10_000)
    grown = counted(small, large)
    width = np.abs(small.astype(np.float32)).max() / BINS * 64  # doubled until 37 fits
    edges = np.arange(BINS + 1) * width
    expected, _ = np.histogram(np.abs(np.concatenate([small, large])), edges)
    assert np.abs(np.cumsum(grown.counts) - np.cumsum(expected)).max() <= 2  # rounding at the edges


def test_zeros_before_the_first_value_are_counted() -> None:
    magnitudes = counted(np.zeros(7), np.zeros(0), np.array([2.0, 0.0]))
    assert magnitudes.counts[0] == 8
    assert magnitudes.bound("minmax") == 2
    assert [counted(np.zeros(7)).bound(m) for m in ("minmax", "percentile", "entropy")] == [0, 0, 0]


def test_entropy_clips_an_outlier_and_keeps_what_is_spread_evenly() -> None:
    normal = RNG.normal(0, 1, 100_000)
    with_outlier = counted(normal, np.array([30.0]))
    assert with_outlier.bound("minmax") == 30
    assert 2 < with_outlier.bound("entropy") < 6
    even = counted(RNG.uniform(-1, 1, 100_000))
    assert even.bound("entropy") > 0.98


def test_entropy_is_that_of_the_plain_definition() -> None:
    counts = np.zeros(BINS, np.int64)
    counts[:600] = np.abs(RNG.normal(0, 1, 600) * 1000 * np.exp(-np.arange(600) / 100)).astype(np.int64)
    counts[1900] = 3

    def divergence(bins: int) -> float:
        p = counts[:bins].astype(float)
        p[-1] += counts[bins:].sum()
        q = np.zeros(bins)
        for level in range(128):
            part = slice(level * bins // 128, (level + 1) * bins // 128)
            used = counts[part] > 0
            q[part][used] = counts[part].sum() / max(used.sum(), 1)
        if p[-1] and not q[-1]:
            q[-1] = 1e-9 * counts[:bins].sum()
        p, q = p / p.sum(), q / q.sum()
        return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a))

    tried = range(128, 1902, 8)
    assert best_bins(counts) == min(reversed(tried), key=divergence)


def test_the_state_is_carried_inside_a_sequence_and_zero_at_its_start() -> None:
    model, spec = running_sum()
    one = {"x": np.ones((1, 2), np.float32)}
    found = measure(model, spec, ["total"], [(one, one, one), (one,)], threads=1)
    assert found["total"].bound("minmax") == 3
    assert found["total"].counts.sum() == 8


def test_feeds_that_are_missing_and_values_that_are_not_finite_are_told() -> None:
    model, spec, _ = layer()
    with pytest.raises(NoInput, match="vision_encoder has no feeds"):
        measure(model, spec, ["a"], [])
    broken = {"x": np.full((1, 8), np.inf, np.float32)}
    with pytest.raises(InvalidInput, match="vision_encoder, tensor x: a value is not finite"):
        measure(model, spec, ["x"], [(broken,)])
    with pytest.raises(InvalidInput, match="method is 'mean'"):
        counted(np.ones(3)).bound("mean")  # type: ignore[arg-type]
