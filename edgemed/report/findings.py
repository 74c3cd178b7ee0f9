"""Regions of one series gathered into findings: what has one name on several images is one finding. And its sizes.

Sizes are in millimetres and only where the images have a spacing; a volume only where slices follow each other without
a gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edgemed.core import Mask, Region
from edgemed.report.dicom_source import Group, Image
from edgemed.terminology import Concept, find_concept


@dataclass(frozen=True, eq=False)
class Finding:
    """One thing found. places: (image, region) in the order of the images. number: 1 for the first."""

    number: int
    concept: Concept
    places: tuple[tuple[Image, Region], ...]

    @cached_property
    def _by_image(self) -> dict[Image, list[Region]]:
        found: dict[Image, list[Region]] = {}
        for image, region in self.places:
            found.setdefault(image, []).append(region)
        return found

    @property
    def images(self) -> tuple[Image, ...]:
        """The images it is on, each once, in order."""
        return tuple(self._by_image)

    @cached_property
    def masked_images(self) -> tuple[Image, ...]:
        """The images on which it has pixels, in order."""
        return tuple(
            i for i, regions in self._by_image.items() if any(r.mask is not None and r.mask.any() for r in regions)
        )

    def on(self, image: Image) -> Sequence[Region]:
        """Return its regions on one image."""
        return self._by_image.get(image, ())

    def mask(self, image: Image) -> Mask | None:
        """Return all of it on one image, None if it has no pixel there."""
        masks = [r.mask for r in self.on(image) if r.mask is not None and r.mask.any()]
        if len(masks) < 2:
            return masks[0] if masks else None
        return np.asarray(np.logical_or.reduce(masks))


def certainty_of(finding: Finding) -> float | None:
    """Return the mean score of its places in percent, None where none has one."""
    scores = [region.score for _, region in finding.places if region.score is not None]
    return 100 * sum(scores) / len(scores) if scores else None


def findings_of(group: Group) -> tuple[Finding, ...]:
    """Return the findings in the order in which the images show them first."""
    places: dict[str, list[tuple[Image, Region]]] = {}
    concepts: dict[str, Concept] = {}
    for image in group.images:
        for region in image.regions:
            concept = find_concept(region.label)
            concepts.setdefault(concept.key, concept)
            places.setdefault(concept.key, []).append((image, region))
    return tuple(Finding(i, concepts[key], tuple(at)) for i, (key, at) in enumerate(places.items(), 1))


@dataclass(frozen=True)
class Sizes:
    """What is known of a finding's size; None for what is not. Axes lie in the image plane."""

    area_mm2: float | None = None
    long_axis_mm: float | None = None
    short_axis_mm: float | None = None
    volume_mm3: float | None = None


def sizes_of(finding: Finding, group: Group) -> Sizes:
    """Return its area if it is on one image, its volume if on several, and the axes of its largest outline."""
    outlined = finding.masked_images
    if not outlined or any(image.spacing_mm is None for image in outlined):
        return Sizes()
    axes = max((_axes(r.mask, i) for i, r in finding.places if r.mask is not None and r.mask.any()), default=(0.0, 0.0))
    areas = [_area(finding.mask(image), image) for image in outlined]
    if len(outlined) == 1:
        return Sizes(areas[0], *axes)
    return Sizes(None, *axes, _volume(areas, group))


def _area(mask: Mask | None, image: Image) -> float:
    assert mask is not None
    assert image.spacing_mm is not None
    return float(np.count_nonzero(mask)) * image.spacing_mm[0] * image.spacing_mm[1]


def _volume(areas: Sequence[float], group: Group) -> float | None:
    """Return the volume in mm3, None unless the slices lie as close as they are thick (5 %)."""
    gap, thickness = group.gap_mm(), group.first.thickness_mm
    if gap is None or thickness is None or gap > 1.05 * thickness:
        return None
    return sum(areas) * gap


def _axes(mask: Mask, image: Image) -> tuple[float, float]:
    """Return (largest distance between two corners of the mask's pixels, its extent across that line), in mm."""
    assert image.spacing_mm is not None
    corners = _outer_corners(mask) * np.array(image.spacing_mm[::-1])
    differences = corners[:, None] - corners[None]
    squares = np.einsum("ijk,ijk->ij", differences, differences)
    at = np.unravel_index(int(squares.argmax()), squares.shape)
    long = differences[at]
    length = float(np.sqrt(squares[at]))
    across = corners @ np.array([-long[1], long[0]]) / length
    return length, float(across.max() - across.min())


def _outer_corners(mask: Mask) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return [n, 2] (x, y) in pixels: the corners of the convex hull, which hold every largest distance."""
    rows = np.flatnonzero(mask.any(axis=1))
    first = mask[rows].argmax(axis=1)
    last = mask.shape[1] - mask[rows, ::-1].argmax(axis=1)

    def side(columns: np.ndarray[tuple[int], np.dtype[np.intp]]) -> list[tuple[int, int]]:
        return [(int(x), int(y) + d) for y, x in zip(rows, columns, strict=True) for d in (0, 1)]

    return np.array([*_chain(side(first), -1), *_chain(side(last), 1)], np.float64)


def _chain(points: Sequence[tuple[int, int]], turn: int) -> list[tuple[int, int]]:
    """Return the corners of `points`, which go down, that bulge outwards (A. M. Andrew's monotone chain, 1979)."""
    kept: list[tuple[int, int]] = []
    for x, y in points:
        while len(kept) > 1:
            (ax, ay), (bx, by) = kept[-2:]
            if turn * ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) > 0:
                break
            kept.pop()
        kept.append((x, y))
    return kept
