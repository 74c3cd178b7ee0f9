"""PNG and JPEG pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgemed.core import Window
from edgemed.dicom import Reader
from edgemed.errors import CannotRead, InvalidInput

Array = np.ndarray[Any, Any]
GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
RGB = np.stack((GREY, 255 - GREY, GREY // 2), axis=-1)


def save(folder: Path, image: Image.Image, name: str = "picture.png", **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


def test_grey_png_is_shown_as_it_is(reader: Reader, tmp_path: Path) -> None:
    scan = reader.read(save(tmp_path, Image.fromarray(GREY)))
    assert (scan.modality, scan.window, scan.pixel_spacing_mm, scan.frames) == ("OT", Window(127.5, 255), None, 1)
    assert scan.pixels.dtype == np.float32
    np.testing.assert_array_equal(scan.pixels[0], GREY)
    np.testing.assert_array_equal(scan.shown(0)[..., 1], GREY)


def test_16_bit_png_keeps_its_values(reader: Reader, tmp_path: Path) -> None:
    wide = GREY.astype(np.uint16) * 257
    scan = reader.read(save(tmp_path, Image.fromarray(wide)))
    np.testing.assert_array_equal(scan.pixels[0], wide)
    np.testing.assert_array_equal(scan.shown(0)[..., 0], GREY)


def test_black_and_white_png(reader: Reader, tmp_path: Path) -> None:
    scan = reader.read(save(tmp_path, Image.fromarray(GREY > 99)))
    np.testing.assert_array_equal(scan.pixels[0], (GREY > 99) * 255.0)


def test_rgb_png_and_palette_png_are_rgb(reader: Reader, tmp_path: Path) -> None:
    np.testing.assert_array_equal(reader.read(save(tmp_path, Image.fromarray(RGB))).pixels[0], RGB)
    few = Image.fromarray(RGB).quantize(64)
    scan = reader.read(save(tmp_path, few, "palette.png"))
    np.testing.assert_array_equal(scan.pixels[0], np.asarray(few.convert("RGB")))


def test_transparency_is_over_black(reader: Reader, tmp_path: Path) -> None:
    rgba = np.dstack((RGB, np.where(GREY > 99, 255, 0).astype(np.uint8)))
    scan = reader.read(save(tmp_path, Image.fromarray(rgba)))
    np.testing.assert_array_equal(scan.pixels[0], RGB * (GREY > 99)[..., None])


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_modes(reader: Reader, tmp_path: Path, mode: str) -> None:
    image = Image.new("RGB", (32, 16), (200, 100, 50)).convert(mode)
    scan = reader.read(save(tmp_path, image, "picture.jpg", quality=95))
    assert scan.is_colour == (mode != "L")
    assert np.abs(scan.shown(0).astype(int) - np.asarray(image.convert("RGB"))).max() <= 3


def test_exif_orientation_is_applied(reader: Reader, tmp_path: Path) -> None:
    image = Image.new("L", (40, 16))
    image.paste(255, (0, 0, 20, 16))  # bright left half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    scan = reader.read(save(tmp_path, image, "turned.jpg", exif=exif, quality=95))
    assert (scan.rows, scan.columns) == (40, 16)
    assert scan.pixels[0, :18].min() > 230 and scan.pixels[0, 22:].max() < 25


def test_users_window_applies_to_grey_pictures_only(reader: Reader, tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(GREY))
    assert reader.read(path, window="100,50").window == Window(100, 50, exact=False)
    assert reader.read(save(tmp_path, Image.fromarray(RGB)), window="100,50").window is None


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated_picture(reader: Reader, tmp_path: Path, kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, kind)
    path = tmp_path / "short"
    path.write_bytes(buffer.getvalue()[:-800])
    with pytest.raises(CannotRead, match="truncated"):
        reader.read(path)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"\xff\xd8\xff" + b"\0" * 50])
def test_damaged_picture(reader: Reader, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(content)
    with pytest.raises(InvalidInput):
        reader.read(path)


def test_damaged_data_of_a_png(reader: Reader, tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(RGB))
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT") + 6
    data[at : at + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match="cannot be decoded"):
        reader.read(path)


def test_picture_has_one_frame(reader: Reader, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="frame 1"):
        reader.read(save(tmp_path, Image.fromarray(GREY)), frame=1)
