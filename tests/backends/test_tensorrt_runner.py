"""The tensorrt back end. Without a GPU: checks, memory, state and shapes, with a graph over the host's memory in place
of the engine; with one: every graph beside onnxruntime.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edgemed.backends import Device, open_runner, tensorrt_runner
from edgemed.backends.cuda_device import CudaStream, Gpu, find_gpu
from edgemed.backends.engine_cache import KernelsKey, load_cached
from edgemed.backends.tensorrt_runner import (
    Described,
    Execution,
    Loaded,
    TensorRTRunner,
    check_bounds,
    check_tensors,
    describe,
    load_engine,
    targets_for,
)
from edgemed.bundle import open_bundle
from edgemed.errors import BackendUnavailable, BundleError, DeviceOutOfMemory, InvalidInput
from edgemed.families.specs import every_logit
from edgemed.graphs import DimRange, GraphSpec, TensorSpec

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (extra: edgemed[gpu])")

GPU = Gpu(0, "NVIDIA Test", 89)
T = TensorSpec
DECODER = GraphSpec(
    "decoder",
    (
        T("input_ids", "int64", (1, "sequence")),
        T("image_tokens", "float32", ("rows", 4)),
        T("past_length", "int64", (1,)),
        T("logits_from", "int64", (1,)),
        T("past_key_0", "float16", (1, 1, "cache", 4)),
    ),
    (T("logits", "float32", (1, "kept", 10)), T("present_key_0", "float16", (1, 1, "cache", 4))),
    {"sequence": DimRange(1, 1, 8), "kept": DimRange(1, 1, 8), "rows": DimRange(1, 3, 5), "cache": DimRange(8, 8, 8)},
    (("present_key_0", "past_key_0"),),
)


def feeds(ids: list[int], past: int = 0, kept: int = 0, rows: int = 3) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.array([ids], np.int64),
        "image_tokens": np.zeros((rows, 4), np.float32),
        "past_length": np.array([past], np.int64),
        "logits_from": np.array([kept], np.int64),
    }


def gpu_missing() -> str:
    try:
        targets_for(trt, find_gpu())
    except BackendUnavailable as error:
        return str(error)
    return ""


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [feeds([0, 12], 6), feeds([9], 7), feeds([10, 11], 0, 1), feeds([14], 0, 0, rows=5)])
def test_values_within_the_tables_pass(given: dict[str, np.ndarray]) -> None:
    check_bounds(DECODER, given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (feeds([0, 1], 7), "past_length: value 7, expected 0 to 6"),
        (feeds([0], -1), "past_length: value -1, expected 0 to 7"),
        (feeds([13]), "input_ids: value 13, expected 0 to 12"),
        (feeds([1, -2]), "input_ids: value -2"),
        (feeds([12], rows=2), "input_ids: value 12, expected 0 to 11"),
        (feeds([1, 2], 0, 2), "logits_from: value 2, expected 0 to 1"),
        ({**feeds([1, 2], 0, 1), "text_at": np.array([1])}, "text_at: value 1, expected 0 to 0"),
        ({**feeds([1, 2]), "text_at": np.zeros(0, np.int64), "box_at": np.array([-1])}, "box_at: value -1"),
    ],
)
def test_values_beyond_a_table_are_refused_before_an_engine_reads_there(
    given: dict[str, np.ndarray], told: str
) -> None:
    with pytest.raises(InvalidInput, match=told):
        check_bounds(DECODER, given)


@pytest.mark.parametrize(
    ("capability", "targets"), [(75, ("sm_75",)), (86, ("sm_86", "any")), (120, ("sm_120", "any"))]
)
def test_a_gpu_takes_engines_of_its_own_target_and_from_80_on_of_none(
    capability: int, targets: tuple[str, ...]
) -> None:
    assert targets_for(trt, Gpu(0, "x", capability)) == targets


@pytest.mark.parametrize("capability", [61, 70, 90, 100])
def test_a_gpu_that_the_library_does_not_know_is_refused_with_those_it_does(capability: int) -> None:
    with pytest.raises(BackendUnavailable, match="sm_75, sm_80, sm_86, sm_89, sm_120, sm_121") as caught:
        targets_for(trt, Gpu(0, "NVIDIA H200", capability))
    assert f"(NVIDIA H200, sm_{capability})" in str(caught.value)


def test_tensorrt_itself_takes_the_gpu_that_is_there() -> None:
    assert targets_for(SimpleNamespace(__name__="tensorrt", __version__="11"), Gpu(0, "x", 90)) == ("sm_90",)


def test_the_cpu_is_never_used_in_silence(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="runs on NVIDIA GPUs only, device cpu was asked for"):
        TensorRTRunner(tmp_path / "graph.onnx", DECODER, device=Device("cpu"))


def test_a_checkpoint_is_no_graph() -> None:
    with pytest.raises(BackendUnavailable, match="export the checkpoint first"):
        TensorRTRunner(lambda: None, DECODER, device=Device("gpu"))  # type: ignore[arg-type]


TENSORS = {t.name: Described(True, t.dtype, t.name == "logits_from") for t in DECODER.inputs} | {
    t.name: Described(False, t.dtype, False) for t in DECODER.outputs
}


def test_an_engine_with_the_tensors_of_the_spec_passes() -> None:
    check_tensors(DECODER, TENSORS)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"logits": Described(False, "float16", False)}, "has float16 output logits, .* says float32 output"),
        ({"past_length": Described(True, "int32", False)}, "has int32 input past_length, .* says int64 input"),
        ({"more": Described(False, "bool", False)}, "has bool output more, .* says nothing"),
        ({"past_key_0": Described(True, "float16", True)}, "keeps state past_key_0 in the host's memory"),
        ({"logits": Described(False, "float32", False, "image_tokens")}, "writes logits over image_tokens"),
        ({"present_key_0": Described(False, "float16", False, "past_1")}, "writes present_key_0 over past_1"),
    ],
)
def test_an_engine_with_other_tensors_is_refused_before_it_gets_an_address(
    change: dict[str, Described], told: str
) -> None:
    with pytest.raises(BundleError, match=told):
        check_tensors(DECODER, {**TENSORS, **change})


def test_an_engine_without_one_of_the_tensors_is_refused() -> None:
    with pytest.raises(BundleError, match="has nothing logits, the bundle's description says float32 output"):
        check_tensors(DECODER, {name: t for name, t in TENSORS.items() if name != "logits"})


# --- a graph in place of the engine -----------------------------------------------------------------------------------

KINDS = {"float32": trt.DataType.FLOAT, "float16": trt.DataType.HALF, "int64": trt.DataType.INT64}


class GraphEngine:
    """An engine's side of the library's interface: an ONNX graph that reads and writes at the addresses it is given.

    over: state outputs that are written over their input, as KVCacheUpdate does.
    """

    def __init__(self, graph: onnx.ModelProto, spec: GraphSpec, *, host: tuple[str, ...] = (), in_place: bool = False):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
        self.spec, self.host, self.in_place = spec, host, in_place
        self.tensors = {t.name: t for t in (*spec.inputs, *spec.outputs)}
        self.num_io_tensors = len(self.tensors)
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.fails = False

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        inputs = {t.name for t in self.spec.inputs}
        return trt.TensorIOMode.INPUT if name in inputs else trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return KINDS[self.tensors[name].dtype]

    def get_tensor_location(self, name: str) -> Any:
        return trt.TensorLocation.HOST if name in self.host else trt.TensorLocation.DEVICE

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return dict(self.spec.state).get(name) if self.in_place else None

    # A context's side.

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def read(self, name: str) -> np.ndarray:
        count = int(np.prod(self.shapes[name]))
        kind = np.dtype(self.tensors[name].dtype)
        data = ctypes.string_at(self.addresses[name], count * kind.itemsize)
        return np.frombuffer(data, kind).reshape(self.shapes[name])

    def infer_shapes(self) -> list[str]:
        for t in self.spec.returned_outputs:
            self.shapes[t.name] = tuple(d if isinstance(d, int) else self.size(d) for d in t.shape)
        return [t.name for t in self.spec.inputs if not self.addresses.get(t.name)]

    def size(self, dim: str) -> int:
        if dim == "kept":
            return self.shapes["input_ids"][1] - int(self.read("logits_from")[0])
        return next(s for t in self.spec.inputs for d, s in zip(t.shape, self.shapes[t.name], strict=True) if d == dim)

    def get_tensor_shape(self, name: str) -> Any:
        return trt.Dims(self.shapes[name])

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 77
        if self.fails:
            return False
        given = {t.name: self.read(t.name) for t in self.spec.inputs}
        for t, made in zip(
            self.spec.outputs, self.session.run([o.name for o in self.spec.outputs], given), strict=True
        ):
            if t.name in self.shapes:
                assert made.shape == self.shapes[t.name]
            source = dict(self.spec.state).get(t.name)
            assert source is None or (self.addresses[t.name] == self.addresses[source]) == self.in_place
            ctypes.memmove(self.addresses[t.name], np.ascontiguousarray(made).ctypes.data, made.nbytes)
        return True


Start = Callable[..., tuple[Execution, GraphEngine, Any]]


@pytest.fixture
def start(bindings_class: type[Any]) -> Start:
    def make(
        graph: onnx.ModelProto, spec: GraphSpec, memory: int = 1 << 30, **how: Any
    ) -> tuple[Execution, GraphEngine, Any]:
        engine, bindings = GraphEngine(graph, spec, **how), bindings_class(size=memory)
        loaded = Loaded(trt, None, engine, engine, ["the library's reason"])
        return Execution(loaded, spec, CudaStream(GPU, bindings)), engine, bindings

    return make


def graph_of(spec: GraphSpec, *nodes: tuple[str, str, str]) -> onnx.ModelProto:
    kinds = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}
    inputs, outputs = (
        [helper.make_tensor_value_info(t.name, kinds[t.dtype], list(t.shape)) for t in tensors]
        for tensors in (spec.inputs, spec.outputs)
    )
    made = [helper.make_node(op, given.split(), result.split()) for op, given, result in nodes]
    graph = helper.make_graph(made, "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


ROWS = GraphSpec(
    "projector",
    (T("a", "float32", ("n", 3)),),
    (T("double", "float32", ("n", 3)), T("total", "float32", ())),
    {"n": DimRange(0, 2, 2000)},
)
DOUBLED = graph_of(ROWS, ("Add", "a a", "double"), ("ReduceSum", "double", "sum"), ("Squeeze", "sum", "total"))
COUNTER = GraphSpec(
    "decoder",
    (T("step", "float32", (1,)), T("past", "float32", ("cache",))),
    (T("seen", "float32", (1,)), T("present", "float32", ("cache",))),
    {"cache": DimRange(5, 5, 5)},
    (("present", "past"),),
)
COUNTING = graph_of(COUNTER, ("Add", "past step", "present"), ("ReduceSum", "present", "seen"))


def test_sizes_change_from_run_to_run_and_earlier_results_stay(start: Start) -> None:
    execution, _, bindings = start(DOUBLED, ROWS)
    kept = [execution.run({"a": np.full((n, 3), n, np.float32)}) for n in (2, 900, 1, 0, 2000)]
    for n, out in zip((2, 900, 1, 0, 2000), kept, strict=True):
        assert set(out) == {"double", "total"}
        assert np.array_equal(out["double"], np.full((n, 3), 2 * n))
        assert out["total"].shape == ()
        assert out["total"] == 6 * n * n
    before = set(bindings.memory)
    execution.run({"a": np.ones((7, 3), np.float32)})
    assert set(bindings.memory) == before  # room that is there is used


def test_feeds_that_are_not_contiguous_are_understood(start: Start) -> None:
    turned = np.arange(12, dtype=np.float32).reshape(3, 4).T
    assert np.array_equal(start(DOUBLED, ROWS)[0].run({"a": turned})["double"], 2 * turned)


@pytest.mark.parametrize("in_place", [True, False])
def test_state_stays_on_the_gpu_until_reset(start: Start, in_place: bool) -> None:
    execution, _, _ = start(COUNTING, COUNTER, in_place=in_place)
    step = {"step": np.array([2], np.float32)}
    assert [execution.run(step)["seen"].item() for _ in range(4)] == [10, 20, 30, 40]
    assert list(execution.run(step)) == ["seen"]
    execution.reset()
    assert [execution.run(step)["seen"].item() for _ in range(2)] == [10, 20]


def test_closing_gives_all_memory_back_and_a_closed_runner_says_so(start: Start) -> None:
    execution, _, bindings = start(COUNTING, COUNTER)
    execution.run({"step": np.zeros(1, np.float32)})
    execution.close()
    execution.close()
    assert bindings.memory == {}
    with pytest.raises(InvalidInput, match="decoder: this Runner was closed"):
        execution.run({"step": np.zeros(1, np.float32)})


def test_a_gpu_that_failed_can_be_closed(start: Start) -> None:
    execution, _, bindings = start(DOUBLED, ROWS)
    bindings.fails = True
    with pytest.raises(BackendUnavailable, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        execution.run({"a": np.ones((1, 3), np.float32)})
    execution.close()


def test_state_that_does_not_fit_is_told_with_numbers_and_leaves_nothing(start: Start) -> None:
    large = dataclasses.replace(COUNTER, dims={"cache": DimRange(2_000_000, 2_000_000, 2_000_000)})
    with pytest.raises(DeviceOutOfMemory, match=r"graph decoder, state past needs 8 MB, on GPU 0 .* 5 of 24000 MB"):
        start(COUNTING, large, memory=5_000_000)


def test_a_run_that_does_not_fit_is_told_and_a_smaller_one_runs(start: Start) -> None:
    execution, _, bindings = start(DOUBLED, ROWS, memory=5_000)
    with pytest.raises(DeviceOutOfMemory, match="graph projector, tensor a needs 0 MB"):
        execution.run({"a": np.ones((2000, 3), np.float32)})
    assert execution.run({"a": np.ones((2, 3), np.float32)})["total"] == 12
    execution.close()
    assert bindings.memory == {}


def test_what_the_library_refuses_is_one_line_with_its_reason(start: Start) -> None:
    execution, engine, _ = start(DOUBLED, ROWS)
    engine.fails = True
    with pytest.raises(BackendUnavailable, match=r"graph projector on GPU 0: tensorrt_rtx .* fails: no reason given"):
        execution.run({"a": np.ones((1, 3), np.float32)})


def test_memory_that_the_library_lacks_is_out_of_memory() -> None:
    loaded = Loaded(trt, None, None, None, ["first", "Error Code 1: Cuda Runtime (out of memory)\nmore"])
    error = loaded.failure("graph decoder on GPU 0", "1 of 2 MB are free")
    assert isinstance(error, DeviceOutOfMemory)
    assert str(error) == "graph decoder on GPU 0: Error Code 1: Cuda Runtime (out of memory); 1 of 2 MB are free"


def test_an_output_whose_size_depends_on_values_is_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    execution, engine, _ = start(DOUBLED, ROWS)
    monkeypatch.setattr(engine, "get_tensor_shape", lambda name: trt.Dims((-1, 3)))
    with pytest.raises(BundleError, match="the size of output double depends on values"):
        execution.run({"a": np.ones((1, 3), np.float32)})


def test_the_portable_decoder_answers_as_in_onnxruntime(start: Start, tmp_path: Path) -> None:
    """Prefill, steps, several tokens, a roll back; logits_from lies in the host's memory, as TensorRT wants it."""
    graph, spec = portable_decoder("fp16")
    execution, _, _ = start(graph, spec, host=("logits_from",), in_place=True)
    onnx.save(graph, tmp_path / "decoder.onnx")
    runner = open_runner("onnxruntime", tmp_path / "decoder.onnx", spec, device="cpu", threads=1)
    given = decoder_feeds(spec)
    ids = given["input_ids"][0]
    for begin, end, kept, text_at, box_at in [
        (0, 20, 19, [0], []), (20, 21, 0, [], [0]), (21, 27, 0, [0, 5], [1, 2, 3]), (24, 26, 1, [], []),
        (0, 30, 0, list(range(30)), []),
    ]:  # fmt: skip
        call = {**given, "input_ids": ids[None, begin:end], "past_length": np.array([begin], np.int64),
                "logits_from": np.array([kept], np.int64), "text_at": np.array(text_at, np.int64),
                "box_at": np.array(box_at, np.int64)}  # fmt: skip
        ours, theirs = execution.run(call), runner.run(call)
        assert ours.keys() == theirs.keys()
        assert ours["hidden"].shape[1] == end - begin - kept
        assert (ours["logits"].shape[1], ours["box_logits"].shape[1]) == (len(text_at), len(box_at))
        for name, values in theirs.items():
            assert np.array_equal(ours[name], values), name


def test_what_an_engine_says_is_put_into_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, spec = portable_decoder("fp16")
    engine = GraphEngine(graph, spec, host=("logits_from",), in_place=True)
    found = describe(trt, engine)
    assert found["logits_from"] == Described(True, "int64", True)
    assert found["present_key_0"] == Described(False, "float16", False, over="past_key_0")
    assert found["logits"] == Described(False, "float32", False)
    monkeypatch.delattr(GraphEngine, "get_aliased_input_tensor")  # as in TensorRT before 10.15
    assert describe(trt, engine)["present_key_0"].over == ""


def test_kernels_compiled_for_the_gpu_are_kept_for_the_next_start(tmp_path: Path) -> None:
    key = KernelsKey("decoder", "g" * 64, "tensorrt_rtx 1.7.1", "sm_89", "fp16", "p" * 64)
    made = SimpleNamespace(serialize=lambda: b"compiled")
    Loaded(trt, None, None, None, [], made, key, tmp_path).close()
    assert load_cached(tmp_path, key) == b"compiled"
    assert [path.suffix for path in tmp_path.iterdir()] == [".kernels"]
    (tmp_path / key.file_name).unlink()
    Loaded(trt, None, None, None, [], made, key, tmp_path, known=b"compiled").close()  # as it was read
    assert not (tmp_path / key.file_name).exists()
    (tmp_path / "taken").write_text("a file")
    Loaded(trt, None, None, None, [], made, key, tmp_path / "taken").close()  # which stops nothing


class Kernels:
    """What TensorRT-RTX keeps of kernels that it compiled."""

    def __init__(self) -> None:
        self.content = b"compiled"

    def serialize(self) -> bytes:
        return self.content

    def deserialize(self, data: bytes) -> bool:
        self.content = data + b"!"
        return True


class Library:
    """tensorrt_rtx, but for a runtime that opens every engine as `graph`; after `refused` ones it opens none."""

    def __init__(self, graph: onnx.ModelProto, spec: GraphSpec) -> None:
        self.graph, self.spec = graph, spec
        self.opened: list[bytes] = []
        self.refuses = 0
        self.kernels: list[Kernels] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(trt, name)

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=self.deserialize)

    def deserialize(self, data: bytes) -> Any:
        self.opened.append(data)
        if len(self.opened) <= self.refuses:
            return None
        engine: Any = GraphEngine(self.graph, self.spec)
        self.kernels.append(Kernels())
        config = SimpleNamespace(
            create_runtime_cache=lambda: self.kernels[-1], set_runtime_cache=lambda kernels: kernels is self.kernels[-1]
        )
        engine.create_runtime_config = lambda: config
        engine.create_execution_context = lambda *, runtime_config: engine if runtime_config is config else None
        return engine


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bindings_class: type[Any]) -> Library:
    """A machine with a GPU that the tensorrt back end can use."""
    made = Library(DOUBLED, ROWS)
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tensorrt_runner, "find_library", lambda: made)
    monkeypatch.setattr(tensorrt_runner, "find_gpu", lambda index: dataclasses.replace(GPU, index=index))
    monkeypatch.setattr(tensorrt_runner, "CudaStream", lambda gpu: CudaStream(gpu, bindings_class()))
    onnx.save(DOUBLED, tmp_path / "graph.onnx")
    return made


def test_a_runner_builds_its_engine_once_and_keeps_kernels_too(library: Library, tmp_path: Path) -> None:
    told: list[str] = []
    for turn in range(3):
        runner = open_runner("tensorrt", tmp_path / "graph.onnx", ROWS, device="gpu:1", tell=told.append)
        assert (runner.backend, runner.device) == ("tensorrt", "GPU 1")
        assert runner.run({"a": np.ones((2, 3), np.float32)})["total"] == 12
        runner.reset()
        runner.close()
        assert library.kernels[turn].content == b"compiled" + b"!" * turn
    assert ["building the engine of projector for sm_89" in told[0], len(told)] == [True, 2]
    assert len(set(library.opened)) == 1
    files = sorted(path.name.split(".", 4)[4] for path in (tmp_path / "home" / "engines").iterdir())
    assert files == ["engine", "kernels"]


def test_a_runner_checks_values_before_the_engine_sees_them(library: Library, tmp_path: Path) -> None:
    runner = open_runner("tensorrt", tmp_path / "graph.onnx", ROWS)
    with pytest.raises(InvalidInput, match="projector"):
        runner.run({"a": np.ones((2, 2), np.float32)})
    runner.close()
    with pytest.raises(InvalidInput, match="closed"):
        runner.run({"a": np.ones((2, 3), np.float32)})


def test_an_engine_that_another_driver_left_is_built_again(library: Library, tmp_path: Path) -> None:
    open_runner("tensorrt", tmp_path / "graph.onnx", ROWS).close()
    library.refuses = 2
    told: list[str] = []
    open_runner("tensorrt", tmp_path / "graph.onnx", ROWS, tell=told.append).close()
    assert "cannot be opened on this GPU and is built again" in told[0]


def test_an_engine_that_the_library_cannot_open_after_all_is_an_error(library: Library, tmp_path: Path) -> None:
    library.refuses = 9
    with pytest.raises(BackendUnavailable, match=r"graph projector on GPU 0: tensorrt_rtx .* fails: "):
        open_runner("tensorrt", tmp_path / "graph.onnx", ROWS)


@pytest.mark.skipif(not gpu_missing(), reason="this machine has a GPU for TensorRT-RTX")
def test_what_the_real_library_says_without_a_gpu_is_one_line(tmp_path: Path, bindings_class: type[Any]) -> None:
    onnx.save(DOUBLED, tmp_path / "graph.onnx")
    stream, told = CudaStream(GPU, bindings_class()), list[str]()
    with pytest.raises(BackendUnavailable, match=r"graph projector on GPU 0: tensorrt_rtx 1\.\S+ fails: \S") as caught:
        load_engine(trt, stream, tmp_path / "graph.onnx", ROWS, ("sm_89", "any"), tmp_path / "engines", told.append)
    assert "\n" not in str(caught.value)
    assert len(told) == 2


def test_every_function_that_is_called_is_the_librarys() -> None:
    """Names that the fakes above would accept and the library does not have."""
    called = {
        trt.ICudaEngine: "num_io_tensors get_tensor_name get_tensor_mode get_tensor_dtype get_tensor_location "
        "get_aliased_input_tensor create_runtime_config create_execution_context",
        trt.IExecutionContext: "set_input_shape set_tensor_address infer_shapes get_tensor_shape execute_async_v3",
        trt.IRuntimeConfig: "create_runtime_cache set_runtime_cache dynamic_shapes_kernel_specialization_strategy",
        trt.IRuntimeCache: "serialize deserialize",
        trt.Runtime: "deserialize_cuda_engine",
        trt.DynamicShapesKernelSpecializationStrategy: "NONE",
    }
    assert [name for owner, names in called.items() for name in names.split() if not hasattr(owner, name)] == []


# --- with a GPU -------------------------------------------------------------------------------------------------------


def portable_decoder(dtype: Any) -> tuple[onnx.ModelProto, GraphSpec]:
    import torch

    from edgemed.export.portable_decoder import build_portable_decoder, portable_spec
    from edgemed.families.native_torch import build, native_specs

    torch.manual_seed(0)
    decoder = {"vocabulary": 1300, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "inner": 96}
    model = build({"decoder": decoder, "projector": {"structures": 4, "modalities": 2, "body_parts": 2}})
    spec = native_specs(model)["decoder"]
    tensors = {name: weight.numpy() for name, weight in model.decoder.state_dict().items()}
    return build_portable_decoder(model.decoder.config, tensors, spec, dtype=dtype), portable_spec(spec, dtype)


def decoder_feeds(spec: GraphSpec) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    width = next(int(t.shape[1]) for t in spec.inputs if t.name == "image_tokens")
    return {
        "input_ids": rng.integers(0, 1300 + 40, (1, 30)),
        "image_tokens": rng.normal(0, 0.3, (40, width)).astype(np.float32),
        "past_length": np.array([0], np.int64),
        "logits_from": np.array([0], np.int64),
        **every_logit(spec, 30),
    }


def random_feeds(spec: GraphSpec) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    made = {}
    for t in spec.fed_inputs:
        shape = [d if isinstance(d, int) else spec.dims[d].opt for d in t.shape]
        made[t.name] = rng.random(shape).astype(t.dtype) if t.dtype == "float32" else np.ones(shape, t.dtype)
    return made


@pytest.mark.gpu
@pytest.mark.skipif(bool(gpu_missing()), reason=f"no GPU for TensorRT-RTX: {gpu_missing()}")
@pytest.mark.parametrize("role", ["vision_encoder", "projector", "mask_decoder", "decoder"])
def test_on_a_gpu_every_graph_computes_what_it_does_in_onnxruntime(
    role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgemed.export.mixed_precision import in_mixed_precision

    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path))
    if role == "decoder":
        graph, spec = portable_decoder("fp16")
        given = decoder_feeds(spec)
    else:
        bundle = open_bundle("nano")
        graph, spec = in_mixed_precision(onnx.load(bundle.graph_path(role))), bundle.spec(role)
        given = random_feeds(spec)
    path = tmp_path / f"{role}.onnx"
    onnx.save(graph, path)
    ours = open_runner("tensorrt", path, spec, device="gpu")
    expected = open_runner("onnxruntime", path, spec, device="cpu").run(given)
    assert ours.device == "GPU 0"
    for _ in range(2):  # the second from memory that was used before
        made = ours.run(given)
        for name, values in expected.items():
            assert made[name].shape == values.shape
            a, b = made[name].ravel().astype(np.float64), values.ravel().astype(np.float64)
            cosine = a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30)
            assert cosine > 0.999 or np.allclose(a, b, atol=1e-2), name  # fp16: 11 bits
    ours.close()
