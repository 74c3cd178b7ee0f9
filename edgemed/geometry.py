"""Frames of reference: the View between a scan and a model's square input, boxes, masks and their resampling.

One frame per variable name: `box_scan_px` (scan pixels), `box_model_px` (pixels of the model's input), `box_norm`
(0..999 bins over the model's input). Pure NumPy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemed.core import Box, Mask, Point, PromptRegion
from edgemed.errors import InvalidInput

BINS = 1000
"""Number of coordinate bins over the model's input side."""


@dataclass(frozen=True)
class View:
    """The affine map between scan and model pixels: model = (scan - (left, top)) * (scale_x, scale_y).

    left, top: outer corner of the crop in scan pixels. The crop fills the input from its top-left corner; what the crop
    does not cover (right or bottom) is padding. scale_x and scale_y differ only where pixels are not square.
    """

    left: float
    top: float
    scale_x: float
    scale_y: float
    rows: int
    columns: int
    side: int

    def __post_init__(self) -> None:
        if not (self.scale_x > 0 and self.scale_y > 0):
            raise InvalidInput(f"view scales are {self.scale_x:g}, {self.scale_y:g}; numbers above 0 were expected")

    def point_to_model(self, point_scan_px: Point) -> Point:
        """Return the point in model pixels, not clipped."""
        return ((point_scan_px[0] - self.left) * self.scale_x, (point_scan_px[1] - self.top) * self.scale_y)

    def box_to_model(self, box_scan_px: Box) -> Box:
        """Return the box in model pixels, not clipped."""
        x0, y0 = self.point_to_model((box_scan_px[0], box_scan_px[1]))
        x1, y1 = self.point_to_model((box_scan_px[2], box_scan_px[3]))
        return (x0, y0, x1, y1)

    def box_to_scan(self, box_model_px: Box) -> Box:
        """Return the box in scan pixels, clipped to the scan.

        Raises InvalidInput if nothing of it is left after clipping.

        >>> View(10, 20, 0.5, 0.5, rows=400, columns=400, side=128).box_to_scan((0, 5, 10, 500))
        (10.0, 30.0, 30.0, 400.0)
        """
        x0 = min(max(box_model_px[0] / self.scale_x + self.left, 0.0), float(self.columns))
        x1 = min(max(box_model_px[2] / self.scale_x + self.left, 0.0), float(self.columns))
        y0 = min(max(box_model_px[1] / self.scale_y + self.top, 0.0), float(self.rows))
        y1 = min(max(box_model_px[3] / self.scale_y + self.top, 0.0), float(self.rows))
        if not (x0 < x1 and y0 < y1):
            raise InvalidInput(f"box {box_model_px} (model pixels) has no part inside the scan")
        return (x0, y0, x1, y1)

    def image_to_model(self, image: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return `image` [rows, columns] or [rows, columns, channels] resampled into float32 [side, side(, channels)].

        Area averaging when shrinking, bilinear when enlarging; padding is 0.
        """
        return _resample(image, self.side, self.side, self.left, self.top, self.scale_x, self.scale_y)

    def map_to_scan(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return float32 [rows, columns]: `values` (model frame, any square size) sampled at each scan pixel, bilinear.

        Scan pixels outside the crop take the value of the nearest border sample; mask what must not leak.
        """
        ratio = values.shape[0] / self.side
        sx, sy = self.scale_x * ratio, self.scale_y * ratio
        return _resample(values, self.rows, self.columns, -self.left * sx, -self.top * sy, 1 / sx, 1 / sy, clamp=True)

    def inside(self) -> Mask:
        """Return bool [rows, columns]: which scan pixels the model's input covers."""
        x = (np.arange(self.columns) + 0.5 - self.left) * self.scale_x
        y = (np.arange(self.rows) + 0.5 - self.top) * self.scale_y
        return ((y >= 0) & (y < self.side))[:, None] & ((x >= 0) & (x < self.side))[None, :]


def fit(
    rows: int, columns: int, side: int, crop: Box | None = None, spacing: tuple[float, float] | None = None
) -> View:
    """Return the View that fits `crop` (scan pixels; default the whole image) into a square of `side` pixels.

    spacing: (row, column) spacing in any unit; pixels that are not square are made square. The longer side fills
    `side`.
    """
    x0, y0, x1, y1 = crop or (0.0, 0.0, float(columns), float(rows))
    row_spacing, column_spacing = spacing or (1.0, 1.0)
    per_unit = side / max((x1 - x0) * column_spacing, (y1 - y0) * row_spacing)
    return View(x0, y0, per_unit * column_spacing, per_unit * row_spacing, rows, columns, side)


def _bands(
    size_out: int, size_in: int, start: float, scale: float, clamp: bool
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Return (first [size_out], weights [size_out, taps]) that resample one axis.

    Output pixel i covers (i .. i + 1) / scale + start and is the sum over t of weights[i, t] * input[first[i] + t].
    Every band lies inside the input; without `clamp` the weights of an output pixel whose centre lies outside are 0.
    """
    step = 1.0 / scale
    a = start + np.arange(size_out) * step
    b = a + step
    centre = (a + b) / 2
    taps = min(max(math.ceil(step) + 1, 2), size_in)
    at = np.clip(centre - 0.5, 0.0, size_in - 1.0)
    first = np.minimum(at.astype(np.intp), size_in - taps)
    index = first[:, None] + np.arange(taps)  # [size_out, taps]
    weights = np.clip(1.0 - np.abs(index - at[:, None]), 0.0, None)  # bilinear
    if step > 1:  # area average over the part that lies in the image
        lo, hi = np.maximum(a, 0.0), np.minimum(b, float(size_in))
        area = hi > lo
        first[area] = np.minimum(lo[area].astype(np.intp), size_in - taps)
        index = first[:, None] + np.arange(taps)
        cover = np.clip(np.minimum(hi[:, None], index + 1) - np.maximum(lo[:, None], index), 0.0, None)
        weights[area] = cover[area] / (hi - lo)[area, None]
    if not clamp:
        weights[(centre < 0) | (centre >= size_in)] = 0.0
    return first, weights.astype(np.float32)


def _resample(
    image: npt.NDArray[Any], rows: int, columns: int, left: float, top: float, sx: float, sy: float, clamp: bool = False
) -> npt.NDArray[np.float32]:
    planes = image[..., None] if image.ndim == 2 else image  # [rows_in, columns_in, channels]
    rows_in, columns_in, channels = planes.shape
    flat = np.ascontiguousarray(planes).reshape(rows_in, columns_in * channels)
    first, weights = _bands(rows, rows_in, top, sy, clamp)
    taps = weights.shape[1]
    # Row by row: a band of a large image stays in the cache (3000 x 2500 RGB: 5 times faster than a dense matrix).
    lines = np.stack([w @ flat[f : f + taps].astype(np.float32) for f, w in zip(first.tolist(), weights, strict=True)])
    across_first, across_weights = _bands(columns, columns_in, left, sx, clamp)
    across = np.zeros((columns, columns_in), np.float32)
    across[np.arange(columns)[:, None], across_first[:, None] + np.arange(across_weights.shape[1])] = across_weights
    # [channels, rows, columns_in]
    lines = np.ascontiguousarray(lines.reshape(rows, columns_in, channels).transpose(2, 0, 1))
    out = (lines.reshape(channels * rows, columns_in) @ across.T).reshape(channels, rows, columns)
    return out[0] if image.ndim == 2 else np.ascontiguousarray(out.transpose(1, 2, 0))


def box_to_bins(box_model_px: Box, side: int) -> tuple[int, int, int, int]:
    """Return the box as four coordinate bins, clipped to 0..999; x0 < x1 and y0 < y1 always hold.

    >>> box_to_bins((0, 12.8, 128, 300), 256)
    (0, 50, 500, 999)
    """
    x0, y0, x1, y1 = (min(max(round(v * BINS / side), 0), BINS - 1) for v in box_model_px)
    x0, y0 = min(x0, BINS - 2), min(y0, BINS - 2)
    return (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))


def bins_to_box(bins: tuple[int, int, int, int], side: int) -> Box:
    """Return the box in model pixels that four bins stand for; bin 999 is the far edge.

    >>> bins_to_box((0, 50, 500, 999), 256)
    (0.0, 12.8, 128.0, 256.0)
    """
    x0, y0, x1, y1 = (float(side) if b == BINS - 1 else b * side / BINS for b in bins)
    return (x0, y0, x1, y1)


def box_of(mask: Mask) -> Box | None:
    """Return the tightest box around the True pixels of `mask` [rows, columns], or None if there is none."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if ys.size == 0:
        return None
    return (float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1))


def region_box(region: PromptRegion) -> Box:
    """Return the box around a region in scan pixels; of a point, the point itself without extent.

    Raises InvalidInput if a mask is empty.
    """
    if region.box is not None:
        return region.box
    if region.point is not None:
        return (*region.point, *region.point)
    assert region.mask is not None
    box = box_of(region.mask)
    if box is None:
        raise InvalidInput("the mask region is empty; it must have at least one pixel inside")
    return box


def check_region(region: PromptRegion, rows: int, columns: int) -> None:
    """Raise InvalidInput unless the region lies in a scan of this size (of a box: a part of it) and is not empty."""
    x0, y0, x1, y1 = region_box(region)
    if region.mask is not None and region.mask.shape != (rows, columns):
        raise InvalidInput(
            f"the mask region is {list(region.mask.shape)}, [{rows}, {columns}] as the scan was expected"
        )
    if not (x0 < columns and y0 < rows and x1 >= 0 and y1 >= 0) or (region.box is not None and (x1 <= 0 or y1 <= 0)):
        raise InvalidInput(
            f"the {region.kind} region lies outside the scan, which has {columns} columns and {rows} rows"
        )


def box_iou(a: Box, b: Box) -> float:
    """Return intersection over union of two boxes of one frame, 0..1."""
    across = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    down = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = across * down
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def dice(a: Mask, b: Mask) -> float:
    """Return the Dice coefficient of two masks of one shape; 1.0 if both are empty."""
    total = int(a.sum()) + int(b.sum())
    return 2.0 * int((a & b).sum()) / total if total else 1.0
