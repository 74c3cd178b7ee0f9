"""Every photometric interpretation, bit depth and transfer syntax, from phantoms with known stored values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from pydicom.pixels import get_encoder
from pydicom.uid import RLELossless

from edgemed.dicom import Reader
from edgemed.errors import UnsupportedDicom

Write = Callable[..., Path]
Array = np.ndarray[Any, Any]
JPEG = "1.2.840.10008.1.2.4."


def grey(dtype: str, low: int, high: int, rows: int = 7, columns: int = 9) -> Array:
    values = np.linspace(low, high, rows * columns).round().astype(dtype)
    return values.reshape(rows, columns)


def smooth(rows: int = 32, columns: int = 48) -> Array:
    """Return RGB that survives lossy coding and chroma subsampling."""
    y, x = np.mgrid[0:rows, 0:columns]
    return np.stack((x * 5, y * 7, 255 - x * 5), axis=-1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("syntax", ["", ".1", ".2", ".1.99"], ids=["implicit", "explicit", "big-endian", "deflated"])
@pytest.mark.parametrize(
    ("dtype", "stored", "low", "high"),
    [
        ("u1", 8, 0, 255),
        ("u2", 12, 0, 4095),
        ("u2", 16, 0, 65535),
        ("i2", 12, -2048, 2047),
        ("i2", 16, -32768, 32767),
        ("u4", 32, 0, 100_000),
        ("i4", 32, -100_000, 100_000),
    ],
)
def test_native_grey_is_read_as_stored(
    reader: Reader, write_dicom: Write, syntax: str, dtype: str, stored: int, low: int, high: int
) -> None:
    image = grey(dtype, low, high)
    scan = reader.read(write_dicom(image, syntax="1.2.840.10008.1.2" + syntax, BitsStored=stored))
    assert scan.pixels.dtype == np.float32
    np.testing.assert_array_equal(scan.pixels[0], image)


def test_signed_values_with_foreign_upper_bits_are_sign_extended(reader: Reader, write_dicom: Write) -> None:
    image = grey("i2", -2048, 2047)
    dirty = (image & 0x0FFF).astype(np.uint16) | 0x5000
    path = write_dicom(dirty.view(np.int16), BitsStored=12, PixelRepresentation=1)
    np.testing.assert_array_equal(reader.read(path).pixels[0], image)


def test_values_in_the_upper_bits_are_brought_down(reader: Reader, write_dicom: Write) -> None:
    image = grey("u2", 0, 4095)
    path = write_dicom(image << 4, BitsStored=12, HighBit=15)
    np.testing.assert_array_equal(reader.read(path).pixels[0], image)


def test_one_bit_frames_need_not_start_on_a_byte(reader: Reader, write_dicom: Write) -> None:
    bits = np.random.default_rng(0).integers(0, 2, (3, 5, 7), dtype=np.uint8)
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    path = write_dicom(bits, frames=True, BitsAllocated=1, BitsStored=1, PixelData=packed + b"\0" * (len(packed) % 2))
    for frame in range(3):
        scan = reader.read(path, frame=frame)
        np.testing.assert_array_equal(scan.pixels[0], bits[frame])
        assert (scan.first_frame, scan.frames, scan.shown(frame).max()) == (frame, 3, 255)


@pytest.mark.parametrize(("keyword", "dtype"), [("FloatPixelData", "<f4"), ("DoubleFloatPixelData", "<f8")])
def test_float_pixels_are_read_and_nan_becomes_the_smallest(
    reader: Reader, write_dicom: Write, keyword: str, dtype: str
) -> None:
    values = np.array([[0.25, -1.5], [np.nan, 3e5]], dtype)
    image = np.zeros((2, 2), "u4" if dtype == "<f4" else "u8")
    elements: dict[str, Any] = {keyword: values.tobytes(), "PixelData": None, "BitsStored": None, "HighBit": None}
    scan = reader.read(write_dicom(image, PixelRepresentation=None, **elements))
    np.testing.assert_array_equal(scan.pixels[0], np.array([[0.25, -1.5], [-1.5, 3e5]], np.float32))


@pytest.mark.parametrize("syntax", [".1", ".2"])
@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize(("dtype", "shift"), [("u1", 0), ("u2", 8)])
def test_rgb_is_read_in_both_planar_configurations(
    reader: Reader, write_dicom: Write, syntax: str, planar: int, dtype: str, shift: int
) -> None:
    rgb = smooth(6, 10)
    wide = rgb.astype(dtype) << shift
    stored = np.moveaxis(wide, -1, 0) if planar else wide
    path = write_dicom(
        wide,
        syntax="1.2.840.10008.1.2" + syntax,
        PlanarConfiguration=planar,
        PixelData=stored.astype(stored.dtype.newbyteorder(">" if syntax == ".2" else "<")).tobytes(),
    )
    scan = reader.read(path)
    assert scan.window is None
    np.testing.assert_array_equal(scan.pixels[0], rgb)


def ybr(rgb: Array) -> Array:
    """Return YBR_FULL of RGB, float. Source: PS3.3 C.7.6.3.1.2."""
    matrix = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    image: Array = rgb.astype(float) @ matrix.T + (0, 128, 128)
    return image


@pytest.mark.parametrize("planar", [0, 1])
def test_ybr_full_becomes_rgb(reader: Reader, write_dicom: Write, planar: int) -> None:
    rgb = smooth()
    image = ybr(rgb).round().clip(0, 255).astype(np.uint8)
    stored = np.moveaxis(image, -1, 0) if planar else image
    scan = reader.read(
        write_dicom(image, PhotometricInterpretation="YBR_FULL", PlanarConfiguration=planar, PixelData=stored.tobytes())
    )
    assert np.abs(scan.pixels[0].astype(int) - rgb).max() <= 2


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("subsampled", [False, True])
def test_ybr_422_becomes_rgb(reader: Reader, write_dicom: Write, partial: bool, subsampled: bool) -> None:
    rgb = np.repeat(smooth()[:, ::2], 2, axis=1)  # pairs of equal columns: subsampling loses nothing
    image = ybr(rgb)
    if partial:
        image = (image - (0, 128, 128)) * (219 / 255, 224 / 255, 224 / 255) + (16, 128, 128)
    image = image.round().clip(0, 255).astype(np.uint8)
    pairs = np.stack((image[:, ::2, 0], image[:, 1::2, 0], image[:, ::2, 1], image[:, ::2, 2]), axis=-1)
    data = pairs.tobytes() if subsampled else image.tobytes()
    name = "YBR_PARTIAL_422" if partial else "YBR_FULL_422"
    scan = reader.read(write_dicom(image, PhotometricInterpretation=name, PixelData=data))
    assert np.abs(scan.pixels[0].astype(int) - rgb).max() <= 3


def palette(entries: int, first: int, bits: int, **extra: Any) -> dict[str, Any]:
    """Return elements of a palette: red rises, green falls, blue is 7 * index, 8 significant bits."""
    ramp = np.arange(entries)
    tables = {"Red": ramp % 256, "Green": 255 - ramp % 256, "Blue": ramp * 7 % 256}
    found: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR", **extra}
    for name, table in tables.items():
        data = (table << 8).astype("<u2") if bits == 16 else table.astype("u1")
        found[f"{name}PaletteColorLookupTableDescriptor"] = [entries, first, bits]
        found[f"{name}PaletteColorLookupTableData"] = data.tobytes()
    return found


@pytest.mark.parametrize("bits", [8, 16])
def test_palette_maps_and_clamps_indices(reader: Reader, write_dicom: Write, bits: int) -> None:
    image = np.array([[0, 9, 10], [11, 73, 255]], np.uint8)
    scan = reader.read(write_dicom(image, **palette(64, 10, bits)))
    index = np.clip(image.astype(int) - 10, 0, 63)
    np.testing.assert_array_equal(scan.pixels[0], np.stack((index, 255 - index, index * 7 % 256), axis=-1))


def test_segmented_palette_is_expanded(reader: Reader, write_dicom: Write) -> None:
    image = np.array([[0, 1, 2, 4, 5, 9]], np.uint8)
    # Discrete segment of 2 entries (10, 20), then a linear segment of 4 entries up to 60. PS3.3 C.7.9.2.
    segments = np.array([0, 2, 10, 20, 1, 4, 60], "u1").tobytes()
    elements: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name in ("Red", "Green", "Blue"):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [6, 0, 8]
        elements[f"Segmented{name}PaletteColorLookupTableData"] = segments + b"\0" * (len(segments) % 2)
    scan = reader.read(write_dicom(image, **elements))
    np.testing.assert_array_equal(scan.pixels[0, 0, :, 0], [10, 20, 30, 50, 60, 60])


def test_supplemental_palette_colours_only_from_its_first_value(reader: Reader, write_dicom: Write) -> None:
    image = np.array([[0, 50, 99, 100, 101]], np.uint16)
    elements = palette(16, 100, 16, PixelPresentation="COLOR", WindowCenter=50, WindowWidth=101)
    elements["PhotometricInterpretation"] = "MONOCHROME2"
    scan = reader.read(write_dicom(image, **elements))
    grey_levels = [round(v) for v in (np.array([0, 50, 99]) + 0.5) * 255 / 100]
    assert scan.is_colour
    assert [int(p[0]) for p in scan.pixels[0, 0, :3]] == grey_levels
    np.testing.assert_array_equal(scan.pixels[0, 0, 3:], [[0, 255, 0], [1, 254, 7]])


def htj2k(image: Array) -> bytes:
    return bytes(imagecodecs.htj2k_encode(image, reversible=True))


def ljpeg(image: Array) -> bytes:
    return bytes(imagecodecs.ljpeg_encode(image, bitspersample=12 if image.dtype == np.uint16 else 8))


LOSSLESS: dict[str, Callable[[Array], bytes]] = {
    JPEG + "57": ljpeg,
    JPEG + "70": ljpeg,
    JPEG + "80": lambda a: bytes(imagecodecs.jpegls_encode(a)),
    JPEG + "90": lambda a: bytes(imagecodecs.jpeg2k_encode(a, level=0, codecformat="j2k", reversible=True)),
    JPEG + "201": htj2k,
    JPEG + "202": htj2k,
    JPEG + "203": htj2k,
}


@pytest.mark.parametrize("syntax", LOSSLESS)
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_lossless_compression_gives_the_stored_values(
    reader: Reader, write_dicom: Write, syntax: str, dtype: str
) -> None:
    image = grey(dtype, 0, 255 if dtype == "u1" else 4095, 64, 96)
    scan = reader.read(write_dicom(image, syntax=syntax, encoded=[LOSSLESS[syntax](image)]))
    np.testing.assert_array_equal(scan.pixels[0], image)


@pytest.mark.parametrize("number", ["57", "70", "80", "90", "201"])
@pytest.mark.parametrize(("dtype", "stored"), [("i1", 7), ("i2", 12), ("i2", 13), ("i2", 16)])
@pytest.mark.parametrize("above", ["sign", "zero"])
def test_signed_values_keep_their_sign_whatever_the_codestream_holds_above_them(
    reader: Reader, write_dicom: Write, number: str, dtype: str, stored: int, above: str
) -> None:
    image = grey(dtype, -(1 << stored - 1), (1 << stored - 1) - 1, 32, 32)
    bits = image.view(dtype.replace("i", "u"))
    if above == "zero":
        bits = bits & bits.dtype.type((1 << stored) - 1)
    is_jpeg, depth = number in ("57", "70"), 8 * image.itemsize
    frame = bytes(imagecodecs.ljpeg_encode(bits, bitspersample=depth)) if is_jpeg else LOSSLESS[JPEG + number](bits)
    path = write_dicom(image, syntax=JPEG + number, BitsStored=stored, encoded=[frame])
    np.testing.assert_array_equal(reader.read(path).pixels[0], image)


@pytest.mark.parametrize("dtype", ["i1", "i2"])
def test_near_lossless_signed_values_keep_their_sign(reader: Reader, write_dicom: Write, dtype: str) -> None:
    top = 127 if dtype == "i1" else 32767
    image = np.where(grey(dtype, -top, top, 32, 32) < 0, -20, grey(dtype, 8, top - 8, 32, 32)).astype(dtype)
    frame = bytes(imagecodecs.jpegls_encode(image.view(f"u{image.itemsize}"), level=2))
    scan = reader.read(write_dicom(image, syntax=JPEG + "81", encoded=[frame]))
    assert np.abs(scan.pixels[0] - image).max() <= 2


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2"])
def test_rle_gives_the_stored_values(reader: Reader, write_dicom: Write, dtype: str) -> None:
    image = grey(dtype, 0, 255 if dtype == "u1" else 4095, 16, 24)
    frame = get_encoder(RLELossless).encode(
        image.tobytes(), rows=16, columns=24, samples_per_pixel=1, number_of_frames=1, pixel_keyword="PixelData",
        bits_allocated=8 * image.itemsize, bits_stored=8 * image.itemsize, pixel_representation=int(dtype == "i2"),
        photometric_interpretation="MONOCHROME2",
    )  # fmt: skip
    scan = reader.read(write_dicom(image, syntax=str(RLELossless), encoded=[frame]))
    np.testing.assert_array_equal(scan.pixels[0], image)


def test_twelve_bit_jpeg_extended_is_read(reader: Reader, write_dicom: Write) -> None:
    image = grey("u2", 100, 4000, 64, 96)
    frame = bytes(imagecodecs.jpeg_encode(image, level=98, bitspersample=12))
    scan = reader.read(write_dicom(image, syntax=JPEG + "51", encoded=[frame], BitsStored=12))
    assert np.abs(scan.pixels[0] - image).max() < 30


@pytest.mark.parametrize("number", ["50", "57", "70"])
@pytest.mark.parametrize(
    "segment",
    [b"\xff\xe0\0\x04JF", b"\xff\xe0\0\x07JFIF\0", b"\xff\xff\xff\xfe\0\x04ab",
     b"\xff\xe0\0\x10JFIF\0\x09\x09\x05\0\0\0\0\x10\x10"],
    ids=["no JFIF", "cut", "fill bytes and a comment", "unknown version, on which gdcm ends its process"],
)  # fmt: skip
def test_odd_markers_of_a_jpeg_do_no_harm(reader: Reader, write_dicom: Write, number: str, segment: bytes) -> None:
    image = grey("u1", 0, 255, 64, 96)
    frame = bytes(imagecodecs.jpeg_encode(image, level=98)) if number == "50" else ljpeg(image)
    path = write_dicom(image, syntax=JPEG + number, encoded=[frame[:2] + segment + frame[2:]])
    assert np.abs(reader.read(path).pixels[0] - image).max() <= (2 if number == "50" else 0)


@pytest.mark.parametrize("photometric", ["YBR_FULL_422", "YBR_FULL"])
def test_jpeg_baseline_colour_is_read(reader: Reader, write_dicom: Write, photometric: str) -> None:
    rgb = smooth()
    frame = bytes(imagecodecs.jpeg_encode(rgb, level=98, subsampling="444" if photometric == "YBR_FULL" else "422"))
    scan = reader.read(write_dicom(rgb, syntax=JPEG + "50", encoded=[frame], PhotometricInterpretation=photometric))
    assert np.abs(scan.pixels[0].astype(int) - rgb).mean() < 4


def test_jpeg_2000_colour_transform_is_undone(reader: Reader, write_dicom: Write) -> None:
    rgb = smooth()
    frame = bytes(imagecodecs.jpeg2k_encode(rgb, level=0, codecformat="j2k", mct=True, reversible=True))
    scan = reader.read(write_dicom(rgb, syntax=JPEG + "90", encoded=[frame], PhotometricInterpretation="YBR_RCT"))
    np.testing.assert_array_equal(scan.pixels[0], rgb)


def test_each_frame_of_a_compressed_file_is_its_own(reader: Reader, write_dicom: Write) -> None:
    images = np.stack([grey("u1", 0, top, 32, 32) for top in (50, 150, 250)])
    frames = [LOSSLESS[JPEG + "90"](image) for image in images]
    path = write_dicom(images, frames=True, syntax=JPEG + "90", encoded=frames)
    for n in (2, 0, 1):
        np.testing.assert_array_equal(reader.read(path, frame=n).pixels[0], images[n])


@pytest.mark.parametrize(
    "uid", [*(JPEG + n for n in ("100", "110", "111", "112")), "1.2.840.10008.1.2.8.1", "1.2.3.4.5.6.7.8.9.10.11"]
)
def test_other_transfer_syntaxes_are_unsupported(reader: Reader, write_dicom: Write, uid: str) -> None:
    placeholder = JPEG + ("201" if len(uid) == 23 else "90")
    path = write_dicom(grey("u1", 0, 9), syntax=placeholder, encoded=[b"\0" * 64])
    width = len(placeholder) + len(placeholder) % 2
    old, new = (text.encode().ljust(width, b"\0") for text in (placeholder, uid))
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(UnsupportedDicom, match="transfer syntax"):
        reader.read(path)


@pytest.mark.parametrize("photometric", ["HSV", "CMYK", "XYB", "YBR_PARTIAL_420"])
def test_other_colour_spaces_are_unsupported(reader: Reader, write_dicom: Write, photometric: str) -> None:
    with pytest.raises(UnsupportedDicom):
        reader.read(write_dicom(smooth(4, 4), PhotometricInterpretation=photometric))
