"""TIFF pictures: values, pages, and files that ask for too much."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgemed.core import Window
from edgemed.dicom import Limits, Reader, read_scan
from edgemed.errors import CannotRead, InvalidInput, ResourceLimit, UnsupportedDicom

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
RGB = np.stack((GREY, 255 - GREY, GREY // 2), axis=-1)


def save(folder: Path, data: np.ndarray[Any, Any], **options: Any) -> Path:
    Image.fromarray(data).save(folder / "picture.tif", **options)
    return folder / "picture.tif"


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("data", [GREY, GREY.astype(np.uint16) * 257, RGB], ids=["grey", "16 bit", "RGB"])
def test_values_are_those_of_the_file(
    reader: Reader, tmp_path: Path, data: np.ndarray[Any, Any], compression: str | None
) -> None:
    scan = reader.read(save(tmp_path, data, compression=compression))
    np.testing.assert_array_equal(scan.pixels[0], data)
    np.testing.assert_array_equal(scan.shown(0)[..., 0], GREY)
    assert (scan.modality, scan.total_frames, scan.pixel_spacing_mm) == ("OT", 1, None)


@pytest.mark.parametrize("kind", ["float32", "int32"])
def test_wide_values_get_the_window_of_what_is_there(reader: Reader, tmp_path: Path, kind: str) -> None:
    data = (GREY.astype(kind) * 1000 - 50_000).astype(kind)
    scan = reader.read(save(tmp_path, data))
    np.testing.assert_array_equal(scan.pixels[0], data)
    assert scan.window == Window(67_500, 235_000)


def test_big_endian_and_turned_by_its_orientation(reader: Reader, tmp_path: Path) -> None:
    entries = [(256, 4, 8), (257, 4, 6), (258, 3, 8 << 16), (259, 3, 1 << 16), (262, 3, 1 << 16), (273, 4, 134)]
    entries += [(274, 3, 6 << 16), (277, 3, 1 << 16), (278, 4, 6), (279, 4, 48)]
    rows = b"".join(struct.pack(">HHII", tag, kind, 1, value) for tag, kind, value in entries)
    data = struct.pack(">2sHIH", b"MM", 42, 8, len(entries)) + rows + bytes(4)
    (tmp_path / "a.tif").write_bytes(data + GREY.tobytes())
    scan = reader.read(tmp_path / "a.tif")
    np.testing.assert_array_equal(scan.pixels[0], np.rot90(GREY, -1))


def test_pages_are_frames(reader: Reader, tmp_path: Path) -> None:
    pages = [Image.fromarray(np.full((4, 5), value, np.uint8)) for value in (10, 20, 30)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    scan = reader.read(tmp_path / "a.tif", frame=2)
    assert (scan.pixels[0, 0, 0], scan.first_frame, scan.total_frames) == (30, 2, 3)
    with pytest.raises(InvalidInput, match=r"frame 3 was asked for; the picture has 3"):
        reader.read(tmp_path / "a.tif", frame=3)


def test_a_header_that_asks_for_too_much_is_refused(tmp_path: Path) -> None:
    whole = save(tmp_path, np.zeros((60, 60), np.uint8), compression="tiff_lzw").read_bytes()
    for tag, kind in ((256, "limit is"), (257, "limit is")):
        changed = bytearray(whole)
        first = struct.unpack_from("<I", whole, 4)[0] + 2
        at = next(k for k in range(first, len(whole), 12) if struct.unpack_from("<H", whole, k)[0] == tag)
        struct.pack_into("<HHII", changed, at, tag, 4, 1, 1_000_000)
        (tmp_path / "big.tif").write_bytes(changed)
        with pytest.raises(ResourceLimit, match=kind):
            read_scan(tmp_path / "big.tif", limits=Limits(max_pixels=1_000_000))
    small = save(tmp_path, np.zeros((5000, 5000), np.uint8), compression="tiff_adobe_deflate")
    with pytest.raises(ResourceLimit, match=r"bytes ask for 23 MiB"):
        read_scan(small, limits=Limits(max_expansion=100))


def test_damaged_files_end_in_their_error(reader: Reader, tmp_path: Path) -> None:
    whole = save(tmp_path, np.arange(10_000, dtype=np.uint16).reshape(100, 100)).read_bytes()
    broken = tmp_path / "broken.tif"
    for data in (whole[:8], whole[:200], whole[:-5000], whole[:4] + b"\xff" * 40, b"II*\0"):
        broken.write_bytes(data)
        with pytest.raises((CannotRead, InvalidInput, UnsupportedDicom)):
            reader.read(broken)
    pages = struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<HI", 0, 8)  # a directory that is its own next
    broken.write_bytes(pages)
    with pytest.raises((InvalidInput, UnsupportedDicom)):
        reader.read(broken)
