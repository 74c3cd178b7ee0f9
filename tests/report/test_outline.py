"""From masks to outlines."""

from __future__ import annotations

import numpy as np
import pytest

from edgemed.report.outline import Outline, blend, outline_of


def whole(outline: Outline | None, shape: tuple[int, int], part: str) -> np.ndarray:
    """Return the alpha of one part on the whole shown image."""
    assert outline is not None
    image = np.zeros(shape, np.float32)
    alpha = getattr(outline, part)
    image[outline.top : outline.top + alpha.shape[0], outline.left : outline.left + alpha.shape[1]] = alpha
    return image


def test_square_has_its_line_just_inside_its_edge() -> None:
    mask = np.zeros((20, 30), bool)
    mask[5:15, 10:20] = True
    outline = outline_of(mask, 4.0, 4.0, thickness_px=2)
    line, fill, casing = (whole(outline, (80, 120), part) for part in ("line", "fill", "casing"))
    middle = 40
    assert np.flatnonzero(line[middle] > 0.5).tolist() == [40, 41, 78, 79]
    assert np.flatnonzero(casing[middle] > 0.5).tolist() == [39, 80]
    assert np.flatnonzero(fill[middle] > 0.5).tolist() == list(range(40, 80))


def test_hole_has_an_outline_of_its_own() -> None:
    mask = np.ones((20, 20), bool)
    mask[8:12, 8:12] = False
    line = whole(outline_of(mask, 4.0, 4.0, thickness_px=2), (80, 80), "line")
    assert np.flatnonzero(line[40] > 0.5).tolist() == [30, 31, 48, 49]


def test_image_border_is_not_outlined() -> None:
    line = whole(outline_of(np.ones((9, 9), bool), 8.0, 8.0, thickness_px=2), (72, 72), "line")
    assert line.max() == 0


@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0, 2.5, 40.0])
def test_single_pixel_stays_visible_at_any_scale(scale: float) -> None:
    mask = np.zeros((60, 60), bool)
    mask[30, 30] = True
    outline = outline_of(mask, scale, scale, thickness_px=2)
    assert outline is not None
    assert outline.line.max() > 0


def test_empty_mask_has_no_outline() -> None:
    assert outline_of(np.zeros((5, 5), bool), 2.0, 2.0, thickness_px=2) is None


def test_dashed_line_has_gaps_on_every_side() -> None:
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:30] = True
    line = whole(outline_of(mask, 4.0, 4.0, thickness_px=2, dash_px=8), (160, 160), "line")
    for side in (line[40, 44:116], line[119, 44:116], line[44:116, 40], line[44:116, 119]):
        assert 0.25 < (side > 0.5).mean() < 0.75


def test_blending_keeps_what_lies_outside() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    blend(image, 2, 1, np.full((5, 5), 0.5, np.float32), (200, 100, 50))
    assert image[1:, 2:].reshape(-1, 3).tolist() == [[100, 50, 25]] * 6
    assert not image[:, :2].any()
    assert not image[0].any()
