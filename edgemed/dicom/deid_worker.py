"""The child process that de-identifies: `python -P -m edgemed.dicom.deid_worker`, started by `deid`.

Requests come as JSON lines on stdin: a file, the folder for the new one, the profile and the key. A reply is one JSON
line without anything of the patient. The header is parsed, cleaned and written anew; of the pixels, whole frames are
copied as they are, byte for byte, and nothing that lies around them; comments in compressed frames are overwritten by
spaces of the same length. Only where regions are blanked is a frame decoded;
the file is then uncompressed.

What a file never keeps: preamble, file meta information but for the new instance's, anything after the pixels, native
pixel data beyond the last frame, overlays in the unused bits of pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from edgemed.dicom import header as h
from edgemed.dicom.codestream import J2K_START, JPEG_START
from edgemed.dicom.deid_rules import CODES, UID_FORM, Cleaner, Profile
from edgemed.dicom.limits import Limits
from edgemed.dicom.worker import TOO_LARGE, Reply, json_reply, serve_requests
from edgemed.errors import CannotRead, CannotWrite, InvalidInput, ResourceLimit, UnsupportedDicom

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_DIRECTORY = "1.2.840.10008.1.3.10"
_CHUNK = 1 << 20
_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_VIDEO = ("1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.107")
_DRAWS_TEXT = ("US", "IVUS", "XA", "RF", "SC", "OT", "ES", "XC", "GM", "SM", "OP", "OPT", "ECG", "DOC")
"""Modalities whose pixels often show a name, or whose pictures are often screens."""
_HEAD = ("HEAD", "BRAIN", "SKULL", "FACE", "NECK", "HEADNECK", "ORBIT", "SINUS", "JAW")

Box = tuple[int, int, int, int]


def main() -> int:
    """Serve requests until stdin ends; return 0."""
    return serve_requests(_serve, TOO_LARGE)


def _serve(request: Mapping[str, Any], limits: Limits) -> Reply:
    return json_reply(
        deidentify_file(
            request["path"],
            Path(request["folder"]),
            Profile(**request["profile"]),
            bytes.fromhex(request["key"]),
            [(x, y, width, height) for x, y, width, height in request["blank"]],
            limits,
        )
    )


@dataclass
class _Parsed:
    """A file up to its pixels: dataset, where the pixels are (None: there are none), how it is encoded."""

    ds: Dataset
    meta: Dataset
    file: h.BoundedFile
    pixels: h._Pixels | None
    syntax: str


def deidentify_file(
    path: str, folder: Path, profile: Profile, key: bytes, blank: Sequence[Box], limits: Limits
) -> dict[str, Any]:
    """Write the de-identified copy of a file below `folder` and return what was done, in words and numbers only.

    blank: regions (x, y, width, height) that are overwritten in every frame.

    Raises the errors of `edgemed.dicom`; UnsupportedDicom for what cannot be de-identified (documents, DICOMDIRs,
    private classes), CannotWrite if the file is there already or the disk refuses.
    """
    with open(path, "rb") as file:
        parsed = _parse(file, limits)
        ds = parsed.ds
        sop_class = _check_kind(parsed)
        told_uid = h._text(ds, "SOPInstanceUID") or str(parsed.meta.get("MediaStorageSOPInstanceUID") or "")
        warnings = list(_warnings(parsed, blank, profile))
        embedded = _embedded_overlays(ds)
        cleaner = Cleaner(profile, key, ds)
        cleaner.clean(ds)
        ds.SOPClassUID = sop_class
        ds.SOPInstanceUID = cleaner.new_uid(told_uid or _digest_of(file))
        _record(ds, profile, blank)
        series = h._text(ds, "SeriesInstanceUID") or ""
        name = Path(series if UID_FORM.match(series) else "no-series") / f"{ds.SOPInstanceUID}.dcm"
        frames: _Copied | _Blanked | None = None
        if blank and parsed.pixels is not None:
            frames = _Blanked(file, ds, limits, blank)
        elif parsed.pixels is not None:
            frames = _Copied(parsed, embedded)
        _write(folder / name, ds, parsed, frames)
    return {
        "file": name.as_posix(),
        "sop_class": h._uid_name(sop_class),
        "modality": h._plain(h._text(ds, "Modality") or ""),
        "counts": dict(sorted(cleaner.counts.items())),
        "warnings": warnings,
    }


def _parse(file: BinaryIO, limits: Limits) -> _Parsed:
    from pydicom.filereader import _read_file_meta_info, read_dataset, read_preamble

    bounded = h.BoundedFile(file, limits.max_header_reads)
    if read_preamble(bounded, force=True) is None:  # type: ignore[arg-type]
        bounded.seek(4 if bounded.read(4) == b"DICM" else 0)
    meta = _read_file_meta_info(bounded)  # type: ignore[arg-type]
    bounded.short = False
    syntax = str(meta.get("TransferSyntaxUID") or "")
    start = bounded.tell()
    if syntax == h.DEFLATED:
        bounded, start = h._inflate(bounded, limits), 0
    implicit, little = h._encoding(bounded, start, syntax)
    found: list[h._Pixels] = []
    elements = 0

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        nonlocal elements
        elements += 1
        if elements > limits.max_elements:
            raise ResourceLimit(f"the header has more than {limits.max_elements} data elements")
        if tag in h._PIXELS:
            found.append(h._Pixels(h._PIXELS[tag], vr or "OW", bounded.tell(), length))
        return bool(found)

    bounded.seek(start)
    ds = read_dataset(bounded, implicit, little, stop_when=at_pixels)  # type: ignore[arg-type]
    if bounded.short and not found:
        raise CannotRead("the file is truncated: it ends inside its header")
    if elements == 0:
        raise InvalidInput("the file has no DICOM data set")
    pixels = found[0] if found else None
    if not syntax:
        given = h.IMPLICIT if implicit else h.EXPLICIT if little else h.BIG_ENDIAN
        syntax = given if pixels is None else h._guess_syntax(bounded, pixels, implicit, little)
    return _Parsed(ds, meta, bounded, pixels, syntax)


def _check_kind(parsed: _Parsed) -> str:
    """Return the SOP class; raises UnsupportedDicom where names could stay in what is not looked into."""
    from pydicom.uid import UID_dictionary

    ds = parsed.ds
    sop_class = h._text(ds, "SOPClassUID") or str(parsed.meta.get("MediaStorageSOPClassUID") or "")
    if sop_class == _DIRECTORY or "DirectoryRecordSequence" in ds:
        raise UnsupportedDicom("a DICOMDIR is not de-identified; pass the files and write a new one")
    if "EncapsulatedDocument" in ds:
        raise UnsupportedDicom("it holds a document or a model, which is not looked into; leave it out")
    if sop_class not in UID_dictionary:
        raise UnsupportedDicom("its SOP class is not one of the standard's; what it holds is not known")
    return sop_class


def _digest_of(file: BinaryIO) -> str:
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
    return digest.hexdigest()


def _warnings(parsed: _Parsed, blank: Sequence[Box], profile: Profile) -> Iterator[str]:
    """Yield what a person must look at."""
    ds = parsed.ds
    if parsed.pixels is None or profile.clean_pixel_data:
        return
    kinds = (h._text(ds, "ImageType") or "").upper()
    modality = (h._text(ds, "Modality") or "").upper()
    burned = (h._text(ds, "BurnedInAnnotation") or "").upper()
    why = [
        "it says so (Burned In Annotation)" if burned == "YES" else "",
        f"modality {h._plain(modality)}" if burned != "NO" and modality in _DRAWS_TEXT else "",
        "it is no original picture" if "SCREEN SAVE" in kinds or "SECONDARY" in kinds or "ConversionType" in ds else "",
        "it is a video" if _VIDEO[0] <= parsed.syntax[:23] <= _VIDEO[1] and len(parsed.syntax) == 23 else "",
    ]
    if any(why):
        done = "outside of the blanked regions " if blank else ""
        yield f"text may be burned into the pixels {done}({', '.join(w for w in why if w)}); look at it, see --blank"
    part = (h._text(ds, "BodyPartExamined") or "").upper()
    if modality in ("CT", "MR", "PT") and part in _HEAD:
        yield "a face can be reconstructed from slices of the head"


def _record(ds: Dataset, profile: Profile, blank: Sequence[Box]) -> None:
    """Write what was done: PS3.15 E.1.1 and the modules Patient and General Image."""
    from pydicom.dataset import Dataset

    meanings = dict(CODES.values())
    items = []
    for code in profile.codes:
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code, "DCM", meanings[code]
        items.append(item)
    ds.PatientIdentityRemoved = "YES"
    ds.DeidentificationMethod = "edgemed deid: PS3.15 Basic Profile" + (", regions blanked" if blank else "")
    ds.DeidentificationMethodCodeSequence = items
    kept = {"full": "UNMODIFIED", "modified": "MODIFIED", "": "REMOVED"}
    ds.LongitudinalTemporalInformationModified = kept[profile.retain_dates]
    if profile.clean_pixel_data:
        ds.BurnedInAnnotation = "NO"


# --- pixels -----------------------------------------------------------------------------------------------------------


def _embedded_overlays(ds: Dataset) -> bool:
    """Return whether an overlay lies in the unused bits of the pixels (retired, and still found)."""
    return any(
        tag.group >> 8 == 0x60 and tag.group % 2 == 0 and tag.element == 0x0102 and ds[tag].value
        for tag in list(ds.keys())
        if (tag.group, 0x3000) not in ds
    )


class _Copied:
    """The pixels of a file as they are."""

    def __init__(self, parsed: _Parsed, embedded: bool) -> None:
        assert parsed.pixels is not None
        self._file, self._pixels, ds = parsed.file, parsed.pixels, parsed.ds
        self.syntax = h.EXPLICIT if parsed.syntax == h.DEFLATED else parsed.syntax
        self.keyword, self.vr = self._pixels.keyword, self._pixels.vr
        self.length: int | None = None
        self._spread: tuple[np.dtype[Any], int] | None = None
        if self._pixels.length == h.UNDEFINED:
            return
        bits = h._integer(ds, "BitsAllocated", {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(self.keyword))
        count = h._integer(ds, "Rows") * h._integer(ds, "Columns") * h._integer(ds, "SamplesPerPixel", 1)
        whole = -(-count * (h._integer(ds, "NumberOfFrames", 1) or 1) * bits // 8)
        present = min(self._pixels.length, self._file.size - self._pixels.offset)
        if (h._text(ds, "PhotometricInterpretation") or "").endswith("_422") and present < whole:
            whole = whole * 2 // 3
        if present < whole:
            raise CannotRead("the pixel data is truncated")
        self.length = whole
        unused = bits - 1 - h._integer(ds, "HighBit", bits - 1)
        if embedded and unused > 0 and bits in (8, 16):
            order = ">" if self.syntax == h.BIG_ENDIAN else "<"
            kind = "i" if h._integer(ds, "PixelRepresentation", 0) else "u"
            self._spread = np.dtype(f"{order}{kind}{bits // 8}"), unused

    def parts(self) -> Iterator[bytes]:
        """Yield the value: native bytes, or items and the delimiter."""
        self._file.seek(self._pixels.offset)
        if self.length is not None:
            left = self.length
            while left:
                part = self._file.read(min(_CHUNK, left))
                left -= len(part)
                yield self._without_overlays(part)
            return
        while True:
            head = self._file.read(8)
            size = int.from_bytes(head[4:], "little")
            if len(head) == 8 and head[:4] == _END:
                yield _END + bytes(4)
                return
            if len(head) < 8 or head[:4] != _ITEM:
                raise CannotRead("the pixel data is truncated or damaged: its items have no end")
            yield head
            start = True
            while size:
                part = self._file.read(min(_CHUNK, size))
                if not part:
                    raise CannotRead("the pixel data is truncated: it ends inside an item")
                size -= len(part)
                yield without_comments(part) if start else part
                start = False

    def _without_overlays(self, part: bytes) -> bytes:
        if self._spread is None:
            return part
        dtype, unused = self._spread
        values = np.frombuffer(part, dtype)
        return ((values << unused).astype(dtype) >> unused).astype(dtype).tobytes()


_SCANS = (0xDA, 0x90)  # JPEG SOS, JPEG 2000 SOT: what follows is pixels
_COMMENTS = frozenset({0xFE, 0x64, 0xE1, *range(0xE3, 0xE8), *range(0xE9, 0xEE), 0xEF})
"""JPEG COM, JPEG 2000 COM, and APPn but for JFIF (0), colour profiles (2), SPIFF (8) and Adobe's colour space (14)."""


def without_comments(start: bytes) -> bytes:
    """Return the start of a compressed frame with its comments and EXIF blocks made spaces; nothing moves.

    >>> without_comments(b"\\xff\\xd8\\xff\\xfe\\x00\\x05Doe\\xff\\xda")
    b'\\xff\\xd8\\xff\\xfe\\x00\\x05   \\xff\\xda'
    """
    if not start.startswith((JPEG_START, J2K_START)):
        return start
    data, at = bytearray(start), 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in _SCANS:
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker in _COMMENTS:
            first = at + (6 if marker == 0x64 else 4)  # JPEG 2000: two bytes tell what kind of comment
            end = min(at + 2 + size, len(data))
            data[first:end] = b" " * max(end - first, 0)
        at += 2 + max(size, 2)
    return bytes(data)


class _Blanked:
    """The pixels of a file decoded frame by frame, without what is in the regions; Explicit VR Little Endian."""

    syntax = h.EXPLICIT

    def __init__(self, file: BinaryIO, ds: Dataset, limits: Limits, blank: Sequence[Box]) -> None:
        from edgemed.dicom.decode import read_stored

        self._header = h.read_header(file, limits)
        self._limits, self._blank = limits, blank
        header = self._header
        if header.bits == 1:
            raise UnsupportedDicom("regions of pixels of one bit cannot be blanked")
        for x, y, _, _ in blank:
            if x >= header.columns or y >= header.rows:
                raise InvalidInput(f"the region at {x},{y} is not inside the {header.columns} x {header.rows} image")
        first, photometric = read_stored(header, 0, limits)
        self.keyword, self.vr = header.keyword, "OB" if first.dtype.itemsize == 1 else "OW"
        if first.dtype.kind == "f":
            self.vr = "OF" if first.dtype.itemsize == 4 else "OD"
        self.length = first.nbytes * header.frames
        ds.PhotometricInterpretation = photometric
        if header.samples == 3:
            ds.PlanarConfiguration = 0
        if header.keyword == "PixelData":
            ds.BitsAllocated = 8 * first.dtype.itemsize
        for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
            ds.pop(name, None)

    def parts(self) -> Iterator[bytes]:
        """Yield the frames; a region has the smallest value of its frame, or the largest where that is black."""
        from edgemed.dicom.decode import read_stored

        for frame in range(self._header.frames):
            stored, photometric = read_stored(self._header, frame, self._limits)
            pixels = np.array(stored)
            value = pixels.max() if photometric == "MONOCHROME1" else pixels.min()
            for x, y, width, height in self._blank:
                pixels[y : y + height, x : x + width] = value
            yield pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()


def _write(target: Path, ds: Dataset, parsed: _Parsed, frames: _Copied | _Blanked | None) -> None:
    """Write the file under a hidden name, then give it its own; never over another."""
    from pydicom import dcmwrite
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID

    syntax = frames.syntax if frames is not None else h.EXPLICIT if parsed.syntax == h.DEFLATED else parsed.syntax
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(syntax)
    temporary = target.with_name(f".{os.urandom(8).hex()}.part")
    try:
        target.parent.mkdir(exist_ok=True)
        if target.exists():
            raise CannotWrite(
                "its copy is there already: an instance was given twice, or -o is the folder of another run"
            )
        with open(temporary, "xb") as out:
            dcmwrite(out, ds, enforce_file_format=True)
            if frames is not None:
                out.write(_element_head(syntax, frames))
                for part in frames.parts():
                    out.write(part)
                if frames.length is not None and frames.length % 2:
                    out.write(b"\0")
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise CannotWrite(f"cannot write to the folder of -o: {error.strerror or 'refused'}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _element_head(syntax: str, frames: _Copied | _Blanked) -> bytes:
    """Return the pixel data element's tag, VR and length."""
    tag = {name: tag for tag, name in h._PIXELS.items()}[frames.keyword]
    length = h.UNDEFINED if frames.length is None else frames.length + frames.length % 2
    if length > h.UNDEFINED - 1 and frames.length is not None:
        raise UnsupportedDicom("the pixel data has 4 GiB or more uncompressed; blank fewer frames at a time")
    if syntax == h.IMPLICIT:
        return struct.pack("<HHI", tag >> 16, tag & 0xFFFF, length)
    order = ">" if syntax == h.BIG_ENDIAN else "<"
    return struct.pack(f"{order}HH2sHI", tag >> 16, tag & 0xFFFF, frames.vr.encode(), 0, length)


if __name__ == "__main__":
    sys.exit(main())
