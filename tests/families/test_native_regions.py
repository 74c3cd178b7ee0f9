"""The user's regions as maps and bins."""

from __future__ import annotations

import numpy as np
import pytest

from edgemed.core import PromptRegion
from edgemed.errors import InvalidInput
from edgemed.families.native_regions import (
    GRID,
    box_map,
    is_seen,
    mask_map,
    point_map,
    region_bins,
    region_map,
    uniform_map,
)
from edgemed.geometry import View, check_region, fit

VIEW = fit(512, 512, 256)  # one cell of the map is 8 scan pixels


def mask_of(y0: int, x0: int, y1: int, x1: int) -> PromptRegion:
    mask = np.zeros((512, 512), np.bool_)
    mask[y0:y1, x0:x1] = True
    return PromptRegion("mask", mask=mask)


REGIONS = {
    "box": PromptRegion("box", box=(16, 24, 40, 28)),
    "point": PromptRegion("point", point=(100, 200)),
    "corner": PromptRegion("point", point=(0, 0)),
    "mask": mask_of(10, 20, 90, 47),
    "one pixel": mask_of(3, 3, 4, 4),
    "thin box": PromptRegion("box", box=(5.0, 5.0, 5.001, 5.001)),
}


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
@pytest.mark.parametrize("view", [VIEW, View(100, 100, 0.7, 0.9, 512, 512, 256)], ids=["whole", "crop"])
def test_weights_are_not_negative_and_sum_to_one(region: PromptRegion, view: View) -> None:
    weights = region_map(region, view)
    assert weights.shape == (GRID, GRID)
    assert weights.dtype == np.float32
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    x0, y0, x1, y1 = region_bins(region, view)
    assert 0 <= x0 < x1 <= 999
    assert 0 <= y0 < y1 <= 999


def test_box_weights_are_areas_shared_with_cells() -> None:
    weights = region_map(REGIONS["box"], VIEW)  # cells x 2..5, y 3..3.5
    np.testing.assert_allclose(weights[3, 2:5], 1 / 3, atol=1e-6)
    assert np.count_nonzero(weights) == 3
    np.testing.assert_allclose(box_map((2, 0, 6, 4))[0, :3], [0.5, 0.5, 0], atol=1e-6)


def test_point_weights_are_a_gaussian_around_it() -> None:
    weights = point_map((4 * 10 + 2, 4 * 20 + 2))
    assert np.unravel_index(weights.argmax(), weights.shape) == (20, 10)
    assert weights[20, 11] / weights[20, 10] == pytest.approx(np.exp(-1 / (2 * 1.5**2)), rel=1e-4)


def test_mask_of_a_box_gives_the_weights_of_the_box() -> None:
    box = PromptRegion("box", box=(20, 10, 47, 90))
    np.testing.assert_allclose(region_map(REGIONS["mask"], VIEW), region_map(box, VIEW), atol=1e-6)


def test_mask_too_thin_for_the_model_uses_its_box() -> None:
    np.testing.assert_array_equal(mask_map(np.zeros((256, 256), np.float32), (4, 4, 8, 8)), box_map((4, 4, 8, 8)))


def test_point_gets_a_square_clipped_to_the_input() -> None:
    assert region_bins(PromptRegion("point", point=(256, 256)), VIEW) == (460, 460, 540, 540)
    assert region_bins(PromptRegion("point", point=(0, 511)), VIEW) == (0, 958, 40, 999)


def test_uniform_map_sums_to_one() -> None:
    assert uniform_map().sum() == pytest.approx(1)


def test_seen_is_nine_tenths_of_a_box_and_the_place_of_a_point() -> None:
    crop = View(100, 0, 1.0, 1.0, 512, 512, 256)
    assert is_seen(PromptRegion("box", box=(98, 0, 200, 50)), crop)
    assert not is_seen(PromptRegion("box", box=(50, 0, 200, 50)), crop)
    assert not is_seen(PromptRegion("point", point=(99, 10)), crop)
    assert is_seen(PromptRegion("point", point=(101, 10)), crop)


@pytest.mark.parametrize(
    "region",
    [
        PromptRegion("box", box=(512, 0, 600, 10)),
        PromptRegion("box", box=(-10, 0, 0, 10)),
        PromptRegion("point", point=(10, 700)),
        PromptRegion("point", point=(-1, 7)),
        PromptRegion("mask", mask=np.zeros((512, 512), np.bool_)),
        PromptRegion("mask", mask=np.ones((4, 4), np.bool_)),
    ],
)
def test_region_outside_the_scan_or_empty_is_refused(region: PromptRegion) -> None:
    with pytest.raises(InvalidInput):
        check_region(region, 512, 512)


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_region_in_the_scan_passes(region: PromptRegion) -> None:
    check_region(region, 512, 512)
