"""Channels that are scaled before INT8: the graph computes the same, and less is lost where channels differ."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgemed.calibration.equalize import Rows, best_factors, equalized, sample_rows, to_equalize
from edgemed.calibration.plan import QuantPlan
from edgemed.calibration.qdq import quantize
from edgemed.calibration.ranges import bounds, measure
from edgemed.calibration.sensitivity import compare, outputs_of
from edgemed.calibration.sites import activations, default_plan
from edgemed.graphs import DimRange, Feeds, GraphSpec, TensorSpec

ROLE, WIDTH = "vision_encoder", 32
SPEC = GraphSpec(
    ROLE, (TensorSpec("x", "float32", ("n", 4, WIDTH)),), (TensorSpec("y", "float32", ("n", 4, WIDTH)),),
    {"n": DimRange(1, 1, 8)},
)  # fmt: skip


def uneven_net(dtype: type = np.float32) -> onnx.ModelProto:
    """Norm with a few large channels -> MatMul -> Gelu -> MatMul, the products in `dtype`."""
    rng = np.random.default_rng(0)
    gain = np.where(np.arange(WIDTH) % 16 == 3, 40, 1).astype(np.float32)
    weights = {"up": rng.normal(0, 0.2, (WIDTH, 64)) / gain[:, None], "down": rng.normal(0, 0.2, (64, WIDTH))}
    tensors = [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()]
    tensors += [numpy_helper.from_array(gain, "gain"), numpy_helper.from_array(gain * np.float32(0.1), "bias")]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    n = helper.make_node
    nodes = [
        n("LayerNormalization", ["x", "gain", "bias"], ["norm"], "norm"),
        n("Cast", ["norm"], ["norm.low"], "c0", to=kind),
        n("Cast", ["up"], ["up.low"], "c1", to=kind),
        n("Cast", ["down"], ["down.low"], "c2", to=kind),
        n("MatMul", ["norm.low", "up.low"], ["u"], "up"),
        n("Gelu", ["u"], ["g"], "g"),
        n("MatMul", ["g", "down.low"], ["d"], "down"),
        n("Cast", ["d"], ["y"], "c3", to=onnx.TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4, WIDTH])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4, WIDTH])], tensors,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def calls(count: int = 4, seed: int = 1) -> tuple[tuple[Feeds, ...], ...]:
    rng = np.random.default_rng(seed)
    return tuple(({"x": rng.normal(0, 1, (2, 4, WIDTH)).astype(np.float32)},) for _ in range(count))


def scaled(model: onnx.ModelProto) -> tuple[onnx.ModelProto, QuantPlan]:
    plan = default_plan({ROLE: model}, {ROLE: "int8"})
    rows = sample_rows(model, SPEC, to_equalize(model, ROLE, plan), calls(), threads=1)
    return equalized(model, ROLE, plan, rows), plan


@pytest.mark.parametrize(("dtype", "error"), [(np.float32, 1e-5), (np.float16, 5e-3)])
def test_the_graph_computes_the_same_and_the_norm_takes_the_factors(dtype: type, error: float) -> None:
    model = uneven_net(dtype)
    made, _ = scaled(model)
    exact = outputs_of(model, SPEC, calls(seed=2), threads=1)
    assert compare(exact, outputs_of(made, SPEC, calls(seed=2), threads=1)).relative_error < error
    assert Counter(n.op_type for n in made.graph.node) - Counter(n.op_type for n in model.graph.node) in (
        Counter(), Counter({"Mul": 1})  # before the second product, if it gains by it
    )  # fmt: skip
    gains = [next(t for t in m.graph.initializer if t.name == "gain") for m in (model, made)]
    before, after = (np.ptp(numpy_helper.to_array(t)) for t in gains)
    assert after < before / 2


def test_int8_loses_less_after_it() -> None:
    model = uneven_net()
    made, plan = scaled(model)
    exact = outputs_of(model, SPEC, calls(seed=2), threads=1)
    errors = []
    for graph in (model, made):
        found = bounds(measure(graph, SPEC, activations(graph, ROLE, plan), calls(), threads=1), "minmax")
        small, _ = quantize(graph, ROLE, plan, found)
        errors.append(compare(exact, outputs_of(small, SPEC, calls(seed=2), threads=1)).relative_error)
    assert errors[1] < 0.6 * errors[0]


def test_channels_of_one_size_are_left_alone() -> None:
    rng = np.random.default_rng(3)
    rows = Rows(rng.choice([-1.0, 1.0], (64, 8)).astype(np.float32), np.ones(8, np.float32))
    assert best_factors(rows, rng.choice([-0.5, 0.5], (8, 16)).astype(np.float32)) is None


def test_fp8_and_what_the_plan_leaves_out_are_not_touched() -> None:
    model = uneven_net()
    assert to_equalize(model, ROLE, default_plan({ROLE: model}, {ROLE: "fp8"})) == {}
    plan = QuantPlan({ROLE: "int8"}, excluded={ROLE: {"up": "a test"}})
    assert list(to_equalize(model, ROLE, plan)) == ["g"]
