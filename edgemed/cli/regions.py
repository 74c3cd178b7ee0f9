"""What the command line says of places: --region as a PromptRegion, --example as an Example.

    --region box:x0,y0,x1,y1 | point:x,y | mask:FILE.png        in pixels of the shown frame
    --example IMAGE=MASK.png

A mask is a picture of the size of its image; it is where the picture is not black.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from edgemed.core import Example, Mask, PromptRegion, Scan
from edgemed.errors import EdgemedError, InvalidInput

COUNTS = {"box": 4, "point": 2}


def read_region(text: str, scan: Scan, read: Callable[[str], Scan]) -> PromptRegion:
    """Return the region that `text` names, checked against the scan; `read` reads the picture of a mask.

    Raises EdgemedError (usage) if the text has another form, InvalidInput if the place is empty or not inside the scan,
    and what reading a picture raises for a mask file.
    """
    kind, _, value = text.partition(":")
    if kind == "mask" and value:
        return PromptRegion("mask", mask=_mask(read(value), value, scan))
    numbers = _numbers(value)
    if COUNTS.get(kind) != len(numbers):
        raise EdgemedError(f"region {text!r} has another form than box:x0,y0,x1,y1, point:x,y or mask:FILE.png")
    xs, ys = numbers[0::2], numbers[1::2]
    end = 1 if kind == "point" else 0  # a point is in a pixel, a box may end at the far edge
    if min(numbers) < 0 or max(xs) > scan.columns - end or max(ys) > scan.rows - end:
        size = f"{scan.columns} columns and {scan.rows} rows"
        raise InvalidInput(f"region {text} is not inside the scan, which has {size}")
    if kind == "point":
        return PromptRegion("point", point=(numbers[0], numbers[1]))
    return PromptRegion("box", box=(numbers[0], numbers[1], numbers[2], numbers[3]))


def read_example(text: str, read_image: Callable[[str], Scan], read: Callable[[str], Scan]) -> Example:
    """Return the example that `text` names; its frame is the first that was read.

    read_image: reads the image, read: the picture of the mask. A path may hold a "="; the last one divides.

    Raises EdgemedError (usage) if the text has another form, InvalidInput if the mask is empty or does not fit, and
    what reading either file raises.
    """
    image, _, mask = text.rpartition("=")
    if not (image and mask):
        raise EdgemedError(f"example {text!r} has another form than IMAGE=MASK.png")
    scan = read_image(image)
    return Example(scan, _mask(read(mask), mask, scan), scan.first_frame)


def _numbers(value: str) -> list[float]:
    """Return the finite numbers between the commas of `value`, or none if one of them is not a number."""
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        return []
    return numbers if all(math.isfinite(n) for n in numbers) else []


def _mask(picture: Scan, path: str, scan: Scan) -> Mask:
    """Return where a picture is not black."""
    if (picture.rows, picture.columns) != (scan.rows, scan.columns):
        raise InvalidInput(
            f"mask file {path} has {picture.columns} x {picture.rows} pixels; "
            f"{scan.columns} x {scan.rows} as the scan was expected"
        )
    inside = picture.pixels[0] > 0
    mask = inside.any(axis=-1) if inside.ndim == 3 else inside
    if not mask.any():
        raise InvalidInput(f"mask file {path} is black all over; the region must have other pixels")
    return np.asarray(mask)
