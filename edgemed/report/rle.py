"""Masks as COCO run lengths, uncompressed: column-major, the first count is background.

Covers the plain list of counts that the answer JSON holds; not COCO's compressed strings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgemed.core import Mask
from edgemed.errors import InvalidInput


def to_rle(mask: Mask) -> dict[str, list[int]]:
    """Return {"size": [rows, columns], "counts": [background, inside, background, ...]} of a bool [rows, columns] mask.

    The counts run down the first column, then the second, ... and add up to rows * columns. A mask whose first pixel
    is inside starts with 0.

    >>> import numpy as np
    >>> to_rle(np.array([[0, 1, 1], [0, 0, 1]], bool))
    {'size': [2, 3], 'counts': [2, 1, 1, 2]}
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise InvalidInput(f"mask is {mask.dtype} {list(mask.shape)}, bool [rows, columns] was expected")
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate(([0], changes, [flat.size]))).tolist()
    return {"size": [int(n) for n in mask.shape], "counts": [0, *counts] if flat.size and flat[0] else counts}


def from_rle(rle: Mapping[str, Any]) -> Mask:
    """Return the bool [rows, columns] mask that `to_rle` wrote.

    Raises InvalidInput if a count is negative or the counts do not fill the size.

    >>> from_rle({"size": [2, 3], "counts": [2, 1, 1, 2]}).astype(int).tolist()
    [[0, 1, 1], [0, 0, 1]]
    """
    rows, columns = (int(n) for n in rle["size"])
    counts = np.asarray(rle["counts"], dtype=np.int64)
    if rows < 0 or columns < 0 or (counts < 0).any() or int(counts.sum()) != rows * columns:
        raise InvalidInput(f"run lengths add up to {int(counts.sum())}, {rows} * {columns} pixels were expected")
    inside = np.arange(counts.size) % 2 == 1
    return np.repeat(inside, counts).reshape((rows, columns), order="F")
