"""MedRegA's input pictures equal the published code's, and box numbers survive the way there and back."""

from typing import Any

import numpy as np
import pytest

from edgemed.errors import InvalidInput
from edgemed.families.medrega_view import MedRegaView, box_to_numbers, numbers_to_box

SIDE = 112  # of the tiny model

CASES = {
    "pixel_square": ("square", MedRegaView(SIDE)),
    "pixel_four_three": ("four_three", MedRegaView(SIDE)),
    "pixel_two_one": ("two_one", MedRegaView(SIDE)),
    "pixel_pad2square_four_three": ("four_three", MedRegaView(SIDE, pad_to_square=True)),
    "pixel_tiles_two_one": ("two_one", MedRegaView(SIDE, tiled=True, thumbnail=True)),
    "pixel_interp_square": ("square", MedRegaView(168)),
}


@pytest.mark.parametrize("name", CASES)
def test_pixels_equal_the_published_codes(reference: Any, name: str) -> None:
    tiny = reference("medrega-tiny")
    image, view = CASES[name]
    ours = view.model_image(tiny.input(f"image_{image}"))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(tiny.rows(name, ours), tiny.expected(name))


def test_without_a_thumbnail_there_are_the_tiles_alone(reference: Any) -> None:
    shown = reference("medrega-tiny").input("image_two_one")
    with_thumbnail = MedRegaView(SIDE, tiled=True, thumbnail=True).model_image(shown)
    tiles = MedRegaView(SIDE, tiled=True).model_image(shown)
    assert tiles.shape[0] == 2
    np.testing.assert_array_equal(tiles, with_thumbnail[:2])


def test_a_small_square_frame_is_one_tile_without_a_thumbnail() -> None:
    view = MedRegaView(SIDE, tiled=True, thumbnail=True)
    assert view.tile_grid(50, 50) == (1, 1)
    assert view.model_image(np.zeros((50, 50, 3), np.uint8)).shape == (1, 3, SIDE, SIDE)


@pytest.mark.parametrize(
    ("rows", "columns", "grid"),
    [(100, 600, (6, 1)), (600, 100, (1, 6)), (300, 200, (2, 3)), (200, 300, (3, 2)), (60, 60, (1, 1))],
)
def test_tiles_follow_the_shape_of_the_frame(rows: int, columns: int, grid: tuple[int, int]) -> None:
    assert MedRegaView(SIDE).tile_grid(rows, columns) == grid


def test_number_of_tiles_stays_within_the_limits() -> None:
    assert MedRegaView(SIDE, min_tiles=4, max_tiles=4).tile_grid(100, 100) == (2, 2)
    assert MedRegaView(SIDE, max_tiles=1).tile_grid(100, 600) == (1, 1)


@pytest.mark.parametrize("padded", [False, True])
def test_box_survives_the_way_to_numbers_and_back(padded: bool) -> None:
    box = (13.0, 40.0, 170.0, 299.0)
    numbers = box_to_numbers(box, 300, 220, padded=padded)
    back = numbers_to_box(numbers, 300, 220, padded=padded)
    np.testing.assert_allclose(back, box, atol=300 / 999)
    assert box_to_numbers(back, 300, 220, padded=padded) == numbers


def test_numbers_of_a_padded_frame_run_over_the_square() -> None:
    assert numbers_to_box((0, 0, 999, 999), 100, 200, padded=True) == (0, 0, 200, 100)
    x0, y0, x1, y1 = numbers_to_box((333, 500, 666, 999), 100, 200, padded=True)
    assert y0 == pytest.approx(500 / 999 * 200 - 50)
    assert (x0, x1, y1) == (pytest.approx(66.667, abs=1e-3), pytest.approx(133.333, abs=1e-3), 100)


def test_thin_box_keeps_an_extent() -> None:
    assert box_to_numbers((10.0, 10.0, 10.01, 10.01), 1000, 1000) == (10, 10, 11, 11)
    assert box_to_numbers((999.9, 999.9, 1000.0, 1000.0), 1000, 1000) == (998, 998, 999, 999)


def test_box_without_extent_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no part inside"):
        numbers_to_box((500, 10, 500, 20), 100, 100)


@pytest.mark.parametrize("shape", [(10, 10), (10, 10, 4), (0, 10, 3)])
def test_what_is_no_rgb_picture_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match=r"uint8 \[rows, columns, 3\] was expected"):
        MedRegaView().model_image(np.zeros(shape, np.uint8))


def test_impossible_tile_limits_are_refused() -> None:
    with pytest.raises(InvalidInput, match="3..2 tiles"):
        MedRegaView(min_tiles=3, max_tiles=2)
