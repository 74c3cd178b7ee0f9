"""Views: there and back, and resampling against a plain restatement of what it means."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from edgemed.errors import InvalidInput
from edgemed.geometry import View, bins_to_box, box_iou, box_of, box_to_bins, dice, fit


def resampled_axis(
    values: npt.NDArray[np.float64], size: int, start: float, scale: float, clamp: bool
) -> npt.NDArray[np.float64]:
    """One axis, pixel by pixel: the mean over what (i .. i + 1) / scale + start covers of `values`, or bilinear."""
    out = np.zeros(size)
    last = len(values) - 1
    for i in range(size):
        a, b = start + i / scale, start + (i + 1) / scale
        centre = (a + b) / 2
        if not clamp and not 0 <= centre < len(values):
            continue
        lo, hi = max(a, 0.0), min(b, float(len(values)))
        if scale < 1 and hi > lo:
            shares = [max(0.0, min(hi, j + 1) - max(lo, j)) for j in range(len(values))]
            out[i] = np.dot(shares, values) / (hi - lo)
        else:
            at = min(max(centre - 0.5, 0.0), last)
            out[i] = np.interp(at, np.arange(len(values)), values)
    return out


@pytest.mark.parametrize("seed", range(40))
def test_resampling_is_area_averaging_or_bilinear(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = (int(n) for n in rng.integers(1, 50, 2))
    side = int(rng.integers(1, 40))
    image = rng.random((rows, columns))
    sx, sy = (float(v) for v in np.exp(rng.normal(0, 1, 2)))
    view = View(float(rng.normal(0, 8)), float(rng.normal(0, 8)), sx, sy, rows, columns, side)
    down = np.stack([resampled_axis(c, side, view.top, sy, False) for c in image.T], axis=1)
    expected = np.stack([resampled_axis(r, side, view.left, sx, False) for r in down])
    found = view.image_to_model(image.astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert found.dtype == np.float32
    back = np.stack([resampled_axis(c, rows, -view.top * sy, 1 / sy, True) for c in expected.T], axis=1)
    back = np.stack([resampled_axis(r, columns, -view.left * sx, 1 / sx, True) for r in back])
    np.testing.assert_allclose(view.map_to_scan(expected.astype(np.float32)), back, atol=5e-6)


def test_colour_is_resampled_channel_by_channel() -> None:
    image = np.random.default_rng(0).integers(0, 256, (37, 53, 3)).astype(np.uint8)
    view = fit(37, 53, 24)
    found = view.image_to_model(image)
    for channel in range(3):
        np.testing.assert_allclose(found[..., channel], view.image_to_model(image[..., channel]), atol=1e-4)


def test_a_box_comes_back_where_it_was_and_clipped_to_the_scan() -> None:
    view = fit(300, 400, 256, (50, 20, 250, 170), (0.9, 0.7))
    box = (60.0, 30.0, 110.0, 90.0)
    assert view.box_to_scan(view.box_to_model(box)) == pytest.approx(box)
    assert view.box_to_scan((-500, -500, 9000, 9000)) == (0, 0, 400, 300)
    with pytest.raises(InvalidInput, match="no part inside"):
        view.box_to_scan((8000, 0, 9000, 10))


def test_pixels_that_are_not_square_become_square_in_the_model() -> None:
    view = fit(100, 100, 256, spacing=(2.0, 1.0))
    assert view.scale_y == 2 * view.scale_x
    assert view.scale_y == 2.56


def test_a_mask_comes_back_with_the_same_box() -> None:
    view = fit(512, 512, 256, (100, 120, 400, 420))
    mask = np.zeros((512, 512), np.bool_)
    mask[200:300, 150:260] = True
    back = (view.map_to_scan(view.image_to_model(mask.astype(np.float32))) > 0.5) & view.inside()
    assert dice(back, mask) > 0.98
    assert view.inside().sum() == 300 * 300


def test_bins_are_ordered_and_come_back_within_half_a_bin() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        x0, y0 = rng.uniform(-20, 260, 2)
        box = (x0, y0, x0 + rng.uniform(0, 100), y0 + rng.uniform(0, 100))
        bins = box_to_bins(box, 256)
        assert 0 <= bins[0] < bins[2] <= 999
        assert 0 <= bins[1] < bins[3] <= 999
    assert bins_to_box(box_to_bins((10, 20, 200, 256), 256), 256) == pytest.approx((10, 20, 200, 256), abs=0.128)


def test_measures_of_hand_made_cases() -> None:
    assert box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    mask = np.zeros((4, 5), np.bool_)
    assert box_of(mask) is None
    assert dice(mask, mask) == 1
    mask[1:3, 2] = True
    assert box_of(mask) == (2, 1, 3, 3)
    assert dice(mask, ~mask) == 0
