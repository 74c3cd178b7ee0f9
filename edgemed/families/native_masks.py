"""What the native mask decoder is asked with: one MaskPrompt for each outline, and the feeds they make.

Covers the user's regions, what the language model wrote, and the dense head's structure maps as rough first masks;
training and inference call the same `map_prompt` and `structure_at`. Does not cover what becomes of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgemed.core import Box, Point, PromptRegion
from edgemed.families.native_regions import GRID
from edgemed.families.native_view import SIDE
from edgemed.geometry import View, region_box
from edgemed.graphs import Feeds

Vector = npt.NDArray[np.float32]

_MASK_LOGIT = 10.0
"""A mask goes in as logits: this inside, its negative outside."""
_SEEN = 0.5
"""From this probability on a structure is seen in a cell of its map."""


@dataclass(frozen=True, eq=False)
class MaskPrompt:
    """One row of the mask decoder's feeds; None where a kind of prompt is absent. Model pixels.

    mask: logits [SIDE, SIDE]; seg: the language model's hidden state at `<seg>`.
    """

    box: Box | None = None
    point: Point | None = None
    mask: Vector | None = None
    seg: Vector | None = None


def prompt_of_region(region: PromptRegion, view: View, maps: Vector) -> MaskPrompt:
    """Return the prompt that outlines what the user points at, and nothing that the language model said of it.

    With the written box and state beside it, box->mask Dice on real slices was 0.20 where the model named the region
    wrongly. maps: [structures, GRID, GRID] probabilities; a point brings the map of the structure that is seen there,
    because where it lies says little about how far the thing reaches.
    """
    if region.point is not None:
        point = view.point_to_model(region.point)
        seen = structure_at(point, maps)
        return MaskPrompt(point=point, mask=None if seen is None else map_prompt(maps[seen]))
    box = view.box_to_model(region_box(region))
    if region.mask is None:
        return MaskPrompt(box)
    inside_share = view.image_to_model(region.mask.astype(np.float32))  # [SIDE, SIDE], 0..1
    return MaskPrompt(box, mask=(2 * inside_share - 1) * np.float32(_MASK_LOGIT))


def prompt_of_answer(box: Box | None, seg: Vector | None, structure: int | None, maps: Vector) -> MaskPrompt:
    """Return the prompt that outlines what was written: its box, its state, the map of its structure if it shows."""
    shows = structure is not None and structure < len(maps) and (maps[structure] >= _SEEN).any()
    return MaskPrompt(box, mask=map_prompt(maps[structure]) if shows else None, seg=seg)


def structure_at(point_model_px: Point, maps: Vector) -> int | None:
    """Return the likeliest structure in the cell of a point, or None if none is likelier than not."""
    column, row = (min(max(int(v * GRID / SIDE), 0), GRID - 1) for v in point_model_px)
    likeliest = int(maps[:, row, column].argmax())
    return likeliest if maps[likeliest, row, column] >= _SEEN else None


def map_prompt(probabilities: Vector) -> Vector:
    """Return a structure map [GRID, GRID] as mask logits [SIDE, SIDE], bilinear between the centres of its cells.

    >>> float(map_prompt(np.full((64, 64), 0.5, np.float32)).max()), float(map_prompt(np.ones((64, 64))).min())
    (0.0, 10.0)
    """
    limit = 1 / (1 + np.exp(-_MASK_LOGIT))
    p = np.clip(probabilities, 1 - limit, limit).astype(np.float64)
    return np.asarray(_WEIGHTS @ np.log(p / (1 - p)) @ _WEIGHTS.T, np.float32)


def _interpolation() -> npt.NDArray[np.float64]:
    """Return [SIDE, GRID]: how much of each cell's value a model pixel takes along one axis."""
    at = np.clip((np.arange(SIDE) + 0.5) * GRID / SIDE - 0.5, 0, GRID - 1)
    return np.asarray(np.maximum(0.0, 1 - np.abs(at[:, None] - np.arange(GRID))), np.float64)


_WEIGHTS = _interpolation()


def stacked(prompts: Sequence[MaskPrompt], width: int) -> Feeds:
    """Return the prompts as the feeds of one mask_decoder call, less the image; width: of the state at `<seg>`."""
    none = np.zeros((SIDE, SIDE), np.float32)
    return {
        "boxes": np.array([p.box or (0.0,) * 4 for p in prompts], np.float32),
        "has_box": np.array([p.box is not None for p in prompts], np.float32),
        "points": np.array([[p.point or (0.0, 0.0)] for p in prompts], np.float32),
        "point_labels": np.array([[1 if p.point else -1] for p in prompts], np.int64),
        "mask_prompts": np.stack([none if p.mask is None else p.mask for p in prompts]).astype(np.float32),
        "has_mask": np.array([p.mask is not None for p in prompts], np.float32),
        "seg_hidden": np.stack([np.zeros(width, np.float32) if p.seg is None else p.seg for p in prompts]),
        "has_seg": np.array([p.seg is not None for p in prompts], np.float32),
    }
