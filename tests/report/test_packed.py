"""Regions whose masks are kept compressed: what they say is the same, what they take is little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgemed.core import Answer, Prompt, Region, Scan
from edgemed.geometry import box_of
from edgemed.report import to_json
from edgemed.report.packed import PackedRegion, packed


def test_a_packed_answer_says_the_same(answer: Answer, make_scan: Callable[..., Scan], english_prompt: Prompt) -> None:
    scan = make_scan()
    assert to_json(packed(answer), scan, english_prompt, path="") == to_json(answer, scan, english_prompt, path="")
    kept = packed(answer).regions
    assert kept[1].mask is None
    moved = replace(kept[0], frame=3)
    assert isinstance(moved, PackedRegion)
    assert moved.frame == 3
    assert moved.mask is not None
    assert np.array_equal(moved.mask, answer.regions[0].mask)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (512, 511)])
def test_a_mask_comes_back_as_it_was(shape: tuple[int, int]) -> None:
    mask = np.random.default_rng(1).random(shape) < 0.5
    mask[0, 0] = True
    box = box_of(mask)
    assert box is not None
    region = PackedRegion(label="liver", box=box, frame=2, mask=mask, score=0.5, iou_estimate=0.25)
    assert region.mask is not None
    assert (region.label, region.box, region.frame, region.score, region.iou_estimate) == ("liver", box, 2, 0.5, 0.25)
    assert region.mask.dtype == np.bool_
    assert np.array_equal(region.mask, mask)


def test_a_thousand_slices_take_a_few_megabytes() -> None:
    import tracemalloc

    y, x = np.mgrid[:512, :512]
    mask = (x - 250) ** 2 + (y - 260) ** 2 < 120**2
    box = box_of(mask)
    assert box is not None
    tracemalloc.start()
    kept = [PackedRegion(label="liver", box=box, mask=mask) for _ in range(200)]
    now, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert now / len(kept) < 4096  # 262,144 bytes as an array


def test_results_of_packed_answers_are_those_of_plain_ones(tmp_path: Path) -> None:
    pytest.importorskip("highdicom", reason="highdicom is not installed")
    import importlib.util

    from pydicom import dcmread

    from edgemed.core import Provenance
    from edgemed.report.results import Analysed, ResultOptions, write_results

    helper = Path(__file__).resolve().parents[1] / "helpers" / "made_series.py"
    spec = importlib.util.spec_from_file_location("made_series", helper)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    files = made.write_series(tmp_path / "in", 3, RescaleSlope=1, RescaleIntercept=0, SliceThickness=2)
    mask = np.zeros((6, 8), bool)
    mask[2:4, 3:6] = True
    used = Provenance("0", "fake", "fake", "0" * 64, "fake", "CPU", {}, "auto", {}, {})
    answer = Answer("liver", "", (Region("liver", (3.0, 2.0, 6.0, 4.0), 0, mask),), used)
    pixels = {}
    for name, one in (("plain", answer), ("packed", packed(answer))):
        options = ResultOptions(prompt=Prompt("?"))
        analysed = [Analysed(file, 0, one) for file in files]
        written = write_results(analysed, tmp_path / name, ("seg", "sr", "gsps"), language="en", options=options)
        found = [dcmread(file) for file in written]
        assert [ds.Modality for ds in found] == ["SEG", "SR", "PR"]
        assert found[1].CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
        pixels[name] = (found[0].PixelData, [ds.SOPInstanceUID for ds in found])
    assert pixels["plain"] == pixels["packed"]
