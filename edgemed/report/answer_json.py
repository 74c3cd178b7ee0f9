"""The answer as one JSON object, schema edgemed.answer/1.

Covers what integrators parse; `answer.schema.json` beside this file describes it. Numbers are rounded to what they
mean: boxes to 0.01 px, scores to 0.0001, areas to 0.1 mm2, times to 0.1 ms.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np

from edgemed.core import Answer, Mask, Prompt, PromptRegion, Provenance, Region, Scan, Side, Window
from edgemed.errors import InvalidInput
from edgemed.report.rle import to_rle

SCHEMA = "edgemed.answer/1"


def to_json(
    answer: Answer,
    scan: Scan | None,
    prompt: Prompt,
    *,
    path: str,
    more: Sequence[tuple[Scan, str]] = (),
    with_tokens: bool = False,
) -> dict[str, Any]:
    """Return the answer as a dict of plain JSON values, keys in the order of the contract.

    scan: None for a question without an image. path: the input as the user wrote it. more: the other images of the same
    question, with their paths. with_tokens: add prompt_ids (as the family's own code writes them) and generated_ids
    (without the end token). `notes` (what was left out of the answer and why), `labels`, `findings`, `more_inputs` and
    what a prompt has beside its text and regions are there only where there are some.
    What is not known is null: UIDs, spacing, score, the mask of a region that has only a box, the window of a colour
    image, the area in mm2 without a spacing.
    Raises InvalidInput if a mask has another size than the scan.
    """
    written: dict[str, Any] = {
        "schema": SCHEMA,
        "input": None if scan is None else _input(scan, prompt.frame, path),
        "prompt": _prompt(prompt, scan),
        "text": answer.text,
        "tagged_text": answer.tagged_text,
        "regions": [] if scan is None else [_region(region, scan) for region in answer.regions],
        "provenance": provenance_to_json(answer.provenance),
    }
    if more:
        written["more_inputs"] = [_input(other, other.first_frame, name) for other, name in more]
    if answer.labels:
        written["labels"] = list(answer.labels)
    if answer.findings:
        written["findings"] = [{"text": f.text, "regions": list(f.regions)} for f in answer.findings]
    if answer.notes:
        written["notes"] = list(answer.notes)
    if with_tokens:
        asked = answer.prompt_ids if answer.written_ids is None else answer.written_ids
        written["prompt_ids"] = [int(i) for i in asked]
        written["generated_ids"] = [int(i) for i in answer.generated_ids]
    return written


def read_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) that every object of `to_json` satisfies."""
    text = resources.files("edgemed.report").joinpath("answer.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def provenance_to_json(provenance: Provenance) -> dict[str, Any]:
    """Return what made the answer; `versions` only where it was recorded."""
    p = provenance
    written: dict[str, Any] = {
        "edgemed": p.edgemed,
        "family": p.family,
        "bundle": p.bundle,
        "bundle_sha256": p.bundle_sha256,
        "backend": p.backend,
        "device": p.device,
        "precision": dict(p.precision),
        "decode": p.decode,
        "tokens": {name: int(count) for name, count in p.tokens.items()},
        "timings_ms": {name: _rounded(ms, 1) for name, ms in p.timings_ms.items()},
    }
    return {**written, "versions": dict(p.versions)} if p.versions else written


def area_mm2(area_px: int, scan: Scan) -> float | None:
    """Return the area in mm2 of `area_px` pixels of the scan, or None where it has no pixel spacing."""
    if scan.pixel_spacing_mm is None:
        return None
    return area_px * scan.pixel_spacing_mm[0] * scan.pixel_spacing_mm[1]


def _prompt(prompt: Prompt, scan: Scan | None) -> dict[str, Any]:
    written: dict[str, Any] = {
        "text": prompt.text,
        "language": prompt.language,
        "regions": [] if scan is None else [_prompt_region(region, scan) for region in prompt.regions],
    }
    if prompt.settings:
        written["settings"] = dict(prompt.settings)
    if prompt.examples:
        written["examples"] = len(prompt.examples)  # not what they show: other patients' images
    if prompt.history:
        written["history"] = [{"question": turn.question, "text": turn.text} for turn in prompt.history]
    return written


def _input(scan: Scan, frame: int, path: str) -> dict[str, Any]:
    spacing = scan.pixel_spacing_mm
    return {
        "path": path,
        "sop_instance_uid": scan.sop_instance_uid,
        "modality": scan.modality,
        "frame": frame,
        "frames": scan.frames,
        "rows": scan.rows,
        "columns": scan.columns,
        "pixel_spacing_mm": None if spacing is None else [_rounded(s, 6) for s in spacing],
        "window": None if scan.window is None else _window(scan.window),
    }


def _window(window: Window) -> list[float | int | None]:
    numbers = (_rounded(n, 4) for n in (window.center, window.width))
    return [int(n) if n is not None and n == int(n) else n for n in numbers]


def _prompt_region(region: PromptRegion, scan: Scan) -> dict[str, Any]:
    if region.box is not None:
        return {"kind": "box", "box_px": [_rounded(v, 2) for v in region.box]}
    if region.point is not None:
        return {"kind": "point", "point_px": [_rounded(v, 2) for v in region.point]}
    assert region.mask is not None
    return {"kind": "mask", "mask": _mask(region.mask, scan)}


def _region(region: Region, scan: Scan) -> dict[str, Any]:
    mask = None
    if region.mask is not None:
        mask = {**_mask(region.mask, scan), "iou_estimate": _rounded(region.iou_estimate, 4)}
    return {
        "label": region.label,
        "box_px": [_rounded(v, 2) for v in region.box],
        "score": _rounded(region.score, 4),
        "mask": mask,
        "sides": None if region.sides is None else [_side(side) for side in region.sides],
        "uncertain": region.uncertain,
    }


def _side(side: Side) -> dict[str, Any]:
    return {"probability": _rounded(side.probability, 4), "spread_px": _rounded(side.spread_px, 2)}


def _mask(mask: Mask, scan: Scan) -> dict[str, Any]:
    if mask.shape != (scan.rows, scan.columns):
        raise InvalidInput(f"mask is {list(mask.shape)}, [{scan.rows}, {scan.columns}] as the scan was expected")
    pixels = int(np.count_nonzero(mask))
    return {"rle": to_rle(mask), "area_px": pixels, "area_mm2": _rounded(area_mm2(pixels, scan), 1)}


def _rounded(value: float | None, digits: int) -> float | None:
    """Return a plain float; None for None and for what JSON cannot hold (NaN, infinity)."""
    return None if value is None or not math.isfinite(value) else round(float(value), digits)
