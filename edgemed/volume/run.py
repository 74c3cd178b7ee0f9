"""The loop over the slices of a stack, and what makes their answers agree."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np

from edgemed.core import Answer, Language, Mask, Prompt, PromptRegion, Scan
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
from edgemed.report.rle import from_rle
from edgemed.volume.journal import Journal
from edgemed.volume.pieces import Pieces
from edgemed.volume.records import Record, Seen, cut, mask_of, seen_in

COARSE_MM = 10.0
"""How far apart the first slices of `auto` are; a structure that is flatter may be missed, which its notes say."""
MAX_HOLE = 2
ALIKE = 0.5
"""Dice with a neighbour's mask from which on a carried one is kept."""
TINY = 0.02
ALONE_MM = 3.0

OUTLINE: Mapping[Language, str] = {"en": "Segment this region.", "zh": "请分割这个区域。"}

Ask = Callable[[Scan, Prompt], Answer]


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


# --- the loop ---------------------------------------------------------------------------------------------------------


class SliceRun:
    """One question to one stack of slices; a context manager. First `ask_slices`, then the results."""

    def __init__(self, slices: Slices, ask: Ask, prompt: Prompt, journal: Journal, *, tokens: bool = False) -> None:
        self._slices, self._ask_model, self._prompt, self._journal = slices, ask, prompt, journal
        self._tokens = tokens
        self._seen: dict[int, dict[str, Seen]] = {}
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
            self._seen[index] = seen_in(self._journal.get(index))
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
        self._seen[index] = seen_in(record)

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
        ends = [mask_of(self._record(k), label) for k in (before, after)]
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
        pieces = Pieces()
        for index in self.asked:
            if label in self._seen[index]:
                mask = mask_of(self._record(index), label)
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
            record = cut(self._record(index), label, kept)
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
        found: dict[str, dict[int, Seen]] = {}
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
