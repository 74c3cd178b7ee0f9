"""The child process that reads headers: `python -P -m edgemed.dicom.series_worker`, started by `series`.

Requests come as JSON lines on stdin: a file whose slices are to be listed, or a DICOMDIR whose files are. Each reply is
one JSON line. Pixels are never read; the limits of `edgemed.dicom.worker` hold here too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from edgemed.dicom.header import (
    _PIXELS,
    DEFLATED,
    BoundedFile,
    _encoding,
    _finish_tags,
    _inflate,
    _integer,
    _text,
)
from edgemed.dicom.limits import Limits
from edgemed.dicom.series import MAX_FILES, PHASES
from edgemed.dicom.values import groups
from edgemed.dicom.worker import TOO_LARGE, Reply, json_reply, serve_requests
from edgemed.errors import CannotRead, InvalidInput, ResourceLimit, UnsupportedDicom

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_SERIES = (
    "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "SOPClassUID", "SOPInstanceUID",
)  # fmt: skip
FACTS = (
    "ImageType", "Modality", "BodyPartExamined", "SeriesDescription", "StudyDescription", "SliceThickness",
    "PatientPosition", "ConvolutionKernel", "SeriesNumber", "ImageOrientationPatient", "SOPClassUID",
)  # fmt: skip
"""What selection rules are usually about; a rule may name any other keyword."""
_PLACE = (
    "Rows", "Columns", "NumberOfFrames", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient",
    "InstanceNumber", "SamplesPerPixel", "BitsAllocated",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "SpecificCharacterSet",
)  # fmt: skip
_LONGEST = 1024
_MAX_RECORDS, _MAX_DICOMDIR = 30_000, 64 << 20
"""Records and bytes of a DICOMDIR. A record takes 50 us to parse; a full DVD of CT slices has some 9,000."""


def main() -> int:
    """Serve requests until stdin ends; return 0."""
    return serve_requests(_serve, TOO_LARGE)


def _serve(request: Mapping[str, Any], limits: Limits) -> Reply:
    with open(request["path"], "rb") as file:
        if request["directory"]:
            return json_reply({"files": _files(file, limits)})
        return json_reply(read_slices(file, limits, request["keywords"]))


def read_slices(file: BinaryIO, limits: Limits, keywords: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what a series needs to know of a file: its UIDs, facts for the rules, and one list for each frame.

    The parser stops where pixel data begins. Raises the errors of `edgemed.dicom`; UnsupportedDicom without pixels.
    """
    facts = (*FACTS, *keywords)
    ds, meta, has_pixels = _parse(file, limits, (*_SERIES, *_PLACE, *PHASES, *facts))
    if not has_pixels:
        raise UnsupportedDicom("the file holds no pixels")
    _finish_tags(ds)
    frames = _integer(ds, "NumberOfFrames", 1) or 1
    rows, columns = _integer(ds, "Rows"), _integer(ds, "Columns")
    if rows < 1 or columns < 1 or frames < 1:
        raise InvalidInput(f"the image has {rows} rows, {columns} columns and {frames} frames; at least one of each")
    if frames > MAX_FILES:
        raise ResourceLimit(f"the header declares {frames} frames; the limit of a series is {MAX_FILES}")
    instance = _text(ds, "SOPInstanceUID") or str(meta.get("MediaStorageSOPInstanceUID") or "") or None
    return {
        "series": _text(ds, "SeriesInstanceUID"),
        "study": _text(ds, "StudyInstanceUID"),
        "reference": _text(ds, "FrameOfReferenceUID"),
        "modality": (_text(ds, "Modality") or "OT").upper(),
        "class": _text(ds, "SOPClassUID") or str(meta.get("MediaStorageSOPClassUID") or ""),
        "instance": instance,
        "number": _number(_value(ds, "InstanceNumber")),
        "facts": {name: value for name in facts if (value := _value(ds, name)) not in (None, "", [])},
        "size": [rows, columns],
        "frames": list(_frames(ds, frames)),
    }


def _frames(ds: Dataset, frames: int) -> Iterator[list[Any]]:
    """Yield [pixel spacing, orientation, position, phases] of each frame."""
    for frame in range(frames):
        spacing = _first(groups(ds, frame, "PixelMeasuresSequence"), "PixelSpacing", 2)
        orientation = _first(groups(ds, frame, "PlaneOrientationSequence"), "ImageOrientationPatient", 6)
        position = _first(groups(ds, frame, "PlanePositionSequence"), "ImagePositionPatient", 3)
        if frames > 1 and "PerFrameFunctionalGroupsSequence" not in ds:
            position = None  # of the first frame only: a film has no place of its own for each
        yield [spacing, orientation, position, [_phase(ds, frame, name) for name in PHASES]]


_PHASE_MACROS = ("FrameContentSequence", "MREchoSequence", "MRDiffusionSequence", "CardiacSynchronizationSequence")


def _phase(ds: Dataset, frame: int, keyword: str) -> str | None:
    for macro in _PHASE_MACROS:
        for group in groups(ds, frame, macro):
            value = _value(group, keyword)
            if value not in (None, "", []):
                return json.dumps(value)
    return None


def _first(datasets: list[Dataset], keyword: str, count: int) -> list[float] | None:
    for ds in datasets:
        value = _value(ds, keyword)
        if isinstance(value, list) and len(value) == count and all(isinstance(v, float) for v in value):
            return value
    return None


def _value(ds: Dataset, keyword: str) -> Any:
    """Return a number, a text of limited length, a list of such, or None for anything else."""
    try:
        value = ds.get(keyword)
    except (ValueError, TypeError, NotImplementedError):  # what pydicom raises where the bytes do not fit the VR
        return None
    if isinstance(value, str | int | float) or value is None:
        return _plain(value)
    if hasattr(value, "__iter__") and not isinstance(value, bytes):
        items = [_plain(item) for item in list(value)[:64]]
        return None if any(item is None for item in items) else items
    return _plain(str(value))


def _plain(value: Any) -> float | str | None:
    if isinstance(value, int | float):
        number = float(value)
        return number if abs(number) < float("inf") else None  # false for NaN, too
    if value is None or isinstance(value, bytes) or (hasattr(value, "__iter__") and not isinstance(value, str)):
        return None
    return str(value).strip().strip("\0")[:_LONGEST]


def _number(value: Any) -> int | None:
    return int(value) if isinstance(value, float) else None


def _parse(file: BinaryIO, limits: Limits, keywords: tuple[str, ...]) -> tuple[Dataset, Dataset, bool]:
    """Return (the wanted elements, the file meta information, whether pixel data follows)."""
    from pydicom.datadict import tag_for_keyword
    from pydicom.filereader import _read_file_meta_info, read_dataset, read_preamble

    bounded = BoundedFile(file, limits.max_header_reads)
    if read_preamble(bounded, force=True) is None:  # type: ignore[arg-type]
        bounded.seek(4 if bounded.read(4) == b"DICM" else 0)
    meta = _read_file_meta_info(bounded)  # type: ignore[arg-type]
    bounded.short = False
    syntax = str(meta.get("TransferSyntaxUID") or "")
    start = bounded.tell()
    if syntax == DEFLATED:
        bounded, start = _inflate(bounded, limits), 0
    implicit, little = _encoding(bounded, start, syntax)
    elements = 0
    pixels = False

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        nonlocal elements, pixels
        elements += 1
        if elements > limits.max_elements:
            raise ResourceLimit(f"the header has more than {limits.max_elements} data elements")
        pixels = tag in _PIXELS
        return pixels

    bounded.seek(start)
    tags = [tag for tag in map(tag_for_keyword, dict.fromkeys(keywords)) if tag is not None]
    ds = read_dataset(bounded, implicit, little, stop_when=at_pixels, specific_tags=tags)  # type: ignore[arg-type]
    if bounded.short and not pixels:
        raise CannotRead("the file is truncated: it ends inside its header")
    if elements == 0:
        raise InvalidInput("the file has no DICOM data set")
    return ds, meta, pixels


def _files(file: BinaryIO, limits: Limits) -> list[list[str]]:
    """Return the file ids of the images of a DICOMDIR, each a list of names."""
    start = file.read(_MAX_DICOMDIR + 1)
    if len(start) > _MAX_DICOMDIR or start.count(b"\xfe\xff\x00\xe0") > _MAX_RECORDS:
        raise ResourceLimit(f"the DICOMDIR has more than {_MAX_RECORDS} records; pass the folder of one study")
    ds, _, _ = _parse(file, limits, ("DirectoryRecordSequence", "SpecificCharacterSet"))
    if "DirectoryRecordSequence" not in ds:
        raise InvalidInput("it is no DICOMDIR; a Directory Record Sequence was expected")
    found: list[list[str]] = []
    for record in ds.DirectoryRecordSequence:
        names = record.get("ReferencedFileID")
        if names and _text(record, "DirectoryRecordType") in ("IMAGE", "PRIVATE"):
            found.append([names] if isinstance(names, str) else [str(name) for name in names])
    return found


if __name__ == "__main__":
    sys.exit(main())
