"""Masks of unevenly spaced or leaning slices on even distances, for files that can hold nothing else (`--resample`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from edgemed.core import Mask, Region
from edgemed.dicom.geometry_verdict import Place, resampled
from edgemed.geometry import box_of
from edgemed.report.dicom_source import Group, Image, Plane
from edgemed.report.packed import packed


def evenly(group: Group) -> Group | None:
    """Return the group with its masks on planes of one distance, the median; None without places or for one image.

    Between two slices a mask is interpolated and cut at one half (`geometry_verdict.resampled`). Each image stands for
    the nearest one that was analysed. Text, and regions without a mask, are not in it.

    Raises InvalidInput if all slices lie at one position.
    """
    places = [_place(image) for image in group.images]
    if len(places) < 2 or not all(place.placed for place in places):
        return None
    first = group.images[0].answers[0]
    bare = replace(first, text="", tagged_text="", regions=(), labels=(), findings=(), notes=())
    nothing = (np.zeros((p.rows, p.columns), np.bool_) for p in places)
    planes = [place for place, _ in resampled(nothing, places)]
    regions: list[list[Region]] = [[] for _ in planes]
    for label in dict.fromkeys(r.label for image in group.images for r in image.regions if r.mask is not None):
        for found, (_, mask) in zip(regions, resampled(_masks(group, label), places), strict=True):
            box = box_of(mask)
            if box is not None:
                found += packed(replace(bare, regions=(Region(label, box, 0, mask),))).regions
    depths = np.array([image.plane.depth for image in group.images if image.plane is not None])
    images = []
    for place, found in zip(planes, regions, strict=True):
        plane = _plane(place)
        nearest = group.images[int(np.abs(depths - plane.depth).argmin())]
        images.append(replace(nearest, answers=(replace(bare, regions=tuple(found)),), plane=plane))
    apart = abs(_depth(images[1]) - _depth(images[0])) if len(images) > 1 else group.first.thickness_mm
    return Group(tuple(replace(image, thickness_mm=apart) for image in images), resampled=True)


def _depth(image: Image) -> float:
    assert image.plane is not None
    return image.plane.depth


def _masks(group: Group, label: str) -> Iterator[Mask]:
    for image in group.images:
        whole = np.zeros((image.rows, image.columns), np.bool_)
        for region in image.regions:
            if region.label == label and region.mask is not None:
                whole |= region.mask
        yield whole


def _place(image: Image) -> Place:
    if image.plane is None:
        return Place(image.rows, image.columns, image.spacing_mm)
    row, column, position = (
        tuple(float(v) for v in vector)
        for vector in (image.plane.along_row, image.plane.down_column, image.plane.position)
    )
    return Place(image.rows, image.columns, image.spacing_mm, (*row, *column), position)  # type: ignore[arg-type]


def _plane(place: Place) -> Plane:
    assert place.position is not None
    assert place.orientation is not None
    return Plane(np.array(place.position), np.array(place.orientation[:3]), np.array(place.orientation[3:]))
