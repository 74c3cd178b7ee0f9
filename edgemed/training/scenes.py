"""Scenes: what the language model reads of a sample (pooled features, proposals, regions), computed once per sample.

With the encoder and the dense head frozen, a sample is 50 kB of numbers instead of 2 MB of features. A scene can also
be made up: the picture's own features with invented proposals, so that copying a box is learned from far more boxes
than the pictures hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from edgemed.core import Box, Mask
from edgemed.families.native_lexicon import STRUCTURES
from edgemed.families.native_regions import POINT_SIDE, box_map, mask_map, point_map
from edgemed.geometry import BINS, box_iou, box_of, box_to_bins
from edgemed.models.projector import PROPOSALS, Projector, Proposals, in_order, pool_pictures, pool_regions
from edgemed.models.tiny_vit import SIDE
from edgemed.training.facts import ImageFacts, RegionFact
from edgemed.training.loop import Log
from edgemed.training.prepare import FeatureCache

Bins = tuple[int, int, int, int]
REGIONS = 5


@dataclass(frozen=True, eq=False)
class Scene:
    """One sample as the language model sees it. Arrays are float32 unless they are indices."""

    sample: int
    pooled: npt.NDArray[np.float16]  # [64, 256]
    modality: npt.NDArray[np.float32]  # probabilities
    body_part: npt.NDArray[np.float32]
    index: npt.NDArray[np.int64]  # [24]
    presence: npt.NDArray[np.float32]  # [24]
    bins: npt.NDArray[np.int64]  # [24, 4]
    regions: npt.NDArray[np.float32]  # [n, 256 + structures + 4]
    facts: ImageFacts


def point_box(x: float, y: float) -> Box:
    """Return the small square that stands for a point, in model pixels, clipped to the picture."""
    half = POINT_SIDE * SIDE / 2
    return (max(x - half, 0.0), max(y - half, 0.0), min(x + half, float(SIDE)), min(y + half, float(SIDE)))


def inner_point(mask: Mask, rng: np.random.Generator) -> tuple[float, float]:
    """Return a random point (x, y) well inside the mask: after wearing its rim away two to seven times where it can."""
    worn = torch.from_numpy(mask.astype(np.float32))[None, None]
    for _ in range(int(rng.integers(2, 8))):
        thinner = -F.max_pool2d(-worn, 3, stride=1, padding=1)
        if float(thinner.sum()) < 4:
            break
        worn = thinner
    ys, xs = np.nonzero(worn[0, 0].numpy() > 0)
    k = int(rng.integers(len(ys)))
    return float(xs[k]) + 0.5, float(ys[k]) + 0.5


def jitter_box(box: Box, rng: np.random.Generator, amount: float) -> Box:
    """Return the box with each side moved by a random share of its width or height."""
    w, h = box[2] - box[0], box[3] - box[1]
    moves = rng.normal(0, amount, 4) * (w, h, w, h)
    x0, y0, x1, y1 = (float(np.clip(v + m, 0, SIDE)) for v, m in zip(box, moves, strict=True))
    return (min(x0, x1 - 2), min(y0, y1 - 2), x1, y1) if x1 - x0 > 2 and y1 - y0 > 2 else box


@torch.no_grad()
def make_scenes(cache: FeatureCache, projector: Projector, rows: Sequence[int], seed: int, log: Log) -> list[Scene]:
    """Return the scenes of the samples `rows`, with up to five regions each."""
    scenes = []
    device = projector.coordinates.device
    for n, i in enumerate(rows):
        rng = np.random.default_rng([seed, 7, int(i)])
        features = torch.from_numpy(np.array(cache.features[i : i + 1])).float().to(device)
        output = projector.head(features)
        proposals = projector.propose(output, projector.head.all_boxes(output.maps))
        index = proposals.index[0].cpu().numpy()
        presence = proposals.presence[0].cpu().numpy()
        bins = proposals.bins[0].cpu().numpy()
        visible = {int(s): _bins(b) for s, p, b in zip(index, presence, bins, strict=True) if p >= 0.5}
        maps, regions = _make_regions(cache, int(i), visible, rng)
        pooled = pool_regions(features, output.maps, torch.from_numpy(np.stack(maps)).to(device)) if maps else None
        absent = tuple(s for s in range(len(STRUCTURES)) if s not in visible)
        facts = ImageFacts(
            int(cache.modality[i]), int(cache.body_part[i]), visible, absent, tuple(regions), _extent(cache, int(i))
        )
        scenes.append(
            Scene(
                sample=int(i),
                pooled=pool_pictures(features)[0].cpu().numpy().astype(np.float16),
                modality=output.modality.softmax(1)[0].cpu().numpy(),
                body_part=output.body_part.softmax(1)[0].cpu().numpy(),
                index=index,
                presence=presence,
                bins=bins,
                regions=np.zeros((0, 1), np.float32) if pooled is None else pooled.cpu().numpy(),
                facts=facts,
            )
        )
        if n % 250 == 249:
            log(f"scenes {n + 1}/{len(rows)}")
    return scenes


def _bins(values: npt.NDArray[np.int64]) -> Bins:
    return (int(values[0]), int(values[1]), int(values[2]), int(values[3]))


def _extent(cache: FeatureCache, i: int) -> tuple[int, int]:
    """Return the bins across and down up to which the picture is lit: the rest of the square is padding."""
    lit = np.asarray(cache.images[i]).max(axis=2) > 0
    across, down = np.flatnonzero(lit.any(0)), np.flatnonzero(lit.any(1))
    if across.size == 0:
        return (BINS, BINS)
    return (int((across[-1] + 1) * BINS / SIDE), int((down[-1] + 1) * BINS / SIDE))


def _make_regions(
    cache: FeatureCache, i: int, visible: dict[int, Bins], rng: np.random.Generator
) -> tuple[list[npt.NDArray[np.float32]], list[RegionFact]]:
    structures, masks = cache.masks(i)
    maps: list[npt.NDArray[np.float32]] = []
    facts: list[RegionFact] = []
    usable = [k for k in range(len(structures)) if masks[k].sum() >= 40]
    rng.shuffle(usable)
    for k in usable[: REGIONS - 1]:
        s, mask = int(structures[k]), masks[k]
        box = box_of(mask)
        assert box is not None
        kind = ("box", "point", "mask")[int(rng.integers(3))]
        if kind == "box":
            given = jitter_box(box, rng, 0.05)
            maps.append(box_map(given))
        elif kind == "point":
            x, y = inner_point(mask, rng)
            given = point_box(x, y)
            maps.append(point_map((x, y)))
        else:
            given = box
            maps.append(mask_map(mask.astype(np.float32), box))
        found = visible.get(s)
        target = box_to_bins(box, SIDE)
        if found is not None and box_iou(tuple(map(float, found)), tuple(map(float, target))) > 0.3:  # type: ignore[arg-type]
            target = found  # the answer names the box that the picture's proposals hold
        facts.append(RegionFact(kind, s, box_to_bins(given, SIDE), target))  # type: ignore[arg-type]
    labels = np.asarray(cache.labels[i])
    if cache.known[i].sum() > len(STRUCTURES) - 8:
        for _ in range(6):  # a place that is certainly none of the structures
            x0, y0 = rng.uniform(0, 200, 2)
            w, h = rng.uniform(16, 56, 2)
            box = (float(x0), float(y0), float(min(x0 + w, SIDE)), float(min(y0 + h, SIDE)))
            part = labels[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])]
            if part.size and (part > 0).mean() < 0.03:
                maps.append(box_map(box))
                facts.append(RegionFact("box", None, box_to_bins(box, SIDE), None))
                break
    return maps, facts


def made_up(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene with invented proposals: random structures, boxes and presence, in their proper order."""
    count = int(rng.integers(0, 15))
    index = rng.permutation(len(STRUCTURES))[:PROPOSALS]
    sure = rng.beta(2.5, 0.7, count) * 0.5 + 0.5
    unsure = rng.beta(0.5, 2.5, PROPOSALS - count) * 0.499
    presence = np.concatenate([sure, unsure]).astype(np.float32)
    centre = rng.uniform(60, 940, (PROPOSALS, 2))
    half = np.exp(rng.normal(4.3, 0.7, (PROPOSALS, 2))).clip(12, 420)
    low, high = np.clip(centre - half, 0, 998).astype(int), np.clip(centre + half, 1, 999).astype(int)
    bins = np.concatenate([low, np.maximum(high, low + 1)], axis=1)
    visible = {int(s): _bins(b) for s, b, p in zip(index, bins, presence, strict=True) if p >= 0.5}
    absent = tuple(s for s in range(len(STRUCTURES)) if s not in visible)
    facts = replace(scene.facts, visible=visible, absent=absent, regions=())
    return _ordered(replace(scene, index=index, presence=presence, bins=bins, facts=facts))


def nudged(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the scene with every proposed box moved a little; visible boxes in the facts move along."""
    moved = np.clip(scene.bins + rng.normal(0, 18, scene.bins.shape).round().astype(int), 0, 999)
    moved[:, 2:] = np.maximum(moved[:, 2:], np.minimum(moved[:, :2] + 1, 999))
    moved[:, :2] = np.minimum(moved[:, :2], moved[:, 2:] - 1)
    at = {int(s): _bins(b) for s, b in zip(scene.index, moved, strict=True)}
    visible = {s: at[s] for s in scene.facts.visible}
    regions = tuple(
        replace(r, target_bins=at[r.structure])
        if r.structure is not None
        and r.structure in scene.facts.visible
        and r.target_bins == scene.facts.visible[r.structure]
        else r
        for r in scene.facts.regions
    )
    return _ordered(replace(scene, bins=moved, facts=replace(scene.facts, visible=visible, regions=regions)))


def _ordered(scene: Scene) -> Scene:
    """Return the scene with its proposals in the projector's order."""
    likeliest = torch.from_numpy(scene.presence).argsort(descending=True, stable=True)
    key = in_order(torch.from_numpy(scene.presence)[likeliest], torch.from_numpy(scene.bins)[likeliest])
    order = likeliest[key.argsort(descending=True)].numpy()
    return replace(scene, index=scene.index[order], presence=scene.presence[order], bins=scene.bins[order])


def batch_rows(scenes: Sequence[Scene], projector: Projector, coordinates: torch.Tensor) -> torch.Tensor:
    """Return image rows [batch, rows, width] of several scenes; `coordinates` is the decoder's live table."""
    device = coordinates.device

    def stack(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.stack(values)).to(device, dtype)

    proposals = Proposals(
        stack([s.index for s in scenes], torch.int64),
        stack([s.presence for s in scenes], torch.float32),
        stack([s.bins for s in scenes], torch.int64),
    )
    return projector.rows(
        stack([s.modality for s in scenes], torch.float32),
        stack([s.body_part for s in scenes], torch.float32),
        stack([s.pooled for s in scenes], torch.float32),
        proposals,
        coordinates,
    )
