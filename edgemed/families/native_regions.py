"""The user's regions as the native model takes them: a weight map over the feature grid and a box in coordinate bins.

Covers box, point and free-form mask; training and inference call the same functions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgemed.core import Box, Point, PromptRegion
from edgemed.families.native_view import SIDE
from edgemed.geometry import View, box_to_bins, region_box

GRID = 64
"""Cells along one side of the feature map."""

POINT_SIGMA_CELLS = 1.5
POINT_SIDE = 0.08
"""Side of the square that stands for a point in the prompt, as a share of the model's input."""

_MIN_INSIDE = 0.9

Map = npt.NDArray[np.float32]


def is_seen(region: PromptRegion, view: View) -> bool:
    """Return whether the model's input shows the region: a point, or nine tenths of a box's or a mask's box's area."""
    x0, y0, x1, y1 = view.box_to_model(region_box(region))
    if region.point is not None:
        return 0 <= x0 < view.side and 0 <= y0 < view.side
    area = (x1 - x0) * (y1 - y0)
    inside = max(0.0, min(x1, view.side) - max(x0, 0.0)) * max(0.0, min(y1, view.side) - max(y0, 0.0))
    return inside >= _MIN_INSIDE * area


def region_bins(region: PromptRegion, view: View) -> tuple[int, int, int, int]:
    """Return the region's box in coordinate bins; of a point, the POINT_SIDE square around it, clipped."""
    x0, y0, x1, y1 = view.box_to_model(region_box(region))
    if region.point is not None:
        half = POINT_SIDE * view.side / 2
        x0, y0, x1, y1 = x0 - half, y0 - half, x1 + half, y1 + half
    return box_to_bins((x0, y0, x1, y1), view.side)


def region_map(region: PromptRegion, view: View) -> Map:
    """Return float32 [GRID, GRID] weights that sum to 1: the share of the region in each cell of the feature map."""
    if region.box is not None:
        return box_map(view.box_to_model(region.box))
    if region.point is not None:
        return point_map(view.point_to_model(region.point))
    assert region.mask is not None
    return mask_map(view.image_to_model(region.mask.astype(np.float32)), view.box_to_model(region_box(region)))


def box_map(box_model_px: Box) -> Map:
    """Return the weights of a box in model pixels: the area it shares with each cell.

    >>> box_map((0, 0, 8, 4)).sum(), box_map((0, 0, 8, 4))[0, :3].tolist()
    (np.float32(1.0), [0.5, 0.5, 0.0])
    """
    x0, y0, x1, y1 = (v * GRID / SIDE for v in box_model_px)
    return _normalised(np.outer(_overlap(y0, y1), _overlap(x0, x1)), box_model_px)


def point_map(point_model_px: Point) -> Map:
    """Return the weights of a point in model pixels: a Gaussian of POINT_SIGMA_CELLS around it."""
    x, y = (v * GRID / SIDE for v in point_model_px)
    centres = np.arange(GRID) + 0.5
    down, across = (np.exp(-(((centres - at) / POINT_SIGMA_CELLS) ** 2) / 2) for at in (y, x))
    return _normalised(np.outer(down, across), (*point_model_px, *point_model_px))


def mask_map(mask_model: npt.NDArray[np.float32], box_model_px: Box) -> Map:
    """Return the weights of a mask in the model frame [SIDE, SIDE], 0..1: its area in each cell.

    box_model_px: the box around it, used where the mask is too thin to leave anything at the model's resolution.
    """
    cell = SIDE // GRID
    areas = mask_model.reshape(GRID, cell, GRID, cell).mean(axis=(1, 3))  # [GRID, GRID]
    return _normalised(areas, box_model_px) if areas.sum() > 0 else box_map(box_model_px)


def uniform_map() -> Map:
    """Return the weights to feed where a prompt has no region; its row is ignored."""
    return np.full((GRID, GRID), 1 / GRID**2, np.float32)


def _overlap(start: float, end: float) -> npt.NDArray[np.float64]:
    cells = np.arange(GRID)
    return np.asarray(np.clip(np.minimum(end, cells + 1) - np.maximum(start, cells), 0.0, None))


def _normalised(weights: npt.NDArray[np.floating], box_model_px: Box) -> Map:
    """Return `weights` with sum 1; where nothing lies in the map, all weight is on the cell nearest to the box."""
    total = float(weights.sum())
    if total > 0:
        return np.asarray(weights / total, np.float32)
    nearest = np.zeros((GRID, GRID), np.float32)
    x0, y0, x1, y1 = (v * GRID / SIDE for v in box_model_px)
    nearest[min(max(int((y0 + y1) / 2), 0), GRID - 1), min(max(int((x0 + x1) / 2), 0), GRID - 1)] = 1.0
    return nearest
