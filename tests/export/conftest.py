"""A native model with random weights and its four graphs, made once for the whole run; and a slice to compare on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from edgemed.bundle import Bundle
from edgemed.export import ExportOptions, export_bundle
from edgemed.families.native_lexicon import BODY_PARTS, MODALITIES, STRUCTURES
from edgemed.families.native_text import NativeText
from edgemed.families.native_torch import NativeModel, native_specs
from edgemed.graphs import GraphSpec
from edgemed.models.llama import Llama, LlamaConfig
from edgemed.models.mask_decoder import MaskDecoder
from edgemed.models.projector import Projector
from edgemed.models.structure_head import StructureConfig
from edgemed.models.tiny_vit import TinyViT


@dataclass(frozen=True, eq=False)
class Exported:
    """The model, its specs and its graphs, and pictures to compare on."""

    model: NativeModel
    specs: dict[str, GraphSpec]
    graphs: dict[str, onnx.ModelProto]
    images: list[npt.NDArray[np.float32]]


@pytest.fixture(scope="session")
def export_text(tmp_path_factory: pytest.TempPathFactory, tiny_native: ModuleType) -> NativeText:
    return NativeText(_tokenizer(tmp_path_factory, tiny_native))


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory, tiny_native: ModuleType) -> Path:
    return _tokenizer(tmp_path_factory, tiny_native)


def _tokenizer(folders: pytest.TempPathFactory, tiny_native: ModuleType) -> Path:
    path = folders.mktemp("text") / "tokenizer.json"
    path.write_text(tiny_native.tokenizer_json(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def native_model(export_text: NativeText) -> NativeModel:
    """All parts in their real shapes, but for a small language model; weights random."""
    torch.manual_seed(0)
    first = export_text.tokens().first_coordinate
    decoder = Llama(LlamaConfig(vocabulary=export_text.vocabulary, first_coordinate=first, width=64, layers=2, heads=4,
                                kv_heads=2, head_dim=16, inner=96, draft_rank=8))  # fmt: skip
    head = StructureConfig(len(STRUCTURES), len(MODALITIES), len(BODY_PARTS), context=24, layers=1, heads=2)
    masks = MaskDecoder(64)
    projector = Projector(head, 64)
    with torch.no_grad():
        masks.frequencies.normal_()
        for p in masks.parameters():
            if not p.any():
                p.normal_(0, 0.1)
        projector.coordinates.normal_()
    return NativeModel(TinyViT(), projector, decoder, masks).eval()


@pytest.fixture(scope="session")
def exported(native_model: NativeModel) -> Exported:
    """Takes about a minute for each graph that torch exports."""
    from edgemed.export.native import native_graphs

    specs = native_specs(native_model)
    images = [np.random.default_rng(0).random((3, 256, 256)).astype(np.float32)]
    return Exported(native_model, specs, native_graphs(native_model, specs), images)


@pytest.fixture(scope="session")
def traced_once() -> Iterator[None]:
    """Traces each module once: a trace knows shapes only, whatever becomes of the weights."""
    from edgemed.export import traced_graph

    made: dict[str, onnx.ModelProto] = {}

    def traced(module: Any, spec: GraphSpec) -> onnx.ModelProto:
        if repr(spec) not in made:
            made[repr(spec)] = trace(module, spec)
        return deepcopy(made[repr(spec)])  # the weights are written into it

    trace = traced_graph.traced
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traced_graph, "traced", traced)
        yield


@pytest.fixture(scope="session")
def one_slice(sample_scan: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one scan."""
    folder = tmp_path_factory.mktemp("slice")
    (folder / "slice.dcm").write_bytes(Path(sample_scan).read_bytes())
    return folder


@pytest.fixture(scope="session")
def made(
    reference: Any, tmp_path_factory: pytest.TempPathFactory, traced_once: None, one_slice: Path
) -> Callable[..., Bundle]:
    """Exports a tiny checkpoint for TensorRT, each way once; the longest prompt of its comparison has 684 tokens."""
    bundles: dict[tuple[str, ...], Bundle] = {}

    def export(family: str, decoder: str = "auto", vision: str = "auto") -> Bundle:
        how = (family, decoder, vision)
        if how not in bundles:
            options = ExportOptions(target="tensorrt", decoder=decoder, vision=vision, cache=800, slices=one_slice,
                                    tell=lambda line: None)  # fmt: skip
            bundles[how] = export_bundle(reference(family).folder, tmp_path_factory.mktemp("b") / "b", options)
        return bundles[how]

    return export
