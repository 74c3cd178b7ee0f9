"""What every DICOM result has in common: who made it, what it says about itself, UIDs, and how it is written.

All text is UTF-8 (ISO_IR 192), and what cannot be written so is an error. Every object says that it is an AI result and
not for diagnosis where a reader of the PACS looks: in the series description, and again in its own way per kind.
"""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from edgemed.core import Language, Prompt, Scan
from edgemed.errors import BackendUnavailable, InvalidInput
from edgemed.report.dicom_source import Group, Image, derived_uid, quiet
from edgemed.report.findings import Finding
from edgemed.report.words import printable
from edgemed.terminology import Code

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

UTF_8 = "ISO_IR 192"
MAKER = "edgemed"
SERIES_NUMBER = {"seg": 9001, "sr": 9002, "gsps": 9003, "sc": 9004, "pdf": 9005}
"""High, so that results come after what a scanner numbers."""
WARNING: dict[Language, str] = {"en": "AI result, not for diagnosis", "zh": "AI 结果，不可用于诊断"}
STAND_IN = "1.2.840.10008.5.1.4.1.1.7"
KIND_NAMES = {"seg": "SEG", "sr": "SR", "gsps": "GSPS", "sc": "overlay", "pdf": "PDF"}
CREATOR = "edgemed^AI"


@dataclass(frozen=True, eq=False)
class ResultOptions:
    """How results are written.

    prompt: the question that was asked, its regions included; its frame is not used. notice: what the bundle says about
    itself; shown in full on pictures and pages, and WARNING where it is empty. read: the pixels of a frame, for sc,
    png and json. labelmap: SEG as LABELMAP instead of BINARY. seg_full_frames: SEG with the empty frames, too (some
    viewers need them). nrrd: NRRD instead of NIfTI. fhir: the releases that are written. tell: called with each note.
    """

    prompt: Prompt
    notice: str = ""
    read: Callable[[Path, int], Scan] | None = None
    labelmap: bool = False
    seg_full_frames: bool = False
    nrrd: bool = False
    fhir: tuple[str, ...] = ("R4B", "R5")
    tell: Callable[[str], None] = field(default=lambda note: None)

    @property
    def task(self) -> str:
        """What was asked: text, language, settings and regions. Two questions that differ in any have other results."""
        asked = self.prompt
        shapes = []
        for region in asked.regions:
            mask = "" if region.mask is None else hashlib.sha256(np.packbits(region.mask).tobytes()).hexdigest()
            shapes.append(f"{region.kind} {region.box} {region.point} {mask}")
        return "\n".join(
            (asked.text, asked.language, *(f"{k}={v}" for k, v in sorted(asked.settings.items())), *shapes)
        )


@dataclass(frozen=True, eq=False)
class Made:
    """One DICOM result: its data set, the stem of its file name; of a SEG, its images and its segments from 1 on."""

    stem: str
    ds: Dataset
    images: tuple[Image, ...] = ()
    segments: tuple[Finding, ...] = ()


def warning_of(options: ResultOptions, language: Language) -> str:
    """Return WARNING, and after it what the bundle says about itself."""
    notice = " ".join(printable(options.notice).split())
    if not notice:
        return WARNING[language]
    return WARNING[language] + {"en": ". ", "zh": "。"}[language] + notice


def common(group: Group, kind: str, language: Language, options: ResultOptions, *which: str) -> dict[str, Any]:
    """Return the arguments that every highdicom constructor takes. which: tells several objects of a kind apart.

    The same images, bundle, question and kind always give the same UIDs: a repeated run replaces its results.
    """
    p = group.provenance
    task = (options.task, kind)
    return {
        "series_instance_uid": group.uid("series", *task),
        "series_number": SERIES_NUMBER[kind],
        "sop_instance_uid": group.uid("instance", *task, *which),
        "instance_number": 1,
        "manufacturer": MAKER,
        "manufacturer_model_name": MAKER,
        "software_versions": [p.edgemed, long_string(f"{p.bundle} {p.bundle_sha256[:16]}")],
        "device_serial_number": p.bundle_sha256[:16] or "0",
        "series_description": long_string(f"{WARNING[language]} ({KIND_NAMES[kind]})"),
        "specific_character_set": UTF_8,
    }


def tracking_uid(group: Group, key: str, options: ResultOptions) -> str:
    """Return the UID by which all results of a run mean the same finding."""
    return group.uid("finding", options.task, key)


def device_uid(group: Group) -> str:
    """Return the UID of the bundle as a device."""
    return derived_uid("device", group.provenance.bundle_sha256)


def plain_sources(group: Group) -> list[Dataset]:
    """Return the headers as highdicom takes them as sources; `refer_to` then sets right what they say of themselves.

    Where there is no frame of reference, and for a SOP class that is retired, they stand as Secondary Captures of one
    frame: highdicom asks more of the others than such files have.
    """
    if not _needs_stand_in(group):
        return group.headers
    stands = copy.deepcopy(group.headers)  # a shallow copy of a Dataset shares its elements
    for header in stands:
        header.SOPClassUID = STAND_IN
        if not group.has_frame_of_reference:
            if group.is_multiframe:
                frame = header.PerFrameFunctionalGroupsSequence[group.first.frame]
                header.update((frame.get("FrameVOILUTSequence") or [{}])[0])
            for keyword in ("NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
                header.pop(keyword, None)
    return stands


def class_of(image: Image, group: Group) -> str:
    """Return the SOP class by which highdicom is told of an image; `refer_to` sets it right."""
    return STAND_IN if _needs_stand_in(group) else str(image.dicom.SOPClassUID)


def _needs_stand_in(group: Group) -> bool:
    from highdicom._standard_utils import get_sop_class_iod_map

    return not group.has_frame_of_reference or group.header.SOPClassUID not in get_sop_class_iod_map()


def refer_to(ds: Dataset, group: Group, frame: int | None = None) -> None:
    """Make every reference in `ds` to an analysed file name its SOP class, and the frame (0-based) of a multi-frame."""
    corrector(group, frame)(ds)


def corrector(group: Group, frame: int | None = None) -> Callable[[Dataset], None]:
    """Return what does `refer_to` to one data set after the other."""
    classes = {header.SOPInstanceUID: header.SOPClassUID for header in group.headers}

    def correct(inner: Dataset) -> None:
        for element in inner:
            if element.VR == "SQ":
                for item in element.value:
                    correct(item)
        if inner.get("ReferencedSOPInstanceUID") in classes:
            inner.ReferencedSOPClassUID = classes[inner.ReferencedSOPInstanceUID]
            if frame is not None and group.is_multiframe:
                inner.ReferencedFrameNumber = frame + 1

    return correct


def library(name: str) -> Any:
    """Return a library that only some kinds of results need. Raises BackendUnavailable if it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"this kind of result needs the library {name} (extra: edgemed[results])") from error


def coded(code: Code) -> Any:
    """Return the code as highdicom takes it."""
    from highdicom.sr import CodedConcept

    return CodedConcept(code.value, code.scheme, code.meaning)


def long_string(text: str, limit: int = 64) -> str:
    """Return `text` as an LO of at most `limit` characters: no backslash, no control character.

    >>> long_string("a\\\\b")
    'a/b'
    """
    line = " ".join(printable(text).replace("\\", "/").split())
    return line if len(line) <= limit else line[: limit - 3].rstrip() + "..."


def write_dicom(ds: Dataset, stream: IO[bytes]) -> None:
    """Write the DICOM file of `ds` with all text as UTF-8.

    Raises InvalidInput if a text cannot be written without loss.
    """
    from pydicom import dcmwrite

    ds.SpecificCharacterSet = UTF_8
    check_text(ds)
    with quiet():
        dcmwrite(stream, ds, enforce_file_format=True)


def to_bytes(ds: Dataset) -> bytes:
    """Return what `write_dicom` writes. Raises InvalidInput as it does."""
    stream = io.BytesIO()
    write_dicom(ds, stream)
    return stream.getvalue()


def check_text(ds: Dataset) -> None:
    """Raise InvalidInput if `ds` has a text that UTF-8 cannot hold."""
    for element in ds.iterall():
        if element.VR in ("AE", "AS", "CS", "DA", "DS", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UT"):
            try:
                str(element.value).encode("utf-8")
            except UnicodeEncodeError as error:
                raise InvalidInput(
                    f"'{element.keyword}' has text that UTF-8 cannot hold ({error.reason}); a result is never written "
                    "with characters lost"
                ) from error
