"""The CLIP vision tower: image -> hidden states of any layer. Class token, quick-GELU, a norm before the first layer.

Covers the vision half only, in the key layout of the published checkpoints, misspelt `pre_layrnorm` included, so that a
state dict goes in without renaming. Does not cover the text half, pooling by the class token or other activations.
An own module because `transformers` would be a large dependency for these lines.

Source of the architecture: CLIP (Radford et al., 2021), ViT-L/14 at 336 pixels in the published size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class ClipVitConfig:
    """Sizes of the tower. `side` and `patch` in pixels; `inner` is the perceptron's width."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    inner: int = 4096
    side: int = 336
    patch: int = 14
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.width % self.heads or self.side % self.patch:
            raise ValueError(
                f"width {self.width}, heads {self.heads}, side {self.side}, patch {self.patch}: "
                "heads must divide width, patch must divide side"
            )

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.side // self.patch


class Embeddings(nn.Module):
    """Patches without a bias, the class token before them, one learned vector per position."""

    def __init__(self, config: ClipVitConfig) -> None:
        super().__init__()
        c = config
        self.class_embedding = nn.Parameter(torch.zeros(c.width))
        self.patch_embedding = nn.Conv2d(3, c.width, c.patch, stride=c.patch, bias=False)
        self.position_embedding = nn.Embedding(c.grid**2 + 1, c.width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [batch, patches, width]
        first = self.class_embedding.expand(pixels.shape[0], 1, -1)
        out: Tensor = torch.cat((first, patches), dim=1) + self.position_embedding.weight
        return out


class SelfAttention(nn.Module):
    """Multi-head attention of every token to every token, with biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [batch, heads, tokens, head_dim]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class Perceptron(nn.Module):
    """Two linear layers with x * sigmoid(1.702 x), the quick form of GELU that the weights were trained with."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.fc1(x)
        out: Tensor = self.fc2(inner * torch.sigmoid(1.702 * inner))
        return out


class Layer(nn.Module):
    """x + attention(norm(x)), then x + perceptron(norm(x))."""

    def __init__(self, config: ClipVitConfig) -> None:
        super().__init__()
        c = config
        self.layer_norm1 = nn.LayerNorm(c.width, c.norm_eps)
        self.self_attn = SelfAttention(c.width, c.heads)
        self.layer_norm2 = nn.LayerNorm(c.width, c.norm_eps)
        self.mlp = Perceptron(c.width, c.inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class Encoder(nn.Module):
    """The layers, under the name that the published keys give them."""

    def __init__(self, config: ClipVitConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))


class ClipVit(nn.Module):
    """Pixels [batch, 3, side, side], normalised -> hidden states [batch, 1 + patches, width], class token first."""

    def __init__(self, config: ClipVitConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width, config.norm_eps)
        self.encoder = Encoder(config)
        # Only CLIP's pooled class token goes through it. It is here so that every published key has its place.
        self.post_layernorm = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, pixels: Tensor, layer: int = -1) -> Tensor:
        """Return the hidden state number `layer`: 0 enters the first layer, -1 leaves the last one (not normed).

        Layers after it are not computed. Raises IndexError if there is no such hidden state.
        """
        count = range(self.config.layers + 1)[layer]
        x = self.pre_layrnorm(self.embeddings(pixels))
        for block in list(self.encoder.layers)[:count]:
            x = block(x)
        out: Tensor = x
        return out

    def two_patch_features(self, pixels: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Return (as `patch_features`, the same after the last layer), computed in one pass."""
        count = range(self.config.layers + 1)[layer]
        x = self.forward(pixels, layer)
        last = x
        for block in list(self.encoder.layers)[count:]:
            last = block(last)
        return x[:, 1:], last[:, 1:]

    def patch_features(self, pixels: Tensor, layer: int) -> Tensor:
        """Return [batch, patches, width]: hidden state `layer` without the class token, patches row by row."""
        return self.forward(pixels, layer)[:, 1:]
