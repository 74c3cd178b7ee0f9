"""What the native model looks at: the body crop, the View and the model's input picture.

Covers one frame as shown (uint8 RGB) -> View -> float32 [3, 256, 256]; training and inference call the same functions.
Does not cover windowing (`core.Scan.shown`) or the way back (`geometry.View`).

The crop depends on the pixels and the modality alone, so one picture always gives one View:

    CT, MR, PET ...            the largest foreground pieces (table, arms, burnt-in text fall away), 2.5 % margin,
                               widened to a square as far as the picture reaches
    X-ray                      the whole frame
    ultrasound and colour      the frame without its black borders
    grey of unknown kind       as CT if most of its rim is dark, else without its black borders
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgemed.core import Box, Mask
from edgemed.errors import InvalidInput
from edgemed.geometry import View, fit

SIDE = 256
"""Pixels along one side of the model's input."""

Picture = npt.NDArray[np.uint8]

_BODY = frozenset({"CT", "MR", "MRI", "PT", "PET", "NM"})
_PROJECTION = frozenset({"CR", "DX", "XR", "X-RAY", "XRAY", "RG", "RF", "XA", "MG", "PX", "IO", "RTIMAGE"})
_ULTRASOUND = frozenset({"US", "ULTRASOUND", "IVUS"})

_COARSE = 128
"""The crop is found on the picture averaged to at most this many pixels a side: 0.6 ms at 512 x 512."""
_MARGIN = 0.025
_DARK = 0.08
"""Background ends this share of the way from the background level to the bright end: fat in an abdominal window
(40 / 350) still counts as body."""
_FLAT = 0.2
"""A grey level held by this share of the outer band, and darker than a third, is background: air in a lung window."""
_NECK = 0.03
"""Bridges narrower than twice this share of the picture are cut: an arm that touches the trunk, the table."""
_CUT = 0.65
"""The cut keeps at least this share of the body's box; else the body was thin or ragged (narrow window): no cut."""
_COMPANION = 0.3
"""A piece this large beside the largest one belongs to the body: the second leg, the second half of a split scan."""
_MIN_BODY = 0.01


def model_view(shown: Picture, modality: str, spacing: tuple[float, float] | None = None) -> View:
    """Return the View from a frame as shown (uint8 RGB [rows, columns, 3]) to the model's 256 x 256 input.

    modality: the DICOM code or the word for it ("CT", "X-ray", "ultrasound"); upper or lower case.
    spacing: (row, column) spacing; pixels that are not square are made square.

    Raises InvalidInput if `shown` is not such a picture.
    """
    if shown.dtype != np.uint8 or shown.ndim != 3 or shown.shape[2] != 3 or 0 in shown.shape:
        raise InvalidInput(f"picture is {shown.dtype} {list(shown.shape)}, uint8 [rows, columns, 3] was expected")
    rows, columns = shown.shape[:2]
    kind = modality.strip().upper()
    if kind in _PROJECTION:
        return fit(rows, columns, SIDE, None, spacing)
    coarse, cell = _coarse(shown)
    if kind in _BODY or (kind not in _ULTRASOUND and is_grey(shown) and _rim_is_dark(coarse)):
        box = _body_box(coarse)
    else:
        box = _lit_box(coarse)
    if box is None:
        return fit(rows, columns, SIDE, None, spacing)
    x0, y0, x1, y1 = (v * cell for v in box)
    crop = (x0, y0, min(x1, float(columns)), min(y1, float(rows)))
    return fit(rows, columns, SIDE, _square(crop, rows, columns, spacing), spacing)


def model_image(shown: Picture, view: View) -> npt.NDArray[np.float32]:
    """Return the model's input float32 [3, 256, 256] (RGB, 0..1) of a frame as shown; what lies outside it is 0."""
    if is_grey(shown):
        plane = view.image_to_model(shown[..., 0])  # [side, side]
        image = np.repeat(plane[None], 3, axis=0)
    else:
        image = view.image_to_model(shown).transpose(2, 0, 1)  # [3, side, side]
    return np.ascontiguousarray(image * np.float32(1 / 255))


def is_grey(shown: Picture) -> bool:
    """Return True if the three channels of the picture are equal everywhere."""
    red = shown[..., 0]
    return bool(np.array_equal(red, shown[..., 1]) and np.array_equal(red, shown[..., 2]))


def _coarse(shown: Picture) -> tuple[npt.NDArray[np.float32], int]:
    """Return (the brightest channel averaged over cells [rows', columns'], cell side in pixels); ragged at the end."""
    rows, columns = shown.shape[:2]
    cell = max(1, -(-max(rows, columns) // _COARSE))
    grey = shown[..., 1] if is_grey(shown) else shown.max(axis=2)
    down = np.arange(0, rows, cell)
    across = np.arange(0, columns, cell)
    sums = np.add.reduceat(np.add.reduceat(grey, down, axis=0, dtype=np.uint32), across, axis=1)
    counts = np.outer(np.diff(np.append(down, rows)), np.diff(np.append(across, columns)))
    return (sums / counts).astype(np.float32), cell


def _threshold(coarse: npt.NDArray[np.float32]) -> float:
    """Return the grey level above which a cell is foreground."""
    bright = max(float(np.percentile(coarse, 99)), 1.0)
    height, width = coarse.shape
    band = np.ones(coarse.shape, bool)
    band[height // 10 : height - height // 10, width // 10 : width - width // 10] = False
    counts, edges = np.histogram(coarse[band], bins=64, range=(0.0, 256.0))
    pairs = counts[:-1] + counts[1:]  # a level may straddle two bins
    flat = np.flatnonzero((pairs >= _FLAT * band.sum()) & (edges[2:] <= bright / 3))
    background = float(edges[flat[-1] + 2]) if flat.size and flat[-1] > 0 else 0.0
    return max(6.0, background + _DARK * (bright - background))


def _rim_is_dark(coarse: npt.NDArray[np.float32]) -> bool:
    rim = np.concatenate([coarse[0], coarse[-1], coarse[1:-1, 0], coarse[1:-1, -1]])
    return float(np.mean(rim < _threshold(coarse))) >= 0.6


def _lit_box(coarse: npt.NDArray[np.float32]) -> Box | None:
    """Return the box, in cells, of all rows and columns that are not black."""
    lit = coarse > _threshold(coarse)
    ys, xs = np.flatnonzero(lit.any(axis=1)), np.flatnonzero(lit.any(axis=0))
    if ys.size == 0:
        return None
    return (float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1))


def _body_box(coarse: npt.NDArray[np.float32]) -> Box | None:
    """Return the box, in cells, around the largest foreground pieces with a margin, or None if there is hardly any."""
    lit = coarse > _threshold(coarse)
    height, width = lit.shape
    whole = max(_pieces(lit), key=lambda p: p.area, default=_Piece())
    if whole.area < _MIN_BODY * lit.size:
        return None
    reach = max(2, round(_NECK * max(height, width)))
    body = _shrunk(lit, 1)  # thin lines (blanket, table edge) would enclose air as if it were lung
    body = _filled(body, _shrunk(~body, reach))
    kept = _large(_pieces(_shrunk(body, reach - 1)))
    if not kept or _box_area(kept, reach) < _CUT * _box_area([whole], 0):
        kept, reach = _large(_pieces(lit)), 0
    x0, y0 = min(p.x0 for p in kept) - reach, min(p.y0 for p in kept) - reach
    x1, y1 = max(p.x1 for p in kept) + reach, max(p.y1 for p in kept) + reach
    mx, my = _MARGIN * (x1 - x0), _MARGIN * (y1 - y0)
    return (max(x0 - mx, 0.0), max(y0 - my, 0.0), min(x1 + mx, float(width)), min(y1 + my, float(height)))


def _box_area(pieces: list[_Piece], reach: int) -> int:
    """Return the area of the box around `pieces`, grown by `reach`."""
    across = max(p.x1 for p in pieces) - min(p.x0 for p in pieces) + 2 * reach
    return across * (max(p.y1 for p in pieces) - min(p.y0 for p in pieces) + 2 * reach)


def _filled(lit: Mask, core: Mask) -> Mask:
    """Return `lit` with its wide holes filled: dark pieces off the rim that hold a cell of `core` (lungs, bowel gas).

    A thin gap stays open, so that an arm lying against the trunk at both ends of it can be cut off.
    """
    height, width = lit.shape
    out = lit.copy()
    for piece in _pieces(~lit, diagonal=False):
        enclosed = piece.x0 > 0 and piece.y0 > 0 and piece.x1 < width and piece.y1 < height
        if enclosed and any(core[y, x:end].any() for y, x, end in piece.runs):
            for y, x, end in piece.runs:
                out[y, x:end] = True
    return out


def _shrunk(lit: Mask, reach: int) -> Mask:
    """Return the cells whose (2 reach + 1)-square is all lit; beyond the rim the rim's cells are repeated."""
    size = 2 * reach + 1
    sums = np.pad(np.cumsum(np.cumsum(np.pad(lit, reach, mode="edge"), axis=0), axis=1), ((1, 0), (1, 0)))
    lit_in_square = sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]
    return np.asarray(lit_in_square == size * size)


@dataclass
class _Piece:
    """A connected piece of a mask: its runs (row, first column, end column), area and box, grown run by run."""

    runs: list[tuple[int, int, int]] = field(default_factory=list)
    area: int = 0
    x0: int = 1 << 30
    y0: int = 1 << 30
    x1: int = 0
    y1: int = 0

    def add(self, y: int, x: int, end: int) -> None:
        self.runs.append((y, x, end))
        self.area += end - x
        self.x0, self.y0 = min(self.x0, x), min(self.y0, y)
        self.x1, self.y1 = max(self.x1, end), max(self.y1, y + 1)


def _large(pieces: list[_Piece]) -> list[_Piece]:
    """Return the largest piece and its companions; none if there are no pieces."""
    largest = max((p.area for p in pieces), default=0)
    return [p for p in pieces if p.area >= _COMPANION * largest]


def _pieces(lit: Mask, diagonal: bool = True) -> list[_Piece]:
    """Return the connected pieces of `lit` (`diagonal`: over corners, too): runs of a row joined with those above."""
    edges = np.diff(np.pad(lit, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, ends = np.argwhere(edges == 1).tolist(), np.argwhere(edges == -1).tolist()
    runs = [(y, x, end) for (y, x), (_, end) in zip(starts, ends, strict=True)]
    parent = list(range(len(runs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    touch = 1 if diagonal else 0
    above: list[int] = []
    row: list[int] = []
    for i, (y, x, end) in enumerate(runs):
        if row and runs[row[-1]][0] != y:
            above, row = (row if runs[row[-1]][0] == y - 1 else []), []
        for j in above:
            if runs[j][1] < end + touch and x < runs[j][2] + touch:
                parent[root(j)] = root(i)
        row.append(i)
    found: dict[int, _Piece] = {}
    for i, run in enumerate(runs):
        found.setdefault(root(i), _Piece()).add(*run)
    return list(found.values())


def _square(crop: Box, rows: int, columns: int, spacing: tuple[float, float] | None) -> Box:
    """Return `crop` widened about its centre to a square of true size, moved to lie in the picture as far as it fits.

    The model then sees the surroundings where the picture has them and padding only where it ends.
    """
    row_spacing, column_spacing = spacing or (1.0, 1.0)
    x0, y0, x1, y1 = crop
    size = max((x1 - x0) * column_spacing, (y1 - y0) * row_spacing)
    left, right = _widen(x0, x1, size / column_spacing, float(columns))
    top, bottom = _widen(y0, y1, size / row_spacing, float(rows))
    return (left, top, right, bottom)


def _widen(start: float, end: float, length: float, limit: float) -> tuple[float, float]:
    if length >= limit:
        return 0.0, limit
    new = min(max((start + end - length) / 2, 0.0), limit - length)
    return new, new + length
