"""What the first bytes of a compressed frame say about its size, read without a decoder.

Covers JPEG 2000 and HTJ2K (SIZ), JPEG and JPEG-LS (SOF), RLE (segment table), PNG (IHDR). Pure Python on bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import error as StructError
from struct import unpack_from

from edgemed.errors import InvalidInput, ResourceLimit

J2K_START = b"\xff\x4f\xff\x51"
JPEG_START = b"\xff\xd8\xff"
PNG_START = b"\x89PNG\r\n\x1a\n"
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""Little and big endian; with a plus, the form with 64-bit offsets."""
_SOF = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7))
_MAX_SCANS = 500
_MAX_TILES = 65535  # ISO/IEC 15444-1 A.4.2: Isot is 16 bit


@dataclass(frozen=True)
class FrameSize:
    """Rows, columns, samples per pixel and bits per sample of a codestream; marker: the JPEG SOF byte, else 0."""

    rows: int
    columns: int
    samples: int
    bits: int
    marker: int = 0


def j2k_size(data: bytes) -> FrameSize:
    """Return the size from the SIZ marker of a JPEG 2000 codestream, in a JP2 wrapper or bare.

    Raises InvalidInput without SIZ, ResourceLimit for more tiles than the standard allows.
    Source: ISO/IEC 15444-1 A.5.1.
    """
    start = data.find(J2K_START, 0, 4096)
    try:
        x1, y1, x0, y0, tile_x, tile_y, _, _, samples = unpack_from(">8IH", data, start + 8)
        bits = data[start + 42]
    except (StructError, IndexError):
        start = -1
    if start < 0 or x1 <= x0 or y1 <= y0 or not tile_x or not tile_y or not samples:
        raise InvalidInput("the JPEG 2000 stream has no valid size marker (SIZ)")
    if -(-x1 // tile_x) * -(-y1 // tile_y) > _MAX_TILES:
        raise ResourceLimit(f"the JPEG 2000 stream declares more than {_MAX_TILES} tiles")
    return FrameSize(y1 - y0, x1 - x0, samples, (bits & 0x7F) + 1)


def jpeg_size(data: bytes) -> FrameSize:
    """Return the size from the first SOF marker of a JPEG or JPEG-LS stream.

    Raises InvalidInput if there is none, ResourceLimit for more scans than any encoder writes: each costs a pass over
    the whole image, however few bytes it has. Source: ITU-T T.81 B.2.2, T.87 C.2.2.
    """
    if data.count(b"\xff\xda") > _MAX_SCANS:  # SOS; coded data have a zero after each 0xFF
        raise ResourceLimit(f"the JPEG stream has more than {_MAX_SCANS} scans")
    at = data.find(b"\xff\xd8", 0, 4096) + 2
    while at >= 2 and at + 4 <= len(data):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _SOF and at + 10 <= len(data):
            bits, rows, columns, samples = unpack_from(">BHHB", data, at + 4)
            if rows and columns and samples:
                return FrameSize(rows, columns, samples, bits, marker)
            break
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise InvalidInput("the JPEG stream has no valid frame header (SOF)")


def png_size(data: bytes) -> FrameSize:
    """Return the size from IHDR of a PNG; samples counts channels (a palette counts as 3).

    Raises InvalidInput if it is not there. Source: PNG specification 11.2.2.
    """
    if data[:8] != PNG_START or data[12:16] != b"IHDR" or len(data) < 26:
        raise InvalidInput("the PNG has no header chunk (IHDR)")
    columns, rows, bits, kind = unpack_from(">IIBB", data, 16)
    samples = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}.get(kind, 0)
    if not (rows and columns and samples):
        raise InvalidInput("the PNG header (IHDR) is invalid")
    return FrameSize(rows, columns, samples, max(8, bits))


def check_rle(data: bytes, segments: int) -> None:
    """Raise InvalidInput unless the RLE segment table fits the frame: `segments` ascending offsets inside the data.

    Source: DICOM PS3.5 G.5.
    """
    if len(data) < 64:
        raise InvalidInput("the RLE frame is shorter than its 64-byte header")
    count, *offsets = unpack_from("<16I", data)
    used = offsets[:count]
    if count != segments or used != sorted(used) or (used and (used[0] < 64 or used[-1] > len(data))):
        raise InvalidInput(f"the RLE segment table is invalid or has not {segments} segments")
