"""Findings as a structured report, TID 1500: what, where, which side, how large, by which algorithm, on which images.

Comprehensive 3D SR; Comprehensive SR where the images have no frame of reference. Every analysed image is named,
"nothing found" included. A box is a closed polyline of five points; SCOORD counts from the outer corner of the first
pixel, as boxes do (PS3.3 C.18.6.1.2). Sizes have UCUM units, and are there only where the images have a spacing.
The report is UNVERIFIED and PRELIMINARY.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgemed.core import Box, Language, Region
from edgemed.report.dicom_object import (
    MAKER,
    Made,
    ResultOptions,
    class_of,
    coded,
    common,
    corrector,
    device_uid,
    long_string,
    plain_sources,
    refer_to,
    tracking_uid,
    warning_of,
)
from edgemed.report.dicom_source import Group, Image, quiet
from edgemed.report.encoded import Encoded
from edgemed.report.findings import Finding, certainty_of, sizes_of
from edgemed.report.words import printable
from edgemed.terminology import CATEGORIES, Code, Concept

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

PROCEDURES = {
    "CT": Code("25045-6", "CT unspecified body region", "LN"),
    "MR": Code("25056-3", "MRI unspecified body region", "LN"),
    "CR": Code("43468-8", "XR unspecified body region", "LN"),
    "DX": Code("43468-8", "XR unspecified body region", "LN"),
    "NM": Code("49118-3", "NM unspecified body region", "LN"),
    "PT": Code("44136-0", "PET unspecified body region", "LN"),
    "US": Code("16310003", "Diagnostic ultrasonography"),
}
"""Modality -> the procedure reported: the imaging, not the algorithm (PS3.16 CID 100)."""
PROCEDURE = Code("363679005", "Imaging procedure")
LANGUAGES: dict[Language, Code] = {
    "en": Code("en", "English", "RFC5646"),
    "zh": Code("zh-CN", "Chinese (China)", "RFC5646"),
}
NOTHING: dict[Language, str] = {"en": "Nothing was marked on these images.", "zh": "这些图像上未标出任何区域。"}
COMMENT = Code("121106", "Comment", "DCM")
BOUNDED_BY = Code("75958009", "Bounded by")
MEASURES = {
    "area_mm2": (Code("42798000", "Area"), Code("mm2", "square millimeter", "UCUM")),
    "volume_mm3": (Code("118565006", "Volume"), Code("mm3", "cubic millimeter", "UCUM")),
    "long_axis_mm": (Code("103339001", "Long axis"), Code("mm", "mm", "UCUM")),
    "short_axis_mm": (Code("103340004", "Short axis"), Code("mm", "mm", "UCUM")),
}

CERTAINTY = (Code("111012", "Certainty of Finding", "DCM"), Code("%", "percent", "UCUM"))
"""The score of a region; PS3.16 CID 6011 has it beside a finding of computer-aided detection."""


def to_sr(
    group: Group, findings: Sequence[Finding], segs: Sequence[Made], language: Language, options: ResultOptions
) -> Dataset:
    """Return the report. segs: the segmentations of these findings, which it refers to; may be empty."""
    from highdicom import sr

    many: list[Many] = []
    with quiet():
        content = sr.MeasurementReport(
            observation_context=sr.ObservationContext(observer_device_context=_observer(group)),
            procedure_reported=coded(PROCEDURES.get(group.header.Modality, PROCEDURE)),
            imaging_measurements=[
                *_texts(group, language, options, many),
                *(item for f in findings for item in _items(f, group, segs, language, options, many)),
            ],
            language_of_content_item_and_descendants=sr.LanguageOfContentItemAndDescendants(coded(LANGUAGES[language])),
        )
        kind = sr.Comprehensive3DSR if group.has_frame_of_reference else sr.ComprehensiveSR
        made: Dataset = kind(
            evidence=[*plain_sources(group), *(seg.ds for seg in segs)],
            content=content,
            is_complete=True,
            is_verified=False,
            is_final=False,
            **common(group, "sr", language, options),
        )
    made.ContentQualification = "RESEARCH"
    refer_to(made, group)
    correct = corrector(group)
    for one in many:
        one.put(correct)
    return made


@dataclass(frozen=True)
class Many:
    """Items of a measurement group, too many to be held: encoded, they replace those that highdicom had.

    group: as highdicom made it. first, count: which of its items are replaced. items: all, made when they are put.
    """

    group: Dataset
    first: Dataset
    count: int
    items: Iterable[Dataset]

    def put(self, correct: Callable[[Dataset], None]) -> None:
        """Put the items in their place. correct: changes each before it is encoded."""
        from pydicom.dataelem import DataElement

        there = list(self.group.ContentSequence)
        at = next(i for i, item in enumerate(there) if item is self.first)
        whole = chain(there[:at], self.items, there[at + self.count :])
        self.group.add(DataElement("ContentSequence", "SQ", Encoded(whole, correct)))  # `=` would decode all


def _observer(group: Group) -> Any:
    from highdicom import sr
    from pydicom.sr.codedict import codes

    p = group.provenance
    return sr.ObserverContext(
        codes.DCM.Device,
        sr.DeviceObserverIdentifyingAttributes(
            uid=device_uid(group),
            name=long_string(f"{MAKER} {p.bundle}"),
            manufacturer_name=MAKER,
            model_name=long_string(p.bundle),
            serial_number=p.bundle_sha256[:16] or None,
        ),
    )


def _algorithm(group: Group) -> Any:
    from highdicom import sr

    p = group.provenance
    return sr.AlgorithmIdentification(
        name=long_string(f"{MAKER} {p.bundle}"), version=long_string(f"{p.edgemed} {p.bundle_sha256[:16]}")
    )


def texts_of(group: Group, language: Language) -> dict[str, list[Image]]:
    """Return each text that was answered, and the images it was answered about; NOTHING where nothing was said."""
    found: dict[str, list[Image]] = {}
    for image in group.images:
        said = [printable(answer.text).strip() for answer in image.answers]
        text = "\n".join(text for text in said if text)
        if not image.regions:
            text = "\n".join(part for part in (text, NOTHING[language]) if part)
        found.setdefault(text, []).append(image)
    return found


def _texts(group: Group, language: Language, options: ResultOptions, many: list[Many]) -> Iterator[Any]:
    """Yield a measurement group (TID 1501) for each answered text, with the images it is about."""
    from highdicom import sr

    for number, (text, images) in enumerate(texts_of(group, language).items(), 1):
        first = _source(images[0], group)
        item = sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(
                tracking_uid(group, f"answer {number}", options), f"answer {number}"
            ),
            algorithm_id=_algorithm(group),
            source_images=[first],
        )
        for comment in (warning_of(options, language), text):
            if comment:
                item[0].ContentSequence.append(sr.TextContentItem(coded(COMMENT), comment, "CONTAINS"))
        many.append(Many(item[0], first, 1, (_related(_source(i, group), first) for i in images)))
        yield item


def _source(image: Image, group: Group) -> Any:
    from highdicom import sr

    return sr.SourceImageForMeasurementGroup(class_of(image, group), image.dicom.SOPInstanceUID, _frames(image))


def _related(item: Any, like: Any) -> Any:
    """Return the item with the relationship that a measurement group gave to another one."""
    item.RelationshipType = like.RelationshipType
    return item


def _items(
    finding: Finding, group: Group, segs: Sequence[Made], language: Language, options: ResultOptions, many: list[Many]
) -> Iterator[Any]:
    """Yield the groups of one finding under one tracking UID: masks as a segment (TID 1411), boxes (TID 1410 or 1411).

    Sizes and certainty are with the masks; with the boxes where there is no segmentation.
    """
    from highdicom import sr

    known, concept = sizes_of(finding, group), finding.concept
    sizes = [
        sr.Measurement(coded(name), round(value, 2), coded(unit))
        for keyword, (name, unit) in MEASURES.items()
        if (value := getattr(known, keyword)) is not None
    ]
    if (certainty := certainty_of(finding)) is not None:
        sizes.append(sr.Measurement(coded(CERTAINTY[0]), round(certainty, 1), coded(CERTAINTY[1])))
    shared = {
        "tracking_identifier": sr.TrackingIdentifier(
            tracking_uid(group, concept.key, options), long_string(concept.name(language))
        ),
        "finding_type": coded(concept.type),
        "finding_category": coded(concept.category),
        "finding_sites": [_site(concept)] if _site(concept) is not None else None,
        "algorithm_id": _algorithm(group),
    }
    volumetric = sr.VolumetricROIMeasurementsAndQualitativeEvaluations
    for seg in segs:
        for reference in _segments(finding, group, seg):
            yield volumetric(referenced_segment=reference, measurements=sizes or None, **shared)
            sizes = []
    boxes = [_region(image, region, group) for image, region in finding.places[:2]]
    if len(boxes) == 1:
        yield sr.PlanarROIMeasurementsAndQualitativeEvaluations(
            referenced_region=boxes[0], geometric_purpose=coded(BOUNDED_BY), measurements=sizes or None, **shared
        )
        return
    made = volumetric(
        referenced_regions=boxes, geometric_purpose=coded(BOUNDED_BY), measurements=sizes or None, **shared
    )
    regions = (_related(_region(image, region, group), boxes[0]) for image, region in finding.places)
    many.append(Many(made[0], boxes[0], 2, regions))
    yield made


def _segments(finding: Finding, group: Group, seg: Made) -> Iterator[Any]:
    """Yield what refers to the finding's segment in `seg`, if it has one."""
    from highdicom import sr

    if finding not in seg.segments:
        return
    # Not by frame, for one image either: a reference names a segment or frames, never both (PS3.3 C.18.4).
    yield sr.ReferencedSegment(
        seg.ds.SOPClassUID,
        seg.ds.SOPInstanceUID,
        1 + seg.segments.index(finding),
        source_series=sr.SourceSeriesForSegmentation(group.header.SeriesInstanceUID),
    )


def _site(concept: Concept) -> Any:
    """Return where the finding is, with the side; None if nothing is known."""
    from highdicom import sr

    place = concept.site or (concept.type if concept.is_anatomy and concept.is_coded else None)
    if place is None and concept.side is not None:
        place = CATEGORIES["anatomy"]
    if place is None:
        return None
    return sr.FindingSite(coded(place), laterality=None if concept.side is None else coded(concept.side))


def outline(box: Box) -> npt.NDArray[np.float64]:
    """Return the corners of a box as a closed polyline [5, 2] of (column, row), from the top left one clockwise."""
    x0, y0, x1, y1 = box
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)], np.float64)


def _region(image: Image, region: Region, group: Group) -> Any:
    from highdicom import sr

    source = sr.SourceImageForRegion(class_of(image, group), image.dicom.SOPInstanceUID, _frames(image))
    return sr.ImageRegion("POLYLINE", outline(region.box), source)


def _frames(image: Image) -> list[int] | None:
    return [image.frame + 1] if "NumberOfFrames" in image.dicom else None
