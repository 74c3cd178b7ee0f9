"""The native family's graphs compute what torch computes, and what does not is never written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgemed.bundle import open_bundle
from edgemed.errors import BundleError, NoInput
from edgemed.export import ExportOptions, export_bundle, write
from edgemed.export.parity import Row, compare, read_slices, to_markdown
from edgemed.families.native_text import NativeText
from edgemed.families.native_torch import NativeModel, load, native_specs, save_checkpoint
from edgemed.models.projector import ROWS


def test_the_specs_have_the_sizes_of_the_model(native_model: NativeModel) -> None:
    specs = native_specs(native_model)
    outputs = {t.name: t.shape for t in specs["projector"].outputs}
    assert outputs["image_tokens"] == (ROWS, 64)
    assert outputs["boxes"] == (native_model.projector.head.config.structures, 4)
    assert specs["decoder"].dims["rows"].max == ROWS + specs["projector"].dims["regions"].max
    assert {t.name: t.shape for t in specs["mask_decoder"].inputs}["seg_hidden"] == ("prompts", 64)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, native_model: NativeModel, tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_checkpoint(
        folder, native_model, tokenizer_file, {"recipe": "tiny", "sources": ["bccd"], "seed": 1, "samples": 2}
    )
    return folder


def test_a_checkpoint_gives_back_what_was_saved(native_model: NativeModel, checkpoint: Path) -> None:
    loaded = load(checkpoint)
    assert not loaded.training
    assert all(v.equal(loaded.state_dict()[k]) for k, v in native_model.state_dict().items())


@pytest.mark.slow
def test_every_output_of_every_graph_agrees_with_torch(exported: Any, export_text: NativeText, tmp_path: Path) -> None:
    paths = {role: tmp_path / f"{role}.onnx" for role in exported.graphs}
    for role, graph in exported.graphs.items():
        onnx.save(graph, paths[role])
        assert not any(node.metadata_props for node in graph.graph.node)
    rows = compare(exported.model, paths, exported.specs, export_text, exported.images)
    assert {(r.graph, r.output) for r in rows} == {
        ("vision_encoder", "image_features"), ("projector", "image_tokens"), ("projector", "region_tokens"),
        ("projector", "presence"), ("projector", "boxes"), ("projector", "structure_maps"),
        ("projector", "side_probability"), ("projector", "side_spread"),
        ("decoder", "logits (prefill)"), ("decoder", "hidden (prefill)"), ("decoder", "logits (step)"),
        ("decoder", "hidden (step)"), ("decoder", "box_logits (prefill)"), ("decoder", "box_logits (step)"),
        ("mask_decoder", "mask_logits"), ("mask_decoder", "iou"),
    }  # fmt: skip
    for row in rows:
        assert row.relative_error < 1e-3, row
        assert row.cosine > 0.99999, row


@pytest.fixture
def with_graphs(exported: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, onnx.ModelProto]:
    """Let a bundle be written from the graphs made already; returns copies that a test may spoil."""
    graphs = {role: onnx.ModelProto.FromString(g.SerializeToString()) for role, g in exported.graphs.items()}
    monkeypatch.setattr(write, "native_graphs", lambda model, specs: graphs)
    monkeypatch.setattr(write, "read_slices", lambda folder: exported.images)
    return graphs


@pytest.mark.slow
def test_a_bundle_holds_graphs_tables_and_the_card(
    with_graphs: dict[str, onnx.ModelProto], checkpoint: Path, tmp_path: Path
) -> None:
    from edgemed.calibration.weight_only import quantize_weights

    (checkpoint / "quality.md").write_text("| liver | 0.9 |\n")
    export_bundle(checkpoint, tmp_path / "b", ExportOptions(shrink=lambda graph: quantize_weights(graph)[0]))
    bundle = open_bundle(str(tmp_path / "b"))
    assert bundle.manifest.name == "tiny"
    assert bundle.manifest.precision["decoder"] == "int8"
    assert "diagnosis" in bundle.manifest.settings["notice"]["en"]
    card = (tmp_path / "b" / "reports" / "card.md").read_text(encoding="utf-8")
    assert "| liver | 0.9 |" in card
    assert card.count("| decoder | logits (prefill) |") == 2  # fp32 and int8
    assert "BCCD" in (tmp_path / "b" / "NOTICE").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_wrong_graph_is_refused_by_its_name(
    with_graphs: dict[str, onnx.ModelProto], checkpoint: Path, tmp_path: Path
) -> None:
    weights = [t for t in with_graphs["projector"].graph.initializer if t.name.endswith("region.2.weight")]
    weights = weights or [max(with_graphs["projector"].graph.initializer, key=lambda t: int(np.prod(t.dims)))]
    spoiled = numpy_helper.to_array(weights[0]) * 1.02
    weights[0].CopyFrom(numpy_helper.from_array(spoiled.astype(np.float32), weights[0].name))
    with pytest.raises(BundleError, match=r"projector: output \w+ differs from torch by .* nothing was written"):
        export_bundle(checkpoint, tmp_path / "b", ExportOptions(decoder="fp32"))
    assert not (tmp_path / "b").exists()


def test_the_gate_refuses_by_its_limits(
    native_model: NativeModel, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without any graph: rows as `compare` would give them."""
    good = Row("decoder", "logits (step)", 0.0, 1e-6, 1.0)
    found = {"fp32": [good], "int8": [good]}
    asked: list[str] = []

    def rows(*_: Any) -> list[Row]:
        asked.append("int8" if asked else "fp32")
        return found[asked[-1]]

    empty = onnx.ModelProto(ir_version=8)
    monkeypatch.setattr(write, "native_graphs", lambda model, specs: dict.fromkeys(specs, empty))
    monkeypatch.setattr(write, "read_slices", lambda folder: [])
    monkeypatch.setattr(write, "compare", rows)
    for changed, told in (
        ({"fp32": [replace(good, relative_error=3e-3)]}, r"decoder: output logits \(step\) differs"),
        ({"fp32": [replace(good, relative_error=float("nan"))]}, "differs from torch by nan"),
        ({"int8": [replace(good, cosine=0.99)]}, "decoder in int8: cosine"),
    ):
        asked.clear()
        found.update({"fp32": [good], "int8": [good]} | changed)
        with pytest.raises(BundleError, match=told):
            export_bundle(checkpoint, tmp_path / "b", ExportOptions(shrink=lambda graph: graph))
        assert not (tmp_path / "b").exists()


def test_slices_come_from_a_folder_that_may_hold_other_files(tmp_path: Path, sample_scan: str) -> None:
    (tmp_path / "readme.txt").write_text("not a scan")
    (tmp_path / "slice.dcm").write_bytes(Path(sample_scan).read_bytes())
    images = read_slices(tmp_path)
    assert [(i.dtype, i.shape) for i in images] == [(np.float32, (3, 256, 256))]
    assert 0 <= images[0].min() < 0.1
    assert images[0].max() == pytest.approx(1, abs=0.1)
    (tmp_path / "slice.dcm").unlink()
    with pytest.raises(NoInput, match="no slices to compare on"):
        read_slices(tmp_path)


def test_the_table_has_one_line_for_each_output() -> None:
    table = to_markdown([Row("decoder", "logits", 1.5e-3, 2e-5, 0.9999999)])
    assert table.splitlines()[-1] == "| decoder | logits | 1.50e-03 | 2.00e-05 | 1.000000 |"
