"""What MedPLIB adds for questions with examples: fewer tokens for a picture, and a few tokens for a mask.

Both average neighbours down to a fixed number of rows ("adaptive" pooling along one axis). The sizes are known when a
graph is made, so that the average is one product with a small constant matrix, which every engine runs.

Source: github ShawnHuang497/MedPLIB at 5ab54bc, medplib_arch.py. No weights with these parts were published: tests
compare with a restatement of the formulas, not with what the authors' code gave.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MASK_CHANNELS = (64, 128, 256, 256)
"""Channels of the mask encoder's convolutions; each halves the side."""


def pool_rows(x: Tensor, count: int) -> Tensor:
    """Return [batch, count, width]: row i is the mean of rows floor(i n / count) to ceil((i + 1) n / count) of n.

    x: [batch, n, width]. The windows repeat after n / gcd(n, count) rows, so one small matrix serves all groups:
    4 x 9 for 576 rows to 256.
    """
    batch, rows, width = x.shape
    groups = math.gcd(rows, count)
    taken, given = rows // groups, count // groups
    shares = [[0.0] * taken for _ in range(given)]
    for i in range(given):
        start, end = i * taken // given, -(-(i + 1) * taken // given)
        shares[i][start:end] = [1 / (end - start)] * (end - start)
    matrix = torch.tensor(shares, dtype=x.dtype, device=x.device)  # [given, taken]
    pooled: Tensor = matrix @ x.reshape(batch, groups, taken, width)
    return pooled.reshape(batch, count, width)


class TokenCompressor(nn.Module):
    """Image tokens of the language model's width -> fewer of them: 576 -> 256 as published."""

    def __init__(self, width: int, tokens: int = 256) -> None:
        super().__init__()
        self.tokens = tokens
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [batch, tokens, width] of x [batch, patches, width]."""
        out: Tensor = self.proj(self.norm(pool_rows(x, self.tokens)))
        return out


class MaskTokenEncoder(nn.Module):
    """A mask -> rows of the language model's width: 64 as published."""

    def __init__(self, width: int, tokens: int = 64) -> None:
        super().__init__()
        self.tokens = tokens
        layers: list[nn.Module] = []
        for before, after in zip((1, *MASK_CHANNELS), MASK_CHANNELS, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU()]
        self.encoder = nn.Sequential(*layers)
        self.proj = nn.Linear(MASK_CHANNELS[-1], width)
        self.norm = nn.LayerNorm(width)

    def forward(self, mask: Tensor) -> Tensor:
        """Return [batch, tokens, width] of mask [batch, 1, side, side], 0 or 1."""
        features = self.encoder(mask).flatten(2).transpose(1, 2)  # [batch, places, channels], row by row
        out: Tensor = self.norm(self.proj(pool_rows(features, self.tokens)))
        return out
