"""A graph whose matrices are blocks of 8- or 4-bit weights, and onnxruntime's quantizer for comparison."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from edgemed.blocks import pack_rows, unpack_rows
from edgemed.calibration.weight_only import WeightPlan, products_wanted, quantize_weights
from edgemed.errors import InvalidInput

RNG = np.random.default_rng(0)


def two_layers(inputs: int = 70, inner: int = 96, outputs: int = 24, seed: int = 0):
    """x @ first -> relu -> @ second, plus a MatMul of two computed values, which has no weight to quantize."""
    rng = np.random.default_rng(seed)
    h = onnx.helper
    weights = {
        "first": rng.normal(0, 0.1, (inputs, inner)).astype(np.float32),
        "second": (rng.normal(0, 0.1, (inner, outputs)) * 2.0 ** rng.integers(-4, 4, outputs)).astype(np.float32),
    }
    nodes = [
        h.make_node("MatMul", ["x", "first"], ["a"], "one"),
        h.make_node("Relu", ["a"], ["b"]),
        h.make_node("MatMul", ["b", "second"], ["y"], "two"),
        h.make_node("Transpose", ["y"], ["yt"], perm=[1, 0]),
        h.make_node("MatMul", ["y", "yt"], ["gram"]),
    ]
    graph = h.make_graph(
        nodes,
        "g",
        [h.make_tensor_value_info("x", 1, ["n", inputs])],
        [h.make_tensor_value_info("y", 1, ["n", outputs]), h.make_tensor_value_info("gram", 1, ["n", "n"])],
        [onnx.numpy_helper.from_array(w, name) for name, w in weights.items()],
    )
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 21)], ir_version=10), weights


def run(model, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


def test_the_runtime_reads_the_blocks_as_they_were_meant() -> None:
    model, weights = two_layers()
    plan = WeightPlan(accuracy_level=0)
    quantized, _ = quantize_weights(model, plan)
    x = RNG.normal(0, 1, (5, 70)).astype(np.float32)
    restored = {n: unpack_rows(*pack_rows(w.T, 32, 8), 8).T[: w.shape[0]] for n, w in weights.items()}
    expected = np.maximum(x @ restored["first"], 0) @ restored["second"]
    np.testing.assert_allclose(run(quantized, x), expected, atol=1e-4)


def test_each_weight_gets_the_bits_the_plan_gives_it_and_the_runtime_reads_them() -> None:
    model, weights = two_layers()
    quantized, rows = quantize_weights(model, WeightPlan(bits=4, bits_of={"second": 8}, accuracy_level=0))
    assert [(r.name, r.bits) for r in rows] == [("first", 4), ("second", 8)]
    x = RNG.normal(0, 1, (5, 70)).astype(np.float32)
    first, second = (
        unpack_rows(*pack_rows(weights[n].T, 32, b), b).T[: len(weights[n])] for n, b in (("first", 4), ("second", 8))
    )
    np.testing.assert_allclose(run(quantized, x), np.maximum(x @ first, 0) @ second, atol=1e-4)


def correlated(rows: int, inputs: int) -> np.ndarray:
    """Activations [rows, inputs] whose channels share 8 causes, some of them 30 times as large as others."""
    rng = np.random.default_rng(1)
    causes = rng.normal(0, 1, (8, inputs)) * np.geomspace(0.2, 6, inputs)
    return (rng.normal(0, 1, (rows, 8)) @ causes + rng.normal(0, 0.1, (rows, inputs))).astype(np.float32)


@pytest.mark.parametrize("inputs", [128, 70])  # whole blocks, and a last one that is padded
def test_four_bits_rounded_for_outputs_lose_less_on_activations_of_that_kind(inputs: int) -> None:
    model, weights = two_layers(inputs)
    x, other = np.split(correlated(400, inputs), 2)
    plan = WeightPlan(bits=4, excluded={"second": "its own error would hide that of the first"}, accuracy_level=0)
    assert products_wanted(model, plan) == {"x": -1}
    exact = np.maximum(other @ weights["first"], 0) @ weights["second"]

    def error(products) -> float:
        return float(np.linalg.norm(run(quantize_weights(model, plan, products)[0], other) - exact))

    assert error({"x": x.T @ x}) < 0.75 * error(None)  # 0.50 and 0.63 measured


def test_products_of_another_size_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"products of \[3, 3\] for weight first; \[70, 70\]"):
        quantize_weights(two_layers()[0], WeightPlan(bits=4), {"x": np.eye(3, dtype=np.float32)})


@pytest.mark.parametrize("level", [0, 4])
def test_the_result_is_close_to_full_precision_and_no_worse_than_the_runtimes_own_quantizer(level: int) -> None:
    model, weights = two_layers(inputs=128, inner=256, outputs=64)
    x = RNG.normal(0, 1, (40, 128)).astype(np.float32)
    exact = np.maximum(x @ weights["first"], 0) @ weights["second"]
    theirs = MatMulNBitsQuantizer(model, bits=8, block_size=32, is_symmetric=True, accuracy_level=level)
    theirs.process()

    def error(m) -> float:
        return float(np.linalg.norm(run(m, x) - exact) / np.linalg.norm(exact))

    ours, _ = quantize_weights(model, WeightPlan(accuracy_level=level))
    assert error(ours) < (0.010 if level == 0 else 0.012)
    assert error(ours) < error(theirs.model.model) * 1.1


def test_the_model_given_is_not_changed_and_the_new_one_is_smaller() -> None:
    model, _ = two_layers(256, 256, 256)
    before = model.SerializeToString()
    quantized, rows = quantize_weights(model)
    assert model.SerializeToString() == before
    assert quantized.ByteSize() < 0.31 * model.ByteSize()
    assert [(r.name, r.shape) for r in rows] == [("first", (256, 256)), ("second", (256, 256))]
    assert all(0.001 < r.relative_error < 0.01 for r in rows)
    assert {n.op_type for n in quantized.graph.node} == {"MatMulNBits", "Relu", "Transpose", "MatMul"}


def test_excluded_weights_keep_their_precision() -> None:
    model, weights = two_layers()
    quantized, rows = quantize_weights(model, WeightPlan(excluded={"second": "its columns differ in size by 2 ** 7"}))
    assert [r.name for r in rows] == ["first"]
    kept = {t.name: onnx.numpy_helper.to_array(t) for t in quantized.graph.initializer}
    assert np.array_equal(kept["second"], weights["second"])
    assert "first" not in kept


def test_a_weight_that_two_nodes_share_is_stored_once() -> None:
    model, _ = two_layers(64, 64, 64)
    model.graph.node[2].input[1] = "first"
    quantized, rows = quantize_weights(model)
    assert len(rows) == 1
    assert sorted(t.name for t in quantized.graph.initializer) == ["first.int8", "first.scales"]
    assert run(quantized, np.ones((1, 64), np.float32)).shape == (1, 64)


def test_the_new_graph_is_the_same_bytes_each_time() -> None:
    model, _ = two_layers()
    assert quantize_weights(model)[0].SerializeToString() == quantize_weights(model)[0].SerializeToString()


def test_plans_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidInput, match="power of two"):
        WeightPlan(block=24)
    with pytest.raises(InvalidInput, match="bits is 5"):
        WeightPlan(bits_of={"first": 5})
    with pytest.raises(InvalidInput, match="accuracy_level"):
        WeightPlan(accuracy_level=7)
    with pytest.raises(InvalidInput, match="names third"):
        quantize_weights(two_layers()[0], WeightPlan(excluded={"third": "typing error"}))
