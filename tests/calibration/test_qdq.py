"""Graphs with Q/DQ pairs: what they compute, what they leave alone, who takes them, and the plans behind them."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from edgemed.bundle import Bundle
from edgemed.calibration.plan import Precision, QuantPlan, plan_from_toml, plan_to_toml
from edgemed.calibration.qdq import quantize, with_opset
from edgemed.calibration.ranges import bounds, measure
from edgemed.calibration.rounding import measure_products, rounded
from edgemed.calibration.sensitivity import compare, outputs_of, sensitivities, to_markdown
from edgemed.calibration.sites import activations, default_plan, names_read, products_wanted, sites
from edgemed.calibration.slices import read_slices, record_feeds
from edgemed.errors import InvalidInput
from edgemed.graphs import DimRange, Feeds, GraphSpec, TensorSpec

ROLE = "vision_encoder"
PRECISIONS: tuple[Precision, ...] = ("int8", "fp8", "int8-weights", "int4-weights")
SPEC = GraphSpec(
    ROLE,
    (TensorSpec("image", "float32", ("n", 3, 16, 16)),),
    (TensorSpec("features", "float32", ("n", 64, 64)),),
    {"n": DimRange(1, 1, 4)},
)
Sequences = Sequence[Sequence[Feeds]]


def small_net(dtype: type = np.float32, stored: int | None = None) -> onnx.ModelProto:
    """patches -> 1 x 1 convolution -> MatMul + bias -> Gelu -> MatMul -> attention -> last convolution.

    stored: a type that the second MatMul's weight is kept in, with a Cast behind it.
    """
    rng = np.random.default_rng(0)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    sharp = {"down": 0.3}  # so that the softmax is not a choice of one row, which rounding could turn over
    shapes = {"patch": (64, 3, 2, 2), "mix": (64, 64, 1, 1), "up": (64, 128), "bias": (128,), "down": (128, 64),
              "last": (64, 64, 1)}  # fmt: skip
    weights = {
        n: rng.normal(0, sharp.get(n, 1) * s[1] ** -0.5 if len(s) > 1 else 0.1, s).astype(dtype)
        for n, s in shapes.items()
    }
    n = helper.make_node
    nodes = [
        n("Conv", ["image", "patch"], ["p"], "patch", strides=[2, 2]),
        n("Conv", ["p", "mix"], ["m"], "mix"),
        n("Reshape", ["m", "flat"], ["f"]),
        n("Transpose", ["f"], ["r"], perm=[0, 2, 1]),
        n("MatMul", ["r", "up"], ["u"], "up"),
        n("Add", ["u", "bias"], ["b"]),
        n("Gelu", ["b"], ["g"]),
        n("MatMul", ["g", "down"], ["d"], "down"),
        n("Transpose", ["d"], ["dt"], perm=[0, 2, 1]),
        n("MatMul", ["d", "dt"], ["gram"], "attention"),
        n("Softmax", ["gram"], ["soft"]),
        n("MatMul", ["soft", "d"], ["e"], "attended"),
        n("Transpose", ["e"], ["et"], perm=[0, 2, 1]),
        n("Conv", ["et", "last"], ["features"], "last"),
    ]
    tensors = [numpy_helper.from_array(w, name) for name, w in weights.items()]
    tensors.append(numpy_helper.from_array(np.array([0, 64, -1], np.int64), "flat"))
    if stored is not None:
        tensors[4].CopyFrom(
            numpy_helper.from_array(weights["down"].astype(helper.tensor_dtype_to_np_dtype(stored)), "down")
        )
        nodes.insert(0, n("Cast", ["down"], ["down.float"], "down.float", to=kind))
        nodes[8].input[1] = "down.float"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", kind, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("features", kind, ["n", 64, 64])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def pictures(calls: int = 3) -> tuple[tuple[Feeds, ...], ...]:
    rng = np.random.default_rng(1)
    return tuple(({"image": rng.normal(0, 1, (2, 3, 16, 16)).astype(np.float32)},) for _ in range(calls))


def measured(model: onnx.ModelProto, spec: GraphSpec, plan: QuantPlan, feeds: Sequences) -> dict[str, float]:
    names = activations(model, spec.role, plan)
    return bounds(measure(model, spec, names, feeds, threads=1), plan.method) if names else {}


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def plan_of(model: onnx.ModelProto, precision: Precision) -> QuantPlan:
    plan = default_plan({ROLE: model}, {ROLE: precision})
    if precision != "int4-weights":
        return plan
    convolutions = {s.node: "a convolution" for s in sites(model) if s.operator == "Conv"}
    return replace(plan, excluded={ROLE: {**convolutions, **plan.excluded[ROLE]}})


@pytest.mark.parametrize(("precision", "least"), [("int8", 0.999), ("fp8", 0.997), ("int8-weights", 0.9998),
                                                  ("int4-weights", 0.985)])  # fmt: skip
def test_results_stay_close_to_full_precision(precision: Precision, least: float) -> None:
    model, feeds = small_net(), pictures()
    plan = plan_of(model, precision)
    quantized, rows = quantize(model, ROLE, plan, measured(model, SPEC, plan, feeds))
    onnx.checker.check_model(quantized, full_check=True)
    assert [r.node for r in rows] == ["mix", "up", "down"][precision == "int4-weights" :]
    exact = outputs_of(model, SPEC, feeds, threads=1)
    assert compare(exact, outputs_of(quantized, SPEC, feeds, threads=1)).cosine >= least


def test_int8_is_what_numpy_computes() -> None:
    model, feeds = small_net(), pictures(1)
    plan = QuantPlan(nodes={ROLE: {"up": "int8"}})
    limits = measured(model, SPEC, plan, feeds)
    quantized, _ = quantize(model, ROLE, plan, limits)
    found = measure(quantized, SPEC, ["r", "r.int8", "u"], feeds, threads=1)
    assert found["r.int8"].largest == pytest.approx(limits["r"], rel=1e-6)
    stored = constants(quantized)
    up = constants(model)["up"]
    scale = np.abs(up).max(axis=0) / 127
    np.testing.assert_allclose(stored["up.int8.1.scale"], scale, rtol=1e-6)
    assert np.array_equal(stored["up.int8.1.q"], np.rint(up / scale.astype(np.float32)))
    assert stored["r.int8.scale"] == pytest.approx(limits["r"] / 127, rel=1e-6)
    assert stored["r.int8.zero"] == 0
    assert stored["r.int8.zero"].dtype == np.int8


def test_fp8_scales_by_448_and_stores_e4m3() -> None:
    model, feeds = small_net(), pictures(1)
    plan = QuantPlan(nodes={ROLE: {"down": "fp8"}})
    limits = measured(model, SPEC, plan, feeds)
    quantized, (row,) = quantize(model, ROLE, plan, limits)
    kinds = {t.name: t.data_type for t in quantized.graph.initializer}
    assert kinds["down.fp8.1.q"] == kinds["g.fp8.zero"] == TensorProto.FLOAT8E4M3FN
    assert constants(quantized)["g.fp8.scale"] == pytest.approx(limits["g"] / 448, rel=1e-6)
    assert np.abs(constants(quantized)["down.fp8.1.q"].astype(np.float32)).max() == 448
    assert 0.01 < row.relative_error < 0.04  # 3 bits of mantissa


def test_int4_blocks_have_a_scale_each_and_lose_no_more_than_plain_rounding() -> None:
    model = small_net()
    down = constants(model)["down"]
    quantized, (row,) = quantize(model, ROLE, QuantPlan(nodes={ROLE: {"down": "int4-weights"}}, block=32))
    stored = constants(quantized)
    assert stored["down.int4-weights.1.scale"].shape == (4, 64)
    back = stored["down.int4-weights.1.q"].astype(np.float32) * np.repeat(stored["down.int4-weights.1.scale"], 32, 0)
    assert np.linalg.norm(back - down) / np.linalg.norm(down) == pytest.approx(row.relative_error, rel=1e-5)
    grouped = down.reshape(4, 32, 64)
    scale = np.abs(grouped).max(axis=1, keepdims=True) / 7
    plain = np.linalg.norm(np.rint(grouped / scale) * scale - grouped) / np.linalg.norm(down)
    assert row.relative_error < plain
    (node,) = (n for n in quantized.graph.node if n.op_type == "DequantizeLinear")
    assert {a.name: a.i for a in node.attribute} == {"axis": 0, "block_size": 32}


def test_what_the_plan_leaves_out_keeps_its_bytes() -> None:
    model, feeds = small_net(), pictures(1)
    plan = default_plan({ROLE: model}, {ROLE: "int8"})
    plan = replace(plan, excluded={ROLE: {**plan.excluded[ROLE], "down": "most sensitive"}})
    quantized, rows = quantize(model, ROLE, plan, measured(model, SPEC, plan, feeds))
    assert [r.node for r in rows] == ["mix", "up"]
    before, after = constants(model), constants(quantized)
    for name in ("patch", "down", "last", "flat"):
        assert np.array_equal(before[name], after[name])
    assert not {"mix", "up"} & set(after)
    inputs = {n.name: list(n.input) for n in quantized.graph.node}
    assert inputs["attention"] == ["d", "dt"]
    assert inputs["attended"] == ["soft", "d"]
    assert inputs["down"] == ["g", "down"]


def test_a_default_plan_gives_a_reason_for_all_it_leaves_out() -> None:
    reasons = default_plan({ROLE: small_net()}, {ROLE: "int8"}).excluded[ROLE]
    assert set(reasons) == {"patch", "attention", "attended", "last"}
    assert reasons["patch"].startswith("the first convolution")
    assert reasons["last"].startswith("the last convolution")
    assert reasons["attention"] == reasons["attended"] != ""


def test_a_weight_in_fewer_bytes_with_a_cast_is_found_and_the_cast_goes() -> None:
    model = small_net(stored=TensorProto.BFLOAT16)
    quantized, rows = quantize(model, ROLE, default_plan({ROLE: model}, {ROLE: "int8-weights"}))
    assert [r.node for r in rows] == ["mix", "up", "down"]
    assert all(n.op_type != "Cast" for n in quantized.graph.node)
    assert "down" not in constants(quantized)
    assert constants(quantized)["down.int8-weights.1.scale"].dtype == np.float32


def test_a_half_precision_graph_gets_half_precision_scales() -> None:
    model = small_net(np.float16)
    plan = QuantPlan(nodes={ROLE: {"up": "int8", "down": "int4-weights"}})
    quantized, _ = quantize(model, ROLE, plan, {"r": 3.0})
    onnx.checker.check_model(quantized, full_check=True)
    scales = [t.data_type for t in quantized.graph.initializer if t.name.endswith(".scale")]
    assert scales == [TensorProto.FLOAT16] * 3


def test_what_two_nodes_read_is_quantized_once() -> None:
    model, feeds = small_net(), pictures(1)
    twin = helper.make_node("MatMul", ["r", "up"], ["unused"], "twin")
    model.graph.node.insert(5, twin)
    plan = QuantPlan(nodes={ROLE: {"up": "int8", "twin": "int8"}})
    quantized, rows = quantize(model, ROLE, plan, measured(model, SPEC, plan, feeds))
    assert len(rows) == 2
    kinds = [n.op_type for n in quantized.graph.node]
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (1, 2)


def test_weights_that_graphs_inside_a_graph_read_are_kept() -> None:
    inner = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "then", [], [])
    node = helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    assert names_read(helper.make_graph([node], "g", [], [])) >= {"c", "x", "w"}


def test_the_model_given_is_not_changed_and_the_new_one_is_the_same_bytes_each_time() -> None:
    model = small_net()
    before = model.SerializeToString(deterministic=True)
    plan = default_plan({ROLE: model}, {ROLE: "int8-weights"})
    first, second = (quantize(model, ROLE, plan)[0].SerializeToString(deterministic=True) for _ in range(2))
    assert model.SerializeToString(deterministic=True) == before
    assert first == second
    assert len(first) < 0.45 * len(before)


@pytest.mark.parametrize("opset", [20, 21])
def test_int8_runs_on_integer_kernels_in_every_operator_set(tmp_path: Path, opset: int) -> None:
    import onnxruntime

    model = with_opset(small_net(), opset)
    quantized, _ = quantize(model, ROLE, default_plan({ROLE: model}, {ROLE: "int8"}), {"p": 4.0, "r": 4.0, "g": 4.0})
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(quantized.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("MatMulIntegerToFloat") + kinds.count("DynamicQuantizeMatMul") == 2


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Sequences) -> None:
        self._left: Iterator[Feeds] = (call for sequence in feeds for call in sequence)

    def get_next(self) -> Feeds | None:
        return next(self._left, None)


def test_int8_is_no_worse_than_the_runtimes_own_quantizer(tmp_path: Path) -> None:
    model, feeds = small_net(), pictures()
    plan = default_plan({ROLE: model}, {ROLE: "int8"})
    ours, _ = quantize(model, ROLE, plan, measured(model, SPEC, plan, feeds))
    onnx.save(model, tmp_path / "exact.onnx")
    quantize_static(
        tmp_path / "exact.onnx", tmp_path / "theirs.onnx", Reader(feeds), quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Conv"], per_channel=True, activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8, nodes_to_exclude=list(plan.excluded[ROLE]),
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )  # fmt: skip
    exact = outputs_of(model, SPEC, feeds, threads=1)
    errors = [
        compare(exact, outputs_of(m, SPEC, feeds, threads=1)).relative_error
        for m in (ours, onnx.load(tmp_path / "theirs.onnx"))
    ]
    assert errors[0] <= errors[1] * 1.1


def test_sensitivities_name_the_worst_node_first() -> None:
    model, feeds = small_net(), pictures(2)
    wide = constants(model)["down"].copy()
    wide[:, 0] *= 1000  # one output channel: its own scale keeps the others; one input channel does not
    wide[0] *= 3000
    index = next(i for i, t in enumerate(model.graph.initializer) if t.name == "down")
    model.graph.initializer[index].CopyFrom(numpy_helper.from_array(wide, "down"))
    plan = default_plan({ROLE: model}, {ROLE: "int8"})
    seen: list[tuple[int, int]] = []
    rows = sensitivities(model, SPEC, plan, measured(model, SPEC, plan, feeds), feeds, threads=1,
                         progress=lambda done, total: seen.append((done, total)))  # fmt: skip
    assert rows[0].node == "down"
    assert {r.node for r in rows} == {"mix", "up", "down"}
    assert [r.error.relative_error for r in rows] == sorted((r.error.relative_error for r in rows), reverse=True)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert to_markdown(rows).splitlines()[2].startswith("| down | MatMul | int8 | features | ")


def test_plans_go_through_toml_unchanged() -> None:
    plan = QuantPlan(
        {"decoder": "int4-weights", "vision_encoder": "int8"},
        {"decoder": {'/layers.0/"q"': "int8-weights"}},
        {"vision_encoder": {"图 \\ node\n\x7f": "die erste Faltung", "b": "最敏感"}},
        "entropy",
        128,
    )
    assert plan_from_toml(plan_to_toml(plan)) == plan
    assert tomllib.loads(plan_to_toml(plan))["precision"] == plan.precision
    assert plan.of("decoder", '/layers.0/"q"') == "int8-weights"
    assert plan.of("decoder", "x") == "int4-weights"
    assert plan.of("vision_encoder", "b") == plan.of("projector", "x") == "fp32"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method = 7", "method is 7"),
        ("precision = [", "not TOML"),
        ("blocks = 3", "blocks, which no plan has"),
        ('block = "x"', "block is 'x'"),
        ("block = 24", "power of two"),
        ('[precision]\nencoder = "int8"', "names graph 'encoder'"),
        ('[precision]\ndecoder = "int3"', "precision is 'int3'"),
        ("[precision]\ndecoder = 8", "has 8 where a text"),
        ('excluded = "all"', "where a table was expected"),
        ('[excluded.decoder]\nlogits = " "', "excludes logits of the decoder without a reason"),
    ],
)
def test_texts_that_are_no_plan_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        plan_from_toml(text)


def test_plans_that_do_not_fit_the_graph_are_refused() -> None:
    model = small_net()
    cases: tuple[tuple[QuantPlan, str], ...] = (
        (QuantPlan(nodes={ROLE: {"no_such": "int8"}}), "names no_such, which is no MatMul, Gemm or Conv"),
        (QuantPlan(excluded={ROLE: {"no_such": "typing error"}}), "names no_such"),
        (QuantPlan(nodes={ROLE: {"attention": "int8"}}), "attention of the vision_encoder cannot be quantized: both"),
        (QuantPlan(nodes={ROLE: {"up": "int8"}}), "no bound of r"),
        (QuantPlan(nodes={ROLE: {"mix": "int4-weights"}}), "mix is a Conv"),
    )
    for plan, message in cases:
        with pytest.raises(InvalidInput, match=message):
            quantize(model, ROLE, plan)


def parsed(model: onnx.ModelProto) -> str:
    """Return what TensorRT-RTX has against a graph, or "" where it parses."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if parser.parse(model.SerializeToString()):
        return ""
    return str(parser.get_error(0).desc())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensorrt_rtx_takes_every_form(precision: Precision) -> None:
    model = small_net()
    quantized, _ = quantize(model, ROLE, plan_of(model, precision), {"p": 4.0, "r": 4.0, "g": 4.0})
    assert parsed(quantized) == ""


@pytest.fixture(scope="module")
def recorded(published_bundle: Callable[[str], Bundle]) -> Callable[[str], tuple[Bundle, Mapping[str, Sequences]]]:
    def record(family: str) -> tuple[Bundle, Mapping[str, Sequences]]:
        bundle = published_bundle(family)
        return bundle, record_feeds(bundle, read_slices(most=2).scans, max_new_tokens=2, threads=1).calls

    return record


@pytest.mark.parametrize("family", ["medrega-tiny", "medplib-tiny"])
def test_published_graphs_keep_their_direction(
    recorded: Callable[[str], tuple[Bundle, Mapping[str, Sequences]]], family: str
) -> None:
    bundle, calls = recorded(family)
    for role, precision in (("vision_encoder", "int8"), ("projector", "int8"), ("decoder", "int8-weights")):
        model, spec = onnx.load(bundle.graph_path(role)), bundle.spec(role)
        plan = default_plan({role: model}, {role: precision})  # type: ignore[dict-item]
        feeds = calls[role][:4]
        quantized, rows = quantize(model, role, plan, measured(model, spec, plan, feeds))
        assert rows
        exact, found = (outputs_of(m, spec, feeds, threads=1) for m in (model, quantized))
        cosines = [compare([a], [b]).cosine for a, b in zip(exact, found, strict=True)]
        # A step of the mixture of experts may fall to 0.96: where a router is at 0.51, the other expert is taken.
        # What is left of the tiny decoders (width 64, random weights) is near 0.999.
        assert np.median(cosines) >= 0.9985 if role == "decoder" else min(cosines) >= 0.999, (role, cosines)
        if role == "vision_encoder":
            assert parsed(quantized) == ""


def test_weights_rounded_for_the_output_lose_less_of_it_and_more_of_themselves() -> None:
    model, feeds = small_net(), pictures(8)
    exact = outputs_of(model, SPEC, feeds[6:], threads=1)
    for precision in ("int4-weights", "int8-weights"):
        plan = plan_of(model, precision)  # type: ignore[arg-type]
        wanted = products_wanted(model, ROLE, plan)
        assert wanted == {"r": -1, "g": -1} | ({"p": 1} if precision == "int8-weights" else {})
        products = measure_products(model, SPEC, wanted, feeds[:6], threads=1)
        nearest, near_rows = quantize(model, ROLE, plan)
        better, rows = quantize(model, ROLE, plan, products=products)
        errors = [compare(exact, outputs_of(m, SPEC, feeds[6:], threads=1)).relative_error for m in (nearest, better)]
        assert errors[1] < errors[0] * 0.95, (precision, errors)
        assert {r.node: r.relative_error for r in rows}["down"] > {r.node: r.relative_error for r in near_rows}["down"]


def test_rounding_with_unrelated_inputs_is_to_the_nearest() -> None:
    weights = np.random.default_rng(0).normal(0, 1, (5, 200)).astype(np.float32)
    scales = np.full_like(weights, 0.1)
    values = rounded(weights, scales, np.eye(200, dtype=np.float32), -127, 127)
    assert np.array_equal(values, np.rint(weights / scales))
