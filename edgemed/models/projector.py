"""The projector: feature map -> the rows the language model reads as image tokens, and the proposals in numbers.

Rows, in order: what kind of picture (1), which part of the body (1), an 8 x 8 grid of pooled features (64), then the
likeliest structures, five rows each: which structure and how sure, x0, y0, x1, y1; what is visible comes first, largest
box first. A coordinate row is the language model's own embedding of that coordinate token, so that writing a box is
copying tokens it can see. A region asked about is one more row, pooled from the map under the region; it carries the
vector of the structure that the dense head sees there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemed.models.structure_head import (
    StructureConfig,
    StructureHead,
    StructureOutput,
    boxes_from_edges,
    sides_from_edges,
)
from edgemed.models.tiny_vit import CHANNELS, GRID, SIDE

POOLED = 8
PROPOSALS = 24
FIRST_PROPOSAL = 2 + POOLED * POOLED
"""The row where the proposals start, five rows each."""
ROWS = FIRST_PROPOSAL + 5 * PROPOSALS
"""Rows of `image_tokens`."""
_SHARPNESS = 16.0
"""How much more the likeliest structure under a region counts than the others."""


@dataclass(frozen=True, eq=False)
class Proposals:
    """The likeliest structures of a batch: index, calibrated presence and coordinate bins, in the order of `in_order`.

    index int64 [batch, 24]; presence [batch, 24]; bins int64 [batch, 24, 4].
    """

    index: Tensor
    presence: Tensor
    bins: Tensor


def box_bins(boxes: Tensor, bins: int) -> Tensor:
    """Return int64 coordinate bins [..., 4] of boxes in model pixels, x0 < x1, y0 < y1 (as `geometry.box_to_bins`)."""
    raw = torch.round(boxes * (bins / SIDE)).clamp(0, bins - 1)
    start = raw[..., :2].clamp(max=bins - 2)
    return torch.cat([start, torch.maximum(raw[..., 2:], start + 1)], dim=-1).long()


def in_order(presence: Tensor, bins: Tensor) -> Tensor:
    """Return int64 [..., proposals], what proposals are ordered by, highest first, given likeliest first.

    What is likelier than not comes first, largest box first; the rest stays. A list by size is then the rows as they
    come; sorting by areas that only coordinates tell was not learned. Whole numbers, all different: a tie would be
    broken one way by torch and another by the graph.
    """
    proposals = presence.shape[-1]
    side = bins[..., 2:] - bins[..., :2]
    size = (1 + side[..., 0] * side[..., 1]) * proposals
    rank = torch.arange(proposals - 1, -1, -1, device=bins.device)
    return torch.where(presence >= 0.5, size, torch.zeros_like(size)) + rank


def pool_pictures(features: Tensor) -> Tensor:
    """Return [batch, 64, 256]: the feature map averaged over an 8 x 8 grid."""
    return F.avg_pool2d(features, GRID // POOLED).flatten(2).transpose(1, 2)


def pool_regions(features: Tensor, maps: Tensor, region_maps: Tensor) -> Tensor:
    """Return [regions, 256 + structures + 4] of one picture: features, structure probabilities, centre and spread.

    features [1, 256, 64, 64]; maps (logits) [1, structures, 64, 64]; region_maps [regions, 64, 64], each sums to 1.
    """
    weights = region_maps.flatten(1)  # [regions, 4096]
    seen = torch.cat([features[0].flatten(1), maps[0].sigmoid().flatten(1)])  # [256 + structures, 4096]
    cell = (torch.arange(GRID, device=features.device, dtype=features.dtype) + 0.5) / GRID
    ys, xs = torch.meshgrid(cell, cell, indexing="ij")
    grid = torch.stack([xs.flatten(), ys.flatten()])
    mean = weights @ grid.T  # [regions, 2]
    spread = (weights @ (grid * grid).T - mean * mean).clamp_min(0).sqrt()
    return torch.cat([weights @ seen.T, mean, spread * 4], dim=1)


def _decided(probabilities: Tensor) -> Tensor:
    """Return probabilities [batch, kinds] nearer to a decision: of a mixture the language model may read the lesser."""
    powers = probabilities**4
    return powers / powers.sum(-1, keepdim=True)


class Projector(nn.Module):
    """Feature map -> image rows, region rows, presence, boxes, structure maps."""

    def __init__(self, config: StructureConfig, width: int, bins: int = 1000) -> None:
        super().__init__()
        self.head = StructureHead(config)
        self.bins = bins
        self.register_buffer("presence_scale", torch.ones(config.structures))
        self.register_buffer("presence_shift", torch.zeros(config.structures))
        self.presence_scale: Tensor
        self.presence_shift: Tensor
        self.modality = nn.Parameter(torch.randn(config.modalities, width))
        self.body_part = nn.Parameter(torch.randn(config.body_parts, width))
        self.structure = nn.Parameter(torch.randn(config.structures, width))
        self.certainty = nn.Parameter(torch.randn(2, width))  # times presence, times "more likely than not"
        self.side = nn.Parameter(torch.randn(4, width) * 0.6)
        # Each coordinate row says whose it is, so one attention hop finds it; without, copying was not learned in 300
        # steps.
        self.owner = nn.Parameter(torch.randn(config.structures, width))
        self.picture = nn.Sequential(nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, width))
        self.grid = nn.Parameter(torch.randn(POOLED * POOLED, width) * 0.02)
        self.region_features = CHANNELS + config.structures + 4
        self.region = nn.Sequential(nn.Linear(self.region_features, width), nn.GELU(), nn.Linear(width, width))
        # Copy of the language model's coordinate embeddings, taken when its training ends.
        self.register_buffer("coordinates", torch.zeros(bins, width))
        self.coordinates: Tensor

    def calibrated(self, presence: Tensor) -> Tensor:
        """Return presence probabilities from logits [batch, structures]."""
        return torch.sigmoid(presence * self.presence_scale + self.presence_shift)

    def propose(self, output: StructureOutput, boxes: Tensor) -> Proposals:
        """Return the 24 likeliest structures of each picture; boxes [batch, structures, 4] in model pixels."""
        presence, index = self.calibrated(output.presence).topk(PROPOSALS, dim=1)
        bins = box_bins(boxes.gather(1, index[..., None].expand(-1, -1, 4)), self.bins)
        order = in_order(presence, bins).topk(PROPOSALS, dim=1).indices
        return Proposals(
            index.gather(1, order), presence.gather(1, order), bins.gather(1, order[..., None].expand(-1, -1, 4))
        )

    def region_rows(self, pooled: Tensor) -> Tensor:
        """Return rows [..., width] of regions from what `pool_regions` gives, [..., 256 + structures + 4]."""
        features, seen, place = pooled.split((CHANNELS, self.head.config.structures, 4), dim=-1)
        features = (features - self.head.feature_mean) / self.head.feature_std
        own: Tensor = self.region(torch.cat([features, seen, place], dim=-1))
        return own + (seen * (_SHARPNESS * seen).softmax(-1)) @ self.structure

    def rows(
        self, modality: Tensor, body_part: Tensor, pooled: Tensor, proposals: Proposals, coordinates: Tensor
    ) -> Tensor:
        """Return image rows [batch, 186, width]. modality, body_part: probabilities; coordinates [bins, width]."""
        batch = pooled.shape[0]
        kind = (_decided(modality) @ self.modality)[:, None]
        part = (_decided(body_part) @ self.body_part)[:, None]
        grid = self.picture(pooled) + self.grid
        likely = (proposals.presence >= 0.5).to(pooled.dtype)
        sure = proposals.presence[..., None] * self.certainty[0] + likely[..., None] * self.certainty[1]
        name = (self.structure[proposals.index] + sure)[:, :, None]  # [batch, 24, 1, width]
        # Only what is likely there shows its box: fewer rows to tell apart, and nothing to copy for what is absent.
        shown = coordinates[proposals.bins] * likely[..., None, None]
        sides = shown + self.side + self.owner[proposals.index][:, :, None]  # [batch, 24, 4, width]
        named = torch.cat([name, sides], dim=2).reshape(batch, 5 * PROPOSALS, -1)
        return torch.cat([kind, part, grid, named], dim=1)

    def forward(self, image_features: Tensor, region_maps: Tensor) -> tuple[Tensor, ...]:
        """Return what the graph gives for one picture.

        (image_tokens [186, width], region_tokens [regions, width], presence [structures], boxes [structures, 4] in
        model pixels, structure_maps [structures, 64, 64] probabilities, side_probability and side_spread
        [structures, 4], see `sides_from_edges`)
        """
        output = self.head(image_features)
        pooled = pool_pictures(image_features)
        edges = self.head.all_edges(output.maps)
        boxes = boxes_from_edges(edges)
        probability, spread = sides_from_edges(edges)
        proposals = self.propose(output, boxes)
        rows = self.rows(output.modality.softmax(1), output.body_part.softmax(1), pooled, proposals, self.coordinates)
        regions = self.region_rows(pool_regions(image_features, output.maps, region_maps))
        presence = self.calibrated(output.presence)[0]
        return rows[0], regions, presence, boxes[0], output.maps[0].sigmoid(), probability[0], spread[0]
