"""SAM-Med2D: image -> embedding; points, boxes, an earlier mask or a text token -> mask logits and their expected IoU.

A SAM ViT-B with an adapter beside each perceptron. Parameter names are the published ones, so a state dict goes in
without renaming, and every size is read from tensor shapes. Frames: points and boxes are (x, y) in pixels of the square
model image, origin at its outer corner. Does not cover preprocessing or bringing the mask back to the scan.

Source of the architecture: Segment Anything (Kirillov et al., 2023), adapters as in SAM-Med2D (Cheng et al., 2023).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemed.errors import InvalidInput
from edgemed.models.mask_decoder import Perceptron
from edgemed.models.tiny_vit import ChannelNorm

CORNERS = 2
"""Sparse tokens of a box: its first and its last corner."""
_DECODER_HEADS = 8  # the published value; no tensor's shape tells it
_ENCODER_EPS = 1e-6
_MASKED_OUT = -1e4  # finite: -inf would make rows without any key NaN in half precision


@dataclass(frozen=True, kw_only=True)
class SamMed2dConfig:
    """Sizes. windows: for each block the side of its attention window in patches, 0 for attention over the whole image.

    adapter: width inside the adapters' channel gate, 0 without adapters. mask_channels: of the earlier mask's encoder.
    """

    width: int
    heads: int
    inner: int
    windows: tuple[int, ...]
    grid: int
    patch: int
    adapter: int
    prompt_width: int
    mask_channels: int
    decoder_depth: int
    decoder_inner: int
    attention_width: int
    mask_tokens: int
    iou_hidden: int
    decoder_heads: int = _DECODER_HEADS

    @property
    def side(self) -> int:
        """Rows and columns of the model image."""
        return self.grid * self.patch

    @property
    def mask_side(self) -> int:
        """Rows and columns of a mask, given or returned."""
        return 4 * self.grid


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> SamMed2dConfig:
    """Return the sizes of a checkpoint from the shapes of its tensors, named from `image_encoder.` on.

    Heads of the encoder: width / width of a relative position table. A block attends within windows of side w where its
    table has 2 w - 1 rows, and over the whole grid where that w is the grid.

    Raises InvalidInput naming the tensor that is missing or whose shape fits nothing.
    """

    def shape(name: str, dims: int) -> tuple[int, ...]:
        found = shapes.get(name)
        if found is None or len(found) != dims or 0 in found:
            raise InvalidInput(
                f"SAM weight {name} is {'missing' if found is None else list(found)}, "
                f"{dims} dims were expected; is this a SAM-Med2D checkpoint?"
            )
        return tuple(found)

    _, grid, columns, width = shape("image_encoder.pos_embed", 4)
    if columns != grid:
        raise InvalidInput(
            f"SAM weight image_encoder.pos_embed has a grid of {grid} x {columns}, a square was expected"
        )
    windows, head_dim = [], width
    for i in range(_count(shapes, r"image_encoder\.blocks\.(\d+)\.")):
        name = f"image_encoder.blocks.{i}.attn.rel_pos_h"
        rows, head_dim = shape(name, 2)
        if rows % 2 == 0 or width % head_dim:
            raise InvalidInput(
                f"SAM weight {name} is {[rows, head_dim]}; an odd number of rows and a divisor of {width} were expected"
            )
        side = (rows + 1) // 2
        windows.append(0 if side == grid else side)
    adapter = "image_encoder.blocks.0.Adapter.channel.0.weight"
    return SamMed2dConfig(
        width=width,
        heads=width // head_dim,
        inner=shape("image_encoder.blocks.0.mlp.lin1.bias", 1)[0],
        windows=tuple(windows),
        grid=grid,
        patch=shape("image_encoder.patch_embed.proj.weight", 4)[2],
        adapter=shape(adapter, 2)[0] if adapter in shapes else 0,
        prompt_width=shape("prompt_encoder.no_mask_embed.weight", 2)[1],
        mask_channels=shape("prompt_encoder.mask_downscaling.3.weight", 4)[0],
        decoder_depth=_count(shapes, r"mask_decoder\.transformer\.layers\.(\d+)\."),
        decoder_inner=shape("mask_decoder.transformer.layers.0.mlp.lin1.bias", 1)[0],
        attention_width=shape("mask_decoder.transformer.final_attn_token_to_image.q_proj.bias", 1)[0],
        mask_tokens=shape("mask_decoder.mask_tokens.weight", 2)[0],
        iou_hidden=shape("mask_decoder.iou_prediction_head.layers.0.bias", 1)[0],
    )


def _count(names: Mapping[str, object], pattern: str) -> int:
    """Return 1 + the largest number that `pattern` finds at the start of a name, 0 if it finds none."""
    return max((int(m[1]) + 1 for name in names if (m := re.match(pattern, name))), default=0)


# -- image encoder -----------------------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """Pixels [batch, 3, side, side] -> patches [batch, rows, columns, width]."""

    def __init__(self, config: SamMed2dConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch, stride=config.patch)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.proj(pixels).permute(0, 2, 3, 1)
        return out


class GridAttention(nn.Module):
    """Attention over a square of [batch, side, side, width], with learned biases by row and by column distance."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, width // heads))

    def forward(self, x: Tensor) -> Tensor:
        batch, side, _, width = x.shape
        tokens = side * side
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, tokens, head_dim]
        place = torch.arange(side, device=x.device)
        distance = place[:, None] - place[None, :] + side - 1  # [query, key], 0 .. 2 side - 2
        grid = q.unflatten(2, (side, side))  # [batch, heads, row, column, head_dim]
        by_row = torch.einsum("bhrcd,rkd->bhrck", grid, self.rel_pos_h[distance])
        by_column = torch.einsum("bhrcd,ckd->bhrck", grid, self.rel_pos_w[distance])
        bias = by_row[..., :, None] + by_column[..., None, :]  # [batch, heads, row, column, key row, key column]
        bias = bias.flatten(4).flatten(2, 3)  # [batch, heads, tokens, tokens]
        scores = (q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5 + bias
        mixed = scores.softmax(dim=-1) @ v  # [batch, heads, tokens, head_dim]
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, side, side, width))
        return out


class TwoLinear(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, inner)
        self.lin2 = nn.Linear(inner, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lin2(self.activation(self.lin1(x)))
        return out


class Adapter(nn.Module):
    """norm(x + spatial(gate(x) * x)): a gate per channel from the mean, then down and up again by a factor of two."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.channel = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, width, bias=False), nn.Sigmoid()
        )
        self.spatial = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False), nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False), nn.ReLU(),
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.channel(x.mean((1, 2)))[:, None, None]  # [batch, 1, 1, width]
        spatial = self.spatial((gate * x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out: Tensor = self.norm(x + spatial)
        return out


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), within windows or over all; then x + perceptron(n) + adapter(n) with n = norm(x)."""

    def __init__(self, config: SamMed2dConfig, window: int) -> None:
        super().__init__()
        c = config
        self.window = window
        self.norm1 = nn.LayerNorm(c.width, _ENCODER_EPS)
        self.attn = GridAttention(c.width, c.heads, window or c.grid)
        self.norm2 = nn.LayerNorm(c.width, _ENCODER_EPS)
        self.mlp = TwoLinear(c.width, c.inner, F.gelu)
        self.Adapter = Adapter(c.width, c.adapter) if c.adapter else None

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + (self._windowed(normed) if self.window else self.attn(normed))
        normed = self.norm2(x)
        out: Tensor = x + self.mlp(normed)
        return out if self.Adapter is None else out + self.Adapter(normed)

    def _windowed(self, x: Tensor) -> Tensor:
        """Return the attention of each window; rows and columns of zeros fill the last ones and are attended, too."""
        batch, rows, columns, width = x.shape
        w = self.window
        x = F.pad(x, (0, 0, 0, -columns % w, 0, -rows % w))
        padded_rows, padded_columns = x.shape[1:3]
        tiles = x.view(batch, padded_rows // w, w, padded_columns // w, w, width).transpose(2, 3)
        mixed = self.attn(tiles.reshape(-1, w, w, width))
        mixed = mixed.view(batch, padded_rows // w, padded_columns // w, w, w, width).transpose(2, 3)
        return mixed.reshape(batch, padded_rows, padded_columns, width)[:, :rows, :columns]


class ImageEncoder(nn.Module):
    """Pixels [batch, 3, side, side], normalised -> embedding [batch, prompt_width, grid, grid]."""

    def __init__(self, config: SamMed2dConfig) -> None:
        super().__init__()
        c = config
        self.patch_embed = PatchEmbed(c)
        self.pos_embed = nn.Parameter(torch.zeros(1, c.grid, c.grid, c.width))
        self.blocks = nn.ModuleList(EncoderBlock(c, window) for window in c.windows)
        self.neck = nn.Sequential(
            nn.Conv2d(c.width, c.prompt_width, 1, bias=False),
            ChannelNorm(c.prompt_width),
            nn.Conv2d(c.prompt_width, c.prompt_width, 3, padding=1, bias=False),
            ChannelNorm(c.prompt_width),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.neck(x.permute(0, 3, 1, 2))
        return out


# -- prompts -----------------------------------------------------------------------------------------------------------


class Places(nn.Module):
    """Random Fourier features of places in 0..1, always in fp32: sine and cosine of the place times fixed numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.zeros(2, width // 2))
        self.positional_encoding_gaussian_matrix: Tensor

    def forward(self, xy: Tensor) -> Tensor:
        """Return [..., width] for places [..., 2]."""
        with torch.autocast(xy.device.type, enabled=False):
            turns = (2 * xy.float() - 1) @ self.positional_encoding_gaussian_matrix.float()
            angle = 2 * math.pi * turns
            return torch.cat((angle.sin(), angle.cos()), dim=-1)


class PromptEncoder(nn.Module):
    """Prompts -> sparse tokens [prompts, tokens, width], and dense maps [prompts, width, grid, grid]."""

    def __init__(self, config: SamMed2dConfig) -> None:
        super().__init__()
        self.config = config
        width, channels = config.prompt_width, config.mask_channels
        self.pe_layer = Places(width)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, width) for _ in range(2 + CORNERS))
        self.not_a_point_embed = nn.Embedding(1, width)
        self.no_mask_embed = nn.Embedding(1, width)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, channels // 4, 2, stride=2), ChannelNorm(channels // 4), nn.GELU(),
            nn.Conv2d(channels // 4, channels, 2, stride=2), ChannelNorm(channels), nn.GELU(),
            nn.Conv2d(channels, width, 1),
        )  # fmt: skip

    def points(self, points: Tensor, labels: Tensor) -> Tensor:
        """Return [prompts, points, width] of points [prompts, points, 2].

        labels: int64 [prompts, points], 1 inside, 0 outside, -1 not a point (its place is ignored).
        """
        place = self.pe_layer((points + 0.5) / self.config.side)  # pixel centres
        kind = torch.cat((self.not_a_point_embed.weight, self._kinds()[:2]))[labels + 1]
        return torch.where((labels < 0)[..., None], 0.0, place).to(kind.dtype) + kind

    def boxes(self, boxes: Tensor) -> Tensor:
        """Return [prompts, 2, width] of boxes (x0, y0, x1, y1) [prompts, 4]."""
        place = self.pe_layer((boxes.view(-1, CORNERS, 2) + 0.5) / self.config.side)
        kind = self._kinds()[2:]
        return place.to(kind.dtype) + kind

    def _kinds(self) -> Tensor:
        """Return [4, width]: the vectors of an outside point, an inside point, and the two corners of a box."""
        return torch.cat([kind.weight for kind in self.point_embeddings if isinstance(kind, nn.Embedding)])

    def native(self, points: Tensor | None = None, labels: Tensor | None = None, boxes: Tensor | None = None) -> Tensor:
        """Return the sparse tokens of points, a box, both or neither, as SAM orders and pads them.

        Points without a box are followed by one token that is not a point.
        """
        parts = []
        if points is not None and labels is not None:
            if boxes is None:
                points, labels = F.pad(points, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
            parts.append(self.points(points, labels))
        if boxes is not None:
            parts.append(self.boxes(boxes))
        return torch.cat(parts, dim=1) if parts else self.no_mask_embed.weight.new_zeros(1, 0, self.config.prompt_width)

    def masks(self, masks: Tensor) -> Tensor:
        """Return the dense map of earlier mask logits [prompts, 1, mask_side, mask_side]."""
        out: Tensor = self.mask_downscaling(masks)
        return out

    def no_mask(self) -> Tensor:
        """Return [1, width, 1, 1], what stands for the dense map where there is no earlier mask."""
        return self.no_mask_embed.weight[:, :, None, None]

    def dense_places(self) -> Tensor:
        """Return [1, width, grid, grid], the encoding of each cell's centre."""
        weight = self.no_mask_embed.weight
        cell = (torch.arange(self.config.grid, device=weight.device, dtype=torch.float32) + 0.5) / self.config.grid
        ys, xs = torch.meshgrid(cell, cell, indexing="ij")
        encoded: Tensor = self.pe_layer(torch.stack((xs, ys), dim=-1))  # [grid, grid, width]
        return encoded.permute(2, 0, 1)[None].to(weight.dtype)


# -- mask decoder ------------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """Multi-head attention between two sequences; `inner` may be narrower than `width`."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return [prompts, queries, width]; bias [prompts, 1, 1, keys] is added to the scores."""
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [prompts, heads, tokens, head_dim]
            for t in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=None if bias is None else bias.to(q.dtype))
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class TwoWayLayer(nn.Module):
    """Tokens attend to themselves and to the image, then the image attends to the tokens."""

    def __init__(self, config: SamMed2dConfig, first: bool) -> None:
        super().__init__()
        width, narrow, heads = config.prompt_width, config.attention_width, config.decoder_heads
        self.first = first
        self.self_attn = CrossAttention(width, width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = CrossAttention(width, narrow, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = TwoLinear(width, config.decoder_inner, F.relu)
        self.norm3 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = CrossAttention(width, narrow, heads)
        self.norm4 = nn.LayerNorm(width)

    def forward(
        self, tokens: Tensor, image: Tensor, token_places: Tensor, image_places: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.first:  # here the tokens are their own places
            tokens = self.self_attn(tokens, tokens, tokens, bias)
        else:
            placed = tokens + token_places
            tokens = tokens + self.self_attn(placed, placed, tokens, bias)
        tokens = self.norm1(tokens)
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_places, image + image_places, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = image + self.cross_attn_image_to_token(image + image_places, tokens + token_places, tokens, bias)
        return tokens, self.norm4(image)


class TwoWayTransformer(nn.Module):
    """The layers and a last look of the tokens at the image."""

    def __init__(self, config: SamMed2dConfig) -> None:
        super().__init__()
        c = config
        self.layers = nn.ModuleList(TwoWayLayer(c, first=i == 0) for i in range(c.decoder_depth))
        self.final_attn_token_to_image = CrossAttention(c.prompt_width, c.attention_width, c.decoder_heads)
        self.norm_final_attn = nn.LayerNorm(c.prompt_width)

    def forward(
        self, tokens: Tensor, image: Tensor, image_places: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return (tokens [prompts, tokens, width], image [prompts, cells, width]) after all layers."""
        out = tokens
        for layer in self.layers:
            out, image = layer(out, image, tokens, image_places, bias)
        out = out + self.final_attn_token_to_image(out + tokens, image + image_places, image)
        return self.norm_final_attn(out), image


class SamMaskDecoder(nn.Module):
    """Image embedding and prompt tokens -> mask logits [prompts, masks, mask_side, mask_side], IoU [prompts, masks].

    Mask 0 is meant for use alone; masks 1 and later are the guesses at an ambiguous prompt.
    """

    def __init__(self, config: SamMed2dConfig) -> None:
        super().__init__()
        self.config = config
        width, masks = config.prompt_width, config.mask_tokens
        self.transformer = TwoWayTransformer(config)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(masks, width)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, 2, stride=2), ChannelNorm(width // 4), nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, 2, stride=2), nn.GELU(),
        )  # fmt: skip
        self.output_hypernetworks_mlps = nn.ModuleList(
            Perceptron(width, width, width, width // 8) for _ in range(masks)
        )
        self.iou_prediction_head = Perceptron(width, config.iou_hidden, config.iou_hidden, masks)

    def forward(
        self, embedding: Tensor, places: Tensor, sparse: Tensor, dense: Tensor, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (mask logits, expected IoU) of each prompt.

        embedding, places: [1, width, grid, grid]; sparse: [prompts, tokens, width]; dense: what broadcasts to [prompts,
        width, grid, grid]; present: [prompts, tokens], 1 where a sparse token is there, 0 where nothing may see it.
        """
        prompts, grid = sparse.shape[0], self.config.grid
        own = torch.cat((self.iou_token.weight, self.mask_tokens.weight))
        tokens = torch.cat((own.expand(prompts, -1, -1), sparse), dim=1)
        bias = None if present is None else F.pad((1 - present) * _MASKED_OUT, (len(own), 0))[:, None, None]
        image = (embedding + dense).expand(prompts, -1, -1, -1).flatten(2).transpose(1, 2)  # [prompts, cells, width]
        tokens, image = self.transformer(tokens, image, places.flatten(2).transpose(1, 2), bias)
        fine = self.output_upscaling(image.transpose(1, 2).unflatten(2, (grid, grid)))  # [prompts, width / 8, ...]
        weights = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1)
        logits = (weights @ fine.flatten(2)).unflatten(2, tuple(fine.shape[2:]))
        return logits, self.iou_prediction_head(tokens[:, 0])
