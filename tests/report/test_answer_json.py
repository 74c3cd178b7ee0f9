"""The JSON answer: its shape, its rounding, its schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import jsonschema
import numpy as np
import pytest

from edgemed.core import Answer, Example, Prompt, PromptRegion, Region, Scan, Side
from edgemed.errors import InvalidInput
from edgemed.report import from_rle, read_schema, to_json

MakeScan = Callable[..., Scan]


def check(written: object) -> None:
    validator = jsonschema.Draft202012Validator(read_schema())
    validator.check_schema(read_schema())
    validator.validate(json.loads(json.dumps(written, allow_nan=False)))


def test_answer_has_the_shape_of_the_contract(answer: Answer, make_scan: MakeScan, english_prompt: Prompt) -> None:
    written = to_json(answer, make_scan(), english_prompt, path="scan.dcm")
    check(written)
    assert list(written) == ["schema", "input", "prompt", "text", "tagged_text", "regions", "provenance"]
    assert written["schema"] == "edgemed.answer/1"
    assert written["input"] == {
        "path": "scan.dcm",
        "sop_instance_uid": "1.2.826.0.1.3680043.8.498.1",
        "modality": "CT",
        "frame": 0,
        "frames": 1,
        "rows": 96,
        "columns": 128,
        "pixel_spacing_mm": [0.5, 0.5],
        "window": [40, 400],
    }
    liver, spleen = written["regions"]
    assert list(liver) == ["label", "box_px", "score", "mask", "sides", "uncertain"]
    assert list(liver["mask"]) == ["rle", "area_px", "area_mm2", "iou_estimate"]
    assert (liver["score"], liver["mask"]["iou_estimate"]) == (0.9322, 0.9512)
    unknown = {"score": None, "mask": None, "sides": None, "uncertain": False}
    assert spleen == {"label": "spleen", "box_px": [8.0, 10.13, 30.5, 40.0], **unknown}
    assert written["provenance"]["timings_ms"] == {"read": 41.0, "total": 1250.0}


def test_a_region_says_how_sure_its_sides_are_and_whether_that_is_enough(
    answer: Answer, make_scan: MakeScan, english_prompt: Prompt
) -> None:
    sides = (Side(0.91239, 1.2345), Side(1.0, 0.0), Side(0.5), Side(0.25, 30.0))
    region = replace(answer.regions[0], sides=sides, uncertain=True)
    written = to_json(replace(answer, regions=(region,)), make_scan(), english_prompt, path="scan.dcm")
    check(written)
    (found,) = written["regions"]
    assert found["uncertain"] is True
    assert found["sides"][:3] == [
        {"probability": 0.9124, "spread_px": 1.23}, {"probability": 1.0, "spread_px": 0.0},
        {"probability": 0.5, "spread_px": None},
    ]  # fmt: skip


def test_mask_and_its_area_are_those_of_the_region(
    answer: Answer, make_scan: MakeScan, english_prompt: Prompt, disc: np.ndarray
) -> None:
    mask = to_json(answer, make_scan((0.5, 0.8)), english_prompt, path="x")["regions"][0]["mask"]
    assert np.array_equal(from_rle(mask["rle"]), disc)
    assert mask["area_px"] == disc.sum()
    assert mask["area_mm2"] == pytest.approx(disc.sum() * 0.4, abs=0.05)


def test_area_in_millimetres_is_null_without_a_spacing(
    answer: Answer, make_scan: MakeScan, english_prompt: Prompt
) -> None:
    written = to_json(answer, make_scan(None), english_prompt, path="x")
    check(written)
    assert written["input"]["pixel_spacing_mm"] is None
    assert written["regions"][0]["mask"]["area_mm2"] is None


def test_every_kind_of_prompt_region_is_written(answer: Answer, make_scan: MakeScan, disc: np.ndarray) -> None:
    regions = (
        PromptRegion("box", box=(1, 2, 3, 4)),
        PromptRegion("point", point=(5.5, 6)),
        PromptRegion("mask", mask=disc),
    )
    written = to_json(answer, make_scan(), Prompt("这是什么?", regions, "zh"), path="x")
    check(written)
    box, point, mask = written["prompt"]["regions"]
    assert box == {"kind": "box", "box_px": [1.0, 2.0, 3.0, 4.0]}
    assert point == {"kind": "point", "point_px": [5.5, 6.0]}
    assert mask["kind"] == "mask"
    assert np.array_equal(from_rle(mask["mask"]["rle"]), disc)
    assert written["prompt"]["language"] == "zh"


def test_tokens_are_added_on_request(answer: Answer, make_scan: MakeScan, english_prompt: Prompt) -> None:
    written = to_json(answer, make_scan(), english_prompt, path="x", with_tokens=True)
    check(written)
    assert (written["prompt_ids"], written["generated_ids"]) == ([1, 3, 500], [5, 12, 2])


def test_notes_are_written_where_there_are_some(answer: Answer, make_scan: MakeScan, english_prompt: Prompt) -> None:
    written = to_json(replace(answer, notes=("a malformed box was left out",)), make_scan(), english_prompt, path="x")
    check(written)
    assert written["notes"] == ["a malformed box was left out"]


def test_colour_image_without_identifiers_is_written_with_nulls(answer: Answer, english_prompt: Prompt) -> None:
    scan = Scan(np.zeros((1, 96, 128, 3), np.uint8), "ES", first_frame=4, total_frames=9)
    written = to_json(answer, scan, replace(english_prompt, frame=4), path="x.png")
    check(written)
    assert written["input"]["sop_instance_uid"] is None
    assert written["input"]["window"] is None
    assert (written["input"]["frame"], written["input"]["frames"]) == (4, 9)


def test_score_that_is_not_a_number_is_null(answer: Answer, make_scan: MakeScan, english_prompt: Prompt) -> None:
    odd = replace(answer, regions=(Region("x", (0, 0, 1, 1), score=float("nan")),))
    written = to_json(odd, make_scan(), english_prompt, path="x")
    check(written)
    assert written["regions"][0]["score"] is None


def test_of_examples_only_their_number_is_told(answer: Answer, make_scan: MakeScan, english_prompt: Prompt) -> None:
    examples = (Example(make_scan(), np.ones((96, 128), bool)),) * 2
    written = to_json(answer, make_scan(), replace(english_prompt, examples=examples), path="x")
    check(written)
    assert written["prompt"]["examples"] == 2
    assert "examples" not in to_json(answer, make_scan(), english_prompt, path="x")["prompt"]


def test_mask_of_another_size_is_refused(answer: Answer, make_scan: MakeScan, english_prompt: Prompt) -> None:
    odd = replace(answer, regions=(Region("x", (0, 0, 1, 1), mask=np.ones((2, 2), bool)),))
    with pytest.raises(InvalidInput, match=r"\[2, 2\]"):
        to_json(odd, make_scan(), english_prompt, path="x")


@pytest.mark.parametrize(
    "damage",
    [
        lambda a: a.update(schema="edgemed.answer/2"),
        lambda a: a.pop("text"),
        lambda a: a["regions"][0].update(box_px=[1, 2, 3]),
        lambda a: a["regions"][0].update(score=1.5),
        lambda a: a["regions"][0]["mask"]["rle"].update(counts=[-1, 5]),
        lambda a: a["regions"][0]["mask"].pop("iou_estimate"),
        lambda a: a["prompt"].update(regions=[{"kind": "circle"}]),
        lambda a: a["provenance"].update(bundle_sha256="ab"),
    ],
)
def test_schema_refuses_a_damaged_answer(
    damage: Callable[[dict[str, object]], object], answer: Answer, make_scan: MakeScan, english_prompt: Prompt
) -> None:
    written = to_json(answer, make_scan(), english_prompt, path="x")
    damage(written)
    with pytest.raises(jsonschema.ValidationError):
        check(written)
