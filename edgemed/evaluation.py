"""Quality on labelled pictures: boxes, masks, names, absent structures, languages, modality; with confidence intervals.

    series = evaluate_test_series(session, dicom_folder, labels_nifti)
    records = evaluate_records(session, records_jsonl, folder, choose)
    write_evaluation(series, Path("quality"))              quality.json and quality.md

Every question goes through `Session.ask`, so what is measured is what a user gets. A structure that the answer does
not name counts as box IoU 0 and Dice 0. Intervals are 95 % bootstrap intervals over
clusters (slices of a series, patients of a collection), not over questions: questions about one slice are not
independent. Nothing of the labels reaches the model but the boxes, points and masks that are asked about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from edgemed.core import Answer, Box, Language, Mask, Point, Prompt, PromptRegion, Region, Scan
from edgemed.errors import CannotRead, EdgemedError, InvalidInput, NoInput
from edgemed.families.native_lexicon import MODALITIES, STRUCTURES, UNKNOWN_NAMES, Term, structure_of
from edgemed.files import write_atomically
from edgemed.geometry import box_iou, box_of, dice
from edgemed.infer import InferOptions

if TYPE_CHECKING:
    from edgemed.dicom import Reader

LANGUAGES: tuple[Language, ...] = ("en", "zh")

QUESTIONS: Mapping[str, Mapping[Language, str]] = {
    "where": {"en": "Where is the {}?", "zh": "{}在哪里？"},
    "segment": {"en": "Segment the {}.", "zh": "请分割{}。"},
    "name": {"en": "What is in this region?", "zh": "这个区域是什么？"},
    "outline": {"en": "Segment this region.", "zh": "请分割这个区域。"},
    "modality": {"en": "Which imaging modality is this?", "zh": "这是什么成像方式？"},
}

TARGETS: Mapping[str, tuple[str, float]] = {
    "box IoU": (">=", 0.72),
    "text->mask Dice": (">=", 0.80),
    "box->mask Dice": (">=", 0.90),
    "point->mask Dice": (">=", 0.80),
    "absent: falsely found": ("<=", 0.10),
    "region->name": (">=", 0.75),
    "English and Chinese box agree": (">=", 0.95),
    "modality named": (">=", 0.95),
}
"""Metric -> what is aimed at. The first seven are meant for the test series, the last for the collection."""

TEST_STRUCTURES = ("liver", "spleen", "stomach", "aorta")
ABSENT = (
    "urinary_bladder",
    "prostate",
    "heart",
    "brain",
    "femur_left",
    "sacrum",
    "hippocampus",
    "thyroid",
)
"""Asked for on an upper abdomen, where none of them is."""
MINIMUM_PIXELS = 200
SAME_BOX = 0.9
"""From this IoU on, the English and the Chinese box are the same."""

_ROUNDS = 2000
TERMS = {term.key: term for term in (*STRUCTURES, *UNKNOWN_NAMES)}


class Asked(Protocol):
    """What is evaluated: a Session, or anything that answers like one."""

    def ask(self, scan: Scan, prompt: Prompt, options: InferOptions | None = None) -> Answer:
        """Return the answer to `prompt` about `scan`."""


@dataclass(frozen=True)
class Sample:
    """One number: what was measured, on which structure, in which group (modality), of which cluster, 0..1."""

    metric: str
    structure: str
    group: str
    cluster: str
    language: str
    value: float


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` samples of `clusters` clusters, with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float
    count: int
    clusters: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Evaluation:
    """All samples of one run, with what was evaluated on what."""

    title: str
    samples: tuple[Sample, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Target:
    """A structure in a picture: its term, its mask or, where people drew a box only, its box."""

    term: Term
    box: Box
    mask: Mask | None = None


def estimate(samples: Iterable[Sample], seed: int = 0) -> Estimate:
    """Return the mean of the samples and its 95 % interval by resampling clusters.

    Raises InvalidInput if there are no samples.
    """
    values: dict[str, list[float]] = {}
    for sample in samples:
        values.setdefault(sample.cluster, []).append(sample.value)
    if not values:
        raise InvalidInput("there is nothing to estimate: no sample was measured")
    sums = np.array([sum(v) for v in values.values()])
    counts = np.array([len(v) for v in values.values()])
    drawn = np.random.default_rng(seed).integers(0, len(sums), (_ROUNDS, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high), int(counts.sum()), len(sums))


def evaluate_test_series(
    session: Asked,
    folder: Path,
    labels: Path,
    *,
    structures: Sequence[str] = TEST_STRUCTURES,
    absent: Sequence[str] = ABSENT,
    languages: Sequence[Language] = LANGUAGES,
    every: int = 1,
    options: InferOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Return the quality on a DICOM series with a NIfTI label map of the same grid, every `every`-th slice.

    folder: the slices, one file each; labels: NIfTI whose header extension names the values. Slice k, in the order of
    ImagePositionPatient z, has the labels seg[:, :, k].T[::-1]. A structure is asked for where at least MINIMUM_PIXELS
    are visible; those of `absent` and every other named label without a pixel in a slice count as absent there.

    Raises NoInput if the folder holds no slices, InvalidInput if their number is not that of the label map.
    """
    from edgemed.dicom import read_scans

    files = by_position(folder)
    volume, names = read_label_map(labels)
    if len(files) != volume.shape[2]:
        raise InvalidInput(f"{len(files)} slices and {volume.shape[2]} label slices were found; as many were expected")
    values = {name: value for value, name in names.items()}
    chosen = range(0, len(files), every)
    samples: list[Sample] = []
    for done, (k, (_, scan)) in enumerate(zip(chosen, read_scans([files[k] for k in chosen]), strict=True)):
        if isinstance(scan, EdgemedError):
            raise scan
        seg = volume[:, :, k].T[::-1]
        masks = {name: np.ascontiguousarray(seg == value) for name, value in values.items()}
        exam = _Exam(session, scan, scan.modality, f"slice {k}", languages, options)
        for key in structures:
            mask = masks.get(key)
            if mask is not None and int(mask.sum()) >= MINIMUM_PIXELS:
                samples += exam.target(target_of(TERMS[key], mask))
        for key in absent:
            if key not in masks or not masks[key].any():
                samples += exam.absent(TERMS[key], "absent: falsely found")
        for key, mask in masks.items():
            if key in TERMS and key not in absent and not mask.any():
                samples += exam.absent(TERMS[key], "absent in this slice: falsely found")
        samples += exam.modality(_modality("CT"))
        if progress is not None:
            progress(done + 1, len(chosen))
    facts = {"slices": len(chosen), "patients": 1, "languages": list(languages), "minimum_pixels": MINIMUM_PIXELS}
    return Evaluation("Test series (1 patient)", tuple(samples), facts)


def evaluate_records(
    session: Asked,
    records: Path,
    folder: Path,
    choose: Callable[[Mapping[str, Any]], bool],
    *,
    languages: Sequence[Language] = LANGUAGES,
    structure: Callable[[str], str | None] | None = None,
    limit: int | None = None,
    options: InferOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Return the quality on the pictures of a `records.jsonl`: modality on all, boxes and masks where there are labels.

    choose: which records are held out. structure: label name -> key of a structure, default by the lexicon; labels it
    does not know, image-level labels and several pieces of one name without a mask are passed over. limit: at most so
    many records of each source, spread evenly. Pictures are read as a user's file is: no modality is told.

    Raises NoInput if no record is chosen.
    """
    from edgemed.dicom import Reader

    chosen = [r for r in read_records(records) if r["view"] != "volume" and choose(r)]
    chosen = spread_out(chosen, limit)
    if not chosen:
        raise NoInput(f"no record of {records} was chosen")
    samples: list[Sample] = []
    with Reader() as reader:
        for done, record in enumerate(chosen):
            scan = reader.read(folder / record["path"])
            patient = f"{record['source']} {record['patient']}"
            exam = _Exam(session, scan, record["modality"], patient, languages, options)
            modality = _modality(record["modality"])
            if modality is not None:
                samples += exam.modality(modality)
            for target in targets_of(record, folder, structure or by_lexicon, reader):
                samples += exam.target(target)
            if progress is not None:
                progress(done + 1, len(chosen))
    facts = {
        "pictures": len(chosen),
        "patients": len({(r["source"], r["patient"]) for r in chosen}),
        "languages": list(languages),
    }
    return Evaluation("Held-out pictures", tuple(samples), facts)


@dataclass(frozen=True, eq=False)
class _Exam:
    """The questions about one picture; each method returns the samples it gave."""

    session: Asked
    scan: Scan
    group: str
    cluster: str
    languages: Sequence[Language]
    options: InferOptions | None

    def target(self, target: Target) -> Iterator[Sample]:
        """Ask where the structure is, for its mask by text, box and point, and what it is."""
        boxes: dict[Language, Box | None] = {}
        for language in self.languages:
            found = named_region(self._ask("where", language, target.term), target.term)
            boxes[language] = found.box if found is not None else None
            yield self._sample("box IoU", target, language, box_iou(found.box, target.box) if found else 0.0)
            if target.mask is not None:
                outlined = named_region(self._ask("segment", language, target.term), target.term)
                yield self._sample("text->mask Dice", target, language, _dice(outlined, target.mask))
        if len(boxes) > 1:
            first, *others = boxes.values()
            yield self._sample("English and Chinese box agree", target, "", float(all(_same(first, b) for b in others)))
        yield from self._regions(target)

    def _regions(self, target: Target) -> Iterator[Sample]:
        asked: dict[str, PromptRegion] = {"box": PromptRegion("box", box=target.box)}
        if target.mask is not None:
            asked["point"] = PromptRegion("point", point=deepest_point(target.mask))
            asked["mask"] = PromptRegion("mask", mask=target.mask)
        for kind, region in asked.items():
            for language in self.languages:
                if target.mask is not None and kind != "mask":
                    outlined = self._ask("outline", language, None, region)
                    first = next((r for r in outlined.regions if r.mask is not None), None)
                    yield self._sample(f"{kind}->mask Dice", target, language, _dice(first, target.mask))
                named = named_region(self._ask("name", language, None, region), target.term)
                metric = "region->name" if kind == "box" else f"region->name ({kind})"
                yield self._sample(metric, target, language, float(named is not None))

    def absent(self, term: Term, metric: str) -> Iterator[Sample]:
        """Ask where a structure is that is not there: 1 if the answer marks any place."""
        for language in self.languages:
            answer = self._ask("where", language, term)
            yield Sample(metric, term.key, self.group, self.cluster, language, float(bool(answer.regions)))

    def modality(self, term: Term | None) -> Iterator[Sample]:
        """Ask for the modality: 1 if the answer names it and no other."""
        if term is None:
            return
        for language in self.languages:
            right = named_modalities(self._ask("modality", language).text, language) == {term.key}
            yield Sample("modality named", term.key, self.group, self.cluster, language, float(right))

    def _ask(
        self, question: str, language: Language, term: Term | None = None, region: PromptRegion | None = None
    ) -> Answer:
        name = "" if term is None else (term.en if language == "en" else term.zh)[0]
        text = QUESTIONS[question][language].format(name)
        regions = () if region is None else (region,)
        return self.session.ask(self.scan, Prompt(text, regions, language, self.scan.first_frame), self.options)

    def _sample(self, metric: str, target: Target, language: str, value: float) -> Sample:
        return Sample(metric, target.term.key, self.group, self.cluster, language, value)


def target_of(term: Term, mask: Mask) -> Target:
    """Return the target of a structure with a mask that is not empty."""
    box = box_of(mask)
    assert box is not None
    return Target(term, box, mask)


def named_region(answer: Answer, term: Term) -> Region | None:
    """Return the first region of the answer that is labelled with a name of `term`, or None."""
    index = structure_of(term.en[0])
    return next((r for r in answer.regions if index is not None and structure_of(r.label) == index), None)


def _dice(region: Region | None, mask: Mask) -> float:
    return dice(region.mask, mask) if region is not None and region.mask is not None else 0.0


def _same(a: Box | None, b: Box | None) -> bool:
    return a == b if a is None or b is None else box_iou(a, b) > SAME_BOX


def named_modalities(text: str, language: Language) -> set[str]:
    """Return the keys of the modalities that `text` names. Latin names count as whole words only.

    >>> named_modalities("This is an axial CT of the abdomen.", "en")
    {'ct'}
    """
    lowered = text.lower()
    found = set()
    for term in MODALITIES:
        for name in (*term.en, *term.zh) if language == "zh" else term.en:
            word = re.escape(name.lower())
            if re.search(rf"(?<![a-z]){word}(?![a-z])" if name.isascii() else word, lowered):
                found.add(term.key)
    return found


def _modality(word: str) -> Term | None:
    """Return the modality that a word of the records means, or None."""
    wanted = word.strip().lower()
    for term in MODALITIES:
        names = {term.key, *(name.lower() for name in term.en)}
        if wanted in names or any(wanted in name.split() for name in names):
            return term
    return None


def deepest_point(mask: Mask) -> Point:
    """Return the centre (x, y) of the pixel of `mask` that lies farthest from every pixel outside of it.

    Of several, the one nearest to the middle of them. Raises InvalidInput if the mask is empty.

    >>> deepest_point(np.array([[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]], bool))
    (1.5, 2.5)
    """
    box = box_of(mask)
    if box is None:
        raise InvalidInput("the mask is empty; it has no deepest point")
    x0, y0, x1, y1 = (int(v) for v in box)
    depth = _squared_depth(np.pad(mask[y0:y1, x0:x1], 1))  # beyond the picture is outside, too
    ys, xs = np.nonzero(depth == depth.max())
    best = int(np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2))
    return (x0 + float(xs[best]) - 0.5, y0 + float(ys[best]) - 0.5)


def _squared_depth(mask: Mask) -> npt.NDArray[np.int64]:
    """Return the squared distance of each pixel to the nearest pixel outside `mask`, whose rim must be outside."""
    rows, columns = mask.shape
    at = np.arange(columns)
    left = np.maximum.accumulate(np.where(mask, -1, at), axis=1)
    right = np.minimum.accumulate(np.where(mask, columns, at)[:, ::-1], axis=1)[:, ::-1]
    along = np.minimum(at - left, right - at).astype(np.int64) ** 2  # [rows, columns], within each row
    depth = along.copy()
    step = 1
    while step < rows and step**2 < depth.max():
        depth[step:] = np.minimum(depth[step:], along[:-step] + step**2)
        depth[:-step] = np.minimum(depth[:-step], along[step:] + step**2)
        step += 1
    return depth


def read_label_map(path: Path) -> tuple[npt.NDArray[np.uint8], dict[int, str]]:
    """Return (labels uint8 [columns, rows, slices] as stored, value -> name from the header extension) of a NIfTI file.

    Raises EdgemedError without nibabel, InvalidInput if the extension names nothing.
    """
    try:
        import nibabel
    except ImportError as error:
        raise EdgemedError("reading NIfTI labels needs the 'nibabel' package (extra: edgemed[dev])") from error
    image: Any = nibabel.load(path)
    table = b"".join(extension.get_content() for extension in image.header.extensions).decode("utf-8", "replace")
    names = {int(value): name for value, name in re.findall(r'Key="(\d+)".*?CDATA\[(.*?)\]', table, re.DOTALL)}
    if not names:
        raise InvalidInput(f"{path.name} has no table of label names in its header extension")
    return np.asarray(image.dataobj).astype(np.uint8), names


def by_position(folder: Path) -> list[Path]:
    """Return the DICOM files of a folder from low to high ImagePositionPatient z."""
    import pydicom

    found = []
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["ImagePositionPatient"], force=True)
        position = header.get("ImagePositionPatient")
        if position:
            found.append((float(position[2]), path))
    if not found:
        raise NoInput(f"{folder} holds no DICOM slices with a position")
    return [path for _, path in sorted(found)]


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a `records.jsonl`. Raises CannotRead, or InvalidInput where it is none."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise CannotRead(f"cannot read {path.name}: {error.strerror or 'refused'}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path.name} has a line that is not JSON; a records.jsonl was expected") from error


def spread_out(records: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """Return at most `limit` records of each source, evenly spread over it."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_source.setdefault(record["source"], []).append(record)
    if limit is None:
        return records
    picked = []
    for group in by_source.values():
        places = np.unique(np.linspace(0, len(group) - 1, min(limit, len(group))).round().astype(int))
        picked += [group[i] for i in places]
    return picked


def by_lexicon(name: str) -> str | None:
    """Return the key of the structure that a name means, or None."""
    index = structure_of(name)
    return None if index is None else STRUCTURES[index].key


def targets_of(
    record: Mapping[str, Any], folder: Path, structure: Callable[[str], str | None], reader: Reader
) -> Iterator[Target]:
    """Yield what is labelled in a picture: the first mask of each structure, and the box of a structure with one."""
    seen: set[str] = set()
    keys = [structure(label["name_en"]) for label in record["labels"]]
    for label, key in zip(record["labels"], keys, strict=True):
        if key is None or key in seen or label["kind"] == "image-level":
            continue
        if label.get("mask"):
            pixels = reader.read(folder / label["mask"]).pixels[0]
            grey = pixels if pixels.ndim == 2 else pixels[..., 0]
            mask = np.asarray(grey == label.get("mask_value", 255))
            if int(mask.sum()) >= MINIMUM_PIXELS:
                seen.add(key)
                yield target_of(TERMS[key], mask)
        elif label.get("box") and keys.count(key) == 1:
            x0, y0, x1, y1 = (float(v) for v in label["box"])
            yield Target(TERMS[key], (x0, y0, x1, y1))


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """Return the evaluation as plain JSON values: metrics over all, by structure, group and language; all samples."""

    def table(key: Callable[[Sample], str]) -> dict[str, dict[str, Any]]:
        groups: dict[str, dict[str, list[Sample]]] = {}
        for sample in evaluation.samples:
            groups.setdefault(sample.metric, {}).setdefault(key(sample), []).append(sample)
        return {m: {k: vars(estimate(s)) for k, s in by.items() if k} for m, by in groups.items()}

    return {
        "schema": "edgemed.evaluation/1",
        "title": evaluation.title,
        "facts": dict(evaluation.facts),
        "targets": {metric: list(target) for metric, target in TARGETS.items()},
        "metrics": {metric: by["all"] for metric, by in table(lambda s: "all").items()},
        "by_structure": table(lambda s: s.structure),
        "by_group": table(lambda s: s.group),
        "by_language": table(lambda s: s.language),
        "samples": [vars(sample) for sample in evaluation.samples],
    }


def to_markdown(evaluation: Evaluation) -> str:
    """Return the tables of an evaluation: each metric with its interval and target, then by structure and by group."""
    lines = [f"### {evaluation.title}", ""]
    lines += [f"{', '.join(f'{name} {_plain(value)}' for name, value in evaluation.facts.items())}.", ""]
    lines += ["| metric | mean (95 % interval) | samples | target | |", "|---|---|--:|---|---|"]
    metrics = list(dict.fromkeys(s.metric for s in evaluation.samples))
    for metric in metrics:
        found = estimate(s for s in evaluation.samples if s.metric == metric)
        target = TARGETS.get(metric)
        aim = "" if target is None else f"{target[0]} {target[1]:.2f}"
        verdict = "" if target is None else ("met" if meets(metric, found.mean) else "missed")
        lines.append(f"| {metric} | {found} | {found.count} | {aim} | {verdict} |")
    for heading, key in (("structure", "structure"), ("kind of image", "group")):
        names = list(dict.fromkeys(getattr(s, key) for s in evaluation.samples))
        if len(names) < 2:
            continue
        lines += ["", f"| {heading} | " + " | ".join(metrics) + " |", "|---|" + "--:|" * len(metrics)]
        for name in names:
            cells = []
            for metric in metrics:
                chosen = [s for s in evaluation.samples if s.metric == metric and getattr(s, key) == name]
                cells.append(f"{estimate(chosen).mean:.2f} ({len(chosen)})" if chosen else "")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def meets(metric: str, mean: float) -> bool:
    """Return whether a mean meets the target of its metric; True for a metric without one."""
    if metric not in TARGETS:
        return True
    sign, value = TARGETS[metric]
    return mean >= value if sign == ">=" else mean <= value


def write_evaluation(evaluation: Evaluation, stem: Path) -> tuple[Path, Path]:
    """Return the paths of the JSON and the Markdown file written: `stem` with .json and .md. Raises CannotWrite."""
    data = json.dumps(summary(evaluation), indent=1, ensure_ascii=False) + "\n"
    as_json, as_markdown = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.md")
    write_atomically(as_json, data.encode())
    write_atomically(as_markdown, to_markdown(evaluation).encode())
    return as_json, as_markdown


def _plain(value: Any) -> str:
    return " and ".join(str(v) for v in value) if isinstance(value, list) else str(value)
