"""Masks as DICOM Segmentation: one segment for each finding, on the pixel grid of the source images.

BINARY, or LABELMAP where it is asked for. Boxes without a mask are not in it: those are in the SR and the GSPS.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydicom.sequence import Sequence as PydicomSequence

from edgemed.core import Language, Mask
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
from edgemed.report.streamed import Parts
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
    """Return the SEG, whose pixels and items of frames are made when it is written.

    highdicom makes all but the pixels, from frames of 32 that tell only the number of their plane and stand for all
    segments; as it was given them, it has one item for each plane, and here each becomes one for each segment.
    """
    from highdicom.seg import Segmentation

    shown = Shown(part, masked)
    if options.labelmap and shown.overlap:
        options.tell("findings overlap; in the LABELMAP the smaller one is on top")
    with quiet():
        made: Dataset = Segmentation(
            source_images=[_shrunk(source) for source in _thick(part, options)],
            pixel_array=_numbers(np.logical_or(shown.seen.any(axis=1), options.seg_full_frames)),
            segmentation_type="LABELMAP" if options.labelmap else "BINARY",
            segment_descriptions=[_describe(i, f, part, language, options) for i, f in enumerate(masked, 1)],
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
    stored = np.frombuffer(made.PixelData, np.uint8 if made.BitsAllocated < 16 else "<u2")
    bits = stored if made.BitsAllocated == 1 else np.packbits(stored.astype(bool), bitorder="little")
    planes = [int(number) - 1 for number in bits.view("<u4")]
    made.Rows, made.Columns = part.first.rows, part.first.columns
    if options.labelmap:
        size, pixels = part.first.rows * part.first.columns * made.BitsAllocated // 8, partial(shown.labels, planes)
        made.PixelData = _even(size * len(planes), pixels)
        return made
    if shown.overlap:
        made.SegmentsOverlap = "YES"
    frames = [
        Frame(segment, item, plane)
        for segment in range(len(masked))
        for item, plane in enumerate(planes)
        if options.seg_full_frames or shown.seen[plane, segment]
    ]
    made.NumberOfFrames = len(frames)
    made.PerFrameFunctionalGroupsSequence = Items(made.PerFrameFunctionalGroupsSequence, frames)
    size = -(-len(frames) * part.first.rows * part.first.columns // 8)
    made.PixelData = _even(size, partial(shown.bits, frames))
    return made


class Frame(NamedTuple):
    """A frame of a BINARY SEG. All from 0. item: of those that highdicom made, one for each plane that it has."""

    segment: int
    item: int
    plane: int


class Items(PydicomSequence):
    """The per-frame functional groups: one item for each frame, made when it is asked for.

    Each is a plane's item with the number of a segment put in; only one is meant to be held at a time. All at once
    they take 20 kB a frame.
    """

    def __init__(self, planes: Sequence[Dataset], frames: Sequence[Frame]) -> None:
        super().__init__()
        self._planes, self._frames = planes, frames

    def __len__(self) -> int:
        return len(self._frames)

    def __iter__(self) -> Iterator[Dataset]:
        return (self._item(frame) for frame in self._frames)

    def __getitem__(self, index: Any) -> Any:
        return self._item(self._frames[index])

    def _item(self, frame: Frame) -> Dataset:
        item = self._planes[frame.item]
        content = item.FrameContentSequence[0]
        content.DimensionIndexValues = [frame.segment + 1, *_listed(content.DimensionIndexValues)[1:]]
        if "SegmentIdentificationSequence" in item:  # not of a single segment: it is in the shared ones
            item.SegmentIdentificationSequence[0].ReferencedSegmentNumber = frame.segment + 1
        return item


def _listed(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _numbers(shown: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Return frames [planes, 1, 32] of 0 and 1: the bits of the plane's number from 1 on; nothing where not shown."""
    numbers = np.where(shown, np.arange(1, len(shown) + 1), 0).astype("<u4")
    return np.unpackbits(numbers.view(np.uint8), bitorder="little").reshape(-1, 1, 32)


def _shrunk(source: Dataset) -> Dataset:
    """Return the header, its elements shared, as that of an image of the size of `_numbers`."""
    from pydicom.dataelem import DataElement
    from pydicom.dataset import Dataset

    made = Dataset()
    made.update(source)
    made.add(DataElement("Rows", "US", 1))
    made.add(DataElement("Columns", "US", 32))
    return made


def _even(length: int, parts: Callable[[], Iterator[bytes]]) -> Parts:
    """Return the pixels, `length` bytes, as a file of an even length."""
    return Parts(length + length % 2, lambda: chain(parts(), [b"0"] * (length % 2)))  # highdicom pads with a "0"


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


class Shown:
    """Which segment is on which plane, and their pixels, a frame at a time.

    Planes are those of the source: each analysed file, or each frame of the one multi-frame file. seen: [planes,
    segments]. overlap: whether two segments share a pixel.
    """

    def __init__(self, group: Group, masked: Sequence[Finding]) -> None:
        first = group.first
        whole = group.is_multiframe and group.has_frame_of_reference and not group.resampled
        count = int(group.header.NumberOfFrames) if whole else len(group.images)
        self._masked, self._shape = masked, (first.rows, first.columns)
        self._images = {image.frame if whole else i: image for i, image in enumerate(group.images)}
        self._dtype = np.dtype("u1" if len(masked) < 256 else "<u2")
        self.seen = np.zeros((count, len(masked)), np.bool_)
        self.overlap = False
        pixels = np.zeros(len(masked), np.int64)
        for plane in self._images:
            taken = np.zeros(self._shape, np.bool_)
            for segment in range(len(masked)):
                mask = self._mask(plane, segment)
                if mask is not None:
                    self.seen[plane, segment] = True
                    pixels[segment] += np.count_nonzero(mask)
                    self.overlap = self.overlap or bool(taken[mask].any())
                    taken |= mask
        self._largest_first = np.argsort(-pixels, kind="stable")

    def _mask(self, plane: int, segment: int) -> Mask | None:
        image = self._images.get(plane)
        return None if image is None else self._masked[segment].mask(image)

    def labels(self, planes: Sequence[int]) -> Iterator[bytes]:
        """Yield the segment numbers of each plane; of segments that overlap, the smaller lies on top."""
        for plane in planes:
            labels = np.zeros(self._shape, self._dtype)
            for segment in self._largest_first:
                mask = self._mask(plane, segment)
                if mask is not None:
                    labels[mask] = segment + 1
            yield labels.tobytes()

    def bits(self, frames: Sequence[Frame]) -> Iterator[bytes]:
        """Yield the frames as bits, the first pixel lowest; one begins where the last ends (PS3.5 8.1.1)."""
        rest = np.zeros(0, np.bool_)
        for frame in frames:
            mask = self._mask(frame.plane, frame.segment)
            bits = np.zeros(self._shape, np.bool_) if mask is None else mask
            pixels = np.concatenate((rest, bits.ravel()))
            whole = len(pixels) // 8 * 8
            rest = pixels[whole:]
            yield np.packbits(pixels[:whole], bitorder="little").tobytes()
        yield np.packbits(rest, bitorder="little").tobytes()


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
