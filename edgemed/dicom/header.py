"""The header of a DICOM file: only the elements that pixels need, read within limits, without touching pixel data.

Covers file meta, missing preamble and missing transfer syntax, deflated datasets, where the pixel data lies, and the
pixel budget. All but `_WANTED` (names, ids, dates among them) are skipped by the parser and never become values.

Policy for a missing or empty Transfer Syntax UID: explicit or implicit VR and byte order are read off the first
element; if the pixel data then has undefined length, the first frame's codestream names the compression, else the file
is refused.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from edgemed.dicom.codestream import J2K_START, jpeg_size
from edgemed.dicom.limits import Limits
from edgemed.errors import CannotRead, InvalidInput, ResourceLimit, UnsupportedDicom

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

UNDEFINED = 0xFFFFFFFF
IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED = "1.2.840.10008.1.2.1.99"
RLE = "1.2.840.10008.1.2.5"
_JPEG = "1.2.840.10008.1.2.4."
JPEG = tuple(_JPEG + n for n in ("50", "51", "57", "70"))
JPEG_LS = tuple(_JPEG + n for n in ("80", "81"))
J2K = tuple(_JPEG + n for n in ("90", "91"))
HTJ2K = tuple(_JPEG + n for n in ("201", "202", "203"))
LOSSLESS = (RLE, *JPEG[2:], JPEG_LS[0], J2K[0], *HTJ2K[:2])
NATIVE = (IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED)
SUPPORTED = (*NATIVE, RLE, *JPEG, *JPEG_LS, *J2K, *HTJ2K)
PHOTOMETRIC = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422",
               "YBR_ICT", "YBR_RCT")  # fmt: skip

_UID_LETTERS = frozenset("0123456789.")
_PIXELS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
_WANTED = (
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "Modality", "StudyInstanceUID", "SeriesInstanceUID",
    "FrameOfReferenceUID", "PixelPresentation", "PresentationLUTShape", "DoseGridScaling",
    "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelSpacing",
    "PixelPaddingValue", "PixelPaddingRangeLimit", "FloatPixelPaddingValue",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence",
    *(f"{c}PaletteColorLookupTable{x}" for c in ("Red", "Green", "Blue") for x in ("Descriptor", "Data")),
    *(f"Segmented{c}PaletteColorLookupTableData" for c in ("Red", "Green", "Blue")),
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "ICCProfile", "OpticalPathSequence",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "BurnedInAnnotation", "ShutterShape",
)  # fmt: skip
OVERLAYS = tuple(group << 16 | 0x0010 for group in range(0x6000, 0x6020, 2))
"""Overlay Rows of each of the 16 overlays."""


class BoundedFile(io.RawIOBase):
    """A binary file that never reads past its end in one allocation and counts its reads.

    A declared length of 4 GiB in a 1 KiB file would make the plain file object allocate 4 GiB first. `short` becomes
    True when more was asked for than the file holds: the sign of truncation. Raises ResourceLimit after `reads` read
    calls.
    """

    def __init__(self, file: BinaryIO, reads: int) -> None:
        self._file = file
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)
        self._left = reads
        self.short = False

    def read(self, size: int | None = -1) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise ResourceLimit("the header's sequences have more data elements than the limit allows")
        remaining = max(self.size - self._file.tell(), 0)
        if size is None or size < 0:
            return self._file.read(remaining)
        # A read of 8 at the end of the file is how the parser finds the end.
        self.short |= size > remaining and (size > 8 or remaining > 0)
        return self._file.read(min(size, remaining))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = self._file.seek(offset, whence)
        self.short |= at > self.size
        return at

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True, eq=False)
class Header:
    """What decoding one frame needs. `file` is positioned nowhere in particular; close it when done.

    keyword, vr, offset, length: the pixel data element; length is UNDEFINED for encapsulated data.
    bits: allocated bits per sample.
    """

    file: BoundedFile
    ds: Dataset
    sop_instance_uid: str | None
    transfer_syntax: str
    keyword: str
    vr: str
    offset: int
    length: int
    rows: int
    columns: int
    samples: int
    bits: int
    frames: int
    photometric: str

    @property
    def native(self) -> bool:
        return self.transfer_syntax in NATIVE


@dataclass(frozen=True)
class _Pixels:
    keyword: str
    vr: str
    offset: int
    length: int


def read_header(file: BinaryIO, limits: Limits) -> Header:
    """Return the header of the DICOM file `file`, checked against the pixel budget.

    Raises CannotRead if it is truncated, InvalidInput if required elements are missing or make no sense,
    UnsupportedDicom if it holds no pixels or a compression that is not supported, ResourceLimit if it asks for more
    than `limits`.
    """
    bounded = BoundedFile(file, limits.max_header_reads)
    try:
        return _read(bounded, limits)
    except RecursionError:
        raise ResourceLimit("the header's sequences are nested too deeply") from None


def _read(file: BoundedFile, limits: Limits) -> Header:
    from pydicom.datadict import tag_for_keyword
    from pydicom.filereader import _read_file_meta_info, read_dataset, read_preamble

    if read_preamble(file, force=True) is None:  # type: ignore[arg-type]
        file.seek(4 if file.read(4) == b"DICM" else 0)
    meta = _read_file_meta_info(file)  # type: ignore[arg-type]
    file.short = False
    syntax = str(meta.get("TransferSyntaxUID") or "")
    start = file.tell()
    if syntax == DEFLATED:
        file = _inflate(file, limits)
        start = 0
    implicit, little = _encoding(file, start, syntax)

    found: list[_Pixels] = []
    elements = 0

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        nonlocal elements
        elements += 1
        if elements > limits.max_elements:
            raise ResourceLimit(f"the header has more than {limits.max_elements} data elements")
        if tag >> 16 == 0 and elements > 32:
            raise InvalidInput("the dataset holds elements of group 0000; it is damaged or not DICOM")
        if tag in _PIXELS:
            found.append(_Pixels(_PIXELS[tag], vr or "OW", file.tell(), length))
            return True
        return False

    tags = [*(tag for tag in map(tag_for_keyword, _WANTED) if tag is not None), *OVERLAYS]
    file.seek(start)
    ds = read_dataset(file, implicit, little, stop_when=at_pixels, specific_tags=tags)  # type: ignore[arg-type]
    sop_class = str(meta.get("MediaStorageSOPClassUID") or _text(ds, "SOPClassUID") or "")
    if not found:
        if file.short:
            raise CannotRead("the file is truncated: it ends inside its header")
        if elements == 0 or not (sop_class or len(ds)):
            raise InvalidInput("the file has no DICOM data set")
        raise UnsupportedDicom(f"the file holds no pixels{_named(sop_class)}; an image was expected")
    pixels = found[0]
    _finish_tags(ds)
    if not syntax:
        syntax = _guess_syntax(file, pixels, implicit, little)
    if not set(syntax) <= _UID_LETTERS:
        raise InvalidInput("the transfer syntax is not a UID; the file is damaged")
    if syntax not in SUPPORTED:
        raise UnsupportedDicom(
            f"transfer syntax {_uid_name(syntax)} is not supported; convert it to Explicit VR or JPEG 2000"
        )
    if not sop_class and "SOPClassUID" not in ds:
        sop_class = "1.2.840.10008.5.1.4.1.1.7"  # Secondary Capture: the class without demands
    if not _text(ds, "SOPClassUID"):
        ds.SOPClassUID = sop_class
    uid = _text(ds, "SOPInstanceUID") or str(meta.get("MediaStorageSOPInstanceUID") or "") or None
    header = _checked(file, ds, uid, syntax, pixels)
    check_budget(header, limits)
    return header


def _encoding(file: BoundedFile, start: int, syntax: str) -> tuple[bool, bool]:
    """Return (implicit VR, little endian) of the dataset at `start`, off its first element if `syntax` is empty."""
    if syntax:
        return syntax == IMPLICIT, syntax != BIG_ENDIAN
    file.seek(start)
    first = file.read(6)
    explicit = len(first) == 6 and first[4:6].isalpha() and first[4:6].isupper()
    return not explicit, not (explicit and first[0] == 0 and first[1] != 0)


def _guess_syntax(file: BoundedFile, pixels: _Pixels, implicit: bool, little: bool) -> str:
    if pixels.length != UNDEFINED:
        return IMPLICIT if implicit else EXPLICIT if little else BIG_ENDIAN
    file.seek(pixels.offset)
    head = file.read(4096)
    if J2K_START in head:
        return J2K[1]
    at = head.find(b"\xff\xd8\xff")
    if at >= 0:
        marker = jpeg_size(head[at:]).marker
        return {0xC0: JPEG[0], 0xC3: JPEG[2], 0xF7: JPEG_LS[1]}.get(marker, JPEG[1])
    raise InvalidInput("the transfer syntax is missing and the compressed pixel data has no known codestream")


def _inflate(file: BoundedFile, limits: Limits) -> BoundedFile:
    """Return the inflated dataset as a file. It is counted first and kept only if it is within `limits`."""
    start = file.tell()
    packed = file.size - start
    allowed = min(limits.max_inflated_bytes, max(limits.expansion_floor_bytes, limits.max_expansion * packed))
    # Deflate reaches 1032:1, so a ratio limit of its own is needed to stop a bomb early. Images reach about 20:1.
    allowed = min(allowed, max(limits.expansion_floor_bytes, 200 * packed))
    total = 0
    for part in _inflated(file, start):
        total += len(part)
        if total > allowed:
            raise ResourceLimit(
                f"the deflated data set unpacks to more than {allowed >> 20} MiB from {packed >> 10} KiB"
            )
    whole = bytearray(total)
    at = 0
    for part in _inflated(file, start):
        whole[at : at + len(part)] = part
        at += len(part)
    return BoundedFile(io.BytesIO(whole), limits.max_header_reads)


def _inflated(file: BoundedFile, start: int) -> Iterator[bytes]:
    """Yield the inflated bytes in parts of at most 1 MiB."""
    file.seek(start)
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        while not stream.eof:
            packed = stream.unconsumed_tail or file.read(1 << 16)
            if not packed:
                raise CannotRead("the file is truncated: its deflated data set has no end")
            yield stream.decompress(packed, 1 << 20)
    except zlib.error:
        raise InvalidInput("the deflated data set is damaged") from None


def _text(ds: Dataset, keyword: str) -> str | None:
    """Return an element's text, None where it is missing, empty or unreadable."""
    try:
        value = ds.get(keyword)
    except (ValueError, TypeError, NotImplementedError):  # what pydicom raises where the bytes do not fit the VR
        return None
    return str(value).strip().strip("\0") or None if value is not None else None


def _finish_tags(ds: Dataset) -> None:
    """Convert all raw elements now, dropping those whose bytes do not fit their VR (pydicom would raise on access)."""
    for tag in list(ds.keys()):
        try:
            ds[tag].value  # noqa: B018
        # What pydicom's converters raise, each VR its own, on bytes that do not fit.
        except (ValueError, TypeError, NotImplementedError, OverflowError, AttributeError):
            del ds[tag]


def _uid_name(uid: str) -> str:
    from pydicom.uid import UID

    if not set(uid) <= _UID_LETTERS:
        return "(not a UID)"
    name = UID(uid).name
    return name if name == uid else f"{name} ({uid})"


def _plain(text: str) -> str:
    """Return a code string for a message, shortened and without characters that a code string cannot have."""
    return "".join(c if c.isascii() and (c.isalnum() or c in " _") else "?" for c in text[:16])


def _named(sop_class: str) -> str:
    return f" ({_uid_name(sop_class)})" if sop_class else ""


def _integer(ds: Dataset, keyword: str, default: int | None = None) -> int:
    value = ds.get(keyword)
    if value is None or value == "":
        if default is None:
            raise InvalidInput(f"'{keyword}' is missing; it is required to read pixels")
        return default
    try:
        return int(value)
    except (TypeError, ValueError):
        raise InvalidInput(f"'{keyword}' is not one whole number") from None


def _checked(file: BoundedFile, ds: Dataset, uid: str | None, syntax: str, pixels: _Pixels) -> Header:
    """Return the Header with the image pixel module checked; what the standard lets a reader infer is filled in."""
    floating = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(pixels.keyword)
    rows, columns = _integer(ds, "Rows"), _integer(ds, "Columns")
    samples = _integer(ds, "SamplesPerPixel", 1)
    bits = _integer(ds, "BitsAllocated", floating)
    stored = _integer(ds, "BitsStored", bits)
    frames = _integer(ds, "NumberOfFrames", 1) or 1
    if rows < 1 or columns < 1:
        raise InvalidInput(f"the image has {rows} rows and {columns} columns; at least one of each was expected")
    if frames < 1:
        raise InvalidInput(f"the number of frames is {frames}; at least one was expected")
    if samples not in (1, 3) or not (bits == 1 or bits in (8, 16, 32, 64)) or not 1 <= stored <= bits:
        raise UnsupportedDicom(
            f"{samples} samples per pixel of {stored} bits in {bits} are not supported; "
            "1 or 3 samples of 1, 8, 16 or 32 bits are"
        )
    if floating and bits != floating:
        raise InvalidInput(f"'{pixels.keyword}' has {bits} bits allocated, {floating} were expected")
    photometric = (_text(ds, "PhotometricInterpretation") or ("RGB" if samples == 3 else "MONOCHROME2")).upper()
    if photometric not in PHOTOMETRIC:  # not quoted: it may hold anything
        raise UnsupportedDicom(f"the photometric interpretation is none of {', '.join(PHOTOMETRIC)}")
    ds.SamplesPerPixel, ds.BitsAllocated, ds.BitsStored, ds.NumberOfFrames = samples, bits, stored, frames
    ds.PixelRepresentation = _integer(ds, "PixelRepresentation", 0)
    if ds.PixelRepresentation not in (0, 1):
        raise InvalidInput("'PixelRepresentation' is neither 0 nor 1")
    if samples == 3:
        ds.PlanarConfiguration = _integer(ds, "PlanarConfiguration", 0)
    return Header(
        file, ds, uid, syntax, pixels.keyword, pixels.vr, pixels.offset, pixels.length,
        rows, columns, samples, bits, frames, photometric,
    )  # fmt: skip


def check_budget(header: Header, limits: Limits) -> None:
    """Raise ResourceLimit if the frame, or all declared frames together, exceed `limits`."""
    pixels = header.rows * header.columns
    if pixels > limits.max_pixels:
        raise ResourceLimit(
            f"the header asks for {header.columns} x {header.rows} pixels; "
            f"the limit is {limits.max_pixels} pixels a frame"
        )
    declared = pixels * header.samples * header.bits * header.frames // 8
    if declared > limits.max_declared_bytes:
        raise ResourceLimit(
            f"the header declares {header.frames} frames of together {declared >> 30} GiB; "
            f"the limit is {limits.max_declared_bytes >> 30} GiB"
        )
