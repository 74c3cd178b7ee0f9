"""What MedRegA looks at: one squashed square, a padded square, or tiles; and its 0..999 box numbers.

Covers a frame as shown (uint8 RGB) -> float32 [tiles, 3, side, side], and boxes between scan pixels and the numbers
that the model reads and writes. Does not cover how a box is written as text (`medrega_text`) or windowing
(`core.Scan.shown`).

The published default squashes the frame to side x side, whatever its aspect ratio. Box numbers run over the frame, not
over a tile: 0 is the left (top) edge, 999 the right (bottom) edge.

Source: github xmed-lab/MedRegA at dfdb0db; the arrays pixel_* of tests/reference/medrega-tiny.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgemed.core import Box
from edgemed.errors import InvalidInput

__all__ = ["BOX_SCALE", "MedRegaView", "NormBox", "box_to_numbers", "numbers_to_box"]

Picture = npt.NDArray[np.uint8]
NormBox = tuple[int, int, int, int]

BOX_SCALE = 999
"""The number that stands for the right or bottom edge."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class MedRegaView:
    """How frames become model input.

    side: pixels along a tile's side. pad_to_square: the frame is padded to a square first, not squashed. tiled: a frame
    is cut into min_tiles..max_tiles squares; thumbnail: and the whole frame follows if there is more than one.
    mean, std: of the RGB channels in 0..1.
    """

    side: int = 448
    pad_to_square: bool = False
    tiled: bool = False
    min_tiles: int = 1
    max_tiles: int = 6
    thumbnail: bool = False
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.side < 1 or not 1 <= self.min_tiles <= self.max_tiles:
            raise InvalidInput(
                f"view has side {self.side} and {self.min_tiles}..{self.max_tiles} tiles; a side above 0 and "
                "1 <= min_tiles <= max_tiles was expected"
            )

    def model_image(self, shown: Picture) -> npt.NDArray[np.float32]:
        """Return the model's input float32 [tiles, 3, side, side] of a frame uint8 RGB [rows, columns, 3].

        Raises InvalidInput if `shown` is not such a picture.
        """
        if shown.dtype != np.uint8 or shown.ndim != 3 or shown.shape[2] != 3 or 0 in shown.shape:
            raise InvalidInput(f"picture is {shown.dtype} {list(shown.shape)}, uint8 [rows, columns, 3] was expected")
        image = Image.fromarray(np.ascontiguousarray(shown))
        squares = self._tiles(image) if self.tiled else [image]
        return np.stack([self._normalised(square) for square in squares])

    def tile_grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Return how many tiles go (across, down): the grid whose shape is nearest the frame's.

        Of two grids equally near, the larger one is taken if the frame has more than half of its pixels.

        >>> MedRegaView().tile_grid(150, 300), MedRegaView().tile_grid(1000, 1000)
        ((2, 1), (2, 2))
        """
        sides = range(1, self.max_tiles + 1)
        grids = [(a, d) for a in sides for d in sides if self.min_tiles <= a * d <= self.max_tiles]
        best, nearest = (1, 1), float("inf")
        for across, down in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)):
            distance = abs(columns / rows - across / down)
            large = rows * columns > 0.5 * self.side * self.side * across * down
            if distance < nearest or (distance == nearest and large):
                best, nearest = (across, down), distance
        return best

    def _tiles(self, image: Image.Image) -> list[Image.Image]:
        side = self.side
        across, down = self.tile_grid(image.height, image.width)
        whole = image.resize((side * across, side * down), Image.Resampling.BICUBIC)
        corners = [(x * side, y * side) for y in range(down) for x in range(across)]
        tiles = [whole.crop((x, y, x + side, y + side)) for x, y in corners]
        return [*tiles, image] if self.thumbnail and len(tiles) > 1 else tiles

    def _normalised(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """Return float32 [3, side, side] of one square."""
        if self.pad_to_square and image.width != image.height:
            side = max(image.width, image.height)
            square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in self.mean))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        if image.size != (self.side, self.side):
            image = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        scaled = np.asarray(image, np.float32) / np.float32(255)  # [side, side, 3]
        out = (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(out.transpose(2, 0, 1))


def numbers_to_box(numbers: NormBox, rows: int, columns: int, *, padded: bool = False) -> Box:
    """Return the box in scan pixels that four numbers 0..999 stand for, clipped to the frame.

    padded: the numbers run over the frame padded to a square. Raises InvalidInput if nothing of the box is left.

    >>> numbers_to_box((0, 333, 999, 666), rows=300, columns=200)
    (0.0, 100.0, 200.0, 200.0)
    """
    width, height, left, top = _frame(rows, columns, padded)
    x0, y0, x1, y1 = numbers
    box = (
        min(max(x0 / BOX_SCALE * width - left, 0.0), float(columns)),
        min(max(y0 / BOX_SCALE * height - top, 0.0), float(rows)),
        min(max(x1 / BOX_SCALE * width - left, 0.0), float(columns)),
        min(max(y1 / BOX_SCALE * height - top, 0.0), float(rows)),
    )
    if not (box[0] < box[2] and box[1] < box[3]):
        raise InvalidInput(f"box {list(numbers)} (0..{BOX_SCALE}) has no part inside the scan")
    return box


def number_px(rows: int, columns: int, *, padded: bool = False) -> tuple[float, float]:
    """Return how many scan pixels 1 of such a number is, (across, down)."""
    width, height, _, _ = _frame(rows, columns, padded)
    return (width / BOX_SCALE, height / BOX_SCALE)


def box_to_numbers(box_scan_px: Box, rows: int, columns: int, *, padded: bool = False) -> NormBox:
    """Return the box as four numbers 0..999, rounded to the nearest and clipped; x0 < x1 and y0 < y1 always hold.

    padded: the numbers run over the frame padded to a square. How the published data were rounded is not known.

    >>> box_to_numbers((0, 100, 200, 200), rows=300, columns=200)
    (0, 333, 999, 666)
    """
    width, height, left, top = _frame(rows, columns, padded)
    scaled = (
        (box_scan_px[0] + left) / width,
        (box_scan_px[1] + top) / height,
        (box_scan_px[2] + left) / width,
        (box_scan_px[3] + top) / height,
    )
    x0, y0, x1, y1 = (min(max(round(v * BOX_SCALE), 0), BOX_SCALE) for v in scaled)
    x0, y0 = min(x0, BOX_SCALE - 1), min(y0, BOX_SCALE - 1)
    return (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))


def _frame(rows: int, columns: int, padded: bool) -> tuple[int, int, int, int]:
    """Return (width, height, left, top) of what the numbers run over, in scan pixels."""
    if not padded:
        return columns, rows, 0, 0
    side = max(rows, columns)
    return side, side, (side - columns) // 2, (side - rows) // 2
