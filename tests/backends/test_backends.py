"""The table of back ends and the onnxruntime Runner, on graphs of a few nodes written here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest

from edgemed.backends import BACKENDS, Backend, Device, device_from_text, find_backend, open_runner
from edgemed.backends.onnxruntime_runner import left_on_cpu
from edgemed.bundle import open_bundle
from edgemed.errors import BackendUnavailable, BundleError, InvalidInput
from edgemed.graphs import DimRange, GraphSpec, TensorSpec

PLAIN = GraphSpec(
    role="projector",
    inputs=(TensorSpec("a", "float32", ("n", 3)),),
    outputs=(TensorSpec("double", "float32", ("n", 3)), TensorSpec("total", "float32", ())),
    dims={"n": DimRange(1, 2, 4)},
)
COUNTER = GraphSpec(
    role="decoder",
    inputs=(TensorSpec("step", "float32", (1,)), TensorSpec("past", "float32", ("cache",))),
    outputs=(TensorSpec("seen", "float32", (1,)), TensorSpec("present", "float32", ("cache",))),
    dims={"cache": DimRange(5, 5, 5)},
    state=(("present", "past"),),
)


def write_graph(path: Path, spec: GraphSpec, nodes: list[tuple[str, list[str], str]]) -> Path:
    def info(tensor: TensorSpec):
        return onnx.helper.make_tensor_value_info(tensor.name, onnx.TensorProto.FLOAT, list(tensor.shape))

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, given, [made]) for op, given, made in nodes],
        "test",
        [info(t) for t in spec.inputs],
        [info(t) for t in spec.outputs],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    nodes = [("Add", ["a", "a"], "double"), ("ReduceSum", ["double"], "sum"), ("Squeeze", ["sum"], "total")]
    return write_graph(tmp_path / "plain.onnx", PLAIN, nodes)


@pytest.fixture
def counter(tmp_path: Path) -> Path:
    nodes = [("Add", ["past", "step"], "present"), ("ReduceSum", ["present"], "seen")]
    return write_graph(tmp_path / "counter.onnx", COUNTER, nodes)


def ones(n: int) -> dict[str, np.ndarray]:
    return {"a": np.ones((n, 3), np.float32)}


def test_a_graph_runs_with_another_size_each_time_and_says_where(plain: Path) -> None:
    runner = open_runner("auto", plain, PLAIN, threads=1)
    assert (runner.backend, runner.device) == ("onnxruntime", "CPU")
    kept = [runner.run(ones(n)) for n in (2, 4, 1)]
    for n, out in zip((2, 4, 1), kept, strict=True):  # earlier results are not overwritten by later runs
        assert set(out) == {"double", "total"}
        assert np.array_equal(out["double"], np.full((n, 3), 2))
        assert out["total"] == 6 * n


def test_feeds_that_are_not_contiguous_are_understood(plain: Path) -> None:
    turned = np.arange(12, dtype=np.float32).reshape(3, 4).T
    assert np.array_equal(open_runner("auto", plain, PLAIN).run({"a": turned})["double"], 2 * turned)


def test_state_stays_inside_until_reset(counter: Path) -> None:
    runner = open_runner("onnxruntime", counter, COUNTER, device="cpu")
    step = {"step": np.array([2], np.float32)}
    assert [runner.run(step)["seen"].item() for _ in range(3)] == [10, 20, 30]
    assert list(runner.run(step)) == ["seen"]
    runner.reset()
    assert runner.run(step)["seen"].item() == 10


def test_two_runners_of_one_file_share_nothing(counter: Path) -> None:
    step = {"step": np.array([1], np.float32)}
    first, second = (open_runner("auto", counter, COUNTER) for _ in range(2))
    first.run(step)
    assert first.run(step)["seen"].item() == 10
    assert second.run(step)["seen"].item() == 5


def test_a_closed_runner_says_so(counter: Path) -> None:
    runner = open_runner("auto", counter, COUNTER)
    runner.close()
    with pytest.raises(InvalidInput, match="closed"):
        runner.run({"step": np.zeros(1, np.float32)})


@pytest.mark.parametrize(
    "feeds", [{}, {"a": np.ones((2, 3))}, {"a": np.ones((5, 3), np.float32)}, {"a": np.ones((2, 2), np.float32)}]
)
def test_feeds_that_do_not_fit_name_the_graph(plain: Path, feeds: dict[str, np.ndarray]) -> None:
    with pytest.raises(InvalidInput, match="projector"):
        open_runner("auto", plain, PLAIN).run(feeds)


def test_a_run_that_fails_is_one_line_and_nothing_on_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = GraphSpec(
        role="projector",
        inputs=(TensorSpec("a", "float32", ("n",)), TensorSpec("b", "float32", ("m",))),
        outputs=(TensorSpec("c", "float32", ("k",)),),
        dims={d: DimRange(1, 1, 9) for d in "nmk"},
    )
    runner = open_runner("auto", write_graph(tmp_path / "g.onnx", spec, [("Add", ["a", "b"], "c")]), spec)
    with pytest.raises(InvalidInput, match="projector cannot run") as caught:
        runner.run({"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)})
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    assert runner.run({"a": np.ones(2, np.float32), "b": np.ones(1, np.float32)})["c"].tolist() == [2, 2]


@pytest.mark.parametrize("content", [b"", b"not a graph", None])
def test_a_damaged_file_is_a_bundle_error(
    tmp_path: Path, plain: Path, content: bytes | None, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(plain.read_bytes()[:-40] if content is None else content)
    with pytest.raises(BundleError, match="damaged.onnx") as caught:
        open_runner("auto", path, PLAIN)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_missing_file_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        open_runner("auto", tmp_path / "nothing.onnx", PLAIN)


def test_a_graph_with_other_names_is_a_bundle_error(counter: Path) -> None:
    with pytest.raises(BundleError, match="inputs"):
        open_runner("auto", counter, PLAIN)


def test_a_gpu_that_is_not_there_is_never_replaced_by_the_cpu(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for providers in (["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]):
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this onnxruntime has a GPU")
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda providers=providers: providers)
        with pytest.raises(BackendUnavailable, match="use --device cpu"):
            open_runner("onnxruntime", plain, PLAIN, device="gpu:0")


def test_a_session_that_came_up_without_the_gpu_is_refused(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CpuOnly(onnxruntime.InferenceSession):
        """What onnxruntime-gpu does where the driver is missing: a warning, and a session on the CPU."""

        def __init__(self, path, options, providers, **more) -> None:
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", CpuOnly)
    for device in ("auto", "gpu:0"):
        with pytest.raises(BackendUnavailable, match="could not start CUDAExecutionProvider on GPU 0"):
            open_runner("onnxruntime", plain, PLAIN, device=device)


def test_a_missing_library_names_the_extra(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "other", Backend("nowhere:Nothing", "no_such_library", "other-extra"))  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailable, match=r"edgemed\[other-extra\]"):
        open_runner("other", plain, PLAIN)


def test_a_library_that_a_site_has_instead_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Backend("nowhere:Nothing", "no_such_library", "extra", instead="json")
    monkeypatch.setitem(BACKENDS, "other", row)  # type: ignore[arg-type]
    assert find_backend("other") is row
    assert BACKENDS["tensorrt"].instead == "tensorrt"


def test_notes_go_to_runners_that_have_some(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Telling:
        def __init__(self, artifact, spec, *, device, threads, tell) -> None:
            tell("building")

    monkeypatch.setattr("edgemed.backends.torch_runner.TorchRunner", Telling)
    row = dataclasses.replace(BACKENDS["torch"], tells=True)
    monkeypatch.setitem(BACKENDS, "telling", row)  # type: ignore[arg-type]
    told: list[str] = []
    open_runner("telling", plain, PLAIN, tell=told.append)
    open_runner("auto", plain, PLAIN, tell=told.append)
    assert told == ["building"]


# --- types and places -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [False, True])
def test_fp8_pairs_run_on_the_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str], relu: bool) -> None:
    """onnxruntime 1.31 refuses them, and drops a Relu before them, unless it is told to leave them as they are."""
    e4m3 = onnx.TensorProto.FLOAT8E4M3FN
    helper, spec = onnx.helper, dataclasses.replace(PLAIN, outputs=PLAIN.outputs[:1])
    weight = onnx.numpy_helper.from_array(np.eye(3, dtype=np.float32).astype(ml_dtypes.float8_e4m3fn), "weight")
    graph = helper.make_graph(
        [
            *([helper.make_node("Relu", ["a"], ["r"])] if relu else []),
            helper.make_node("QuantizeLinear", ["r" if relu else "a", "scale", "zero"], ["a8"]),
            helper.make_node("DequantizeLinear", ["a8", "scale", "zero"], ["a32"]),
            helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["w32"]),
            helper.make_node("MatMul", ["a32", "w32"], ["double"]),
        ],
        "fp8",
        [helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("double", onnx.TensorProto.FLOAT, ["n", 3])],
        [
            weight,
            onnx.numpy_helper.from_array(np.float32(2), "scale"),
            helper.make_tensor("zero", e4m3, [], b"\0", raw=True),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.save(model, tmp_path / "fp8.onnx")
    runner = open_runner("onnxruntime", tmp_path / "fp8.onnx", spec, device="cpu")
    given = np.array([[2, 4.1, -6]], np.float32)  # 2.05 is 2 in three bits of mantissa
    assert runner.run({"a": given})["double"].tolist() == [[4, 8, 0 if relu else -12]]
    assert capfd.readouterr().err == ""


def test_bfloat16_state_runs_without_a_numpy_that_knows_it(tmp_path: Path) -> None:
    def bfloat16(tensor: TensorSpec) -> TensorSpec:
        return dataclasses.replace(tensor, dtype="bfloat16") if tensor.shape == ("cache",) else tensor

    spec = dataclasses.replace(
        COUNTER, inputs=tuple(map(bfloat16, COUNTER.inputs)), outputs=tuple(map(bfloat16, COUNTER.outputs))
    )
    helper, kinds = onnx.helper, {"float32": onnx.TensorProto.FLOAT, "bfloat16": onnx.TensorProto.BFLOAT16}
    nodes = [
        helper.make_node("Cast", ["past"], ["past_f"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Add", ["past_f", "step"], ["present_f"]),
        helper.make_node("Cast", ["present_f"], ["present"], to=onnx.TensorProto.BFLOAT16),
        helper.make_node("ReduceSum", ["present_f"], ["seen"]),
    ]
    infos = [
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], list(t.shape)) for t in tensors]
        for tensors in (spec.inputs, spec.outputs)
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "b", *infos), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    onnx.save(model, tmp_path / "counter.onnx")
    runner = open_runner("onnxruntime", tmp_path / "counter.onnx", spec, device="cpu")
    step = {"step": np.array([2], np.float32)}
    assert [runner.run(step)["seen"].item() for _ in range(3)] == [10, 20, 30]
    runner.reset()
    assert runner.run(step)["seen"].item() == 10


def test_an_operator_without_a_kernel_for_its_type_is_named(tmp_path: Path) -> None:
    spec = dataclasses.replace(PLAIN, inputs=(TensorSpec("a", "bfloat16", ("n", 3)),), outputs=PLAIN.outputs[:1])
    helper, kind = onnx.helper, onnx.TensorProto.BFLOAT16
    graph = helper.make_graph(
        [helper.make_node("Transpose", ["a"], ["b"]), helper.make_node("MatMul", ["a", "b"], ["double"])],
        "b",
        [helper.make_tensor_value_info("a", kind, ["n", 3])],
        [helper.make_tensor_value_info("double", kind, ["n", "n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "b.onnx")
    with pytest.raises(BundleError, match=r"implementation for MatMul.*\. Use a bundle in another precision"):
        open_runner("onnxruntime", tmp_path / "b.onnx", spec, device="cpu")


def recorded(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def test_operators_that_would_run_on_the_cpu_in_silence_are_found(plain: Path, tmp_path: Path) -> None:
    """On a session of the CPU, where all nodes are; sizes may be computed there."""
    assert left_on_cpu(recorded(plain)) == []
    spec = dataclasses.replace(PLAIN, outputs=PLAIN.outputs[:1])
    nodes = [("Softmax", ["a"], "share"), ("Add", ["share", "a"], "double")]
    assert left_on_cpu(recorded(write_graph(tmp_path / "g.onnx", spec, nodes))) == ["Softmax"]
    found = left_on_cpu(recorded(open_bundle("nano").graph_path("decoder")))
    assert {"GroupQueryAttention", "MatMulNBits"} <= set(found)
    assert not {"Shape", "Concat", "Range"} & set(found)


def test_an_unknown_back_end_lists_those_there_are(plain: Path) -> None:
    with pytest.raises(BackendUnavailable, match="choose from: onnxruntime"):
        open_runner("abacus", plain, PLAIN)


def test_threads_below_one_are_refused(plain: Path) -> None:
    with pytest.raises(InvalidInput, match="threads"):
        open_runner("auto", plain, PLAIN, threads=0)


@pytest.mark.parametrize(
    ("text", "device"), [("auto", Device("auto")), ("gpu", Device("gpu")), ("gpu:2", Device("gpu", 2))]
)
def test_devices_are_read(text: str, device: Device) -> None:
    assert device_from_text(text) == device


@pytest.mark.parametrize("text", ["", "cuda", "cpu:1", "gpu:", "gpu:x", "gpu:-1", "gpu:1:2"])
def test_devices_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="gpu:N"):
        device_from_text(text)
