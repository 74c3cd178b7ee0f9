"""Engines of small graphs, built without a GPU: targets by name, what is refused and how, what is found again."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgemed.backends import engine_build
from edgemed.backends.engine_build import (
    ANY,
    TARGETS,
    build_engine,
    find_library,
    graph_key,
    held,
    open_or_build,
    target_name,
    targets_of,
)
from edgemed.bundle import open_bundle, write_bundle
from edgemed.errors import BackendUnavailable, BundleError, CannotRead, InvalidInput
from edgemed.graphs import DimRange, GraphSpec, TensorSpec

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (extra: edgemed[gpu])")

SPEC = GraphSpec(
    "projector",
    (TensorSpec("x", "float32", ("rows", 8)),),
    (TensorSpec("z", "float32", ("rows", 8)),),
    {"rows": DimRange(1, 2, 16)},
)


def product() -> onnx.ModelProto:
    """The smallest graph worth an engine: z = x @ w."""
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", 8]) for n in ("x", "z")]
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["z"])], "g", infos[:1], infos[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    onnx.save(product(), tmp_path / "graph.onnx")
    return tmp_path / "graph.onnx"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_operator_that_the_library_lacks_is_named_with_its_node_and_what_to_do() -> None:
    bundle = open_bundle("nano")
    with pytest.raises(BundleError, match=r"operator MatMulNBits of node layers\.0\.qkv\.output") as caught:
        build_engine(bundle.graph_path("decoder"), bundle.spec("decoder"))
    assert "`edgemed export --target tensorrt`" in str(caught.value)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, graph: Path) -> None:
    for name in ("tensorrt_rtx", "tensorrt"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendUnavailable, match=r"edgemed\[gpu\]"):
        build_engine(graph, SPEC)


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "RTX 4090", ""])
def test_an_unknown_target_is_refused_with_the_known_ones(graph: Path, target: str) -> None:
    with pytest.raises(InvalidInput, match="sm_75, sm_80, sm_86, sm_89, sm_120, sm_121, any"):
        build_engine(graph, SPEC, target)


def test_the_documented_targets_are_the_librarys() -> None:
    assert targets_of(find_library()) == tuple(TARGETS)


@pytest.mark.parametrize(("text", "name"), [("sm89", "sm_89"), ("SM_120", "sm_120"), ("any", "any"), ("sm", "sm")])
def test_targets_are_read_in_both_forms(text: str, name: str) -> None:
    assert target_name(text) == name


def test_files_that_are_no_graph_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotRead, match="there is no such file"):
        build_engine(tmp_path / "none.onnx", SPEC)
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x08not a graph")
    with pytest.raises(BundleError, match=r"broken\.onnx"):
        build_engine(tmp_path / "broken.onnx", SPEC)


def test_a_graph_with_other_inputs_than_described_is_refused(graph: Path) -> None:
    other = dataclasses.replace(SPEC, inputs=(dataclasses.replace(SPEC.inputs[0], name="y"),))
    with pytest.raises(BundleError, match="has inputs x; the bundle's description says y"):
        build_engine(graph, other)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_key_follows_from_the_files_the_spec_the_target_and_the_library(graph: Path) -> None:
    key = graph_key(graph, SPEC, "sm_89")
    assert (key.role, key.target, key.precision) == ("projector", "sm_89", "own")
    assert key.library.startswith("tensorrt_rtx 1.")
    assert graph_key(graph, SPEC, "sm_89") == key
    other = dataclasses.replace(SPEC, dims={"rows": DimRange(1, 2, 17)})
    assert graph_key(graph, other, "sm_89").profile != key.profile
    graph.with_name("graph.onnx.data").write_bytes(b"weights")
    assert graph_key(graph, SPEC).graph != key.graph


def test_the_digests_of_a_bundle_are_taken_from_its_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(
        tmp_path / "b", name="small", family="native", graphs={"projector": SPEC}, precision={"projector": "fp16"},
        files={"graphs/projector.onnx": product().SerializeToString(), "graphs/projector.onnx.data": b"weights"},
    )  # fmt: skip
    monkeypatch.setattr(engine_build, "sha256_of", lambda path: pytest.fail(f"{path} was read"))
    path = bundle.graph_path("projector")
    key = graph_key(path, SPEC)
    assert key.precision == "fp16"
    manifest = json.loads((bundle.path / "bundle.json").read_text())
    manifest["files"]["graphs/projector.onnx.data"] = "0" * 64
    (bundle.path / "bundle.json").write_text(json.dumps(manifest))
    assert graph_key(path, SPEC).graph != key.graph


def test_a_graph_that_is_not_there_has_no_key(tmp_path: Path) -> None:
    with pytest.raises(CannotRead, match="none.onnx"):
        graph_key(tmp_path / "none.onnx", SPEC)


# --- found or built ---------------------------------------------------------------------------------------------------


class Builds:
    """Counts the builds, which are real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.targets: list[str | None] = []
        monkeypatch.setattr(engine_build, "build_engine", self)

    def __call__(self, graph: Path, spec: GraphSpec, target: str | None = None) -> bytes:
        self.targets.append(target)
        return build_engine(graph, spec, target)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds(monkeypatch)


def test_an_engine_is_built_once_and_again_where_it_is_stale_or_changed(
    graph: Path, tmp_path: Path, builds: Builds
) -> None:
    folder, told = tmp_path / "engines", list[str]()

    def get(spec: GraphSpec = SPEC) -> bytes:
        engine = open_or_build(graph, spec, ("sm_89", ANY), folder, bytes, told.append)
        assert engine is not None
        return engine

    first = get()
    assert "building the engine of projector for sm_89" in told[0]
    assert [get() == first, get() == first, len(told)] == [True, True, 2]
    (file,) = folder.iterdir()
    changed = bytearray(file.read_bytes())
    changed[-7] ^= 4
    file.write_bytes(changed)
    get()
    assert "was changed after it was built" in told[2]
    get(dataclasses.replace(SPEC, dims={"rows": DimRange(1, 2, 17)}))
    assert "is stale: it was built for profile" in told[5]
    assert builds.targets == ["sm_89"] * 3


def test_an_engine_for_any_gpu_is_taken_where_there_is_none_for_this_one(
    graph: Path, tmp_path: Path, builds: Builds
) -> None:
    portable = open_or_build(graph, SPEC, (ANY,), tmp_path / "e", bytes, print)
    assert open_or_build(graph, SPEC, ("sm_86", ANY), tmp_path / "e", bytes, print) == portable
    assert builds.targets == [None]


def test_an_engine_that_does_not_open_is_built_again_but_once(graph: Path, tmp_path: Path, builds: Builds) -> None:
    told: list[str] = []
    open_or_build(graph, SPEC, ("sm_89",), tmp_path / "e", bytes, told.append)
    assert open_or_build(graph, SPEC, ("sm_89",), tmp_path / "e", lambda engine: None, told.append) is None
    assert "cannot be opened on this GPU and is built again" in told[2]
    assert builds.targets == ["sm_89", "sm_89"]


def test_graphs_that_are_opened_side_by_side_are_built_one_after_the_other(graph: Path, tmp_path: Path) -> None:
    def get(role: str) -> bytes | None:
        spec = dataclasses.replace(SPEC, role=role)
        return open_or_build(graph, spec, ("sm_89",), tmp_path / "e", bytes, lambda line: None)

    roles = ("projector", "vision_encoder", "mask_decoder")
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(get, roles))
    assert sorted(path.name.split(".")[0] for path in (tmp_path / "e").iterdir()) == sorted(roles)


def test_a_folder_that_cannot_be_written_does_not_stop_the_answer(graph: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    told: list[str] = []
    assert open_or_build(graph, SPEC, ("sm_89",), tmp_path / "taken", bytes, told.append)
    assert "cannot write" in told[-1]
    assert "built again the next time" in told[-1]
    assert held(tmp_path / "taken", graph_key(graph, SPEC, "sm_89")) is None


def test_progress_is_told_and_ends_the_build_where_it_raises(graph: Path) -> None:
    seen: list[tuple[int, int]] = []
    build_engine(graph, SPEC, progress=lambda *step: seen.append(step))
    assert all(0 < done <= total for done, total in seen)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(graph, SPEC, progress=stop)
    assert build_engine(graph, SPEC)  # and the next one is not held up


def test_nothing_is_collected_while_the_library_holds_its_lock() -> None:
    assert gc.isenabled()
    with engine_build.no_collection():
        with engine_build.no_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_build_runs_without_collection_and_gives_it_back(graph: Path) -> None:
    """TensorRT logs with a lock held; a collection there that finds an old Builder would wait for ever."""
    seen: list[bool] = []
    build_engine(graph, SPEC, progress=lambda done, total: seen.append(gc.isenabled()))
    assert seen
    assert not any(seen)
    assert gc.isenabled()
