"""Where the slices of a series lie, and whether they make one volume: the verdict, the affine, the slab of each slice.

Millimetres are those of the patient (LPS: x to the left, y to the back, z to the head). Distances come from Image
Position (Patient), never from Slice Thickness. Covers any list of slices; does not cover reading headers (`series`).

Source: DICOM PS3.3 C.7.6.2.1.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgemed.core import Mask
from edgemed.errors import InvalidInput

Array = npt.NDArray[np.float64]
Triple = tuple[float, float, float]
Kind = Literal[
    "uniform", "single", "gaps", "irregular", "duplicates", "tilt", "mixed orientation", "localizer", "unplaced"
]

SAME_DIRECTION = 1e-3
"""Cosines that differ by less are one orientation (0.06 degrees); headers round them to four digits or more."""
SAME_POSITION_MM = 1e-3
STRAY = 0.05
"""How far a slice may lie from its place, as a share of the spacing: 0.1 mm rounding at 1 mm passes, a gap does not."""
MAX_ORIENTATIONS = 8
"""A series with more is not taken apart: it turns around an axis."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one slice lies. None where the header says nothing of it or no numbers.

    spacing_mm: (between rows, between columns). orientation: cosines of the direction along a row, then down a column.
    position: centre of the first pixel, LPS mm.
    """

    rows: int
    columns: int
    spacing_mm: tuple[float, float] | None = None
    orientation: tuple[float, float, float, float, float, float] | None = None
    position: Triple | None = None

    @property
    def placed(self) -> bool:
        return self.spacing_mm is not None and self.orientation is not None and self.position is not None


@dataclass(frozen=True)
class Verdict:
    """What the slices of a stack make together.

    kind: "uniform" and "single" are volumes; of every other kind `reasons` tells why it is none. spacing_mm: (between
    slices, between rows, between columns), the first along the normal; None where a distance is not known or not one.
    affine: [4, 4] (column, row, slice) -> LPS mm with slice 0 the first, where one matrix says it.
    """

    kind: Kind
    reasons: tuple[str, ...] = ()
    spacing_mm: tuple[float | None, float, float] | None = None
    affine: tuple[tuple[float, ...], ...] | None = None

    @property
    def is_volume(self) -> bool:
        """Whether volumes and three-dimensional masks mean something."""
        return self.kind in ("uniform", "single")

    def with_reasons(self, *more: str) -> Verdict:
        return replace(self, reasons=(*self.reasons, *more))


def normal_of(place: Place) -> Array:
    """Return the unit vector along which slices are sorted: row direction x column direction.

    >>> normal_of(Place(1, 1, orientation=(1, 0, 0, 0, 1, 0))).tolist()
    [0.0, 0.0, 1.0]
    """
    assert place.orientation is not None
    normal = np.cross(place.orientation[:3], place.orientation[3:])
    return np.asarray(normal / np.linalg.norm(normal))


def depth_of(place: Place) -> float:
    """Return the position along the normal in mm."""
    return float(np.dot(normal_of(place), place.position or (0.0, 0.0, 0.0)))


def plane_of(place: Place) -> str:
    """Return "axial", "coronal" or "sagittal": the plane that is nearest."""
    return ("sagittal", "coronal", "axial")[int(np.abs(normal_of(place)).argmax())]


def affine_of(place: Place, step: Sequence[float] | Array | None = None) -> Array:
    """Return [4, 4]: (column, row, slice) of pixel centres -> LPS mm; step: what one slice further is, default the
    normal.

    The row spacing goes with the column direction: PixelSpacing is (between rows, between columns).
    """
    assert place.orientation is not None
    assert place.spacing_mm is not None
    assert place.position is not None
    affine = np.eye(4)
    affine[:3, 0] = np.multiply(place.orientation[:3], place.spacing_mm[1])
    affine[:3, 1] = np.multiply(place.orientation[3:], place.spacing_mm[0])
    affine[:3, 2] = normal_of(place) if step is None else step
    affine[:3, 3] = place.position
    return affine


def centroid_mm(masks: Iterable[tuple[Place, Mask]]) -> Triple | None:
    """Return the mean patient position of all mask pixels, each slice by its own header; None if there is none."""
    total, count = np.zeros(3), 0
    for place, mask in masks:
        rows, columns = np.nonzero(mask)
        if rows.size:
            affine = affine_of(place)
            total += affine[:3] @ (columns.sum(), rows.sum(), 0, rows.size)
            count += rows.size
    x, y, z = total / max(count, 1)
    return (float(x), float(y), float(z)) if count else None


def orientation_groups(places: Sequence[Place]) -> list[list[int]]:
    """Return the indices of slices that share size, pixel spacing and orientation, in the order of their first."""
    heads: list[Place] = []
    groups: list[list[int]] = []
    for index, place in enumerate(places):
        at = next((i for i, head in enumerate(heads) if _fits(head, place)), None)
        if at is None:
            heads.append(place)
            groups.append([index])
        else:
            groups[at].append(index)
    return groups


def _fits(a: Place, b: Place) -> bool:
    if (a.rows, a.columns, a.placed) != (b.rows, b.columns, b.placed):
        return False
    if not a.placed:
        return True
    assert a.orientation and b.orientation and a.spacing_mm and b.spacing_mm  # noqa: PT018 (of one fact: placed)
    turned = max(abs(x - y) for x, y in zip(a.orientation, b.orientation, strict=True))
    scaled = max(abs(x - y) / x for x, y in zip(a.spacing_mm, b.spacing_mm, strict=True))
    return turned < SAME_DIRECTION and scaled < SAME_DIRECTION


def judge(places: Sequence[Place], *, localizer: bool = False) -> Verdict:
    """Return the verdict over slices that are sorted by `depth_of`.

    Raises InvalidInput if there is no slice.
    """
    if not places:
        raise InvalidInput("a series without slices was to be judged; at least one was expected")
    first = places[0]
    groups = orientation_groups(places)
    if localizer:
        return Verdict("localizer", ("a localizer: a picture to plan on, not one of a volume",))
    if len(groups) > 1:
        sizes = len({(p.rows, p.columns, p.spacing_mm) for p in places}) > 1
        what = "orientations, matrix sizes or pixel spacings" if sizes else "orientations"
        return Verdict("mixed orientation", (f"the slices have {len(groups)} {what}",))
    if not first.placed:
        return Verdict("unplaced", ("the headers do not say where the slices lie and how large a pixel is",))
    assert first.spacing_mm is not None
    if len(places) == 1:
        return Verdict("single", (), (None, *first.spacing_mm), _rows(affine_of(first)))
    return _judge_stack(places, first.spacing_mm)


def _judge_stack(places: Sequence[Place], pixel_mm: tuple[float, float]) -> Verdict:
    positions = np.array([p.position for p in places])  # [slices, 3]
    normal = normal_of(places[0])
    depths = positions @ normal
    gaps = np.diff(depths)
    repeated = int((gaps < SAME_POSITION_MM).sum())
    if repeated:
        return Verdict(
            "duplicates", (f"{repeated} of {len(places)} slices lie where another one does",), (None, *pixel_mm)
        )
    # Median, not mean: it is the spacing of what is there, whatever is missing.
    spacing = float(np.median(gaps))
    kind, reason = _evenness(depths, gaps, spacing)
    if kind != "uniform":
        return Verdict(kind, (reason,), (None, *pixel_mm))
    step = (positions[-1] - positions[0]) / (len(places) - 1)
    spacing = float(step @ normal)
    in_plane = positions - positions[0] - np.outer(depths - depths[0], normal)  # [slices, 3]
    straight = np.outer(np.arange(len(places)), step - spacing * normal)
    pixel = min(pixel_mm)
    verdict = Verdict("uniform", (), (spacing, *pixel_mm), _rows(affine_of(places[0], step)))
    if float(np.abs(in_plane - straight).max()) > max(STRAY * spacing, STRAY * pixel):
        return Verdict("irregular", ("the slices are shifted against each other in their plane",), (None, *pixel_mm))
    if float(np.linalg.norm(in_plane[-1])) > pixel / 2:
        degrees = math.degrees(math.atan2(float(np.linalg.norm(step - spacing * normal)), spacing))
        sheared = f"the stack leans by {degrees:.1f} degrees against the slices (tilted gantry)"
        return replace(verdict, kind="tilt", reasons=(sheared,))
    return verdict


def _evenness(depths: Array, gaps: Array, spacing: float) -> tuple[Kind, str]:
    even = (depths[-1] - depths[0]) / (len(depths) - 1)
    strays = np.abs(depths - depths[0] - even * np.arange(len(depths)))
    if float(strays.max()) <= STRAY * even and float(np.abs(gaps - even).max()) <= 2 * STRAY * even:
        return "uniform", ""
    steps = gaps / spacing
    if float(np.abs(steps - np.rint(steps)).max()) <= 2 * STRAY:
        missing = int(np.rint(steps).sum()) - len(gaps)
        at = int(np.argmax(steps > 1.5))
        return "gaps", f"{missing} missing between its {len(depths)} slices, the first after slice {at} (from 0)"
    return "irregular", f"the distance between slices goes from {gaps.min():.2f} to {gaps.max():.2f} mm"


def slabs_mm(places: Sequence[Place]) -> list[float]:
    """Return how thick a slab each of the sorted slices stands for: half the way to each neighbour, along the normal.

    At the ends the slab is symmetric. Areas times slabs add up to what linear interpolation between the slices gives;
    with equal distances every slab is that distance. A slice that repeats a position stands for nothing.

    Raises InvalidInput where positions are missing or there are fewer than two.
    """
    if len(places) < 2 or not all(p.placed for p in places):
        raise InvalidInput("volumes need at least two slices with a known position")
    normal = normal_of(places[0])
    depths = np.array([p.position for p in places]) @ normal
    kept = np.concatenate(([True], np.diff(depths) >= SAME_POSITION_MM))
    gaps = np.diff(depths[kept])
    if gaps.size == 0:
        raise InvalidInput("volumes need at least two slices at different positions")
    slabs = np.zeros(len(places))
    slabs[kept] = (np.concatenate((gaps[:1], gaps)) + np.concatenate((gaps, gaps[-1:]))) / 2
    return [float(slab) for slab in slabs]


def resampled(masks: Iterable[Mask], places: Sequence[Place]) -> Iterator[tuple[Place, Mask]]:
    """Yield (place, mask) on even distances along the normal: linear between the two slices around, cut at one half.

    The distance is the median one. Slices that are shifted in their plane (tilt) are shifted back by whole pixels, so
    that the result has no shear. Two masks are in memory at a time.

    Raises InvalidInput as `slabs_mm`.
    """
    slabs = slabs_mm(places)
    head = places[0]
    assert head.orientation is not None
    assert head.spacing_mm is not None
    assert head.position is not None
    normal, origin = normal_of(head), np.array(head.position)
    depths = np.array([p.position for p in places]) @ normal - float(normal @ origin)
    distance = float(np.median(np.diff(depths[np.array(slabs) > 0])))
    below: tuple[float, Mask] | None = None
    number = 0
    for slab, depth, place, mask in zip(slabs, depths, places, masks, strict=True):
        if slab == 0:
            continue
        offset = np.array(place.position) - origin
        across = round(float(offset @ head.orientation[:3]) / head.spacing_mm[1])
        down = round(float(offset @ head.orientation[3:]) / head.spacing_mm[0])
        above = (float(depth), _shifted(mask, down, across))
        while number * distance <= above[0] + STRAY * distance:
            low = below or above
            share = 0.0 if above[0] <= low[0] else (number * distance - low[0]) / (above[0] - low[0])
            share = min(max(share, 0.0), 1.0)
            mixed = low[1] * (1 - share) + above[1] * share >= 0.5
            x, y, z = origin + number * distance * normal
            yield replace(head, position=(float(x), float(y), float(z))), mixed
            number += 1
        below = above


def _shifted(mask: Mask, down: int, across: int) -> Mask:
    """Return the mask moved by whole pixels; what leaves the picture is lost, what comes in is empty."""
    if not (down or across):
        return mask
    moved = np.zeros_like(mask)
    rows, columns = mask.shape
    source = mask[max(-down, 0) : rows - max(down, 0), max(-across, 0) : columns - max(across, 0)]
    top, left = max(down, 0), max(across, 0)
    moved[top : top + source.shape[0], left : left + source.shape[1]] = source
    return moved


def _rows(affine: Array) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in affine)
