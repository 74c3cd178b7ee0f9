"""The embedded bundle in INT8 by a plan that the search found: it still answers as before, and is smaller."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgemed.bundle import open_bundle
from edgemed.calibration.plan import plan_from_toml
from edgemed.calibration.quantize_bundle import REPORT, QuantizeOptions, quantize_bundle

PLAN = Path(__file__).resolve().parents[1] / "files" / "nano_int8.toml"


@pytest.mark.slow
def test_nano_in_int8_passes_its_gates(tmp_path: Path, segmentator_files: Path) -> None:
    plan = plan_from_toml(PLAN.read_text(encoding="utf-8"))
    options = QuantizeOptions(slices=segmentator_files / "example_ct_dicom", calibrate=8, held_out=6)
    made = quantize_bundle("nano", tmp_path / "nano8", plan, options)
    report = json.loads(made.file(REPORT).read_text())
    assert [row["graph"] for row in report["graphs"]] == ["vision_encoder"]
    assert report["graphs"][0]["cosine"] > 0.9995
    assert report["answers"]["boxes"] > 100
    before = open_bundle("nano").graph_path("vision_encoder").stat().st_size
    assert made.graph_path("vision_encoder").stat().st_size < 0.7 * before
