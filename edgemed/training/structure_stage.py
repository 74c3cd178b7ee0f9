"""Stage 1: the dense head on cached features. Losses: structure maps, edges, presence, modality and body part.

A structure that a sample does not know is left out of every loss. Presence is calibrated afterwards on samples of the
training sources that were kept back from fitting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgemed.families.native_lexicon import BODY_PARTS, MODALITIES, STRUCTURES
from edgemed.geometry import box_iou
from edgemed.models.structure_head import StructureConfig, StructureHead, StructureOutput
from edgemed.models.tiny_vit import GRID, SIDE
from edgemed.training.device import ALONE, Processes
from edgemed.training.loop import Log, Loop
from edgemed.training.prepare import FeatureCache

CONFIG = StructureConfig(len(STRUCTURES), len(MODALITIES), len(BODY_PARTS))
MIN_PIXELS = 30
"""A structure counts as present from this many model pixels; fewer is neither present nor absent."""


@dataclass(frozen=True, eq=False)
class Targets:
    """Training targets of one sample: maps as area fractions, presence 1, 0 or -1 (unknown), boxes in model pixels."""

    structures: Tensor  # int64 [n]: those with a map
    maps: Tensor  # uint8 [n, 64, 64]: 0..16 of the 16 pixels of a cell
    presence: Tensor  # int8 [structures]
    boxes: Tensor  # float32 [structures, 4], only where presence is 1


def make_targets(cache: FeatureCache, index: int) -> Targets:
    """Return the targets of sample `index`."""
    structures, masks = cache.masks(index)
    known = cache.known[index]
    presence = np.where(known, 0, -1).astype(np.int8)
    boxes = np.zeros((len(STRUCTURES), 4), np.float32)
    kept, maps = [], []
    for s, mask in zip(structures, masks, strict=True):
        if not known[s]:
            continue
        pixels = int(mask.sum())
        presence[s] = 1 if pixels >= MIN_PIXELS else -1
        if pixels >= MIN_PIXELS:
            ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            boxes[s] = (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)
            kept.append(int(s))
            maps.append(mask.reshape(GRID, 4, GRID, 4).sum((1, 3)).astype(np.uint8))
    for s, box in cache.facts[index]["boxes"]:
        clipped = np.clip(box, 0, SIDE)
        if clipped[2] - clipped[0] < 6 or clipped[3] - clipped[1] < 6:
            presence[s] = -1
            continue
        presence[s], boxes[s] = 1, clipped
        ys, xs = np.mgrid[0:GRID, 0:GRID] * 4.0 + 2
        cx, cy = (clipped[0] + clipped[2]) / 2, (clipped[1] + clipped[3]) / 2
        rx, ry = (clipped[2] - clipped[0]) / 2, (clipped[3] - clipped[1]) / 2
        kept.append(int(s))
        maps.append(((((xs - cx) / rx) ** 2 + ((ys - cy) / ry) ** 2) <= 1).astype(np.uint8) * 16)
    return Targets(
        torch.tensor(kept, dtype=torch.int64),
        torch.from_numpy(np.array(maps, np.uint8).reshape(len(kept), GRID, GRID)),
        torch.from_numpy(presence),
        torch.from_numpy(boxes),
    )


def structure_loss(
    head: StructureHead, output: StructureOutput, targets: list[Targets], modality: Tensor, body_part: Tensor
) -> dict[str, Tensor]:
    """Return the named losses of a batch."""
    device = output.maps.device
    presence = torch.stack([t.presence for t in targets]).to(device)
    boxes = torch.stack([t.boxes for t in targets]).to(device)
    wanted = torch.zeros_like(output.maps)
    for i, t in enumerate(targets):
        wanted[i, t.structures.to(device)] = t.maps.to(device).float() / 16
    known = (presence >= 0).float()[..., None, None]
    here = presence == 1
    pixel = F.binary_cross_entropy_with_logits(output.maps, wanted, reduction="none")
    hard = 1 + 4 * wanted  # inside counts more: most of a map is outside
    maps = (pixel * hard * known).sum() / (known.sum() * GRID * GRID) * 10
    probability = output.maps[here].sigmoid()
    overlap = 2 * (probability * wanted[here]).sum((1, 2)) + 1
    dice = (1 - overlap / (probability.sum((1, 2)) + wanted[here].sum((1, 2)) + 1)).mean() if here.any() else maps * 0
    edge_bins = torch.cat([boxes[..., :2], boxes[..., 2:] - 1], -1)[here].clamp(0, SIDE - 1)  # [n, 4]
    at = torch.arange(SIDE, device=device)
    soft = torch.softmax(-((at - edge_bins[..., None]) ** 2) / (2 * 1.5**2), -1)
    edge_logits = head.edges(output.maps[here], here.nonzero()[:, 1])
    edges = -(soft * edge_logits.log_softmax(-1)).sum(-1).mean() if here.any() else maps * 0
    sure = presence >= 0
    there = F.binary_cross_entropy_with_logits(output.presence[sure], here[sure].float())
    return {
        "maps": maps,
        "dice": dice,
        "edges": edges * 0.25,
        "presence": there * 2,
        "modality": F.cross_entropy(output.modality, modality) * 0.5,
        "body_part": F.cross_entropy(output.body_part, body_part) * 0.2,
    }


def box_iou_of(predicted: Tensor, targets: list[Targets]) -> list[float]:
    """Return the IoU of predicted boxes [batch, structures, 4] and true ones, of every present structure of a batch."""
    values = []
    for i, t in enumerate(targets):
        for k in t.structures.tolist():
            a, b = predicted[i, k].tolist(), t.boxes[k].tolist()
            values.append(box_iou((a[0], a[1], a[2], a[3]), (b[0], b[1], b[2], b[3])))
    return values


def kept_back(count: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return bool [count]: the one sample in sixteen that is never fitted on, for calibration and curves."""
    return np.arange(count) % 16 == 7


def feature_statistics(cache: FeatureCache) -> tuple[Tensor, Tensor]:
    """Return (mean, spread) [channels] of the encoder's features over every 16th sample; a spread is 0.005 or more."""
    some = np.stack([np.asarray(cache.features[i], np.float32) for i in range(0, cache.ready, 16)])
    return torch.from_numpy(some.mean((0, 2, 3))), torch.from_numpy(np.maximum(some.std((0, 2, 3)), 0.005))


def train_structures(
    cache: FeatureCache, folder: Path, *, steps: int, batch: int, rate: float, repeat: Mapping[str, int], seed: int,
    device: torch.device, log: Log, processes: Processes = ALONE,
) -> StructureHead:  # fmt: skip
    """Return the trained dense head; resumes from `folder/structure.pt`.

    repeat: group of samples -> how often one pass over the data shows each of them; 1 where it is not named. batch: of
    all processes together.
    """
    processes.check_batch(batch, "structures.batch")
    torch.manual_seed(seed)
    head = StructureHead(CONFIG).to(device)
    count = cache.ready
    mean, std = feature_statistics(cache)
    head.feature_mean.copy_(mean)
    head.feature_std.copy_(std)
    rows_once = np.flatnonzero(~kept_back(count))
    fit = np.repeat(rows_once, [repeat.get(cache.facts[i]["group"], 1) for i in rows_once])
    targets = [make_targets(cache, i) for i in range(count)]
    optimiser = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=0.05)
    loop = Loop("structure", "head", folder / "structure.pt", head, optimiser, steps, warm_up=60, floor=0.02,
                log=log, processes=processes)  # fmt: skip
    per_epoch = len(fit) // batch
    head.train()
    for step in loop.left():
        epoch, at = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(fit)
        rows = order[at * batch : (at + 1) * batch][processes.part]
        features = torch.from_numpy(np.stack([cache.features[i] for i in rows])).to(device).float()
        with torch.autocast(device.type, torch.bfloat16):
            output = head(features)
        kinds = torch.as_tensor(cache.modality[rows], device=device)
        places = torch.as_tensor(cache.body_part[rows], device=device)
        loop.take(step, structure_loss(head, output, [targets[i] for i in rows], kinds, places))
    return head.eval()


@torch.no_grad()
def calibrate_presence(
    head: StructureHead, cache: FeatureCache, device: torch.device, log: Log
) -> tuple[Tensor, Tensor]:
    """Return (scale, shift) [structures] for the presence logits, fitted on the kept-back samples.

    One scale for all (a fit per structure would need more samples), and a shift that makes a presence of one half the
    point where falsely found and falsely missed structures cost the same.
    """
    logits, truth = [], []
    ious: list[float] = []
    right = 0
    rows = np.flatnonzero(kept_back(cache.ready))
    for i in rows:
        features = torch.from_numpy(np.array(cache.features[i : i + 1])).to(device).float()
        output = head(features)
        targets = make_targets(cache, int(i))
        ious += box_iou_of(head.all_boxes(output.maps), [targets])
        right += int(output.modality.argmax()) == cache.modality[i]
        sure = targets.presence >= 0
        logits.append(output.presence[0].cpu()[sure])
        truth.append((targets.presence[sure] == 1).float())
    x, y = torch.cat(logits), torch.cat(truth)
    with torch.enable_grad():
        scale = torch.ones(1, requires_grad=True)
        shift = torch.zeros(1, requires_grad=True)
        fitter = torch.optim.LBFGS([scale, shift], max_iter=50)

        def loss() -> Tensor:
            fitter.zero_grad()
            value = F.binary_cross_entropy_with_logits(x * scale + shift, y)
            value.backward()
            return value

        fitter.step(loss)
    p = torch.sigmoid(x * scale.detach() + shift.detach())
    found, there = p >= 0.5, y == 1
    log(f"kept-back samples: box IoU {np.mean(ious):.3f}, modality {right / len(rows):.3f}, "
        f"found {float(found[there].float().mean()):.3f}, falsely found {float(found[~there].float().mean()):.4f}, "
        f"scale {float(scale):.2f}, shift {float(shift):.2f}")  # fmt: skip
    n = len(STRUCTURES)
    return scale.detach().expand(n).clone(), shift.detach().expand(n).clone()
