"""What is known of an image: what questions are asked about, and answers made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgemed.core import RegionKind
from edgemed.families.native_text import Bins
from edgemed.geometry import BINS


@dataclass(frozen=True)
class RegionFact:
    """A region of the prompt. structure: index, or None for background or something unknown; target_bins: its box."""

    kind: RegionKind
    structure: int | None
    box_bins: Bins
    target_bins: Bins | None

    def __post_init__(self) -> None:
        if (self.structure is None) != (self.target_bins is None):
            raise ValueError("a region has a structure and its box, or neither")


@dataclass(frozen=True)
class ImageFacts:
    """What is known of one image. A structure in neither `visible` nor `absent` is not asked about.

    visible: structure -> box as coordinate bins 0..999 (x0, y0, x1, y1). absent: certainly not visible.
    extent: bins across and down that the image covers of the model's square; the rest is padding.
    """

    modality: int | None
    body_part: int | None
    visible: Mapping[int, Bins]
    absent: tuple[int, ...] = ()
    regions: tuple[RegionFact, ...] = ()
    extent: tuple[int, int] = (BINS, BINS)
