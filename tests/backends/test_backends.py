"""The table of back ends and the onnxruntime Runner, on graphs of a few nodes written here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from edgemed.backends import BACKENDS, Backend, Device, device_from_text, open_runner
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

        def __init__(self, path, options, providers) -> None:
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
