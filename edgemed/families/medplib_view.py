"""What MedPLIB looks at and what its masks mean: CLIP pixels, SAM pixels, region maps, mask post-processing.

Covers a frame as shown (uint8 RGB) -> two model inputs; a region of the user -> a full-size mask -> the 24 x 24 map
that pools CLIP features; the mask decoder's 64 x 64 logits -> a mask in scan pixels. Does not cover texts
(`medplib_text`) or the pooling itself, which is a product with `region_weights`.

Both inputs keep the aspect ratio and centre the frame: CLIP's padding is the mean colour, SAM's is 0 after
normalisation. Post-processing has two modes. "reference" is what the published weights were trained and scored with: it
computes the padding of the 64 x 64 map as if it had the size of SAM's input, so that it stretches the whole padded map
over the frame, or takes a wrong slice of it where the aspect ratio is above 4:3. "corrected" undoes the padding.

Source: github ShawnHuang497/MedPLIB at 5ab54bc; arrays pixel_*, region_mask*, post_* in tests/reference/medplib-tiny.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgemed.core import Box, Mask, Point, PromptRegion
from edgemed.errors import InvalidInput

__all__ = [
    "MASK_THRESHOLD",
    "MedplibView",
    "Placed",
    "mask_picture",
    "overlaid",
    "placed",
    "postprocess",
    "region_mask",
    "region_weights",
    "to_mask",
    "view_of",
]

Picture = npt.NDArray[np.uint8]
MaskMode = Literal["reference", "corrected"]

OVERLAY_RGB = (118, 158, 224)
OVERLAY_SHARE = 0.55
"""How an example's mask is drawn into its image: this much of the colour, the rest of the image."""

MASK_THRESHOLD = 0.1
"""A pixel belongs to the mask if its probability is above this."""

POINT_REACH = 20
"""A point stands for the square of this many pixels to each side: 41 x 41."""

SAM_MEAN = (123.675, 116.28, 103.53)
SAM_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Placed:
    """Where a frame lies in a model's square input: its size after resizing, and its top-left corner."""

    rows: int
    columns: int
    top: int
    left: int


def placed(rows: int, columns: int, side: int) -> Placed:
    """Return where a frame lies in a square of `side`: longest side resized to it (rounded half up), centred.

    >>> placed(150, 300, 256)
    Placed(rows=128, columns=256, top=64, left=0)
    """
    scale = side / max(rows, columns)
    height, width = max(int(rows * scale + 0.5), 1), max(int(columns * scale + 0.5), 1)
    return Placed(height, width, (side - height) // 2, (side - width) // 2)


@dataclass(frozen=True)
class MedplibView:
    """How frames and regions become model input.

    clip_side, patch: side of CLIP's input and of its patches, in pixels. sam_side: side of SAM's input. clip_mean,
    clip_std: of the RGB channels in 0..1; clip_scale: what a pixel value is multiplied by first.
    """

    clip_side: int = 336
    patch: int = 14
    sam_side: int = 256
    clip_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    clip_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    clip_scale: float = 1 / 255

    def __post_init__(self) -> None:
        if min(self.clip_side, self.patch, self.sam_side) < 1 or self.clip_side % self.patch:
            raise InvalidInput(
                f"CLIP's side is {self.clip_side} with patches of {self.patch}, SAM's side {self.sam_side}; sides "
                "above 0 and a whole number of patches were expected"
            )

    @property
    def grid(self) -> int:
        """Patches along CLIP's side: 24."""
        return self.clip_side // self.patch

    def clip_image(self, shown: Picture) -> npt.NDArray[np.float32]:
        """Return CLIP's input float32 [1, 3, clip_side, clip_side] of a frame uint8 RGB [rows, columns, 3].

        Raises InvalidInput if `shown` is not such a picture.
        """
        resized, place = _resized(shown, self.clip_side)
        colour = np.array([int(m * 255) for m in self.clip_mean], np.uint8)
        square = np.tile(colour, (self.clip_side, self.clip_side, 1))  # [side, side, 3]
        square[place.top : place.top + place.rows, place.left : place.left + place.columns] = resized
        scaled = (square * self.clip_scale).astype(np.float32)
        out = (scaled - np.asarray(self.clip_mean, np.float32)) / np.asarray(self.clip_std, np.float32)
        return np.ascontiguousarray(out.transpose(2, 0, 1)[None])

    def sam_image(self, shown: Picture) -> npt.NDArray[np.float32]:
        """Return SAM's input float32 [1, 3, sam_side, sam_side] of a frame uint8 RGB [rows, columns, 3].

        Raises InvalidInput if `shown` is not such a picture.
        """
        resized, place = _resized(shown, self.sam_side)
        out = np.zeros((self.sam_side, self.sam_side, 3), np.float32)
        inner = out[place.top : place.top + place.rows, place.left : place.left + place.columns]
        inner[...] = (resized - np.asarray(SAM_MEAN, np.float32)) / np.asarray(SAM_STD, np.float32)
        return np.ascontiguousarray(out.transpose(2, 0, 1)[None])

    def region_square(self, mask: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Return a region as 0 or 1 on CLIP's input, uint8 [clip_side, clip_side]; values from 1 on are the region.

        mask: [rows, columns], bool or integer. Raises InvalidInput if it is not two-dimensional.
        """
        return self._square(mask, 1)

    def mask_image(self, mask: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return the mask encoder's input, 0 or 1, float32 [1, 1, clip_side, clip_side]: 1 where a pixel has any share.

        mask: of an example, [rows, columns]. Raises InvalidInput if it is not two-dimensional.
        """
        return (self._square(mask, 255) > 0).astype(np.float32)[None, None]

    def _square(self, mask: npt.NDArray[Any], inside: int) -> npt.NDArray[np.uint8]:
        """Return a mask on CLIP's input: `inside` where it is, in between at its edge as far as bytes can tell."""
        if mask.ndim != 2 or 0 in mask.shape:
            raise InvalidInput(f"region mask is {list(mask.shape)}, [rows, columns] was expected")
        place = placed(mask.shape[0], mask.shape[1], self.clip_side)
        binary = Image.fromarray((mask >= 1).astype(np.uint8) * np.uint8(inside))
        out = np.zeros((self.clip_side, self.clip_side), np.uint8)
        resized = binary.resize((place.columns, place.rows), Image.Resampling.BILINEAR)
        out[place.top : place.top + place.rows, place.left : place.left + place.columns] = np.asarray(resized)
        return out

    def region_map(self, mask: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Return a region as 0 or 1 on CLIP's patches, uint8 [grid, grid]: the top-left pixel of each patch decides.

        A region that no such pixel hits takes the patch of its centre; the published code has no feature for it.

        Raises InvalidInput if the region is empty.
        """
        if not (mask >= 1).any():
            raise InvalidInput("the region mask is empty; at least one pixel above 0 was expected")
        out = np.ascontiguousarray(self.region_square(mask)[:: self.patch, :: self.patch])
        if not out.any():
            ys, xs = np.nonzero(mask >= 1)
            place = placed(mask.shape[0], mask.shape[1], self.clip_side)
            row = place.top + (ys.mean() + 0.5) * place.rows / mask.shape[0]
            column = place.left + (xs.mean() + 0.5) * place.columns / mask.shape[1]
            out[min(int(row / self.patch), self.grid - 1), min(int(column / self.patch), self.grid - 1)] = 1
        return out


def view_of(preprocessor: Mapping[str, Any], *, patch: int = 14, sam_side: int = 256) -> tuple[MedplibView, list[str]]:
    """Return the View of a CLIP preprocessor_config.json, and the keys that fell back to published values.

    Raises InvalidInput if means and deviations are not three numbers each.
    """
    published = MedplibView()
    fell_back: list[str] = []

    def take(key: str, value: Any) -> Any:
        if preprocessor.get(key) is None:
            fell_back.append(key)
            return value
        return preprocessor[key]

    crop = take("crop_size", published.clip_side)
    side = crop.get("height", published.clip_side) if isinstance(crop, Mapping) else crop
    mean, std = take("image_mean", published.clip_mean), take("image_std", published.clip_std)
    scale = take("rescale_factor", published.clip_scale)
    try:
        red, green, blue = (float(v) for v in mean)
        red_std, green_std, blue_std = (float(v) for v in std)
        view = MedplibView(int(side), patch, sam_side, (red, green, blue), (red_std, green_std, blue_std), float(scale))
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"preprocessor_config.json does not hold three means and deviations: {error}") from error
    return view, fell_back


def overlaid(shown: Picture, mask: Mask) -> Picture:
    """Return a frame uint8 RGB [rows, columns, 3] with a mask bool [rows, columns] drawn in, as published.

    >>> overlaid(np.full((1, 2, 3), 100, np.uint8), np.array([[False, True]]))[0].tolist()
    [[100, 100, 100], [109, 131, 168]]
    """
    out = shown.astype(np.float32)
    out[mask] = out[mask] * (1 - OVERLAY_SHARE) + np.asarray(OVERLAY_RGB, np.float32) * OVERLAY_SHARE
    return out.astype(np.uint8)


def mask_picture(mask: Mask) -> Picture:
    """Return a mask bool [rows, columns] as a picture of its own: white on black, uint8 RGB [rows, columns, 3]."""
    return np.repeat(mask.astype(np.uint8)[..., None] * np.uint8(255), 3, axis=2)


def _resized(shown: Picture, side: int) -> tuple[npt.NDArray[np.uint8], Placed]:
    if shown.dtype != np.uint8 or shown.ndim != 3 or shown.shape[2] != 3 or 0 in shown.shape:
        raise InvalidInput(f"picture is {shown.dtype} {list(shown.shape)}, uint8 [rows, columns, 3] was expected")
    place = placed(shown.shape[0], shown.shape[1], side)
    image = Image.fromarray(np.ascontiguousarray(shown))
    return np.asarray(image.resize((place.columns, place.rows), Image.Resampling.BILINEAR)), place


# --- regions ----------------------------------------------------------------------------------------------------------


def region_mask(region: PromptRegion, rows: int, columns: int) -> Mask:
    """Return a user's region as bool [rows, columns]: a 41 x 41 square for a point, the filled box, or the mask itself.

    Raises InvalidInput if the region lies outside the frame or a mask has another size.
    """
    if region.mask is not None:
        if region.mask.shape != (rows, columns):
            raise InvalidInput(
                f"region mask is {list(region.mask.shape)}, the frame's [{rows}, {columns}] was expected"
            )
        return region.mask
    if region.point is not None:
        top, bottom, left, right = _point_square(region.point)
    else:
        assert region.box is not None
        top, bottom, left, right = _whole_pixels(region.box)
    out = np.zeros((rows, columns), np.bool_)
    out[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
    if not out.any():
        raise InvalidInput(f"the {region.kind} region lies outside the frame of {rows} rows and {columns} columns")
    return out


def _point_square(point: Point) -> tuple[int, int, int, int]:
    row, column = math.floor(point[1]), math.floor(point[0])
    return row - POINT_REACH, row + POINT_REACH + 1, column - POINT_REACH, column + POINT_REACH + 1


def _whole_pixels(box: Box) -> tuple[int, int, int, int]:
    return math.floor(box[1]), math.ceil(box[3]), math.floor(box[0]), math.ceil(box[2])


def region_weights(region_map: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return float32 [grid * grid]: the share of each patch in a region's feature; the shares add up to 1.

    region_map: [grid, grid], above 0 inside. The feature is `region_weights @ map of features [grid * grid, width]`:
    the mean of bilinear samples at (row, column) / grid, in a frame whose 0 and 1 are the centres of the outer patches
    (grid_sample with align_corners). The published code draws 512 cells at random where the region has more; here all
    count.

    Raises InvalidInput if the map is empty or not square.
    """
    if region_map.ndim != 2 or region_map.shape[0] != region_map.shape[1]:
        raise InvalidInput(f"region map is {list(region_map.shape)}, [grid, grid] was expected")
    cells = np.nonzero(region_map)
    count = cells[0].size
    if count == 0:
        raise InvalidInput("the region map is empty; at least one patch above 0 was expected")
    grid = region_map.shape[0]
    axes = []
    for index in cells:
        position = index * (grid - 1) / grid
        low = position.astype(np.intp)
        axes.append(((low, 1 - (position - low)), (np.minimum(low + 1, grid - 1), position - low)))
    out = np.zeros((grid, grid))
    for row, row_share in axes[0]:
        for column, column_share in axes[1]:
            np.add.at(out, (row, column), row_share * column_share)
    return (out / count).astype(np.float32).reshape(-1)


# --- masks ------------------------------------------------------------------------------------------------------------


def postprocess(
    low_res: npt.NDArray[Any], rows: int, columns: int, *, sam_side: int = 256, mode: MaskMode = "reference"
) -> npt.NDArray[np.float32]:
    """Return mask logits float32 [rows, columns] in scan pixels.

    low_res: the mask decoder's logits [side, side] (64 x 64 for sam_side 256). rows, columns: of the frame as shown.
    mode: see the head of this file.
    """
    return _postprocess(low_res, placed(rows, columns, sam_side), rows, columns, sam_side, mode)


def _postprocess(
    low_res: npt.NDArray[Any], place: Placed, rows: int, columns: int, sam_side: int, mode: MaskMode
) -> npt.NDArray[np.float32]:
    if low_res.ndim != 2:
        raise InvalidInput(f"mask logits are {list(low_res.shape)}, [side, side] was expected")
    values = np.asarray(low_res, np.float32)
    if mode == "reference":
        values = _slice(_slice(values, place.rows).T, place.columns).T
        return _bilinear(values, rows, columns, (0.0, float(values.shape[0])), (0.0, float(values.shape[1])))
    down, across = values.shape[0] / sam_side, values.shape[1] / sam_side
    return _bilinear(
        values,
        rows,
        columns,
        (place.top * down, (place.top + place.rows) * down),
        (place.left * across, (place.left + place.columns) * across),
    )


def _slice(values: npt.NDArray[np.float32], resized: int) -> npt.NDArray[np.float32]:
    """Return the rows that the published code keeps of a map that it takes to be as large as SAM's input.

    Its padding (side - resized) // 2 is negative for a map smaller than the resized frame; a negative start of a slice
    counts from the end.
    """
    start = (values.shape[0] - resized) // 2
    return values[start : start + resized]


def _bilinear(
    values: npt.NDArray[np.float32], rows: int, columns: int, down: tuple[float, float], across: tuple[float, float]
) -> npt.NDArray[np.float32]:
    """Return float32 [rows, columns]: the part `down` x `across` of `values` spread over the output, edges repeated.

    Pixel centres are at halves (align_corners False), nothing is averaged when shrinking. The arithmetic is float32, as
    the published code's: with the whole map as the part, the difference is below 4e-5 at logits up to 18.
    """
    upper, lower, row_share = _axis(rows, values.shape[0], down)
    left, right, column_share = _axis(columns, values.shape[1], across)
    top = _mixed(values[upper][:, left], values[upper][:, right], column_share)  # [rows, columns]
    bottom = _mixed(values[lower][:, left], values[lower][:, right], column_share)
    return _mixed(top, bottom, row_share[:, None])


def _mixed(
    a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], share: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    return np.asarray(a * (np.float32(1) - share) + b * share, np.float32)


def _axis(
    size_out: int, size_in: int, part: tuple[float, float]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Return (index, next index, share of the next) of each output sample along one axis."""
    scale = np.float32((part[1] - part[0]) / size_out)
    centre = np.float32(part[0]) + scale * (np.arange(size_out, dtype=np.float32) + np.float32(0.5))
    position = np.clip(centre - np.float32(0.5), np.float32(0), np.float32(size_in - 1))
    low = position.astype(np.intp)
    return low, np.minimum(low + 1, size_in - 1), position - low.astype(np.float32)


def to_mask(logits: npt.NDArray[Any], threshold: float = MASK_THRESHOLD) -> Mask:
    """Return bool: where the sigmoid of the logits is above `threshold` (0..1).

    >>> to_mask(np.array([-2.3, -2.1, 0.0]))
    array([False,  True,  True])
    """
    return np.asarray(logits > math.log(threshold / (1 - threshold)))
