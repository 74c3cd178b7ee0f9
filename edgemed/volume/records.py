"""One slice's answer as it is kept: edgemed.answer/1, read, cut, and turned back into an Answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgemed.core import Answer, Box, Finding, Mask, Provenance, Region, Side, Sides
from edgemed.geometry import box_of
from edgemed.report.rle import from_rle, to_rle

Record = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """What is kept in memory of a label in a slice."""

    box: Box
    pixels: int


def seen_in(record: Record) -> dict[str, Seen]:
    """Return what a record shows, by label; several regions of one name are one."""
    seen: dict[str, Seen] = {}
    for region in record["regions"]:
        x0, y0, x1, y1 = region["box_px"]
        pixels = region["mask"]["area_px"] if region["mask"] else 0
        known = seen.get(region["label"])
        if known is not None:
            a, b, c, d = known.box
            x0, y0, x1, y1, pixels = min(a, x0), min(b, y0), max(c, x1), max(d, y1), known.pixels + pixels
        seen[region["label"]] = Seen((x0, y0, x1, y1), pixels)
    return seen


def mask_of(record: Record, label: str) -> Mask | None:
    """Return the union of the masks of a label, None where there is none."""
    masks = [from_rle(r["mask"]["rle"]) for r in record["regions"] if r["label"] == label and r["mask"]]
    return np.logical_or.reduce(masks) if masks else None


def cut(record: Record, label: str, kept: Mask | None) -> Record:
    """Return the record with the masks of a label cut to `kept`; a region that has nothing left is taken out."""
    regions: list[Record] = []
    moved: dict[int, int] = {}
    for number, region in enumerate(record["regions"]):
        if region["label"] == label:
            mask = from_rle(region["mask"]["rle"]) & kept if kept is not None and region["mask"] else None
            box = None if mask is None else box_of(mask)
            if mask is None or box is None:
                continue
            old = region["mask"]
            pixels = int(mask.sum())
            area = None if old["area_mm2"] is None else round(old["area_mm2"] * pixels / old["area_px"], 1)
            cut = {**old, "rle": to_rle(mask), "area_px": pixels, "area_mm2": area}
            region = {**region, "box_px": [*box], "mask": cut}
        moved[number] = len(regions)
        regions.append(region)
    cut_record = {**record, "regions": regions}
    if "findings" in record:
        told = [{**f, "regions": [moved[i] for i in f["regions"] if i in moved]} for f in record["findings"]]
        cut_record["findings"] = told
    return cut_record


def _sides(written: Sequence[Mapping[str, Any]] | None) -> Sides | None:
    if written is None:
        return None
    x0, y0, x1, y1 = (Side(side["probability"], side["spread_px"]) for side in written)
    return (x0, y0, x1, y1)


def to_answer(record: Mapping[str, Any]) -> Answer:
    """Return the Answer that `edgemed.report.to_json` wrote, for writers of other formats; no ids, no router."""
    frame = (record["input"] or {}).get("frame", 0)
    regions = tuple(
        Region(
            r["label"],
            tuple(r["box_px"]),
            frame,
            from_rle(r["mask"]["rle"]) if r["mask"] else None,
            r["score"],
            r["mask"]["iou_estimate"] if r["mask"] else None,
            _sides(r["sides"]),
            r["uncertain"],
        )
        for r in record["regions"]
    )
    return Answer(
        text=record["text"],
        tagged_text=record["tagged_text"],
        regions=regions,
        provenance=Provenance(**record["provenance"]),
        notes=tuple(record.get("notes", ())),
        labels=tuple(record.get("labels", ())),
        findings=tuple(Finding(f["text"], tuple(f["regions"])) for f in record.get("findings", ())),
    )
