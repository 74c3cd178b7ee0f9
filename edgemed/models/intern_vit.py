"""InternViT, the image encoder of MedRegA: square RGB -> one feature per patch, after the layer that is selected.

Covers the 6B variant: RMS norms before attention and MLP, query and key normed over the full width before they are
split into heads, a learned scale per channel on each branch (LayerScale), no norm after the last layer. Does not cover
the smaller InternViT with layer norms, nor drop path and dropout (they are off when the model answers).

Source: github xmed-lab/MedRegA at dfdb0db, modeling_intern_vit.py; proven against tests/reference/medrega-tiny.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemed.models.llama import RMSNorm

CHANNELS = 3
"""Colours of the input image."""


@dataclass(frozen=True, kw_only=True)
class InternViTConfig:
    """Sizes of the encoder. `side_px` is what the position table was made for; other sides are interpolated.

    run_layers: how many of the layers run before the feature is taken.
    """

    width: int
    layers: int
    heads: int
    inner: int
    patch_px: int
    side_px: int
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    run_layers: int

    def __post_init__(self) -> None:
        if self.width % self.heads or self.side_px % self.patch_px or not 0 <= self.run_layers <= self.layers:
            raise ValueError(
                f"width {self.width}, heads {self.heads}, side_px {self.side_px}, patch_px {self.patch_px}, "
                f"run_layers {self.run_layers}: heads must divide the width, patch_px must divide side_px, and "
                f"run_layers must lie in 0..{self.layers}"
            )

    @property
    def grid(self) -> int:
        """Rows and columns of the position table."""
        return self.side_px // self.patch_px


class Embeddings(nn.Module):
    """Patches [batch, 1 + grid * grid, width] with their places added, a class token before them."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        c = config
        self.grid = c.grid
        self.class_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.position = nn.Parameter(torch.zeros(1, 1 + c.grid * c.grid, c.width))
        self.patch = nn.Conv2d(CHANNELS, c.width, c.patch_px, stride=c.patch_px)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.patch(image)  # [batch, width, rows, columns]
        rows, columns = patches.shape[2:]
        tokens = patches.flatten(2).transpose(1, 2)  # [batch, rows * columns, width]
        tokens = tokens + self._places(rows, columns).to(tokens.dtype)
        first = (self.class_token + self.position[:, :1]).to(tokens.dtype)
        return torch.cat((first.expand(tokens.shape[0], -1, -1), tokens), dim=1)

    def _places(self, rows: int, columns: int) -> Tensor:
        """Return the places of the patches [1, rows * columns, width], resized from the table bicubically in fp32."""
        table = self.position[:, 1:]
        if (rows, columns) == (self.grid, self.grid):
            return table  # the resize would be the identity
        square = table.float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)  # [1, width, grid, grid]
        resized = F.interpolate(square, size=(rows, columns), mode="bicubic", align_corners=False)
        return resized.flatten(2).transpose(1, 2).to(table.dtype)


class Attention(nn.Module):
    """Attention over all tokens [batch, tokens, width], scaled by head_dim ** -0.5."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        c = config
        self.heads = c.heads
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=c.qkv_bias)
        self.q_norm = RMSNorm(c.width, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.width, c.norm_eps) if c.qk_norm else nn.Identity()
        self.proj = nn.Linear(c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)  # [batch, tokens, width] each
        parts = (self.q_norm(query), self.k_norm(key), value)
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)  # [batch, heads, tokens, head_dim]
        result: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return result


class Block(nn.Module):
    """One layer: x + ls1 * attention(norm1(x)), then x + ls2 * mlp(norm2(x)); the GELU in the MLP is the exact one."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        c = config
        self.norm1 = RMSNorm(c.width, c.norm_eps)
        self.attn = Attention(c)
        self.ls1 = nn.Parameter(torch.ones(c.width))
        self.norm2 = RMSNorm(c.width, c.norm_eps)
        self.fc1 = nn.Linear(c.width, c.inner)
        self.fc2 = nn.Linear(c.inner, c.width)
        self.ls2 = nn.Parameter(torch.ones(c.width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1 * self.attn(self.norm1(x))
        result: Tensor = x + self.ls2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return result


class InternViT(nn.Module):
    """Image [tiles, 3, side, side], normalised -> image_features [tiles, patches, width], row by row, no class token.

    `side` may be any multiple of the patch; for a side other than the config's the position table is resized.
    """

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(self, image: Tensor) -> Tensor:
        x = self.embeddings(image)
        for layer in self.layers[: self.config.run_layers]:
            x = layer(x)
        features: Tensor = x[:, 1:]
        return features

    def hidden_states(self, image: Tensor) -> list[Tensor]:
        """Return [tiles, 1 + patches, width] with the class token: after the embeddings, then after every layer."""
        states = [self.embeddings(image)]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states
