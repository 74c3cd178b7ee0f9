"""What results take from the analysed files: identity, references, geometry. One `Group` for each series of one size.

Every header is rebuilt from the few elements that a result may carry on: the patient and study modules, what a
reference names, and the geometry. Values that do not fit their VR are left out; UIDs that are missing are derived from
what is there, so that a second run derives the same ones. Covers DICOM files and pictures; does not decode pixels.
"""

from __future__ import annotations

import logging
import re
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgemed.core import Answer, Region
from edgemed.errors import CannotRead, InvalidInput, NoInput
from edgemed.files import sha256_of

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Vector = npt.NDArray[np.float64]

IDENTITY = ("PatientName", "PatientID", "AccessionNumber", "StudyID", "ReferringPhysicianName")
"""A character that cannot be read in one of these is an error: a result must not change who it is about."""
COPIED = (
    *IDENTITY,
    "IssuerOfPatientID", "TypeOfPatientID", "PatientBirthDate", "PatientBirthTime", "PatientSex", "OtherPatientNames",
    "PatientSpeciesDescription", "PatientBreedDescription", "ResponsiblePerson", "ResponsibleOrganization",
    "PatientComments", "PatientIdentityRemoved", "DeidentificationMethod", "StudyDate", "StudyTime",
    "StudyDescription", "PhysiciansOfRecord", "PatientAge", "PatientSize", "PatientWeight", "PatientState",
    "PregnancyStatus", "AdmissionID",
)  # fmt: skip
"""Patient, General Study and Patient Study (PS3.3 C.7.1.1, C.7.2.1, C.7.2.2): all that is copied."""
SHOWN = (
    "Modality", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored",
    "PixelRepresentation", "SeriesNumber", "InstanceNumber", "AcquisitionNumber",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "WindowCenter", "WindowWidth", "VOILUTFunction",
    "BurnedInAnnotation", "LossyImageCompression", "LossyImageCompressionRatio",
)  # fmt: skip
PLANE = ("ImagePositionPatient", "ImageOrientationPatient")
MACROS = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
VALUES = {
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction"),
}
CATCH_ALL = "1.2.840.10008.5.1.4.1.1.7"
"""Secondary Capture, for a file that names no SOP class."""

_NAMESPACE = uuid.UUID("0b9f8f0e-3a47-5c1d-9d5f-5e1c8a4d2e61")
_UID = re.compile(r"(?=.{1,64}\Z)(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))+\Z")
_ESCAPE = re.compile(r"\x1b[\x20-\x2f]*[\x30-\x7e]")  # left in text by ISO 2022 decoding (ISO 2022 IR 58)


@dataclass(frozen=True, eq=False)
class Analysed:
    """One analysed image: the file, its frame (0-based), and the answer with regions in scan pixels of that frame."""

    file: Path
    frame: int
    answer: Answer


@dataclass(frozen=True, eq=False)
class Plane:
    """Where an image lies: centre of its first pixel, directions along a row and down a column, in patient mm (LPS)."""

    position: Vector
    along_row: Vector
    down_column: Vector

    @property
    def normal(self) -> Vector:
        return np.cross(self.along_row, self.down_column)

    @property
    def depth(self) -> float:
        """How far along the normal, in mm."""
        return float(self.position @ self.normal)


@dataclass(frozen=True, eq=False)
class Image:
    """One frame of one file with every answer about it. header: see `read_header`; None for a picture.

    spacing_mm: (row, column) spacing, None where the file has none. plane: None where the file does not tell.
    """

    file: Path = field(repr=False)  # a path and a header may name the patient, and a repr ends in messages
    frame: int
    answers: tuple[Answer, ...] = field(repr=False)
    header: Dataset | None = field(repr=False)
    rows: int
    columns: int
    spacing_mm: tuple[float, float] | None
    plane: Plane | None
    thickness_mm: float | None

    @property
    def regions(self) -> tuple[Region, ...]:
        return tuple(region for answer in self.answers for region in answer.regions)

    @property
    def dicom(self) -> Dataset:
        """The header; raises InvalidInput for a picture, which DICOM results cannot refer to."""
        if self.header is None:
            raise InvalidInput(
                f"{self.file} is a picture, and a DICOM or FHIR result must refer to DICOM images; ask for json, png "
                "or nifti"
            )
        return self.header


@dataclass(frozen=True, eq=False)
class Group:
    """The analysed images of a series that share size and orientation, one at each place; or the frames of one file.

    resampled: the images lie between those that were analysed, and each stands for the nearest.
    """

    images: tuple[Image, ...]
    resampled: bool = False

    @property
    def first(self) -> Image:
        return self.images[0]

    @property
    def header(self) -> Dataset:
        return self.first.dicom

    @property
    def headers(self) -> list[Dataset]:
        """One header for each file, in order."""
        return list({image.file: image.dicom for image in self.images}.values())

    @property
    def is_multiframe(self) -> bool:
        return self.first.header is not None and "NumberOfFrames" in self.first.header

    @property
    def has_frame_of_reference(self) -> bool:
        return "FrameOfReferenceUID" in self.header

    @property
    def provenance(self) -> Any:
        return self.first.answers[0].provenance

    def gap_mm(self) -> float | None:
        """Return the distance between neighbours, None if it is not even (1 %, at least 0.01 mm) or not known."""
        depths = [image.plane.depth for image in self.images if image.plane is not None]
        if len(depths) != len(self.images) or len(depths) < 2:
            return None
        steps = np.diff(depths)
        gap = float(steps.mean())
        uneven = float(np.abs(steps - gap).max()) > max(0.01 * gap, 0.01)
        return None if gap <= 0 or uneven else gap

    def uid(self, *what: str) -> str:
        """Return the UID of something made from these images by this bundle; the same in every run."""
        seen = (f"{image.dicom.SOPInstanceUID}#{image.frame}" for image in self.images)
        return derived_uid(*sorted(seen), self.provenance.bundle_sha256, *what)


def derived_uid(*what: str) -> str:
    """Return the UID 2.25.N that these texts always give. Source: PS3.5 B.2."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, chr(0).join(what)).int}"


def read_groups(analysed: Sequence[Analysed]) -> tuple[tuple[Group, ...], tuple[str, ...]]:
    """Return (the analysed images in groups, notes on what their headers lack).

    Raises NoInput if there are none, CannotRead, InvalidInput if a name in the header cannot be decoded or a frame is
    not in the file.
    """
    if not analysed:
        raise NoInput("no image was analysed, so there is no result to write")
    notes: dict[str, None] = {}
    headers: dict[Path, Dataset | None] = {}
    for one in analysed:
        if one.file not in headers:
            header = _read(one.file, notes)
            _share(header, next(iter(headers.values()), None))
            headers[one.file] = header
    answers: dict[tuple[Path, int], list[Answer]] = {}
    for one in analysed:
        answers.setdefault((one.file, one.frame), []).append(one.answer)
    images = (_image(file, frame, tuple(about), headers[file]) for (file, frame), about in answers.items())
    groups: dict[tuple[object, ...], list[Image]] = {}
    there: Counter[tuple[object, ...]] = Counter()
    for image in sorted(images, key=_order):
        key = _key(image)
        if image.plane is not None:
            place = (*key, *np.round(image.plane.position, 3) + 0.0)
            there[place] += 1
            key = (*key, there[place])  # a second image of a place is another phase, and another group
        groups.setdefault(key, []).append(image)
    return tuple(Group(tuple(some)) for some in groups.values()), tuple(notes)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom's and highdicom's remarks: they quote values of the file, which may name the patient."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    before = [logger.disabled for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger, was in zip(loggers, before, strict=True):
                logger.disabled = was


def _read(file: Path, notes: dict[str, None]) -> Dataset | None:
    """Return the header of a DICOM file, None for a picture."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    try:
        with open(file, "rb") as stream:
            start = stream.read(132)
        if start.startswith((b"\x89PNG", b"\xff\xd8", b"II*\0", b"MM\0*", b"BM")) and start[128:] != b"DICM":
            return None
        with quiet():  # values that do not fit are told in notes
            ds = dcmread(file, stop_before_pixels=True, force=True)
            ds.decode()
            return read_header(ds, file, notes)
    except OSError as error:
        raise CannotRead(f"cannot read {file}: {error.strerror or 'refused'}") from error
    except (InvalidDicomError, EOFError) as error:
        raise InvalidInput(f"{file} is not DICOM; a DICOM file or a picture was expected") from error


def _share(header: Dataset | None, first: Dataset | None) -> None:
    """Take from `first` the elements that are equal there: of a series nearly all are, and they take 19 kB a header."""
    if header is None or first is None:
        return
    for element in list(header):
        if element.tag in first and first[element.tag] == element:
            header.add(first[element.tag])


def read_header(ds: Dataset, file: Path, notes: dict[str, None]) -> Dataset:
    """Return a data set with what results may take from `ds`, all text in Unicode; a note for what is missing.

    Raises InvalidInput if a name or number of the patient or study has characters that cannot be read.
    """
    from pydicom.dataset import Dataset

    header = Dataset()
    for keyword in (*COPIED, *SHOWN):
        if keyword in ds and not _copy(ds, header, keyword) and keyword in COPIED:
            notes[f"'{keyword}' has a value that is not allowed there; the results leave it empty"] = None
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
                    "StudyDate", "StudyTime", "ReferringPhysicianName"):  # fmt: skip
        if keyword not in header:
            setattr(header, keyword, None)
    if header.PatientSex not in ("M", "F", "O"):
        header.PatientSex = None
    if not header.get("DeidentificationMethod"):
        header.pop("PatientIdentityRemoved", None)  # may only be said together with the method (PS3.3 C.7.1.1)
    header.Modality = header.get("Modality") or "OT"
    _identify(ds, header, file, notes)
    frames = int(ds.get("NumberOfFrames") or 1)
    if frames > 1 or "PerFrameFunctionalGroupsSequence" in ds:
        header.NumberOfFrames = frames
    _locate(ds, header, frames, notes)
    return header


def _copy(ds: Dataset, header: Dataset, keyword: str) -> bool:
    """Copy one element if its value fits its VR; return whether it did."""
    from pydicom import config
    from pydicom.valuerep import validate_value

    try:
        value, vr = ds[keyword].value, ds[keyword].VR
        if isinstance(value, str) or vr == "PN":
            value = _ESCAPE.sub("", str(value)).strip("\0 ") or None
        if value is None or value == "":
            setattr(header, keyword, None)
            return True
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if "\ufffd" in str(one) and keyword in IDENTITY:
                raise InvalidInput(
                    f"'{keyword}' has characters that its character set does not have; correct 'SpecificCharacterSet' "
                    "(0008,0005) of the images"
                )
            validate_value(vr, str(one) if vr in ("DS", "IS", "PN") else one, config.RAISE)
        if keyword in ("WindowCenter", "WindowWidth"):
            value = value if isinstance(value, float) else value[0]  # several windows: the first is the default
        setattr(header, keyword, value)
    # What pydicom's converters and validators raise, each VR its own, on values that do not fit.
    except (ValueError, TypeError, AttributeError, NotImplementedError, OverflowError, IndexError, KeyError):
        return False
    return True


def _identify(ds: Dataset, header: Dataset, file: Path, notes: dict[str, None]) -> None:
    """Give `header` its UIDs, deriving what is missing from the other UIDs or the SHA-256."""
    meta = getattr(ds, "file_meta", None) or {}
    header.SOPClassUID = _uid(ds, "SOPClassUID") or _uid(meta, "MediaStorageSOPClassUID") or CATCH_ALL
    known = {
        "SOPInstanceUID": _uid(ds, "SOPInstanceUID") or _uid(meta, "MediaStorageSOPInstanceUID"),
        "SeriesInstanceUID": _uid(ds, "SeriesInstanceUID"),
        "StudyInstanceUID": _uid(ds, "StudyInstanceUID"),
    }
    reference = _uid(ds, "FrameOfReferenceUID")
    if reference is not None:
        header.FrameOfReferenceUID = reference
    basis = {
        "SOPInstanceUID": None,
        "SeriesInstanceUID": reference and f"{reference} {header.get('SeriesNumber')} {header.Modality}",
        "StudyInstanceUID": known["SeriesInstanceUID"] or reference,
    }
    for keyword, uid in known.items():
        if uid is None:
            notes[f"the images have no valid {keyword}; one was derived from their other UIDs or their SHA-256"] = None
        raw = str(ds.get(keyword) or "").strip("\0 ")
        setattr(header, keyword, uid or derived_uid(keyword, raw or basis[keyword] or sha256_of(file)))


def _uid(ds: Any, keyword: str) -> str | None:
    text = str(ds.get(keyword) or "").strip("\0 ")
    return text if _UID.match(text) else None


def _locate(ds: Dataset, header: Dataset, frames: int, notes: dict[str, None]) -> None:
    """Copy the geometry. A frame of reference is there exactly where every frame has a place and a spacing."""
    from pydicom.dataset import Dataset

    planes, measures = [], []
    for frame in range(frames):
        groups = [*_groups(ds, frame)]
        planes.append(_plane(groups))
        measures.append(_measures(groups))
    placed = all(plane is not None for plane in planes) and all(m[0] is not None for m in measures)
    if placed and not _alike(planes, measures):
        placed = False
        notes["the frames are no volume (orientation, spacing, place); results refer to frames, not to places"] = None
    if not placed:
        header.pop("FrameOfReferenceUID", None)
        planes = [None] * frames
    elif "FrameOfReferenceUID" not in header:
        header.FrameOfReferenceUID = derived_uid("FrameOfReferenceUID", header.SeriesInstanceUID)
        notes["the images have positions without a FrameOfReferenceUID; one was derived from their series"] = None
    if "NumberOfFrames" not in header:
        _set_plane(header, planes[0])
        _set_measures(header, measures[0])
        return
    shared = Dataset()
    if measures[0][0] is not None and len(set(measures)) == 1:
        shared.PixelMeasuresSequence = [_filled(_set_measures, measures[0])]
    header.SharedFunctionalGroupsSequence = [shared]
    items: list[Dataset] = []
    for plane, measure in zip(planes, measures, strict=True):
        item = Dataset()
        if plane is not None:
            for name, place in zip(MACROS[:2], PLANE, strict=True):
                whole = _filled(_set_plane, plane)
                setattr(item, name, [Dataset({whole[place].tag: whole[place]})])
        if measure[0] is not None and not shared:
            item.PixelMeasuresSequence = [_filled(_set_measures, measure)]
        _copy_values(ds, len(items), item)
        items.append(item)
    if planes[0] is not None:
        shared.PlaneOrientationSequence = items[0].PlaneOrientationSequence
        for item in items:
            del item.PlaneOrientationSequence
    header.PerFrameFunctionalGroupsSequence = items


def _alike(planes: Sequence[Plane | None], measures: Sequence[Measures]) -> bool:
    """Tell whether all planes have one orientation and one spacing, and each a place of its own."""
    places = {tuple(np.round(p.position, 3) + 0.0) for p in planes if p is not None}
    directions = {tuple(np.round([*p.along_row, *p.down_column], 4) + 0.0) for p in planes if p is not None}
    return len(directions) == 1 and len(set(measures)) == 1 and len(places) == len(planes)


def _copy_values(ds: Dataset, frame: int, item: Dataset) -> None:
    """Copy a frame's rescale and window into its own group."""
    from pydicom.dataset import Dataset

    for macro, keywords in VALUES.items():
        for group in _groups(ds, frame, (macro,)):
            found = Dataset()
            present = [keyword for keyword in keywords if keyword in group and _copy(group, found, keyword)]
            if len(present) > 1:
                setattr(item, macro, [found])
                break


def _filled(fill: Callable[[Dataset, Any], None], value: object) -> Dataset:
    from pydicom.dataset import Dataset

    made = Dataset()
    fill(made, value)
    return made


def _groups(ds: Dataset, frame: int, macros: Sequence[str] = MACROS) -> Iterator[Dataset]:
    """Yield the data sets that may describe a frame: its own macros, the shared ones, the top level."""
    for keyword, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        items = ds.get(keyword) or ()
        if index < len(items):
            yield from (items[index][macro][0] for macro in macros if items[index].get(macro))
    yield ds


def _numbers(groups: Sequence[Dataset], keyword: str, count: int) -> list[float] | None:
    for ds in groups:
        try:
            value = ds.get(keyword)
            found = [float(v) for v in (value if count > 1 else [value])]
        except (TypeError, ValueError):
            continue
        if len(found) == count and bool(np.isfinite(found).all()):
            return found
    return None


def _plane(groups: Sequence[Dataset]) -> Plane | None:
    """Return the plane, None where it is missing or its directions are not two unit vectors at a right angle."""
    position, cosines = _numbers(groups, PLANE[0], 3), _numbers(groups, PLANE[1], 6)
    if position is None or cosines is None:
        return None
    row, column = np.array(cosines[:3]), np.array(cosines[3:])
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    # 1e-3: headers round the cosines to four digits or more.
    if np.abs(lengths - 1).max() > 1e-3 or abs(float(row @ column)) > 1e-3:
        return None
    return Plane(np.array(position), row / lengths[0], column / lengths[1])


Measures = tuple[tuple[float, float] | None, float | None, float | None]


def _measures(groups: Sequence[Dataset]) -> Measures:
    """Return (spacing, slice thickness, spacing between slices) in mm; None where not known. Nothing is made up."""
    spacing = _numbers(groups, "PixelSpacing", 2)
    thickness, between = _numbers(groups, "SliceThickness", 1), _numbers(groups, "SpacingBetweenSlices", 1)
    valid = spacing is not None and all(0 < s < 1e4 for s in spacing)
    return (
        (spacing[0], spacing[1]) if valid and spacing is not None else None,
        thickness[0] if thickness and thickness[0] > 0 else None,
        between[0] if between and between[0] > 0 else None,
    )


def _set_plane(ds: Dataset, plane: Plane | None) -> None:
    if plane is not None:
        ds.ImagePositionPatient = [_decimal(v) for v in plane.position]
        ds.ImageOrientationPatient = [_decimal(v) for v in (*plane.along_row, *plane.down_column)]


def _set_measures(ds: Dataset, measures: Measures) -> None:
    spacing, thickness, between = measures
    if spacing is not None:
        ds.PixelSpacing = [_decimal(s) for s in spacing]
        ds.SliceThickness = None if thickness is None else _decimal(thickness)
    if between is not None:
        ds.SpacingBetweenSlices = _decimal(between)


def _decimal(value: float) -> str:
    """Return a DS of at most 16 characters."""
    from pydicom.valuerep import format_number_as_ds

    return format_number_as_ds(float(value))


def _image(file: Path, frame: int, answers: tuple[Answer, ...], header: Dataset | None) -> Image:
    if header is None:
        masks = [r.mask for a in answers for r in a.regions if r.mask is not None]
        rows, columns = masks[0].shape if masks else (0, 0)
        return Image(file, frame, answers, None, rows, columns, None, None, None)
    frames = int(header.get("NumberOfFrames") or 1)
    if not 0 <= frame < frames:
        raise InvalidInput(f"{file} has {frames} frames, so frame {frame} cannot have been analysed")
    groups = [*_groups(header, frame)]
    spacing, thickness, between = _measures(groups)
    size = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
    for region in (r for a in answers for r in a.regions if r.mask is not None):
        if region.mask is not None and region.mask.shape != size:
            raise InvalidInput(f"a mask is {list(region.mask.shape)}, {list(size)} as its image was expected")
    return Image(file, frame, answers, header, *size, spacing, _plane(groups), thickness or between)


def _key(image: Image) -> tuple[object, ...]:
    h = image.header
    if h is None or "NumberOfFrames" in h:
        return (image.file,)
    plane = image.plane
    directions = () if plane is None else tuple(np.round([*plane.along_row, *plane.down_column], 3) + 0.0)
    reference = h.get("FrameOfReferenceUID")
    return (h.StudyInstanceUID, h.SeriesInstanceUID, reference, image.rows, image.columns, image.spacing_mm, directions)


def _order(image: Image) -> tuple[float, int, str]:
    depth = 0.0 if image.plane is None else image.plane.depth
    number = 0 if image.header is None else int(image.header.get("InstanceNumber") or 0)
    return (depth, image.frame or number, image.file.name)
