"""Findings drawn over the source images as a presentation state: boxes, mask outlines, names and the notice.

Grayscale Softcopy Presentation State, Color for colour images. Coordinates are pixels counted from the outer corner of
the first pixel, as boxes are (PS3.3 C.10.5). The images are shown as they are: with their own rescale and window,
MONOCHROME1 inverted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgemed.core import Language, Mask
from edgemed.report.dicom_object import (
    CREATOR,
    WARNING,
    Made,
    ResultOptions,
    common,
    corrector,
    long_string,
    plain_sources,
    refer_to,
    tracking_uid,
)
from edgemed.report.dicom_source import Group, Image, quiet
from edgemed.report.dicom_sr import outline
from edgemed.report.encoded import Encoded
from edgemed.report.findings import Finding
from edgemed.report.style import PALETTE

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

LAYER = "AI RESULT"
MAX_POINTS = 8000
"""Graphic Data has a 16-bit length: 8,191 points of two FL."""


def to_gsps(group: Group, findings: Sequence[Finding], language: Language, options: ResultOptions) -> list[Made]:
    """Return the presentation states: one, or one for each rescale, of which a state can hold only one."""
    parts: dict[tuple[float, float, str] | None, list[Image]] = {}
    for image in group.images:
        parts.setdefault(_rescale(image), []).append(image)
    made = [_to_gsps(Group(tuple(images)), findings, language, options) for images in parts.values()]
    return [Made("gsps" if len(made) == 1 else f"gsps-{i}", ds) for i, ds in enumerate(made, 1)]


def _rescale(image: Image) -> tuple[float, float, str] | None:
    """Return (slope, intercept, type) of an image, None where it has none."""
    header = image.dicom
    if "NumberOfFrames" in header:
        own = header.PerFrameFunctionalGroupsSequence[image.frame].get("PixelValueTransformationSequence")
        header = own[0] if own else header
    slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
    if slope is None or intercept is None:
        return None
    return (float(slope), float(intercept), str(header.get("RescaleType") or "US"))


def _to_gsps(group: Group, findings: Sequence[Finding], language: Language, options: ResultOptions) -> Dataset:
    from highdicom import pr
    from highdicom.color import CIELabColor
    from highdicom.content import ModalityLUTTransformation, PresentationLUTTransformation
    from pydicom.dataelem import DataElement

    layer = pr.GraphicLayer(LAYER, 1, long_string(WARNING[language]), CIELabColor.from_rgb(*PALETTE[0]))
    colour = group.header.get("SamplesPerPixel") == 3 or group.header.PhotometricInterpretation == "PALETTE COLOR"
    sources = {h.SOPInstanceUID: _own(h) for h in plain_sources(group)}
    for source in sources.values():
        for keyword in ("RescaleSlope", "RescaleIntercept", "RescaleType"):
            source.pop(keyword, None)
        for item in source.get("PerFrameFunctionalGroupsSequence") or ():
            item.pop("PixelValueTransformationSequence", None)
        if colour:
            # highdicom takes a palette for grey; the standard does not (PS3.3 A.33.2)
            source.add(DataElement("SamplesPerPixel", "US", 3))

    def annotated(image: Image) -> Any:
        return _annotate(image, sources[image.dicom.SOPInstanceUID], layer, findings, group, language, options)

    shared = {
        "referenced_images": list(sources.values()),
        "content_label": "AI_RESULT",
        "content_description": long_string(WARNING[language]),
        "content_creator_name": CREATOR,
        "graphic_layers": [layer],
        "graphic_annotations": [annotated(group.first)],
        **common(group, "gsps", language, options),
    }
    rescale = _rescale(group.first)
    with quiet():
        if colour:
            made: Dataset = pr.ColorSoftcopyPresentationState(icc_profile=_srgb(), **shared)
        else:
            shape = "INVERSE" if group.header.PhotometricInterpretation == "MONOCHROME1" else "IDENTITY"
            made = pr.GrayscaleSoftcopyPresentationState(
                modality_lut_transformation=None
                if rescale is None
                else ModalityLUTTransformation(rescale[1], rescale[0], rescale[2]),
                presentation_lut_transformation=PresentationLUTTransformation(presentation_lut_shape=shape),
                **shared,
            )
    made.Laterality = None
    made.ContentQualification = "RESEARCH"
    refer_to(made, group)
    with quiet():
        made.GraphicAnnotationSequence = Encoded(map(annotated, group.images), corrector(group))
    return made


def _own(header: Dataset) -> Dataset:
    """Return a header whose elements can be taken out without those of another; of a single frame they are shared."""
    from pydicom.dataset import Dataset

    if "PerFrameFunctionalGroupsSequence" in header:
        return copy.deepcopy(header)
    made = Dataset()
    made.update(header)
    return made


def _srgb() -> bytes:
    """Return the ICC profile that a colour state must have; images without one are taken to be sRGB.

    The profile is an input one: those of displays are not allowed (PS3.3 C.11.15.1.1).
    """
    from PIL import ImageCms

    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[12:16] = b"spac"  # ICC.1 7.2.5: device class
    return bytes(profile)


def _annotate(
    image: Image,
    source: Dataset,
    layer: Any,
    findings: Sequence[Finding],
    group: Group,
    language: Language,
    options: ResultOptions,
) -> Any:
    from highdicom import pr

    made = pr.GraphicAnnotation(
        [source],
        layer,
        graphic_objects=[*_graphics(image, findings, group, options)] or None,
        text_objects=[*_words(image, findings, language)],
    )
    if group.is_multiframe:
        made.ReferencedImageSequence[0].ReferencedFrameNumber = image.frame + 1
    return made


def _graphics(image: Image, findings: Sequence[Finding], group: Group, options: ResultOptions) -> Iterator[Any]:
    """Yield the outlines of what has a mask, the boxes of what has none."""
    from highdicom import pr

    for finding in findings:
        key = finding.concept.key
        for region in finding.on(image):
            lines = [] if region.mask is None else outlines_of(region.mask)
            for line in lines or [outline(region.box)]:
                yield pr.GraphicObject(
                    "POLYLINE",
                    line,
                    "PIXEL",
                    tracking_id=long_string(key),
                    tracking_uid=tracking_uid(group, key, options),
                )


def _words(image: Image, findings: Sequence[Finding], language: Language) -> Iterator[Any]:
    from highdicom import pr

    yield pr.TextObject(WARNING[language], "DISPLAY", bounding_box=(0.0, 0.95, 1.0, 1.0))
    for finding in findings:
        for region in finding.on(image):
            text = f"{finding.number} {long_string(finding.concept.name(language))}"
            yield pr.TextObject(text, "PIXEL", anchor_point=region.box[:2], anchor_point_visible=False)


def outlines_of(mask: Mask) -> list[npt.NDArray[np.float64]]:
    """Return the borders of a mask along the edges of its pixels, each a closed polyline [n, 2] of (x, y).

    Holes have borders of their own. A border that is too long for DICOM is left out, and with it all of them.
    """
    inside = np.pad(mask, 1)
    after: dict[tuple[int, int], list[tuple[int, int]]] = {}
    # Each edge is walked with the mask on its right, seen with y down.
    for dy, dx, start, step in (
        (-1, 0, (0, 0), (1, 0)),
        (0, 1, (1, 0), (0, 1)),
        (1, 0, (1, 1), (-1, 0)),
        (0, -1, (0, 1), (0, -1)),
    ):
        ys, xs = np.nonzero(inside & ~np.roll(inside, (-dy, -dx), (0, 1)))
        for y, x in zip(ys.tolist(), xs.tolist(), strict=True):
            at = (x - 1 + start[0], y - 1 + start[1])
            after.setdefault(at, []).append(step)
    lines = []
    while after:
        line = _walk(after)
        if len(line) > MAX_POINTS:
            return []
        lines.append(np.array(line, np.float64))
    return lines


def _walk(after: dict[tuple[int, int], list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """Return the corners of one border, taking its edges out of `after` (corner -> steps to the next corners)."""
    start = at = next(iter(after))
    corners: list[tuple[int, int]] = []
    last = (0, 0)
    while at in after:
        steps = after[at]
        # Where two borders touch, turn right, so that each pixel keeps its own border.
        step = min(steps, key=lambda s: (s != (-last[1], last[0]), s != last))
        steps.remove(step)
        if not steps:
            del after[at]
        if step != last:
            corners.append(at)
        at, last = (at[0] + step[0], at[1] + step[1]), step
    return [*corners, start] if corners[0] == start else [start, *corners, start]
