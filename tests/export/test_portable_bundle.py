"""Bundles for TensorRT: standard operators, agreeing with torch, answering in onnxruntime, building to engines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgemed.bundle import Bundle
from edgemed.core import Prompt, Scan, Window
from edgemed.errors import BundleError, InvalidInput
from edgemed.export import ExportOptions, compare, export_bundle
from edgemed.export.parity import Row
from edgemed.export.portable_decoder import portable_spec
from edgemed.infer import InferOptions, Session

Made = Callable[..., Bundle]

compact = pytest.mark.parametrize("reference", ["compact"], indirect=True)
both = pytest.mark.parametrize("family", ["medrega-tiny", "medplib-tiny"])


def parity(bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bundle.file("reports/parity.json").read_text())
    return found


def types(bundle: Bundle, role: str) -> set[int]:
    """The types that matrices are stored in."""
    model = onnx.load(bundle.graph_path(role), load_external_data=False)
    kept = ("rope", "router", "embedding", ".scales", "position")
    return {t.data_type for t in model.graph.initializer if len(t.dims) == 2 and not any(k in t.name for k in kept)}


@compact
@both
def test_auto_means_fp16_and_standard_operators_everywhere(made: Made, family: str) -> None:
    bundle = made(family)
    assert set(bundle.manifest.precision.values()) == {"fp16"}
    for role in bundle.manifest.graphs:
        onnx.checker.check_model(str(bundle.graph_path(role)), full_check=True)
        model = onnx.load(bundle.graph_path(role), load_external_data=False)
        assert [o.domain for o in model.opset_import] == [""]
    assert onnx.TensorProto.FLOAT16 in types(bundle, "decoder")
    spec = bundle.spec("decoder")
    assert spec == portable_spec(spec, "fp16")
    rows = parity(bundle)["rows"]
    assert {row["graph"] for row in rows} == set(bundle.manifest.graphs)
    assert max(row["relative_error"] for row in rows) < 5e-3


@compact
@both
def test_fp32_answers_as_torch_does(made: Made, family: str) -> None:
    bundle = made(family, "fp32", "fp32")
    assert set(bundle.manifest.precision.values()) == {"fp32"}
    found = parity(bundle)
    assert max(row["relative_error"] for row in found["rows"]) < 1e-4
    answers = found["answers"]
    assert answers["questions"] == answers["same_ids"] > 0
    if family == "medplib-tiny":
        assert answers["masks"] > 0
        assert answers["lowest_dice"] > 0.999


@compact
def test_a_session_in_fp32_writes_the_authors_ids_and_in_fp16_it_answers(made: Made, reference: Any) -> None:
    tiny = reference("medrega-tiny")
    scan = Scan(np.array(tiny.input("image_square"))[None], "OT")
    prompt = Prompt(tiny.prompts["vqa_en"]["question"], settings={"task": "none"})
    expected = tiny.expected("gen_vqa_en")[0].tolist()
    for precision in ("fp32", "fp16"):
        with Session(made("medrega-tiny", precision, precision), "onnxruntime", "cpu", threads=1) as session:
            answer = session.ask(scan, prompt, InferOptions(max_new_tokens=24, grammar=False))
        ids = [*answer.generated_ids, tiny.prompts["ids"]["<|im_end|>"]][: len(expected)]
        assert ids == expected if precision == "fp32" else len(ids) > 4
        assert answer.provenance.precision["decoder"] == precision


@compact
@both
@pytest.mark.parametrize(("decoder", "vision"), [("int8", "int8"), ("int4", "auto"), ("bf16", "auto")])
def test_other_precisions_are_stored_as_said_and_compared(made: Made, family: str, decoder: str, vision: str) -> None:
    bundle = made(family, decoder, vision)
    stored = {"int8": "INT8", "int4": "INT4", "bf16": "BFLOAT16"}[decoder]
    assert bundle.manifest.precision["decoder"] == decoder
    assert bundle.manifest.precision["vision_encoder"] == ("int8" if vision == "int8" else "fp16")
    assert bundle.manifest.precision["projector"] == "fp16"
    assert getattr(onnx.TensorProto, stored) in types(bundle, "decoder")
    kind = "bfloat16" if decoder == "bf16" else "float16"
    assert {t.dtype for t in bundle.spec("decoder").inputs if t.name.startswith("past_key")} == {kind}
    assert parity(bundle)["answers"]["questions"] > 0


@compact
@both
def test_every_graph_builds_to_an_engine(made: Made, family: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (extra: edgemed[gpu])")
    from edgemed.export.engine import build_engine

    half, full = made(family), made(family, "fp32", "fp32")
    graphs = [(bundle, role) for bundle in (half, full) for role in bundle.manifest.graphs]
    graphs += [(made(family, *how), "decoder") for how in (("int8", "int8"), ("int4", "auto"))]
    graphs.append((made(family, "int8", "int8"), "vision_encoder"))
    for bundle, role in graphs:
        assert len(build_engine(bundle.graph_path(role), bundle.spec(role))) > 1 << 14


@pytest.mark.slow
def test_a_native_checkpoint_for_tensorrt_agrees_answers_and_builds(
    tiny_native: ModuleType, tmp_path: Path, traced_once: None, one_slice: Path
) -> None:
    folder = tiny_native.checkpoint(tmp_path / "tiny")
    bundles = {}
    for decoder, vision in (("auto", "auto"), ("fp32", "fp32"), ("int8", "int8"), ("int4", "auto")):
        options = ExportOptions(target="tensorrt", decoder=decoder, vision=vision, slices=one_slice)
        bundles[decoder] = export_bundle(folder, tmp_path / decoder, options)
    assert set(bundles["auto"].manifest.precision.values()) == {"fp16"}
    assert "diagnosis" in bundles["auto"].manifest.settings["notice"]["en"]
    assert "BCCD" in bundles["auto"].file("NOTICE").read_text(encoding="utf-8")
    assert "| decoder | logits |" in bundles["auto"].file("reports/card.md").read_text(encoding="utf-8")
    answers = parity(bundles["fp32"])["answers"]
    assert answers["questions"] == answers["same_ids"] == 4
    scan = Scan(np.random.default_rng(0).normal(40, 200, (1, 200, 300)).astype(np.float32), "CT", Window(40, 400))
    for bundle in bundles.values():
        with Session(bundle, "onnxruntime", "cpu", threads=1) as session:
            assert session.ask(scan, Prompt("Where is the liver?"), InferOptions(max_new_tokens=24)).generated_ids
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (extra: edgemed[gpu])")
    from edgemed.export.engine import build_engine

    graphs = [(how, role) for how in ("auto", "fp32") for role in bundles[how].manifest.graphs]
    for how, role in (*graphs, ("int8", "decoder"), ("int8", "vision_encoder"), ("int4", "decoder")):
        assert len(build_engine(bundles[how].graph_path(role), bundles[how].spec(role))) > 1 << 14


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(reference: Any, tmp_path: Path) -> Path:
    """A tiny MedRegA checkpoint that a test may change."""
    import shutil

    folder = tmp_path / "checkpoint"
    left_out = shutil.ignore_patterns("*.npz", "*.png", "sharded")
    shutil.copytree(reference("medrega-tiny").folder, folder, ignore=left_out)
    return folder


@compact
@pytest.mark.parametrize(("part", "option"), [("language_model", "decoder"), ("vision_model", "vision")])
def test_a_weight_beyond_fp16_is_refused_before_anything_is_kept(
    checkpoint: Path, tmp_path: Path, traced_once: None, part: str, option: str
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    name = next(n for n, t in sorted(tensors.items()) if n.startswith(part) and t.ndim == 2 and "embed" not in n)
    with torch.no_grad():
        tensors[name][0, 0] = 1e5
    save_file(tensors, checkpoint / "model.safetensors")
    options = ExportOptions(target="tensorrt", compare=False, tell=lambda line: None)
    with pytest.raises(InvalidInput, match="has a value that fp16 does not hold; choose bf16 or fp32"):
        export_bundle(checkpoint, tmp_path / "b", options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]
    export_bundle(checkpoint, tmp_path / "b", dataclasses.replace(options, **{option: "fp32"}))


@compact
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"vision": "bf16"}, "--vision is bf16, --target tensorrt takes auto, fp16, fp32, int8"),
        ({"vision": "int4"}, "--vision is int4"),
        (
            {"target": "onnxruntime", "decoder": "fp16"},
            "--decoder is fp16, --target onnxruntime takes auto, fp32, int8",
        ),
        ({"target": "cuda"}, "target is 'cuda'"),
        ({"decoder": "fp8"}, "format is 'fp8'"),
        ({"decoder": "int4", "block": 20}, "blocks of 20"),
    ],
)
def test_a_precision_that_a_target_has_not_is_one_line(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidInput, match=told) as caught:
        export_bundle(checkpoint, tmp_path / "b", ExportOptions(**{"target": "tensorrt", **options}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_each_precision_has_its_limit() -> None:
    near, far = Row("decoder", "logits", 0.1, 1e-3, 0.9999), Row("decoder", "logits", 9.0, 0.5, 0.9)
    for precision in ("fp32", "fp16", "bf16", "int8"):
        compare._check(near, precision)  # type: ignore[arg-type]
        with pytest.raises(BundleError, match=f"{precision}.* nothing was written"):
            compare._check(far, precision)  # type: ignore[arg-type]
    compare._check(far, "int4")
    compare._check(dataclasses.replace(far, output="logits" + compare.REROUTED), "fp32")


def test_answers_agree_by_their_ids_and_the_dice_of_their_masks() -> None:
    full, none = np.ones((4, 4), bool), np.zeros((4, 4), bool)
    same = compare.Answered((1, 2), (full,))
    found = compare._agreement([
        (same, same),
        (same, compare.Answered((1, 3), (none,))),
        (compare.Answered((), (full, full)), compare.Answered((), (full,))),  # a mask that one lacks
    ])  # fmt: skip
    assert (found["questions"], found["same_ids"], found["masks"]) == (2, 1, 4)
    assert (found["mean_dice"], found["lowest_dice"]) == (0.5, 0.0)
    assert compare._agreement([])["mean_dice"] is None
