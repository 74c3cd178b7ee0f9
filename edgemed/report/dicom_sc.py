"""The overlay picture as a Secondary Capture: what every viewer can show, with the notice burnt into the pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgemed.core import Language
from edgemed.errors import InvalidInput
from edgemed.report.dicom_object import (
    WARNING,
    Made,
    ResultOptions,
    common,
    long_string,
    plain_sources,
    refer_to,
    warning_of,
)
from edgemed.report.dicom_source import Group, Image, quiet
from edgemed.report.overlay import render_overlay

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


def rendered(image: Image, language: Language, options: ResultOptions) -> npt.NDArray[np.uint8]:
    """Return the overlay of one image as uint8 RGB [height, width, 3].

    Raises InvalidInput if the options have no way to read pixels, and what reading raises.
    """
    if options.read is None:
        raise InvalidInput("pictures of results need the pixels; set ResultOptions.read")
    scan = options.read(image.file, image.frame)
    answer = replace(image.answers[0], regions=image.regions)
    prompt = replace(options.prompt, frame=image.frame, language=language)
    return render_overlay(answer, scan, prompt, notice=warning_of(options, language))


def shown_images(group: Group) -> Sequence[Image]:
    """Return the images that are worth a picture: those with regions; if there are none, the middle one."""
    marked = [image for image in group.images if image.regions]
    return marked or [group.images[len(group.images) // 2]]


def to_scs(group: Group, language: Language, options: ResultOptions) -> Iterator[Made]:
    """Yield one Secondary Capture for each image that has regions, or of the middle image if none has."""
    images = shown_images(group)
    for number, image in enumerate(images, 1):
        stem = "sc" if len(images) == 1 else f"sc-{number}"
        yield Made(stem, _to_sc(group, image, number, language, options))


def _to_sc(group: Group, image: Image, number: int, language: Language, options: ResultOptions) -> Dataset:
    from highdicom.sc import SCImage
    from pydicom.dataset import Dataset

    part = Group((image,))
    shared = common(group, "sc", language, options, image.dicom.SOPInstanceUID, str(image.frame))
    with quiet():
        made: Dataset = SCImage.from_ref_dataset(
            ref_dataset=plain_sources(part)[0],
            pixel_array=rendered(image, language, options),
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=("L", "P"),  # highdicom asks for one; emptied below, for it is not known
            **{**shared, "instance_number": number},
        )
    source = Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = image.dicom.SOPClassUID, image.dicom.SOPInstanceUID
    made.SourceImageSequence = [source]
    made.PatientOrientation = made.Laterality = None
    made.ImageType = ["DERIVED", "SECONDARY"]
    made.DerivationDescription = long_string(f"{WARNING[language]}: regions drawn over the image", 1024)
    made.ImageComments = WARNING[language]
    made.ContentQualification = "RESEARCH"
    for keyword in ("BurnedInAnnotation", "LossyImageCompression", "LossyImageCompressionRatio"):
        if image.dicom.get(keyword):
            setattr(made, keyword, image.dicom[keyword].value)
    refer_to(made, part, image.frame)
    return made
