"""Engines built without a GPU: every graph of every family, and those of a bundle into a folder. None is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgemed.backends.engine_build import build_engine, graph_key
from edgemed.backends.engine_cache import load_cached
from edgemed.bundle import Bundle, open_bundle, write_bundle
from edgemed.checkpoints import open_checkpoint
from edgemed.errors import BundleError, CannotRead
from edgemed.export.engine import build_engines
from edgemed.export.graph_writer import GraphWriter, WeightFile
from edgemed.export.mixed_precision import in_mixed_precision
from edgemed.export.portable_decoder import build_portable_decoder, portable_spec
from edgemed.export.traced_graph import build_traced_graph
from edgemed.families.native_torch import build, native_specs
from edgemed.families.opened_torch import describe
from edgemed.families.specs import decoder_spec
from edgemed.graphs import DimRange, GraphSpec, TensorSpec
from edgemed.models.llama import Llama, LlamaConfig
from edgemed.models.moe import MoeLlama

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (extra: edgemed[gpu])")

compact = pytest.mark.parametrize("reference", ["compact"], indirect=True)
ALL = [None, "sm_75", "sm_86", "sm_120"]


def save(graph: onnx.ModelProto, folder: Path, name: str = "graph") -> Path:
    path = folder / f"{name}.onnx"
    onnx.save(graph, path)
    return path


# --- decoders ---------------------------------------------------------------------------------------------------------


def native_decoder(folder: Path, dtype: str) -> tuple[Path, GraphSpec]:
    decoder = {"vocabulary": 1300, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "inner": 96}
    model = build({"decoder": decoder, "projector": {"structures": 4, "modalities": 2, "body_parts": 2}})
    spec = native_specs(model)["decoder"]
    tensors = {name: weight.numpy() for name, weight in model.decoder.state_dict().items()}
    graph = build_portable_decoder(model.decoder.config, tensors, spec, dtype=dtype)  # type: ignore[arg-type]
    return save(graph, folder), portable_spec(spec, dtype)  # type: ignore[arg-type]


def published_decoder(reference: Any, family: str, folder: Path, dtype: str) -> tuple[Path, GraphSpec]:
    published = describe(open_checkpoint(reference(family).folder))
    spec = published.specs["decoder"]
    graph = build_portable_decoder(
        published.decoder, published.tensors["decoder"], spec, dtype=dtype, experts=published.experts  # type: ignore[arg-type]
    )  # fmt: skip
    return save(graph, folder), portable_spec(spec, dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ALL)
def test_the_native_decoder_builds_in_fp16_for_every_target(tmp_path: Path, target: str | None) -> None:
    assert len(build_engine(*native_decoder(tmp_path, "fp16"), target)) > 1 << 16


@compact
@pytest.mark.parametrize("family", ["medrega-tiny", "medplib-tiny"])
def test_published_decoders_build_with_and_without_experts(reference: Any, tmp_path: Path, family: str) -> None:
    graph, spec = published_decoder(reference, family, tmp_path, "fp16")
    for target in (None, "sm_75"):
        assert len(build_engine(graph, spec, target)) > 1 << 16
    assert len(build_engine(*published_decoder(reference, family, tmp_path, "bf16"))) > 1 << 16


@pytest.mark.parametrize("experts", [(2, 1), (1, 2), (2, 1, 1), (2, 2, 1), (3, 1, 3, 1)])
def test_a_decoder_builds_wherever_its_experts_are(tmp_path: Path, experts: tuple[int, ...]) -> None:
    """With the Attention operator, those whose last layer has none did not."""
    sizes: Any = {"vocabulary": 130, "width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "inner": 96, "bins": 0}
    model = MoeLlama(LlamaConfig(**sizes, layers=len(experts), tied=False), experts)
    spec = decoder_spec(model.config, image_rows=DimRange(1, 7, 7), cache=64, draft=False, experts=experts)
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    graph = build_portable_decoder(model.config, weights, spec, experts=experts)
    assert len(build_engine(save(graph, tmp_path), portable_spec(spec))) > 1 << 16


def test_a_decoder_with_its_weights_in_a_file_beside_it_builds(tmp_path: Path) -> None:
    model = Llama(LlamaConfig(vocabulary=130, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, inner=96, bins=0))
    spec = decoder_spec(model.config, image_rows=DimRange(1, 7, 7), cache=64, draft=False)
    file = WeightFile(tmp_path / "graph.onnx.data")
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    graph = build_portable_decoder(model.config, weights, spec, writer=GraphWriter(weights=file))
    file.finish()
    assert len(build_engine(save(graph, tmp_path), portable_spec(spec))) > 1 << 16


def test_the_native_decoder_builds_in_fp32(tmp_path: Path) -> None:
    assert len(build_engine(*native_decoder(tmp_path, "fp32"))) > 1 << 16


@pytest.mark.parametrize(("dtype", "reason"), [("fp32", "FP32 GEMM is not supported"), ("bf16", "b16")])
def test_what_sm_75_cannot_compute_is_refused_with_the_librarys_reason(tmp_path: Path, dtype: str, reason: str) -> None:
    with pytest.raises(BundleError, match=f"cannot build it for sm_75: .*{reason}"):
        build_engine(*native_decoder(tmp_path, dtype), "sm_75")


# --- other graphs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["vision_encoder", "projector", "mask_decoder"])
def test_native_graphs_build_in_fp16_and_fp32(tmp_path: Path, role: str) -> None:
    bundle = open_bundle("nano")
    path, spec = bundle.graph_path(role), bundle.spec(role)
    half = save(in_mixed_precision(onnx.load(path)), tmp_path)
    for graph in (half, path):  # no word on sizes: one graph gave 18 MB or 466 MB from build to build
        assert len(build_engine(graph, spec)) > 1 << 16


@compact
@pytest.mark.parametrize(
    ("family", "role"),
    [
        ("medrega-tiny", "vision_encoder"),
        ("medrega-tiny", "projector"),
        ("medplib-tiny", "vision_encoder"),
        ("medplib-tiny", "projector"),
        ("medplib-tiny", "mask_decoder"),
    ],
)
def test_published_graphs_build_in_fp16_and_fp32(reference: Any, tmp_path: Path, family: str, role: str) -> None:
    published = describe(open_checkpoint(reference(family).folder))
    spec = published.specs[role]
    graph = build_traced_graph(published.modules[role], published.tensors[role], spec)
    assert len(build_engine(save(graph, tmp_path, "fp32"), spec)) > 1 << 14
    half = save(in_mixed_precision(graph), tmp_path, "fp16")
    assert len(build_engine(half, spec, "sm_75")) > 1 << 14  # which has no product in fp32


# --- a bundle's engines -----------------------------------------------------------------------------------------------

SPEC = GraphSpec(
    "projector",
    (TensorSpec("x", "float32", ("rows", 8)),),
    (TensorSpec("z", "float32", ("rows", 8)),),
    {"rows": DimRange(1, 2, 16)},
)


def product(scale: float = 1.0) -> onnx.ModelProto:
    """The smallest graph worth an engine: z = x @ w."""
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", 8]) for n in ("x", "z")]
    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32) * scale, "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["z"])], "g", infos[:1], infos[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def bundle_of(folder: Path, scale: float = 1.0) -> Bundle:
    return write_bundle(
        folder, name="small", family="native", graphs={"projector": SPEC}, precision={"projector": "fp32"},
        files={"graphs/projector.onnx": product(scale).SerializeToString()}, replace=True,
    )  # fmt: skip


def test_engines_of_a_bundle_are_kept_until_something_they_were_built_from_changes(tmp_path: Path) -> None:
    bundle, told = bundle_of(tmp_path / "b"), list[str]()
    folder, targets = tmp_path / "engines", ("any", "sm_89")
    first = build_engines(bundle, folder, targets, tell=told.append)
    assert [b.path.name.rsplit(".", 2)[0] for b in first] == ["projector.fp32.any", "projector.fp32.sm_89"]
    assert [b.reused for b in first] == [False, False]
    assert all(load_cached(folder, b.key) for b in first)
    assert [b.reused for b in build_engines(bundle, folder, targets, tell=told.append)] == [True, True]
    assert told == []
    other = bundle_of(tmp_path / "b", scale=2.0)
    with pytest.raises(CannotRead, match="there is no engine"):
        load_cached(folder, graph_key(other.graph_path("projector"), SPEC))
    assert [b.reused for b in build_engines(other, folder, targets, tell=told.append)] == [False, False]
    assert told == []
    wider = replace(SPEC, dims={"rows": DimRange(1, 2, 32)})
    other = write_bundle(
        tmp_path / "b", name="small", family="native", graphs={"projector": wider}, precision={"projector": "fp32"},
        files={"graphs/projector.onnx": product(2.0).SerializeToString()}, replace=True,
    )  # fmt: skip
    assert [b.reused for b in build_engines(other, folder, tell=told.append)] == [False]
    assert "is stale: it was built for profile" in told[-1]
    content = bytearray(first[0].path.read_bytes())
    content[-100] ^= 1
    first[0].path.write_bytes(content)
    again = bundle_of(tmp_path / "b")
    assert [b.reused for b in build_engines(again, folder, targets, tell=told.append)] == [False, True]
    assert "was changed after it was built" in told[-1]


def test_progress_is_told_and_ends_the_build_where_it_raises(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    bundle = bundle_of(tmp_path / "b")
    build_engines(bundle, tmp_path / "engines", progress=lambda *step: seen.append(step))
    assert {name for name, _, _ in seen} == {"projector for any"}
    assert all(0 < done <= total for _, done, total in seen)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, tmp_path / "stopped", progress=stop)
    assert not (tmp_path / "stopped").exists()
