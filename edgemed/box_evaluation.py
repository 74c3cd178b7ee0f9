"""How true the scores of boxes are, on labelled pictures that no training saw, before and after a fit.

    samples = boxes_of_series(session, dicom_folder, labels_nifti) + boxes_of_records(session, records, folder, choose)
    report = judge(samples)
    write_confidence(report, Path("confidence"))          confidence.json and confidence.png

Every box is one that `Session.ask` answered with. A box of a structure that is not in the picture is wrong. "After" is
measured with a fit on the boxes of all other patients; the fit that the report brings is on all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgemed.box_confidence import (
    RIGHT,
    BoxConfidence,
    Part,
    calibration_error,
    fit,
    held_out_scores,
    ranking,
    raw_score,
    reliability,
)
from edgemed.core import Prompt, Scan
from edgemed.errors import EdgemedError, InvalidInput, NoInput
from edgemed.evaluation import (
    MINIMUM_PIXELS,
    QUESTIONS,
    TERMS,
    Asked,
    Target,
    by_lexicon,
    by_position,
    named_region,
    read_label_map,
    read_records,
    spread_out,
    target_of,
    targets_of,
)
from edgemed.families.native_lexicon import Term
from edgemed.files import write_atomically
from edgemed.geometry import box_iou

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BoxSample:
    """One box of an answer: what it was called, whose picture it is in, its raw score, its IoU with the true box."""

    structure: str
    group: str
    patient: str
    raw: float
    iou: float


@dataclass(frozen=True)
class Judged:
    """How true scores are: parts of neighbouring scores, calibration error, share of pairs in the right order."""

    parts: tuple[Part, ...]
    error: float
    ranking: float


@dataclass(frozen=True)
class ConfidenceReport:
    """The scores of `boxes` boxes of `patients` patients as they are and as a fit on other patients makes them."""

    boxes: int
    patients: int
    right: float
    before: Judged
    after: Judged
    fitted: BoxConfidence


def boxes_of_series(
    session: Asked, folder: Path, labels: Path, *, every: int = 1, progress: Progress | None = None
) -> list[BoxSample]:
    """Return the boxes of the answers about a DICOM series with a NIfTI label map of the same grid.

    Every structure that the map names is asked for in every `every`-th slice, but not where a few pixels of it are
    visible. Raises what `evaluation.evaluate_test_series` raises.
    """
    from edgemed.dicom import read_scans

    files = by_position(folder)
    volume, names = read_label_map(labels)
    if len(files) != volume.shape[2]:
        raise InvalidInput(f"{len(files)} slices and {volume.shape[2]} label slices were found; as many were expected")
    samples: list[BoxSample] = []
    chosen = range(0, len(files), every)
    for done, (k, (_, scan)) in enumerate(zip(chosen, read_scans([files[k] for k in chosen]), strict=True)):
        if isinstance(scan, EdgemedError):
            raise scan
        seg = volume[:, :, k].T[::-1]
        for value, name in names.items():
            mask = np.ascontiguousarray(seg == value)
            pixels = int(mask.sum())
            if name not in TERMS or 0 < pixels < MINIMUM_PIXELS:
                continue
            target = target_of(TERMS[name], mask) if pixels else None
            samples += _asked(session, scan, TERMS[name], target, scan.modality, "series")
        if progress is not None:
            progress(done + 1, len(chosen))
    return samples


def boxes_of_records(
    session: Asked,
    records: Path,
    folder: Path,
    choose: Callable[[Mapping[str, Any]], bool],
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> list[BoxSample]:
    """Return the boxes of the answers about the labelled pictures of a `records.jsonl`, as `evaluate_records` has them.

    Raises NoInput if no record is chosen.
    """
    from edgemed.dicom import Reader

    chosen = [r for r in read_records(records) if r["view"] != "volume" and r["labels"] and choose(r)]
    chosen = spread_out(chosen, limit)
    if not chosen:
        raise NoInput(f"no record of {records} was chosen")
    samples: list[BoxSample] = []
    with Reader() as reader:
        for done, record in enumerate(chosen):
            if any(by_lexicon(label["name_en"]) for label in record["labels"]):
                scan = reader.read(folder / record["path"])
                patient = f"{record['source']} {record['patient']}"
                for target in targets_of(record, folder, by_lexicon, reader):
                    samples += _asked(session, scan, target.term, target, record["modality"], patient)
            if progress is not None:
                progress(done + 1, len(chosen))
    return samples


def judge(samples: Sequence[BoxSample]) -> ConfidenceReport:
    """Return how true the scores are, before and after. Raises InvalidInput where boxes are all right or all wrong."""
    raw = [sample.raw for sample in samples]
    right = [sample.iou >= RIGHT for sample in samples]
    patients = [sample.patient for sample in samples]
    fitted = fit(raw, right)
    after = held_out_scores(raw, right, patients)
    share = sum(right) / len(right)
    return ConfidenceReport(
        len(samples), len(set(patients)), share, _judged(raw, right), _judged(list(after), right), fitted
    )


def to_json(report: ConfidenceReport) -> dict[str, Any]:
    """Return the report as plain JSON values; `slope` and `offset` are what a bundle needs."""
    return {
        "schema": "edgemed.confidence/1",
        "right_from_iou": RIGHT,
        **asdict(report.fitted),
        "boxes": report.boxes,
        "patients": report.patients,
        "right": report.right,
        "before": asdict(report.before),
        "after": asdict(report.after),
    }


def write_confidence(report: ConfidenceReport, stem: Path) -> tuple[Path, Path]:
    """Return the paths of the JSON file and the plot written: `stem` with .json and .png. Raises CannotWrite."""
    found = to_json(report)
    as_json, as_plot = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.png")
    write_atomically(as_json, (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(as_plot, plot(found))
    return as_json, as_plot


def plot(found: Mapping[str, Any]) -> bytes:
    """Return the reliability plot of a report in the form of `to_json`, as a PNG."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(5, 4.5))
    panel.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for key, marker in (("before", "o"), ("after", "s")):
        parts = found[key]["parts"]
        label = f"{key}: calibration error {found[key]['error']:.3f}"
        panel.plot([p["score"] for p in parts], [p["right"] for p in parts], marker=marker, label=label)
    panel.set(
        title=f"{found['boxes']} held-out boxes, {found['patients']} patients",
        xlabel="score",
        ylabel=f"share with IoU >= {found['right_from_iou']:g}",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    panel.legend(fontsize=8)
    figure.tight_layout()
    stream = io.BytesIO()
    figure.savefig(stream, dpi=90, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return stream.getvalue()


def _asked(
    session: Asked, scan: Scan, term: Term, target: Target | None, group: str, patient: str
) -> Iterator[BoxSample]:
    """Ask where a structure is, and yield the box of the answer if it has one that says how sure it is."""
    answer = session.ask(scan, Prompt(QUESTIONS["where"]["en"].format(term.en[0]), (), "en", scan.first_frame))
    found = named_region(answer, term)
    if found is not None and found.sides is not None:
        iou = 0.0 if target is None else box_iou(found.box, target.box)
        yield BoxSample(term.key, group, patient, raw_score(found.sides), iou)


def _judged(scores: Sequence[float], right: Sequence[bool]) -> Judged:
    parts = reliability(scores, right)
    return Judged(tuple(parts), calibration_error(parts), ranking(scores, right))
