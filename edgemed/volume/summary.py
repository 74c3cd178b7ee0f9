"""What a run over a series found, as plain JSON values: schema edgemed.series/1."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from edgemed.core import Prompt
from edgemed.dicom.geometry_verdict import Verdict
from edgemed.volume.run import SliceRun

SCHEMA = "edgemed.series/1"


def series_to_json(
    run: SliceRun, verdict: Verdict, prompt: Prompt, *, resample: bool = False, **facts: Any
) -> dict[str, Any]:
    """Return the summary of a run, schema edgemed.series/1: plain JSON values.

    facts: what is known of the series (uid, modality, slices ...), written as they are. A volume that is not given has
    null, and the notes say why.
    """
    structures = run.structures(verdict, resample=resample)
    notes = [*run.notes]
    if any(s.volume_ml is None for s in structures):
        notes.append(_why_no_volume(run, verdict, resample))
    elif structures and not verdict.is_volume:
        notes.append("volumes: areas change linearly along the normal between unevenly spaced or leaning slices")
    return {
        "schema": SCHEMA,
        **facts,
        "verdict": {
            "kind": verdict.kind,
            "reasons": list(verdict.reasons),
            "spacing_mm": None if verdict.spacing_mm is None else [_rounded(v, 6) for v in verdict.spacing_mm],
        },
        "prompt": {"text": prompt.text, "language": prompt.language},
        "asked": run.asked,
        "failed": [
            {"slice": k, "name": type(e).__name__, "code": e.exit_code, "message": " ".join(str(e).split())}
            for k, e in sorted(run.failed.items())
        ],
        "structures": [
            {
                "label": s.label,
                "slices": list(s.slices),
                "pixels": s.pixels,
                "volume_ml": _rounded(s.volume_ml, 3),
            }
            for s in structures
        ],
        "notes": notes,
    }


def read_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) that every summary of a series run satisfies."""
    schema: dict[str, Any] = json.loads(resources.files("edgemed").joinpath("series.schema.json").read_text("utf-8"))
    return schema


def _why_no_volume(run: SliceRun, verdict: Verdict, resample: bool) -> str:
    if not run.covers_all:
        return "no volumes: not every slice was asked; pass --slices all or auto"
    if run.failed:
        return "no volumes: slices failed"
    if verdict.kind in ("single", "unplaced", "localizer", "mixed orientation"):
        return f"no volumes: {verdict.kind}"
    if not (verdict.is_volume or resample):
        return f"no volumes: {'; '.join(verdict.reasons) or verdict.kind}; --resample gives them nevertheless"
    return "no volumes where there is no mask"


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
