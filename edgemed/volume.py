"""One question to the slices of a series, and one three-dimensional finding out of their answers.

    with Journal(path, key) as journal, SliceRun(slices, ask, prompt, journal) as run:
        run.ask_slices("auto", on_progress)
        for index, answer in run.answers(): ...          the edgemed.answer/1 of each slice, made to agree
        for structure in run.structures(verdict): ...    label, slices, volume in ml

A slice is read, asked and forgotten; its answer goes to a journal on disk, so that memory does not grow with the series
and a run that was left goes on where it was. Afterwards the slices are made to agree:

    a structure that one or two slices lack between two that have it is asked for again there, with the box between the
    neighbours' boxes; what comes back is kept if it looks like them
    a piece that is alone in one slice (neighbours nearer than 3 mm lack the structure), or smaller than 2 % of the
    structure's largest piece, is dropped

A region that the user gives is on one slice; it is carried from slice to slice as the box of the last answer, until the
structure gets another name or a mask is unlike the last.

Measured on the 20-slice test series (Dice in 3-D before -> after): aorta 0.909 -> 0.912, colon 0.325 -> 0.329, costal
cartilages 0.688 -> 0.692, with the one slice that they lacked; liver 0.974, spleen 0.965, stomach 0.749, inferior vena
cava 0.702 and spinal cord 0.899 as before; a left adrenal gland and a duodenum that are not there were named in single
slices and are gone. What did not help and is not done: a mask beside the carried box (spleen 0.962 -> 0.961), and a
carried box where a slice answers by itself (stomach 0.741 -> 0.699).

Does not cover finding series, geometry (`edgemed.dicom`), or results in other formats than JSON.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from edgemed.core import Answer, Box, Finding, Language, Mask, Prompt, PromptRegion, Provenance, Region, Scan
from edgemed.dicom.geometry_verdict import Place, Verdict, depth_of, slabs_mm
from edgemed.errors import (
    BackendUnavailable,
    BundleError,
    CannotWrite,
    EdgemedError,
    InvalidInput,
    OutOfMemory,
)
from edgemed.geometry import box_of, dice
from edgemed.report import to_json
from edgemed.report.rle import from_rle, to_rle

SCHEMA = "edgemed.series/1"
JOURNAL_SCHEMA = "edgemed.slices/1"

COARSE_MM = 10.0
"""How far apart the first slices of `auto` are; a structure that is flatter may be missed, which its notes say."""
MAX_HOLE = 2
ALIKE = 0.5
"""Dice with a neighbour's mask from which on a carried one is kept."""
TINY = 0.02
ALONE_MM = 3.0
_MAX_RUNS = 4000  # of one mask; beyond, it is noise, and pairs of runs would take more than 16 MB

OUTLINE: Mapping[Language, str] = {"en": "Segment this region.", "zh": "请分割这个区域。"}

Ask = Callable[[Scan, Prompt], Answer]
Record = dict[str, Any]


class Slices(Protocol):
    """The slices of one stack, in order along the normal."""

    @property
    def places(self) -> Sequence[Place]: ...

    def read(self, index: int) -> Scan: ...

    def path(self, index: int) -> str:
        """Return what the slice's file is called in results."""

    def digest(self, index: int) -> str:
        """Return what tells the slice's content from another's."""


@dataclass(frozen=True)
class Structure:
    """What was found of one label: the slices that show it, its pixels, its volume where that means something."""

    label: str
    slices: tuple[int, ...]
    pixels: int
    volume_ml: float | None


@dataclass(frozen=True)
class _Seen:
    """What is kept in memory of a label in a slice."""

    box: Box
    pixels: int


# --- which slices -----------------------------------------------------------------------------------------------------


def chosen_slices(text: str, count: int) -> list[int] | None:
    """Return the slices (from 0) that "middle", "all", "every:N" or a list as "3,5,10-20" means; None for "auto".

    Raises EdgemedError (usage) if the text has another form or names a slice that is not there.

    >>> chosen_slices("middle", 20), chosen_slices("every:8", 20), chosen_slices("0,3-5", 20)
    ([10], [0, 8, 16], [0, 3, 4, 5])
    """
    if text == "auto":
        return None
    if text == "middle":
        return [count // 2]
    if text == "all":
        return list(range(count))
    kind, _, number = text.partition(":")
    if kind == "every" and number.isdecimal() and int(number) > 0:
        return list(range(0, count, int(number)))
    picked: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise EdgemedError(f"--slices {text!r} is none of middle, all, auto, every:N or a list as 3,5,10-20")
        ends = (int(first), int(last) if dash else int(first))
        if not ends[0] <= ends[1] < count:
            raise EdgemedError(f"--slices {text!r}: the series has slices 0 to {count - 1}")
        picked.update(range(ends[0], ends[1] + 1))
    return sorted(picked)


# --- the journal ------------------------------------------------------------------------------------------------------


def question_key(prompt: Prompt, options: object, more: Mapping[str, Any]) -> str:
    """Return what tells one question from another: a digest of the prompt, the options (a dataclass) and `more`."""
    regions = [
        {"kind": r.kind, "box": r.box, "point": r.point, "mask": None if r.mask is None else to_rle(r.mask)}
        for r in prompt.regions
    ]
    asked = {"text": prompt.text, "language": prompt.language, "regions": regions, "settings": dict(prompt.settings)}
    whole = {**asked, "frame": prompt.frame, "options": asdict(options), **more}  # type: ignore[call-overload]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


class Journal:
    """Answers by slice in a file of JSON lines, each flushed; use it as a context manager.

    path: None for a file that is gone at the end. key: of the question; a file with another is begun anew. A last line
    that was not finished is cut off.

    Raises CannotWrite if the system refuses, or InvalidInput if the file is no journal: it is then left as it is.
    """

    def __init__(self, path: Path | None = None, key: str = "") -> None:
        self._places: dict[int, tuple[int, str]] = {}
        self._path = path
        try:
            self._file: IO[bytes] = (
                tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
                if path is None
                else open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
            )
        except OSError as error:
            raise CannotWrite(f"cannot write {path}: {error.strerror or 'refused'}") from error
        self._load(json.dumps({"schema": JOURNAL_SCHEMA, "key": key}).encode() + b"\n")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _load(self, head: bytes) -> None:
        first = self._file.readline()
        if first and JOURNAL_SCHEMA.encode() not in first:
            self._file.close()
            raise InvalidInput(f"{self._path} is no journal of slices; remove it, or pass another folder to -o")
        end = 0
        if first == head:
            end = len(first)
            for line in self._file:
                if not line.endswith(b"\n"):
                    break
                told = json.loads(line)
                self._places[told["slice"]] = (end, told["sha256"])
                end += len(line)
        self._file.truncate(end)
        if not end:
            self._put(head)

    def _put(self, line: bytes) -> int:
        try:
            at = self._file.seek(0, 2)
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise CannotWrite(f"cannot write {self._path}: {error.strerror or 'refused'}") from error
        return at

    def holds(self, index: int, digest: str) -> bool:
        """Return whether there is an answer about this slice with this content."""
        return self._places.get(index, (0, None))[1] == digest

    def put(self, index: int, digest: str, record: Record) -> None:
        """Write the answer of a slice; a later one replaces an earlier one."""
        line = {"slice": index, "sha256": digest, "answer": record}
        at = self._put(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        self._places[index] = (at, digest)

    def get(self, index: int) -> Record:
        """Return the answer of a slice."""
        self._file.seek(self._places[index][0])
        record: Record = json.loads(self._file.readline())["answer"]
        return record


# --- the loop ---------------------------------------------------------------------------------------------------------


class SliceRun:
    """One question to one stack of slices; a context manager. First `ask_slices`, then the results."""

    def __init__(self, slices: Slices, ask: Ask, prompt: Prompt, journal: Journal, *, tokens: bool = False) -> None:
        self._slices, self._ask_model, self._prompt, self._journal = slices, ask, prompt, journal
        self._tokens = tokens
        self._seen: dict[int, dict[str, _Seen]] = {}
        self._amended = Journal()
        self._changed: set[int] = set()
        self.covers_all = False
        self._progress: Callable[[int, int], None] = lambda done, total: None
        self._total = 0
        self.failed: dict[int, EdgemedError] = {}
        self.notes: list[str] = []
        self.asked_now = 0

    def __enter__(self) -> SliceRun:
        return self

    def __exit__(self, *_: object) -> None:
        self._amended.__exit__()

    @property
    def asked(self) -> list[int]:
        """The slices that have an answer, in order."""
        return sorted(self._seen)

    def ask_slices(self, which: str, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Ask the slices that `which` means (`chosen_slices`), then make their answers agree.

        on_progress: called with (slices done, slices expected so far).

        Raises what ends the whole run: EdgemedError of wrong usage, BundleError, BackendUnavailable, CannotWrite; and
        the first slice's error if no slice could be answered.
        """
        self._progress = on_progress or self._progress
        count = len(self._slices.places)
        chosen = chosen_slices(which, count)
        if self._prompt.regions:
            self._carry(chosen)
        elif chosen is None:
            self._search(count)
        else:
            self._expect(len(chosen))
            for index in chosen:
                self._ask(index)
        self.covers_all = which in ("all", "auto")
        if not self._seen and self.failed:
            raise next(iter(self.failed.values()))
        if not self._prompt.regions:
            self._fill_holes()
        self._drop_pieces()

    def _expect(self, more: int) -> None:
        self._total += more
        self._progress(len(self._seen) + len(self.failed), self._total)

    def _search(self, count: int) -> None:
        """Ask every k-th slice, then what lies between two that show something, and the way to where it ends."""
        step = max(1, int(COARSE_MM / spacing)) if (spacing := self._spacing()) else max(1, count // 16)
        middle = count // 2
        for offset in (0, step // 2) if step > 1 else (0,):
            coarse = [k for k in range((middle + offset) % step, count, step) if k not in self._seen]
            self._expect(len(coarse))
            shows = [self._shows(k) for k in coarse]
            if any(shows):
                break
        else:
            self.notes.append(f"nothing was named in {len(self._seen)} of {count} slices; --slices all asks every one")
            return
        for before, after in pairwise([-1, *self.asked, count]):
            shown = [bool(self._seen.get(k)) for k in (before, after)]
            first, last = before, after
            if shown == [True, False]:
                last = self._end(before, after) + 1
            elif shown == [False, True]:
                first = self._end(after, before) - 1
            elif shown == [False, False]:
                continue
            inside = [k for k in range(first + 1, last) if k not in self._seen]
            self._expect(len(inside))
            for index in inside:
                self._ask(index)

    def _shows(self, index: int) -> bool:
        self._ask(index)
        return bool(self._seen.get(index))

    def _end(self, found: int, absent: int) -> int:
        """Return the last slice from `found` towards `absent` that shows something, by halving the way."""
        while abs(absent - found) > 1:
            middle = (absent + found) // 2
            self._expect(1)
            if self._shows(middle):
                found = middle
            else:
                absent = middle
        return found

    def _carry(self, chosen: list[int] | None) -> None:
        """Ask the slice that the regions are on, then its neighbours with the box of the last answer, both ways."""
        count = len(self._slices.places)
        seed = self._prompt.frame
        if not 0 <= seed < count:
            raise InvalidInput(f"the regions are on slice {seed}; the series has slices 0 to {count - 1}")
        wanted = set(range(count)) if chosen is None else {seed, *chosen}
        self._expect(1)
        self._ask(seed)
        if len(self._prompt.regions) > 1:
            self.notes.append("only the one slice was asked: more than one region cannot be carried")
            return
        first = self._first_mask(seed)
        for way, end in ((1, count), (-1, -1)):
            last = first
            for index in range(seed + way, end, way):
                if last is None or (chosen is not None and index not in wanted):
                    break
                box = box_of(last[1])
                assert box is not None
                self._expect(1)
                self._ask(index, (PromptRegion("box", box=box),))
                now = self._first_mask(index)
                if now is None or now[0] != last[0] or dice(now[1], last[1]) < ALIKE:
                    self._seen.pop(index, None)
                    now = None
                last = now

    def _first_mask(self, index: int) -> tuple[str, Mask] | None:
        if index not in self._seen:
            return None
        regions = self._journal.get(index)["regions"]
        return next(((r["label"], from_rle(r["mask"]["rle"])) for r in regions if r["mask"]), None)

    def _ask(self, index: int, regions: tuple[PromptRegion, ...] | None = None) -> None:
        """Answer one slice into the journal, unless it is there; an error is kept and the run goes on."""
        if index in self._seen or index in self.failed:
            return
        try:
            content = self._slices.digest(index)
            if regions is not None:
                content += json.dumps([r.box for r in regions])
            if not self._journal.holds(index, content):
                scan = self._slices.read(index)
                prompt = replace(self._prompt, frame=scan.first_frame, regions=regions or self._prompt.regions)
                answer = self._ask_model(scan, prompt)
                told = to_json(answer, scan, prompt, path=self._slices.path(index), with_tokens=self._tokens)
                self._journal.put(index, content, told)
                self.asked_now += 1
            self._seen[index] = _seen_in(self._journal.get(index))
        except (BundleError, BackendUnavailable, CannotWrite):
            raise  # the next slice would end in the same
        except EdgemedError as error:
            self.failed[index] = error
        except MemoryError:
            self.failed[index] = OutOfMemory("out of memory; use a machine with more memory")
        self._progress(len(self._seen) + len(self.failed), self._total)

    def _spacing(self) -> float | None:
        """Return the median distance between slices in mm, or None where positions are missing."""
        places = self._slices.places
        if len(places) < 2 or not all(p.placed for p in places):
            return None
        return float(np.median(np.abs(np.diff([depth_of(p) for p in places])))) or None

    # --- agreement ---

    def _record(self, index: int) -> Record:
        return (self._amended if index in self._changed else self._journal).get(index)

    def _amend(self, index: int, record: Record, note: str) -> None:
        record["notes"] = [*record.get("notes", []), note]
        self._amended.put(index, "", record)
        self._changed.add(index)
        self._seen[index] = _seen_in(record)

    def _fill_holes(self) -> None:
        """Ask again where one or two slices lack what both sides have."""
        labels = sorted({label for seen in self._seen.values() for label in seen})
        for label in labels:
            having = [k for k in self.asked if label in self._seen[k]]
            for before, after in pairwise(having):
                hole = range(before + 1, after)
                if 0 < len(hole) <= MAX_HOLE and all(k in self._seen for k in hole):
                    for index in hole:
                        self._fill(index, label, before, after)

    def _fill(self, index: int, label: str, before: int, after: int) -> None:
        ends = [_mask_of(self._record(k), label) for k in (before, after)]
        if ends[0] is None or ends[1] is None:
            return
        share = (index - before) / (after - before)
        boxes = zip(self._seen[before][label].box, self._seen[after][label].box, strict=True)
        x0, y0, x1, y1 = (a * (1 - share) + b * share for a, b in boxes)
        try:
            scan = self._slices.read(index)
            region = PromptRegion("box", box=(x0, y0, x1, y1))
            prompt = replace(self._prompt, text=OUTLINE[self._prompt.language], regions=(region,))
            prompt = replace(prompt, frame=scan.first_frame)
            answer = self._ask_model(scan, prompt)
        except (BundleError, BackendUnavailable, CannotWrite):
            raise
        except EdgemedError:
            return  # a family without region prompts: the hole stays
        told = to_json(answer, scan, prompt, path="")
        found = next((r for r in told["regions"] if r["mask"]), None)
        if found is None:
            return
        mask = from_rle(found["mask"]["rle"])
        if mask.shape != ends[0].shape or max(dice(mask, end) for end in ends if end is not None) < ALIKE:
            return
        record = self._record(index)
        record["regions"].append({**found, "label": label})
        self._amend(index, record, f"{label}: outlined at its place in the neighbouring slices")

    def _drop_pieces(self) -> None:
        """Drop pieces that are alone in their slice or tiny; nothing without positions or with every N-th slice."""
        places = self._slices.places
        if not self.covers_all or len(self.asked) < 3 or not all(p.placed for p in places):
            return
        depths = [depth_of(p) for p in places]
        for label in sorted({label for seen in self._seen.values() for label in seen}):
            self._drop_pieces_of(label, depths)

    def _drop_pieces_of(self, label: str, depths: Sequence[float]) -> None:
        pieces = _Pieces()
        for index in self.asked:
            if label in self._seen[index]:
                mask = _mask_of(self._record(index), label)
                if mask is None or not pieces.add(index, mask):
                    return
        dropped = pieces.smaller_than(TINY)
        for index in pieces.slices:
            gone = {p for p in pieces.of(index) if p in dropped}
            alone = all(
                k in self._seen and k not in pieces.slices and abs(depths[k] - depths[index]) <= ALONE_MM
                for k in (index - 1, index + 1)
            )
            if alone or gone == set(pieces.of(index)):
                kept = None
            elif gone:
                kept = pieces.mask_without(index, gone)
            else:
                continue
            record = _cut(self._record(index), label, kept)
            why = "seen in this slice alone" if alone else "a piece away from the rest"
            self._amend(index, record, f"{label}: left out, {why}")

    # --- results ---

    def answers(self) -> Iterator[tuple[int, Record]]:
        """Yield (slice, its edgemed.answer/1) in order."""
        for index in self.asked:
            yield index, self._record(index)

    def structures(self, verdict: Verdict, *, resample: bool = False) -> list[Structure]:
        """Return what was found, the largest first.

        A volume is given where all slices that may show the structure were asked and none failed, and where `verdict`
        is that of a volume; with `resample`, between unevenly spaced or leaning slices too: areas are then taken to
        change linearly along the normal.
        """
        places = self._slices.places
        spaced = len(places) > 1 and all(p.placed for p in places) and verdict.kind in _SPACED
        slabs = slabs_mm(places) if spaced and self.covers_all and (verdict.is_volume or resample) else None
        found: dict[str, dict[int, _Seen]] = {}
        for index in self.asked:
            for label, seen in self._seen[index].items():
                found.setdefault(label, {})[index] = seen
        result: list[Structure] = []
        for label, slices in found.items():
            indices = tuple(slices)
            broken = any(indices[0] <= k <= indices[-1] for k in self.failed)
            masked = all(seen.pixels for seen in slices.values())
            volume = None
            if slabs is not None and masked and not broken:
                volume = sum(_area_mm2(places[k], seen.pixels) * slabs[k] for k, seen in slices.items()) / 1000
            result.append(Structure(label, indices, sum(s.pixels for s in slices.values()), volume))
        return sorted(result, key=lambda s: -s.pixels)


_SPACED = ("uniform", "tilt", "gaps", "irregular", "duplicates")


def _area_mm2(place: Place, pixels: int) -> float:
    assert place.spacing_mm is not None
    return pixels * place.spacing_mm[0] * place.spacing_mm[1]


def _seen_in(record: Record) -> dict[str, _Seen]:
    """Return what a record shows, by label; several regions of one name are one."""
    seen: dict[str, _Seen] = {}
    for region in record["regions"]:
        x0, y0, x1, y1 = region["box_px"]
        pixels = region["mask"]["area_px"] if region["mask"] else 0
        known = seen.get(region["label"])
        if known is not None:
            a, b, c, d = known.box
            x0, y0, x1, y1, pixels = min(a, x0), min(b, y0), max(c, x1), max(d, y1), known.pixels + pixels
        seen[region["label"]] = _Seen((x0, y0, x1, y1), pixels)
    return seen


def _mask_of(record: Record, label: str) -> Mask | None:
    """Return the union of the masks of a label, None where there is none."""
    masks = [from_rle(r["mask"]["rle"]) for r in record["regions"] if r["label"] == label and r["mask"]]
    return np.logical_or.reduce(masks) if masks else None


def _cut(record: Record, label: str, kept: Mask | None) -> Record:
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


class _Pieces:
    """The connected pieces (26 neighbours) of masks in consecutive slices, by runs down the columns and union-find."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._sizes: list[int] = []
        self.slices: dict[int, int] = {}
        """Slice -> the number of its first run."""
        self._runs: dict[int, npt.NDArray[np.int32]] = {}
        self._shape = (0, 0)

    def add(self, index: int, mask: Mask) -> bool:
        """Take the next slice; return False if the mask has more runs than a structure has."""
        runs = _runs(mask)
        if len(runs) > _MAX_RUNS:
            return False
        self._shape = (mask.shape[0], mask.shape[1])
        base = len(self._parent)
        self._parent.extend(range(base, base + len(runs)))
        self._sizes.extend((runs[:, 2] - runs[:, 1]).tolist())
        self.slices[index] = base
        self._runs[index] = runs
        self._link(runs, base, runs, base)
        if index - 1 in self.slices:
            self._link(runs, base, self._runs[index - 1], self.slices[index - 1])
        return True

    def _link(self, a: npt.NDArray[np.int32], a_base: int, b: npt.NDArray[np.int32], b_base: int) -> None:
        near = np.abs(a[:, None, 0] - b[None, :, 0]) <= 1
        near &= (a[:, None, 1] <= b[None, :, 2]) & (b[None, :, 1] <= a[:, None, 2])
        for i, j in np.argwhere(near).tolist():
            self._parent[self._root(a_base + i)] = self._root(b_base + j)

    def _root(self, run: int) -> int:
        while self._parent[run] != run:
            self._parent[run] = self._parent[self._parent[run]]
            run = self._parent[run]
        return run

    def smaller_than(self, share: float) -> set[int]:
        """Return the pieces with less than `share` of the largest one's pixels."""
        totals: dict[int, int] = {}
        for run, size in enumerate(self._sizes):
            root = self._root(run)
            totals[root] = totals.get(root, 0) + size
        most = max(totals.values(), default=0)
        return {root for root, size in totals.items() if size < share * most}

    def of(self, index: int) -> list[int]:
        """Return the piece of each run of a slice."""
        base = self.slices[index]
        return [self._root(base + i) for i in range(len(self._runs[index]))]

    def mask_without(self, index: int, pieces: set[int]) -> Mask:
        """Return the mask of a slice without these pieces."""
        mask = np.zeros(self._shape, np.bool_)
        for (column, start, end), piece in zip(self._runs[index].tolist(), self.of(index), strict=True):
            if piece not in pieces:
                mask[start:end, column] = True
        return mask


def _runs(mask: Mask) -> npt.NDArray[np.int32]:
    """Return [runs, 3]: column, first row, row after the last, of the True pixels down each column."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((1, 1), (0, 0))), axis=0).T  # [columns, rows + 1]
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    return np.column_stack((starts, ends[:, 1])).astype(np.int32)


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
