"""The projector of MedRegA: patch features -> the rows that the language model reads as image tokens.

Neighbouring patches are folded into channels (factor 2: a quarter of the tokens, four times the width), then a norm and
two linear layers bring them to the width of the language model.

Source: github xmed-lab/MedRegA at dfdb0db, modeling_internvl_chat.py; proven against tests/reference/medrega-tiny.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Version = Literal["v1", "v2"]

_NORM_EPS = 1e-5
"""Not in the published config: the default of the layer norm in use there."""


def fold_patches(x: Tensor, factor: int, version: Version) -> Tensor:
    """Return [tiles, side / factor, side / factor, factor * factor * width] of x [tiles, side, side, width].

    Each output channel group holds a factor x factor square of neighbours, row by row. "v1" leaves the squares
    transposed (first the columns of the picture, then its rows), as the released weights were trained; "v2" has rows
    first.
    """
    _, rows, columns, width = x.shape
    x = x.reshape(-1, rows, columns // factor, factor * width)
    x = x.transpose(1, 2)  # [tiles, columns / factor, rows, factor * width]
    x = x.reshape(-1, columns // factor, rows // factor, factor * factor * width)
    return x if version == "v1" else x.transpose(1, 2)


class PixelShuffleProjector(nn.Module):
    """image_features [tiles, side * side, vision_width] -> image_tokens [tiles * (side / factor) ** 2, width]."""

    def __init__(self, vision_width: int, width: int, factor: int, version: Version) -> None:
        super().__init__()
        self.factor = factor
        self.version: Version = version
        folded = vision_width * factor * factor
        self.norm = nn.LayerNorm(folded, eps=_NORM_EPS)
        self.fc1 = nn.Linear(folded, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, image_features: Tensor) -> Tensor:
        folded = self.fold(image_features).flatten(0, 2)  # [tiles * (side / factor) ** 2, factor ** 2 * vision_width]
        rows: Tensor = self.fc2(F.gelu(self.fc1(self.norm(folded))))
        return rows

    def fold(self, image_features: Tensor) -> Tensor:
        """Return [tiles, side / factor, side / factor, factor ** 2 * vision_width], patches folded into channels.

        Raises ValueError where the patches are not a square that the factor divides.
        """
        patches = image_features.shape[1]
        side = math.isqrt(patches)
        if side * side != patches or side % self.factor:
            raise ValueError(f"{patches} patches are not a square whose side {self.factor} divides")
        return fold_patches(image_features.unflatten(1, (side, side)), self.factor, self.version)
