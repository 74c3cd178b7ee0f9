"""Every graph of every family in INT8, FP8 and INT4: runs in onnxruntime, passes its gate, builds to an engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from edgemed.bundle import Bundle
from edgemed.calibration.gates import Gates
from edgemed.calibration.plan import Precision
from edgemed.calibration.quantize_bundle import REPORT, QuantizeOptions, quantize_bundle
from edgemed.calibration.sites import default_plan
from edgemed.export import ExportOptions, export_bundle

FORMS: dict[str, tuple[Precision, str]] = {
    "int8": ("int8", "INT8"), "fp8": ("fp8", "FLOAT8E4M3FN"), "int4": ("int4-weights", "INT4"),
}  # fmt: skip
RANDOM = Gates(cosine=0.97, box_iou=0, mask_dice=0, same_text=0)
"""What random weights pass: they have no margin between tokens and amplify rounding in each layer. native's image rows
hold coordinates that are looked up by where a box happens to be; FP8 moves it (0.74)."""

PROFILES = dict.fromkeys(("node_conv1d", "node_conv1d_1"), "coordinates of boxes come from it")
"""Of native's projector: with random weights a coordinate may be anywhere, and a row is looked up by it."""

Portable = Callable[[str], Bundle]


@pytest.fixture(scope="session")
def portable(
    reference: Any, tiny_native: ModuleType, tmp_path_factory: pytest.TempPathFactory, sample_scan: str
) -> Portable:
    """`portable("native")`: the fp16 bundle for TensorRT of a tiny checkpoint, made once."""
    made: dict[str, Bundle] = {}
    folder = tmp_path_factory.mktemp("portable")
    (folder / "slices").mkdir()
    (folder / "slices" / "slice.dcm").write_bytes(Path(sample_scan).read_bytes())

    def export(family: str) -> Bundle:
        if family not in made:
            native = family == "native"
            checkpoint = tiny_native.checkpoint(folder / "native") if native else reference(family).folder
            options = ExportOptions(
                target="tensorrt", cache=None if native else 800, slices=folder / "slices", tell=lambda line: None
            )
            made[family] = export_bundle(checkpoint, folder / f"{family}-bundle", options)
        return made[family]

    return export


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["compact"], indirect=True)
@pytest.mark.parametrize("family", ["native", "medrega-tiny", "medplib-tiny"])
@pytest.mark.parametrize("form", FORMS)
def test_every_graph_passes_and_builds(tmp_path: Path, portable: Portable, family: str, form: str) -> None:
    source = portable(family)
    precision, stored = FORMS[form]
    models = {role: onnx.load(source.graph_path(role)) for role in source.manifest.graphs}
    plan = default_plan(models, dict.fromkeys(models, precision), block=32)
    if family == "native":
        boxes = {**plan.excluded["projector"], **PROFILES}
        plan = replace(plan, excluded={**plan.excluded, "projector": boxes})
    gates = replace(RANDOM, cosine=0.7) if family == "native" else RANDOM
    options = QuantizeOptions(calibrate=2, held_out=1, gates=gates, max_new_tokens=4, recorded_tokens=64, threads=1)
    made = quantize_bundle(source.path, tmp_path / form, plan, options)
    report = json.loads(made.file(REPORT).read_text())
    assert {row["graph"] for row in report["graphs"]} == set(models)
    assert all(row["passed"] for row in report["graphs"])
    for role in models:
        kinds = {t.data_type for t in onnx.load(made.graph_path(role), load_external_data=False).graph.initializer}
        assert getattr(onnx.TensorProto, stored) in kinds, role
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (extra: edgemed[gpu])")
    from edgemed.backends.engine_build import build_engine

    for role in models:
        assert len(build_engine(made.graph_path(role), made.spec(role))) > 1 << 14, role
