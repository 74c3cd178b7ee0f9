"""From a mask in scan pixels to the outline and fill that are blended over the shown image.

Pure NumPy apart from Pillow's resampling. Masks are smoothed to the shown size by linear interpolation at the half
level, as the image beside them is; a single scan pixel stays visible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemed.core import Mask
from edgemed.geometry import box_of

Alpha = npt.NDArray[np.float32]
OVERSAMPLING = 2


@dataclass(frozen=True, eq=False)
class Outline:
    """Where to blend: float32 alphas 0..1 [height, width] of the part of the shown image whose corner is (left, top).

    line lies on the inner side of the mask's edge, casing is a thin rim on its outer side, fill is the whole mask.
    """

    left: int
    top: int
    line: Alpha
    casing: Alpha
    fill: Alpha


def outline_of(mask: Mask, scale_x: float, scale_y: float, thickness_px: int, dash_px: int = 0) -> Outline | None:
    """Return the outline of a bool [rows, columns] mask shown at `scale_x`, `scale_y`, or None if the mask is empty.

    dash_px: length of dashes and gaps along the edge; 0 for an unbroken line.
    """
    box = box_of(mask)
    if box is None:
        return None
    rows, columns = mask.shape
    pad_x, pad_y = (int(np.ceil((thickness_px + 2) / s)) + 1 for s in (scale_x, scale_y))
    x0, x1 = max(int(box[0]) - pad_x, 0), min(int(box[2]) + pad_x, columns)
    y0, y1 = max(int(box[1]) - pad_y, 0), min(int(box[3]) + pad_y, rows)
    left, right = round(x0 * scale_x), round(x1 * scale_x)
    top, bottom = round(y0 * scale_y), round(y1 * scale_y)
    size = (max(right - left, 1) * OVERSAMPLING, max(bottom - top, 1) * OVERSAMPLING)
    inside = _enlarged(mask[y0:y1, x0:x1], size)
    line = inside & ~_shrunk(inside, thickness_px * OVERSAMPLING)
    casing = ~_shrunk(~inside, OVERSAMPLING) & ~inside
    if dash_px:
        drawn = _dashes(inside, dash_px * OVERSAMPLING, thickness_px * OVERSAMPLING)
        line, casing = line & drawn, casing & drawn
    return Outline(left, top, _averaged(line), _averaged(casing), _averaged(inside))


def _enlarged(mask: Mask, size: tuple[int, int]) -> Mask:
    from PIL import Image

    picture = Image.fromarray(mask.astype(np.uint8) * 255)
    # Shrinking averages too; max() keeps a mask that is thinner than a shown pixel from vanishing.
    soft = np.asarray(picture.resize(size, Image.Resampling.BILINEAR))
    inside: Mask = soft >= min(128, max(int(soft.max()), 1))
    return inside


def _shrunk(inside: Mask, steps: int) -> Mask:
    """Return `inside` less `steps` pixels at its edge; squares and diamonds alternate, which is nearly round.

    What lies beyond the array counts as inside, so that a mask cut by the image border has no line along the border.
    """
    for step in range(steps):
        p = np.pad(inside, 1, constant_values=True)
        inside = p[1:-1, 1:-1] & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
        if step % 2:
            inside &= p[:-2, :-2] & p[:-2, 2:] & p[2:, :-2] & p[2:, 2:]
    return inside


def _dashes(inside: Mask, period: int, blur: int) -> Mask:
    """Return where a dashed edge is drawn: alternate stretches along x where the edge runs across, else along y."""
    from PIL import Image, ImageFilter

    soft = Image.fromarray(inside.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(max(blur, 2)))
    down, across = np.gradient(np.asarray(soft, np.float32))
    height, width = inside.shape
    along_x = (np.arange(width) // period % 2 == 0)[None, :]
    along_y = (np.arange(height) // period % 2 == 0)[:, None]
    drawn: Mask = np.where(np.abs(down) >= np.abs(across), along_x, along_y)
    return drawn


def _averaged(fine: Mask) -> Alpha:
    height, width = fine.shape[0] // OVERSAMPLING, fine.shape[1] // OVERSAMPLING
    blocks = fine.reshape(height, OVERSAMPLING, width, OVERSAMPLING)
    shares: Alpha = blocks.mean(axis=(1, 3), dtype=np.float32)
    return shares


def blend(image: npt.NDArray[np.uint8], left: int, top: int, alpha: npt.NDArray[Any], colour: tuple[int, ...]) -> None:
    """Blend `colour` into RGB `image` [rows, columns, 3] in place; `alpha` [height, width] 0..1 lies at (left, top)."""
    part = image[top : top + alpha.shape[0], left : left + alpha.shape[1]]
    weight = alpha[: part.shape[0], : part.shape[1], None].astype(np.float32)
    part[:] = np.rint(part * (1 - weight) + np.asarray(colour, np.float32) * weight).astype(np.uint8)
