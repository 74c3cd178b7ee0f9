"""MedPLIB's input pictures, region maps and masks equal the published code's."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgemed.core import PromptRegion
from edgemed.errors import InvalidInput
from edgemed.families import medplib_view
from edgemed.families.medplib_view import (
    MedplibView,
    Placed,
    mask_picture,
    overlaid,
    placed,
    postprocess,
    region_mask,
    region_weights,
    to_mask,
    view_of,
)

TINY = "medplib-tiny"
VIEW = MedplibView()
IMAGES = ("square", "four_three", "two_one")
UI = {
    "ui_point": PromptRegion("point", point=(150.5, 70.5)),
    "ui_point_corner": PromptRegion("point", point=(235.0, 3.0)),
    "ui_box": PromptRegion("box", box=(20.0, 60.0, 121.0, 151.0)),
}
POST = ("256x256_to_96x96", "192x256_to_72x96", "191x256_to_71x96", "190x256_to_71x96", "180x256_to_68x96")
POST += ("160x256_to_60x96", "128x256_to_48x96", "100x256_to_38x96", "64x256_to_24x96")
POST += ("256x192_to_96x72", "256x171_to_96x64", "256x128_to_96x48")


@pytest.mark.parametrize("image", IMAGES)
def test_clip_pixels_equal_the_published_codes(reference: Any, image: str) -> None:
    tiny = reference(TINY)
    ours = VIEW.clip_image(tiny.input(f"image_{image}"))
    name = f"pixel_clip_{image}"
    np.testing.assert_array_equal(tiny.rows(name, ours), tiny.expected(name))


@pytest.mark.parametrize("image", IMAGES)
def test_sam_pixels_equal_the_published_codes(reference: Any, image: str) -> None:
    tiny = reference(TINY)
    ours = VIEW.sam_image(tiny.input(f"image_{image}"))
    name = f"pixel_sam_{image}"
    np.testing.assert_array_equal(tiny.rows(name, ours), tiny.expected(name))


@pytest.mark.parametrize("image", IMAGES)
def test_region_on_clips_input_equals_the_published_codes(reference: Any, image: str) -> None:
    tiny = reference(TINY)
    ours = VIEW.region_square(tiny.input(f"region_mask_{image}"))
    name = f"region_mask336_{image}"
    np.testing.assert_array_equal(tiny.rows(name, ours), tiny.expected(name))


@pytest.mark.parametrize("case", [*IMAGES, *UI])
def test_region_map_equals_the_published_codes(reference: Any, case: str) -> None:
    tiny = reference(TINY)
    ours = VIEW.region_map(tiny.input(f"region_mask_{case}"))
    name = f"region_mask24_{case}"
    np.testing.assert_array_equal(tiny.rows(name, ours), tiny.expected(name))


@pytest.mark.parametrize("case", UI)
def test_points_and_boxes_become_the_masks_of_the_published_page(reference: Any, case: str) -> None:
    expected = reference(TINY).input(f"region_mask_{case}")
    np.testing.assert_array_equal(region_mask(UI[case], *expected.shape), expected.astype(bool))


@pytest.mark.parametrize(
    ("case", "image"), [("square", "square"), ("four_three", "four_three"), *((case, "four_three") for case in UI)]
)
def test_region_weights_pool_features_as_the_published_code_does(reference: Any, case: str, image: str) -> None:
    tiny = reference(TINY)
    if f"clip_features_{image}" in tiny.steps:
        pytest.skip(f"the compact copy has not all of clip_features_{image}; the full folder has")
    weights = tensors(tiny / "model.safetensors")
    features = tiny.expected(f"clip_features_{image}")[0]  # [576, width]
    adapted = features @ weights("model.region_fea_adapter.weight").T + weights("model.region_fea_adapter.bias")
    ours = region_weights(tiny.expected(f"region_mask24_{case}")) @ adapted
    np.testing.assert_allclose(ours, tiny.expected(f"region_embedding_{case}")[0], atol=1e-4)


def tensors(path: Path) -> Any:
    """Return a reader of single float32 tensors of a safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])

    def read(name: str) -> npt.NDArray[np.float32]:
        begin, end = header[name]["data_offsets"]
        return np.frombuffer(data[start + begin : start + end], np.float32).reshape(header[name]["shape"])

    return read


def test_region_weights_of_one_patch_by_hand() -> None:
    cells = np.zeros((24, 24), np.uint8)
    cells[12, 0] = 1  # samples row 12 * 23 / 24 = 11.5, column 0
    expected = np.zeros((24, 24), np.float32)
    expected[11, 0] = expected[12, 0] = 0.5
    np.testing.assert_allclose(region_weights(cells).reshape(24, 24), expected, atol=1e-7)


def test_region_weights_add_up_to_one_even_for_the_whole_picture() -> None:
    assert region_weights(np.ones((24, 24), np.uint8)).sum() == pytest.approx(1, abs=1e-5)


def test_region_too_small_for_the_grid_takes_the_patch_of_its_centre() -> None:
    mask = np.zeros((336, 336), np.uint8)
    mask[100:103, 200:203] = 1
    assert not VIEW.region_square(mask)[::14, ::14].any()
    assert np.argwhere(VIEW.region_map(mask)).tolist() == [[101 // 14, 201 // 14]]


@pytest.mark.parametrize("sizes", POST)
def test_reference_postprocessing_equals_the_published_codes(reference: Any, sizes: str) -> None:
    tiny = reference(TINY)
    name = f"post_{sizes}"
    height, width, rows, columns = map(int, re.findall(r"\d+", sizes))
    low_res = whole(tiny, "low_res_mask_ground_square_demo")[0, 0]
    place = Placed(height, width, 0, 0)
    ours = medplib_view._postprocess(low_res, place, rows, columns, 256, "reference")
    np.testing.assert_allclose(tiny.rows(name, ours[None, None]), tiny.expected(name), atol=5e-4)


@pytest.mark.parametrize(
    ("resized", "first"), [(256, 0), (192, 0), (191, 0), (190, 1), (180, 6), (160, 16), (128, 32), (100, 46), (64, 0)]
)
def test_reference_mode_keeps_the_published_rows_of_the_map(resized: int, first: int) -> None:
    rows = np.repeat(np.arange(64, dtype=np.float32)[:, None], 64, axis=1)
    kept = medplib_view._slice(rows, resized)[:, 0]
    np.testing.assert_array_equal(kept, np.arange(first, 64))


def test_reference_mode_stretches_what_it_keeps_over_the_frame() -> None:
    rows = np.repeat(np.arange(64, dtype=np.float32)[:, None], 64, axis=1)
    column = postprocess(rows, 150, 300)[:, 0]  # 128 x 256 on SAM's input: rows 32 to 63
    expected = np.clip(32 + (np.arange(150) + 0.5) * 32 / 150 - 0.5, 32, 63)
    np.testing.assert_allclose(column, expected, atol=1e-4)


def whole(tiny: Any, name: str) -> npt.NDArray[Any]:
    if name in tiny.steps:
        pytest.skip(f"the compact copy has not all of {name}; the full folder has")
    return np.asarray(tiny.expected(name))


MASKS = [f"{image}_{variant}" for image in IMAGES for variant in ("v1", "demo")]


@pytest.mark.parametrize("case", [*MASKS, *(f"release_cli_{image}_v1" for image in IMAGES)])
def test_masks_in_scan_pixels_equal_the_published_codes(reference: Any, case: str) -> None:
    tiny = reference(TINY)
    prefix = "release_cli_" if case.startswith("release_cli_") else ""
    case = "ground_" + case.removeprefix("release_cli_")
    rows, columns = tiny.input(f"image_{case.removeprefix('ground_').rpartition('_')[0]}").shape[:2]
    logits = postprocess(whole(tiny, f"{prefix}low_res_mask_{case}")[0, 0], rows, columns)
    name = f"{prefix}mask_logits_{case}"
    if name in tiny.names:
        np.testing.assert_allclose(tiny.rows(name, logits[None]), tiny.expected(name), atol=5e-4)
    name = f"{prefix}mask_binary_{case}"
    certain = tiny.rows(name, np.abs(logits - math.log(1 / 9))[None]) >= 1e-3
    wrong = tiny.rows(name, to_mask(logits)[None]) != tiny.expected(name).astype(bool)
    assert not (wrong & certain).any()


@pytest.mark.parametrize(("rows", "columns"), [(300, 150), (150, 300), (200, 200), (90, 300)])
def test_corrected_postprocessing_puts_a_blob_where_it_is(rows: int, columns: int) -> None:
    place = placed(rows, columns, 256)
    y, x = np.mgrid[0:64, 0:64] * 4 + 2.0  # centres of the map's pixels on SAM's input
    row, column = 0.75 * rows, 0.25 * columns
    peak_y, peak_x = place.top + row * place.rows / rows, place.left + column * place.columns / columns
    logits = postprocess(-np.hypot(y - peak_y, x - peak_x), rows, columns, mode="corrected")
    assert logits.shape == (rows, columns)
    found = np.unravel_index(np.argmax(logits), logits.shape)
    np.testing.assert_allclose(found, (row, column), atol=4 * rows / place.rows)


def test_both_modes_agree_on_a_square_frame() -> None:
    low_res = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    np.testing.assert_allclose(
        postprocess(low_res, 180, 180), postprocess(low_res, 180, 180, mode="corrected"), atol=1e-6
    )


def test_mask_region_is_taken_as_it_is_and_its_size_checked() -> None:
    mask = np.zeros((5, 6), np.bool_)
    mask[2, 3] = True
    region = PromptRegion("mask", mask=mask)
    np.testing.assert_array_equal(region_mask(region, 5, 6), mask)
    with pytest.raises(InvalidInput, match=r"the frame's \[6, 5\]"):
        region_mask(region, 6, 5)


def test_region_outside_the_frame_is_refused() -> None:
    with pytest.raises(InvalidInput, match="outside the frame"):
        region_mask(PromptRegion("box", box=(50.0, 50.0, 60.0, 60.0)), 40, 40)
    with pytest.raises(InvalidInput, match="outside the frame"):
        region_mask(PromptRegion("point", point=(-30.0, 5.0)), 40, 40)


def test_empty_region_is_refused() -> None:
    with pytest.raises(InvalidInput, match="empty"):
        VIEW.region_map(np.zeros((10, 10), np.uint8))
    with pytest.raises(InvalidInput, match="empty"):
        region_weights(np.zeros((24, 24), np.uint8))


def test_preprocessor_configuration_gives_the_view_and_names_what_is_missing(reference: Any) -> None:
    published = json.loads((reference(TINY) / "clip-tiny-patch14-336/preprocessor_config.json").read_text())
    assert view_of(published) == (VIEW, [])
    del published["image_std"]
    assert view_of(published) == (VIEW, ["image_std"])
    with pytest.raises(InvalidInput, match=r"preprocessor_config\.json"):
        view_of({"image_mean": [1.0]})


def test_the_mask_of_an_example_is_drawn_into_its_image_in_the_published_colour() -> None:
    shown = np.random.default_rng(1).integers(0, 256, (40, 30, 3), np.uint8)
    mask = np.zeros((40, 30), bool)
    mask[5:20, 3:9] = True
    expected = shown.astype(np.float64)
    expected[mask] = expected[mask] * 0.45 + np.array([118, 158, 224]) * 0.55
    drawn = overlaid(shown, mask)
    assert drawn.dtype == np.uint8
    assert np.abs(drawn - np.floor(expected + 1e-4)).max() == 0  # a whole number may come out just below in float32
    assert np.array_equal(drawn[~mask], shown[~mask])


def test_a_mask_as_a_picture_is_white_on_black() -> None:
    mask = np.eye(3, 5, dtype=bool)
    picture = mask_picture(mask)
    assert (picture.dtype, picture.shape) == (np.uint8, (3, 5, 3))
    assert np.array_equal(picture, np.where(mask[..., None], 255, 0).repeat(3, axis=2))
    assert VIEW.clip_image(picture).shape == (1, 3, 336, 336)


def test_mask_encoders_input_holds_every_pixel_that_the_mask_touches() -> None:
    mask = np.zeros((168, 84), bool)
    mask[40:60, 20:40] = True
    square = VIEW.mask_image(mask)
    assert (square.dtype, square.shape) == (np.float32, (1, 1, 336, 336))
    assert set(np.unique(square)) == {0.0, 1.0}
    ys, xs = np.nonzero(square[0, 0])
    # Twice as large, 84 to the right, and one more pixel to each side than its area, where it has a quarter.
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (79, 120, 84 + 39, 84 + 80)
    assert square.sum() > VIEW.region_square(mask).sum() > 0
    with pytest.raises(InvalidInput, match="rows, columns"):
        VIEW.mask_image(np.ones((2, 3, 4), bool))


def test_other_sizes_work() -> None:
    view = MedplibView(clip_side=224, patch=16, sam_side=512)
    shown = np.zeros((30, 50, 3), np.uint8)
    assert view.clip_image(shown).shape == (1, 3, 224, 224)
    assert view.sam_image(shown).shape == (1, 3, 512, 512)
    assert view.region_map(np.ones((30, 50), np.uint8)).shape == (14, 14)
    with pytest.raises(InvalidInput, match="whole number of patches"):
        MedplibView(clip_side=225)
