"""Answers as people and programs read them: text, JSON, a PNG overlay, a run manifest.

    text         the answer and a short table of its regions
    answer_json  one JSON object of schema edgemed.answer/1 (answer.schema.json lies beside it)
    rle          masks as COCO run lengths
    overlay      the shown frame with boxes, mask outlines, legend and notice
    panels       image, mask and light-blue overlay side by side, and the notice
    router_report  which expert each token went to
    run_report   what ran on what: versions, digests, timings; no path, no UID
    results      answers about images as files for hospitals: DICOM SEG, SR, GSPS, SC and PDF, FHIR, NIfTI, NRRD

The names below are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgemed.report.answer_json import read_schema, to_json
    from edgemed.report.overlay import render_overlay, write_overlay
    from edgemed.report.panels import render_panels, write_panels
    from edgemed.report.results import Analysed, ResultOptions, write_results
    from edgemed.report.rle import from_rle, to_rle
    from edgemed.report.router_report import to_router_report
    from edgemed.report.run_report import to_run_report, write_run_report
    from edgemed.report.text import to_text

__all__ = [
    "Analysed",
    "ResultOptions",
    "from_rle",
    "read_schema",
    "render_overlay",
    "render_panels",
    "to_json",
    "to_rle",
    "to_router_report",
    "to_run_report",
    "to_text",
    "write_overlay",
    "write_panels",
    "write_results",
    "write_run_report",
]

_HOME = {
    "Analysed": "results",
    "ResultOptions": "results",
    "from_rle": "rle",
    "read_schema": "answer_json",
    "render_overlay": "overlay",
    "render_panels": "panels",
    "to_json": "answer_json",
    "to_rle": "rle",
    "to_router_report": "router_report",
    "to_run_report": "run_report",
    "to_text": "text",
    "write_overlay": "overlay",
    "write_panels": "panels",
    "write_results": "results",
    "write_run_report": "run_report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
