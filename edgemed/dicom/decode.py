"""One frame of stored values: found in the file, its codestream checked against the header, decoded.

Decoders, tried in this order (none is GPL): pyjpegls (JPEG-LS), pylibjpeg with openjpeg or rle (JPEG 2000, HTJ2K, RLE),
gdcm, Pillow, pydicom's own RLE, and last imagecodecs through the plug-in below, for what the others cannot (12-bit
JPEG). pylibjpeg is only asked for the two codecs named, so an installed pylibjpeg-libjpeg (GPL) is never used.

The module is itself a pydicom decoder plug-in: `DECODER_DEPENDENCIES`, `is_available` and `_decode_frame` are the three
names pydicom looks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil
from struct import error as StructError
from struct import unpack
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgemed.dicom import header as h
from edgemed.dicom.codestream import FrameSize, check_rle, j2k_size, jpeg_size
from edgemed.dicom.limits import Limits
from edgemed.errors import CannotRead, InvalidInput, ResourceLimit, UnsupportedDicom

if TYPE_CHECKING:
    from pydicom.pixels.decoders.base import DecodeRunner

LABEL = "edgemed-imagecodecs"
_IMAGECODECS = {
    **dict.fromkeys(h.JPEG[:2], "jpeg_decode"),
    **dict.fromkeys(h.JPEG[2:], "ljpeg_decode"),
    **dict.fromkeys(h.JPEG_LS, "jpegls_decode"),
    **dict.fromkeys(h.J2K, "jpeg2k_decode"),
}
DECODER_DEPENDENCIES = dict.fromkeys(_IMAGECODECS, ("imagecodecs",))
_ORDER = {
    **dict.fromkeys(h.JPEG, ("gdcm", "pillow", LABEL)),
    **dict.fromkeys(h.JPEG_LS, ("pyjpegls", "gdcm", LABEL)),
    **dict.fromkeys(h.J2K, ("pylibjpeg", "gdcm", "pillow", LABEL)),
    **dict.fromkeys(h.HTJ2K, ("pylibjpeg",)),
    h.RLE: ("pylibjpeg", "pydicom"),
}


def is_available(uid: str) -> bool:
    """Return whether imagecodecs is there and decodes transfer syntax `uid` (pydicom plug-in interface)."""
    from importlib.util import find_spec

    return uid in _IMAGECODECS and find_spec("imagecodecs") is not None


def _decode_frame(src: bytes, runner: DecodeRunner) -> bytes:
    """Return the decoded frame as bytes, samples interleaved (pydicom plug-in interface)."""
    import imagecodecs

    array = np.asarray(getattr(imagecodecs, _IMAGECODECS[str(runner.transfer_syntax)])(src))
    runner.set_option("bits_allocated", 8 * array.dtype.itemsize)
    if runner.samples_per_pixel == 3:
        runner.set_option("planar_configuration", 0)
        if str(runner.transfer_syntax) in h.JPEG:
            runner.set_option("photometric_interpretation", "RGB")  # imagecodecs returns RGB
    return array.tobytes()


def read_stored(header: h.Header, frame: int, limits: Limits, skip: Sequence[str] = ()) -> tuple[npt.NDArray[Any], str]:
    """Return (stored values, photometric interpretation) of frame `frame` (0-based), decoded by none of `skip`.

    Stored values: [rows, columns] or [rows, columns, 3], of the file's own integer or float type, unused bits cleared.
    YBR_FULL and YBR_FULL_422 come back as RGB.

    Raises InvalidInput for a frame that does not exist or a damaged stream, CannotRead for truncated pixel data,
    ResourceLimit for a stream that declares more than the header or expands too much, UnsupportedDicom if no decoder
    takes it.
    """
    if not 0 <= frame < header.frames:
        raise InvalidInput(f"frame {frame} was asked for; the file has {header.frames} (0 to {header.frames - 1})")
    return _native(header, frame) if header.native else _encapsulated(header, frame, limits, skip)


def _native(header: h.Header, frame: int) -> tuple[npt.NDArray[Any], str]:
    if header.length == h.UNDEFINED:
        raise InvalidInput("the transfer syntax says uncompressed, the pixel data is encapsulated")
    photometric = header.photometric
    count = header.rows * header.columns * header.samples
    frame_bytes = count * header.bits / 8
    if photometric in ("YBR_FULL_422", "YBR_PARTIAL_422"):
        if header.length >= int(frame_bytes) * header.frames:
            # Named subsampled, stored whole: seen in real files; a third too many bytes would be left over.
            photometric = photometric.removesuffix("_422")
        else:
            frame_bytes = frame_bytes * 2 / 3
    end = header.offset + ceil((frame + 1) * frame_bytes)
    if end > min(header.file.size, header.offset + header.length):
        raise CannotRead(f"the pixel data is truncated: it ends before the end of frame {frame}")
    if header.bits == 1:
        return _bits(header, frame), photometric
    # pydicom knows no partial range: the bytes are laid out as in YBR_FULL(_422), `values` converts the colours.
    layout = {"YBR_PARTIAL_422": "YBR_FULL_422", "YBR_PARTIAL": "YBR_FULL"}.get(photometric, photometric)
    array, shown = _decode(header, frame, layout, "", raw=layout != photometric)
    return array, photometric.removesuffix("_422") if layout != photometric else shown


def _bits(header: h.Header, frame: int) -> npt.NDArray[np.uint8]:
    """Return a frame of packed bits as 0 and 1. It may start inside a byte, where pydicom 3.0.2 reads one too few."""
    count = header.rows * header.columns * header.samples
    first = frame * count
    header.file.seek(header.offset + first // 8)
    packed = np.frombuffer(header.file.read((first % 8 + count + 7) // 8), np.uint8)
    if header.transfer_syntax == h.BIG_ENDIAN and header.vr == "OW":
        raise UnsupportedDicom(
            "packed bits in big endian words are not supported; convert it to Explicit VR Little Endian"
        )
    bits = np.unpackbits(packed, bitorder="little")[first % 8 : first % 8 + count]
    return bits.reshape(
        (header.rows, header.columns) if header.samples == 1 else (header.rows, header.columns, header.samples)
    )


def _encapsulated(header: h.Header, frame: int, limits: Limits, skip: Sequence[str]) -> tuple[npt.NDArray[Any], str]:
    data = _frame_bytes(header, frame)
    check_stream(header, data, limits)
    from pydicom.pixels import get_decoder

    decoder = get_decoder(header.transfer_syntax)
    if LABEL not in decoder._available and is_available(header.transfer_syntax):
        decoder.add_plugin(LABEL, ("edgemed.dicom.decode", "_decode_frame"))
    plugins = [p for p in _ORDER[header.transfer_syntax] if p in decoder.available_plugins and p not in skip]
    name = h._uid_name(header.transfer_syntax)
    if not plugins:
        raise UnsupportedDicom(f"no decoder for {name} is installed; reinstall edgemed with its dependencies")
    for plugin in plugins:
        try:
            array, shown = _decode(header, frame, header.photometric, plugin, raw=False)
        except InvalidInput:
            continue
        return _sign_extended(array, header), shown
    raise InvalidInput(f"the {name} pixel data cannot be decoded: the stream is damaged or does not fit the header")


def _sign_extended(array: npt.NDArray[Any], header: h.Header) -> npt.NDArray[Any]:
    """Return grey values with what lies above their stored bits replaced: by the sign, by zero where there is none.

    pydicom 3.0.2 does so where the codestream has fewer bits than are allocated; in one of 16 bits a signed 12-bit -20
    stayed 4076. Lossy streams are left alone: they may overshoot the stored bits, and 4097 must not become 1.
    """
    unused = 8 * array.dtype.itemsize - int(header.ds.BitsStored)
    high_bit = header.ds.get("HighBit")
    if array.ndim != 2 or array.dtype.kind not in "iu" or unused <= 0 or header.transfer_syntax not in h.LOSSLESS:
        return array
    if high_bit is not None and high_bit != header.ds.BitsStored - 1:
        return array
    extended: npt.NDArray[Any] = (array << unused) >> unused
    return extended


def _decode(header: h.Header, frame: int, photometric: str, plugin: str, raw: bool) -> tuple[npt.NDArray[Any], str]:
    from pydicom.pixels import get_decoder
    from pydicom.pixels.utils import as_pixel_options

    options = as_pixel_options(
        header.ds, photometric_interpretation=photometric, pixel_keyword=header.keyword, pixel_vr=header.vr
    )
    header.file.seek(header.offset)
    try:
        array, facts = get_decoder(header.transfer_syntax).as_array(
            header.file,  # type: ignore[arg-type]
            index=frame,
            raw=raw,
            decoding_plugin=plugin,
            **options,
        )
    except (MemoryError, ResourceLimit, KeyboardInterrupt):
        raise
    # BaseException: the RLE decoder is written in Rust, and its panics are no Exception.
    except BaseException as error:  # noqa: BLE001  decoders raise any class; the text may quote header values, so only its class is kept
        raise InvalidInput(f"the pixel data cannot be decoded ({type(error).__name__})") from None
    return array, str(facts["photometric_interpretation"])


def _frame_bytes(header: h.Header, frame: int) -> bytes:
    """Return the compressed bytes of frame `frame`, its fragments joined."""
    from pydicom.encaps import get_frame

    file = header.file
    file.seek(header.offset)
    file.short = False
    table = header.ds.get("ExtendedOffsetTable"), header.ds.get("ExtendedOffsetTableLengths")
    try:
        _check_offsets(header, frame, table[0] if all(table) else None)
        file.seek(header.offset)
        data = get_frame(
            file,
            frame,
            number_of_frames=header.frames,
            extended_offsets=table if all(table) else None,
        )
    except (ValueError, IndexError, EOFError, TypeError, StopIteration, StructError):
        if file.short or file.tell() >= file.size:
            raise CannotRead(f"the pixel data is truncated: frame {frame} is not complete") from None
        raise InvalidInput(f"the encapsulated pixel data is damaged: frame {frame} cannot be found") from None
    if file.short:
        raise CannotRead(f"the pixel data is truncated: frame {frame} is not complete")
    if not data:
        raise InvalidInput(f"frame {frame} of the encapsulated pixel data is empty")
    return data


def _check_offsets(header: h.Header, frame: int, extended: bytes | None) -> None:
    """Raise ValueError unless the offset table (`extended`, else the basic one) is empty or leads to frame `frame`.

    One offset a frame, ascending from 0, each to an item: a table that is not would show another frame without a word.
    Source: DICOM PS3.5 A.4.
    """
    from pydicom.encaps import parse_basic_offsets

    file = header.file
    offsets = parse_basic_offsets(file)
    start = file.tell()
    if extended is not None:
        offsets = list(unpack(f"<{len(extended) // 8}Q", extended))
    if not offsets:
        return
    if len(offsets) != header.frames or offsets[0] != 0 or any(a >= b for a, b in pairwise(offsets)):
        raise ValueError("the offsets do not ascend, one a frame")
    for offset in offsets[frame : frame + 2]:
        file.seek(start + offset)
        if file.read(4) != b"\xfe\xff\x00\xe0":
            raise ValueError("an offset does not lead to an item")


def check_stream(header: h.Header, data: bytes, limits: Limits) -> None:
    """Raise unless the codestream `data` declares the size the header declares and expands within `limits`."""
    unpacked = header.rows * header.columns * header.samples * header.bits // 8
    if unpacked > limits.expansion_floor_bytes and unpacked > limits.max_expansion * len(data):
        raise ResourceLimit(
            f"the frame's {len(data)} compressed bytes ask for {unpacked >> 20} MiB, "
            f"over {limits.max_expansion} times as much"
        )
    if header.transfer_syntax == h.RLE:
        check_rle(data, header.samples * max(header.bits // 8, 1))
        return
    size = j2k_size(data) if header.transfer_syntax in (*h.J2K, *h.HTJ2K) else jpeg_size(data)
    check_size(size, limits)
    if (size.rows, size.columns, size.samples) != (header.rows, header.columns, header.samples):
        raise InvalidInput(
            f"the compressed frame is {size.columns} x {size.rows} with {size.samples} samples, the header says "
            f"{header.columns} x {header.rows} with {header.samples}"
        )


def check_size(size: FrameSize, limits: Limits) -> None:
    """Raise ResourceLimit if a codestream or picture is larger than `limits`."""
    if size.rows * size.columns > limits.max_pixels:
        raise ResourceLimit(
            f"the picture asks for {size.columns} x {size.rows} pixels; the limit is {limits.max_pixels} pixels"
        )
