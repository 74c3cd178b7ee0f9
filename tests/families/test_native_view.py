"""The crop: the body and nothing beside it, the same for the same picture."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from edgemed.errors import InvalidInput
from edgemed.families.native_view import SIDE, is_grey, model_image, model_view

Picture = npt.NDArray[np.uint8]


def grey(plane: npt.NDArray[np.floating]) -> Picture:
    return np.repeat(plane.astype(np.uint8)[..., None], 3, axis=2)


def ellipse(rows: int, columns: int, cy: float, cx: float, ry: float, rx: float) -> npt.NDArray[np.bool_]:
    y, x = np.mgrid[:rows, :columns]
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1


def trunk(value: float = 130.0) -> npt.NDArray[np.float64]:
    """A trunk with two lungs, 300 columns x 200 rows around (256, 240) of a 512 square."""
    image = np.zeros((512, 512))
    image[ellipse(512, 512, 240, 256, 100, 150)] = value
    for cx in (190, 322):
        image[ellipse(512, 512, 240, cx, 60, 50)] = 0
    return image


def sides(picture: Picture, modality: str = "CT") -> tuple[float, float, float, float]:
    """Return what the model sees of the picture: x0, y0, x1, y1 in scan pixels."""
    view = model_view(picture, modality)
    return (view.left, view.top, view.left + SIDE / view.scale_x, view.top + SIDE / view.scale_y)


def assert_around_trunk(seen: tuple[float, float, float, float]) -> None:
    x0, y0, x1, y1 = seen
    assert 76 <= x0 <= 106  # the trunk's first column is 106
    assert 406 <= x1 <= 436
    assert x1 - x0 == pytest.approx(y1 - y0)
    assert y0 <= 140
    assert y1 >= 340


def test_body_is_cropped_to_a_square_with_a_margin() -> None:
    assert_around_trunk(sides(grey(trunk())))


def test_table_and_free_arm_and_text_fall_away() -> None:
    image = trunk()
    image[380:384, 40:480] = 150
    image[ellipse(512, 512, 260, 45, 40, 30)] = 130
    image[5:20, 5:90:3] = 255
    assert_around_trunk(sides(grey(image)))


def test_arm_that_touches_the_trunk_is_cut_off() -> None:
    image = trunk()
    image[ellipse(512, 512, 250, 79, 30, 28)] = 130  # reaches column 107; the trunk starts at 106
    assert_around_trunk(sides(grey(image)))


def test_lungs_are_inside_and_noise_in_air_is_not_body() -> None:
    rng = np.random.default_rng(1)
    image = np.clip(trunk() + rng.normal(0, 6, (512, 512)), 0, 255)
    assert_around_trunk(sides(grey(image)))


def test_grey_air_of_a_lung_window_is_background() -> None:
    image = np.where(trunk(255.0) > 0, 235.0, 59.0) + np.random.default_rng(0).normal(0, 3, (512, 512))
    assert_around_trunk(sides(grey(image)))


def test_both_legs_are_kept() -> None:
    image = np.zeros((512, 512))
    image[ellipse(512, 512, 256, 150, 70, 60)] = 130
    image[ellipse(512, 512, 256, 350, 70, 60)] = 130
    x0, _, x1, _ = sides(grey(image))
    assert x0 <= 90
    assert x1 >= 410


@pytest.mark.parametrize(
    "image", [np.zeros((64, 80)), np.full((64, 80), 200.0), np.eye(64)], ids=["black", "white", "line"]
)
def test_picture_without_a_body_is_seen_whole(image: npt.NDArray[np.float64]) -> None:
    view = model_view(grey(image), "MR")
    rows, columns = image.shape
    assert (view.left, view.top, view.scale_x) == (0, 0, SIDE / max(rows, columns))


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (3, 5), (129, 257)])
def test_any_size_gives_a_view_and_an_image(shape: tuple[int, int]) -> None:
    picture = grey(np.random.default_rng(0).uniform(0, 255, shape))
    for modality in ("CT", "US", "DX", "OT"):
        view = model_view(picture, modality)
        image = model_image(picture, view)
        assert image.shape == (3, SIDE, SIDE)
        assert image.dtype == np.float32
        assert image.min() >= 0
        assert image.max() <= 1


@pytest.mark.parametrize("modality", ["DX", "X-ray", "cr", "MG"])
def test_projection_is_seen_whole(modality: str) -> None:
    view = model_view(grey(trunk()), modality)
    assert (view.left, view.top, view.scale_x, view.scale_y) == (0, 0, 0.5, 0.5)


@pytest.mark.parametrize("modality", ["US", "ultrasound", "fundus", "OT", ""])
def test_black_borders_of_a_colour_picture_are_cut(modality: str) -> None:
    picture = np.zeros((400, 600, 3), np.uint8)
    picture[50:350, 150:450] = (180, 60, 20)
    x0, y0, x1, y1 = sides(picture, modality)
    assert x0 == pytest.approx(150, abs=5)
    assert y0 == pytest.approx(50, abs=5)
    assert x1 == pytest.approx(450, abs=5)
    assert y1 == pytest.approx(350, abs=5)


def test_grey_of_unknown_kind_is_cropped_like_ct_if_its_rim_is_dark() -> None:
    assert sides(grey(trunk()), "OT") == sides(grey(trunk()), "CT")
    bright = np.full((300, 300), 90.0)
    assert sides(grey(bright), "OT") == (0, 0, 300, 300)


def test_pixels_that_are_not_square_are_made_square() -> None:
    view = model_view(grey(trunk()), "CT", (2.0, 1.0))
    assert view.scale_y == pytest.approx(2 * view.scale_x)


def test_image_shows_the_crop_in_0_to_1_with_padding_0() -> None:
    picture = np.full((100, 200, 3), 255, np.uint8)
    image = model_image(picture, model_view(picture, "DX"))
    np.testing.assert_allclose(image[:, :128], 1.0, atol=1e-6)
    np.testing.assert_array_equal(image[:, 128:], 0.0)


def test_grey_and_colour_paths_agree() -> None:
    picture = grey(np.random.default_rng(0).uniform(0, 255, (130, 170)))
    view = model_view(picture, "CT")
    slow = view.image_to_model(picture).transpose(2, 0, 1) / 255
    assert is_grey(picture)
    np.testing.assert_allclose(model_image(picture, view), slow, atol=1e-6)


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(InvalidInput, match="float64"):
        model_view(np.zeros((4, 4, 3)), "CT")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"\[4, 4\]"):
        model_view(np.zeros((4, 4), np.uint8), "CT")
