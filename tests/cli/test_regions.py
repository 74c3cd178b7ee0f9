"""The texts of --region and --example: forms, limits, masks from pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgemed.cli.regions import read_example, read_region
from edgemed.core import Scan, Window
from edgemed.dicom import read_scan
from edgemed.errors import CannotRead, EdgemedError, InvalidInput


@pytest.fixture
def scan() -> Scan:
    """A grey scan of 40 rows and 60 columns."""
    return Scan(np.zeros((1, 40, 60), np.float32), "CT", Window(40, 400))


def test_box_and_point_are_read_in_scan_pixels(scan: Scan) -> None:
    assert read_region("box:0,1.5,60,40", scan, read_scan).box == (0.0, 1.5, 60.0, 40.0)
    assert read_region("point:12,7.25", scan, read_scan).point == (12.0, 7.25)


@pytest.mark.parametrize(
    "text", ["", "box", "box:", "box:1,2,3", "box:1,2,3,x", "box:1,2,nan,4", "circle:1,2,3", "point:1,2,3", "mask:"]
)
def test_another_form_is_wrong_usage(text: str, scan: Scan) -> None:
    with pytest.raises(EdgemedError, match="box:x0,y0,x1,y1, point:x,y or mask:FILE.png") as caught:
        read_region(text, scan, read_scan)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("text", ["box:0,0,61,40", "box:-1,0,10,10", "point:10,41", "box:10,10,10,20", "point:60,10"])
def test_a_place_outside_or_empty_is_refused(text: str, scan: Scan) -> None:
    with pytest.raises(InvalidInput):
        read_region(text, scan, read_scan)


def test_a_mask_is_where_the_picture_is_not_black(scan: Scan, tmp_path: Path) -> None:
    pixels = np.zeros((40, 60), np.uint8)
    pixels[5:9, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    region = read_region(f"mask:{tmp_path / 'mask.png'}", scan, read_scan)
    assert region.mask is not None
    assert np.array_equal(region.mask, pixels > 0)


def test_a_mask_of_another_size_or_without_a_pixel_is_refused(scan: Scan, tmp_path: Path) -> None:
    Image.fromarray(np.ones((40, 59), np.uint8)).save(tmp_path / "small.png")
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(tmp_path / "black.png")
    with pytest.raises(InvalidInput, match="59 x 40"):
        read_region(f"mask:{tmp_path / 'small.png'}", scan, read_scan)
    with pytest.raises(InvalidInput, match="black"):
        read_region(f"mask:{tmp_path / 'black.png'}", scan, read_scan)


def test_an_example_is_an_image_and_where_its_mask_is_not_black(tmp_path: Path) -> None:
    image, mask = tmp_path / "a=b.png", tmp_path / "mask.png"
    Image.fromarray(np.full((30, 20, 3), 90, np.uint8)).save(image)
    pixels = np.zeros((30, 20), np.uint8)
    pixels[3:9, 4:8] = 1
    Image.fromarray(pixels).save(mask)
    example = read_example(f"{image}={mask}", read_scan, read_scan)
    assert (example.scan.rows, example.scan.columns, example.frame) == (30, 20, 0)
    assert np.array_equal(example.mask, pixels == 1)


def test_an_example_that_does_not_hold_is_told(tmp_path: Path) -> None:
    image, black, small = (tmp_path / name for name in ("image.png", "black.png", "small.png"))
    Image.fromarray(np.zeros((30, 20), np.uint8)).save(image)
    Image.fromarray(np.zeros((30, 20), np.uint8)).save(black)
    Image.fromarray(np.ones((30, 19), np.uint8)).save(small)
    for text in ("", str(image), f"{image}=", f"={small}"):
        with pytest.raises(EdgemedError, match=r"another form than IMAGE=MASK\.png") as caught:
            read_example(text, read_scan, read_scan)
        assert caught.value.exit_code == 1
    with pytest.raises(InvalidInput, match="black"):
        read_example(f"{image}={black}", read_scan, read_scan)
    with pytest.raises(InvalidInput, match="19 x 30"):
        read_example(f"{image}={small}", read_scan, read_scan)
    with pytest.raises(CannotRead, match=r"missing\.png does not exist"):
        read_example(f"{image}={tmp_path / 'missing.png'}", read_scan, read_scan)
