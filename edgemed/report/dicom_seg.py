"""Masks as DICOM Segmentation: one segment for each finding, on the pixel grid of the source images.

BINARY, or LABELMAP where it is asked for. Boxes without a mask are not in it: those are in the SR and the GSPS.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgemed.core import Language
from edgemed.report.dicom_object import (
    CREATOR,
    MAKER,
    WARNING,
    Made,
    ResultOptions,
    coded,
    common,
    long_string,
    plain_sources,
    refer_to,
    tracking_uid,
)
from edgemed.report.dicom_source import Group, quiet
from edgemed.report.findings import Finding
from edgemed.report.style import PALETTE

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


def to_segs(group: Group, findings: Sequence[Finding], language: Language, options: ResultOptions) -> list[Made]:
    """Return the segmentations: one, or none if no finding has a mask.

    Without a frame of reference a SEG holds a single plane, so there is one for each image that has masks.
    """
    if group.has_frame_of_reference:
        parts = [group]
    else:
        parts = [Group((image,)) for image in group.images if any(f.mask(image) is not None for f in findings)]
    made = []
    for number, part in enumerate(parts, 1):
        segments = tuple(f for f in findings if any(f.mask(image) is not None for image in part.images))
        if segments:
            stem = "seg" if len(parts) == 1 else f"seg-{number}"
            made.append(Made(stem, _to_seg(part, segments, language, options), part.images, segments))
    return made


def _to_seg(part: Group, masked: Sequence[Finding], language: Language, options: ResultOptions) -> Dataset:
    from highdicom.seg import Segmentation

    pixels = _pixels(part, masked)
    if options.labelmap and pixels.ndim == 4:
        options.tell("findings overlap; in the LABELMAP the smaller one is on top")
        pixels = flattened(pixels)
    with quiet():
        made: Dataset = Segmentation(
            source_images=_thick(part, options),
            pixel_array=pixels,
            segmentation_type="LABELMAP" if options.labelmap else "BINARY",
            segment_descriptions=[_describe(i, f, part, language, options) for i, f in enumerate(masked, 1)],
            omit_empty_frames=not options.seg_full_frames,
            content_label="AI_RESULT",
            content_description=long_string(WARNING[language]),
            content_creator_name=CREATOR,
            **_planes(part),
            **common(part, "seg", language, options, *(["resampled"] if part.resampled else [])),
        )
    made.ContentQualification = "RESEARCH"
    if not part.has_frame_of_reference:
        made.PatientOrientation = None
        refer_to(made, part, part.first.frame)
    else:
        refer_to(made, part)
    return made


def _planes(part: Group) -> dict[str, Any]:
    """Return where frames lie that are not on the planes of source images."""
    if not part.resampled:
        return {}
    from highdicom import PixelMeasuresSequence, PlaneOrientationSequence, PlanePositionSequence

    plane, apart = part.first.plane, part.first.thickness_mm
    assert plane is not None
    assert part.first.spacing_mm is not None
    assert apart is not None
    return {
        "plane_positions": [
            PlanePositionSequence("PATIENT", image.plane.position.tolist())
            for image in part.images
            if image.plane is not None
        ],
        "plane_orientation": PlaneOrientationSequence("PATIENT", [*plane.along_row, *plane.down_column]),
        "pixel_measures": PixelMeasuresSequence(part.first.spacing_mm, apart, apart),
    }


def _thick(part: Group, options: ResultOptions) -> list[Dataset]:
    """Return the sources, with a slice thickness where they have none: a SEG with a spacing must name one."""
    sources = plain_sources(part)
    spacing = part.first.spacing_mm
    single = part.resampled and not part.is_multiframe
    told = part.first.dicom.get("SliceThickness") if single else part.first.thickness_mm
    if told is not None or spacing is None:
        return sources
    if not part.resampled:
        options.tell("the images have no SliceThickness; the SEG, which must name one, has the width of a pixel there")
    sources = copy.deepcopy(sources)
    for source in sources:
        shared = source.get("SharedFunctionalGroupsSequence")
        holder = shared[0].PixelMeasuresSequence[0] if shared else source
        holder.SliceThickness = f"{spacing[1]:.6g}"
    return sources


def flattened(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """Return segment numbers [frames, rows, columns] of overlapping masks [..., segments]; the smaller lies on top."""
    labels = np.zeros(pixels.shape[:-1], np.uint16)
    for index in np.argsort([-int(np.count_nonzero(pixels[..., i])) for i in range(pixels.shape[-1])], kind="stable"):
        labels[pixels[..., index] > 0] = index + 1
    return labels


def _pixels(group: Group, masked: Sequence[Finding]) -> npt.NDArray[Any]:
    """Return segment numbers [frames, rows, columns], or uint8 [..., segments] where segments overlap.

    Frames are those of the source: each analysed file, or each frame of the one multi-frame file.
    """
    first = group.first
    whole = group.is_multiframe and group.has_frame_of_reference and not group.resampled
    frames = int(group.header.NumberOfFrames) if whole else len(group.images)
    place = {image: image.frame if whole else i for i, image in enumerate(group.images)}
    labels = np.zeros((frames, first.rows, first.columns), np.uint8 if len(masked) < 256 else np.uint16)
    for number, finding in enumerate(masked, 1):
        for image in group.images:
            mask = finding.mask(image)
            if mask is None:
                continue
            plane = labels[place[image]]
            if plane[mask].any():
                return _stacked(frames, place, group, masked)
            plane[mask] = number
    return labels


def _stacked(frames: int, place: dict[Any, int], group: Group, masked: Sequence[Finding]) -> npt.NDArray[np.uint8]:
    stack = np.zeros((frames, group.first.rows, group.first.columns, len(masked)), np.uint8)
    for index, finding in enumerate(masked):
        for image in group.images:
            mask = finding.mask(image)
            if mask is not None:
                stack[place[image], ..., index] = mask
    return stack


def _describe(number: int, finding: Finding, group: Group, language: Language, options: ResultOptions) -> Any:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from pydicom.dataset import Dataset
    from pydicom.sr.codedict import codes

    concept, p = finding.concept, group.provenance
    segment = SegmentDescription(
        segment_number=number,
        segment_label=long_string(concept.name(language)),
        segmented_property_category=coded(concept.category),
        segmented_property_type=coded(concept.type),
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=long_string(f"{MAKER} {p.bundle}"),
            version=long_string(f"{p.edgemed} {p.bundle_sha256[:16]}"),
            family=codes.DCM.ArtificialIntelligence,
            source=MAKER,
        ),
        tracking_uid=tracking_uid(group, concept.key, options),
        tracking_id=long_string(concept.key),
        anatomic_regions=[coded(concept.site)] if concept.site else None,
        display_color=CIELabColor.from_rgb(*PALETTE[(finding.number - 1) % len(PALETTE)]),
    )
    segment.SegmentDescription = long_string(WARNING[language])
    if concept.side is not None:
        side = Dataset()
        side.update(coded(concept.side))
        if concept.site is not None:
            segment.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [side]
        else:
            segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [side]
    return segment
