"""Stage 3: the mask decoder, from LiteMedSAM's weights: points, text (the state at `<seg>`) and imperfect boxes.

The published weights were trained on boxes alone. Here each prompt is drawn at random: a box (jittered or the one the
language model would write), a point, an earlier mask, the state at `<seg>`, and mixtures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from edgemed.core import Box, Mask
from edgemed.errors import InvalidInput
from edgemed.families.native_lexicon import STRUCTURES
from edgemed.families.native_masks import map_prompt, structure_at
from edgemed.families.native_text import NativeText
from edgemed.geometry import bins_to_box, box_of
from edgemed.models.llama import Llama
from edgemed.models.mask_decoder import MaskDecoder
from edgemed.models.projector import Projector
from edgemed.models.structure_head import StructureHead
from edgemed.models.tiny_vit import SIDE
from edgemed.training.answers import say_place
from edgemed.training.device import ALONE, Processes
from edgemed.training.language_stage import collate, embed_batch, pack
from edgemed.training.loop import Log, Loop
from edgemed.training.prepare import FeatureCache
from edgemed.training.scenes import Scene, inner_point, jitter_box
from edgemed.training.tasks import Turn

POINTS = 1
SMALLEST = 40
"""Model pixels a structure has at least to be asked for."""


@dataclass(frozen=True, eq=False)
class SegState:
    """The language model's state at `<seg>` for one structure of one sample, and the box it wrote (model pixels)."""

    hidden: npt.NDArray[np.float32]
    box: Box


@torch.no_grad()
def seg_states(
    scenes: Sequence[Scene],
    projector: Projector,
    model: Llama,
    text: NativeText,
    seed: int,
    device: torch.device,
    log: Log,
) -> dict[tuple[int, int], SegState]:
    """Return (sample, structure) -> state for every visible structure, from teacher-forced "where is it" turns."""
    states: dict[tuple[int, int], SegState] = {}
    seg = text.tokens().seg
    for n, scene in enumerate(scenes):
        rng = np.random.default_rng([seed, 13, scene.sample])
        asked = list(scene.facts.visible)[:12]
        turns = []
        for s in asked:
            zh = bool(rng.random() < 0.5)
            name = STRUCTURES[s].zh[0] if zh else STRUCTURES[s].en[0]
            prompt = f"{name}在哪里？" if zh else f"Where is the {name}?"
            turns.append(Turn(prompt, say_place(s, scene.facts, "zh" if zh else "en"), "zh" if zh else "en"))
        if turns:
            batch = collate([pack(text, scene, turns)], text.tokens().pad, device)
            with torch.autocast(device.type, torch.bfloat16):
                hidden = model(embed_batch(batch, [scene], model, projector), batch.position, batch.mask)
            at = (batch.ids[0] == seg).nonzero()[:, 0]
            for s, state in zip(asked, hidden[0, at].float().cpu().numpy(), strict=True):
                states[(scene.sample, s)] = SegState(state, bins_to_box(scene.facts.visible[s], SIDE))
        if n % 250 == 249:
            log(f"states at <seg> {n + 1}/{len(scenes)}")
    return states


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts for one image, as the mask decoder's inputs without the image, and the true masks bool [n, 256, 256]."""

    feeds: dict[str, Tensor]
    masks: Tensor


def draw_prompts(
    structures: npt.NDArray[np.int64], masks: npt.NDArray[np.bool_], states: Mapping[tuple[int, int], SegState],
    maps: npt.NDArray[np.float32], sample: int, width: int, count: int, rng: np.random.Generator,
) -> PromptBatch | None:  # fmt: skip
    """Return up to `count` random prompts on one sample, or None if it holds nothing large enough.

    maps: the dense head's probabilities [structures, 64, 64]; most points and answers bring theirs, as at run time.
    """
    usable = [k for k in range(len(structures)) if masks[k].sum() >= SMALLEST]
    if not usable:
        return None
    n = count
    boxes, has_box = np.zeros((n, 4), np.float32), np.zeros(n, np.float32)
    points, point_labels = np.zeros((n, POINTS, 2), np.float32), np.full((n, POINTS), -1, np.int64)
    mask_prompts, has_mask = np.zeros((n, SIDE, SIDE), np.float32), np.zeros(n, np.float32)
    seg_hidden, has_seg = np.zeros((n, width), np.float32), np.zeros(n, np.float32)
    truth = np.zeros((n, SIDE, SIDE), bool)
    for i in range(n):
        seen: int | None = None  # the structure whose map goes in as a rough mask
        k = usable[int(rng.integers(len(usable)))]
        mask: Mask = masks[k]
        truth[i] = mask
        state = states.get((sample, int(structures[k])))
        kind = rng.random()
        box = box_of(mask)
        assert box is not None
        if kind < 0.25 or (state is None and kind >= 0.5):  # a box that a person or a model drew
            boxes[i], has_box[i] = jitter_box(box, rng, 0.03), 1
        elif kind < 0.5:  # a point alone
            point = inner_point(mask, rng)
            points[i, 0], point_labels[i, 0] = point, 1
            seen = structure_at(point, maps)
        else:  # as answers are made: the written box and the state at <seg>, at times a point too
            assert state is not None
            written = state.box if rng.random() < 0.7 else jitter_box(box, rng, 0.05)
            boxes[i], has_box[i] = written, 1
            seg_hidden[i], has_seg[i] = state.hidden, 1
            seen = int(structures[k]) if (maps[structures[k]] >= 0.5).any() else None
            if kind > 0.8:
                points[i, 0], point_labels[i, 0] = inner_point(mask, rng), 1
            if kind > 0.92:
                has_box[i] = 0
        if rng.random() < 0.08:  # an earlier mask: the truth blurred, as logits
            soft = F.avg_pool2d(torch.from_numpy(mask.astype(np.float32))[None, None], 17, stride=1, padding=8)[0, 0]
            mask_prompts[i], has_mask[i] = (soft.numpy() - 0.5) * 12, 1
        elif seen is not None and rng.random() < 0.85:
            mask_prompts[i], has_mask[i] = map_prompt(maps[seen]), 1
    arrays = {"boxes": boxes, "has_box": has_box, "points": points, "point_labels": point_labels,
              "mask_prompts": mask_prompts, "has_mask": has_mask,
              "seg_hidden": seg_hidden, "has_seg": has_seg}  # fmt: skip
    return PromptBatch({k: torch.from_numpy(v) for k, v in arrays.items()}, torch.from_numpy(truth))


def mask_loss(logits: Tensor, iou: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Return the named losses: cross-entropy near and far, soft Dice, and the estimated IoU."""
    wanted = truth.to(logits.dtype)
    p = logits.sigmoid()
    overlap = (p * wanted).sum((1, 2))
    dice = 1 - (2 * overlap + 1) / (p.sum((1, 2)) + wanted.sum((1, 2)) + 1)
    found = logits.detach() > 0
    both = (found & truth).sum((1, 2)).float()
    actual = both / (found | truth).sum((1, 2)).clamp_min(1)
    return {
        "cross_entropy": F.binary_cross_entropy_with_logits(logits, wanted) * 4,
        "dice": dice.mean(),
        "iou": F.mse_loss(iou.float(), actual) * 0.5,
    }


def train_masks(
    cache: FeatureCache, rows: Sequence[int], states: Mapping[tuple[int, int], SegState], head: StructureHead,
    decoder: MaskDecoder, folder: Path, *, width: int, steps: int, prompts: int, rate: float, seed: int,
    device: torch.device, log: Log, processes: Processes = ALONE,
) -> None:  # fmt: skip
    """Fine-tune `decoder` in place; resumes from `folder/masks.pt`. prompts: a step, of all processes together.

    Raises InvalidInput if no sample of `rows` has a labelled structure of SMALLEST pixels.
    """
    processes.check_batch(prompts, "masks.prompts")
    decoder.train()
    fresh = [p for n, p in decoder.named_parameters() if n.startswith("seg_projection.")]
    published = [p for n, p in decoder.named_parameters() if not n.startswith("seg_projection.")]
    optimiser = torch.optim.AdamW(
        [{"params": fresh, "lr": rate * 5}, {"params": published, "lr": rate}], weight_decay=0.01
    )
    loop = Loop("masks", "decoder", folder / "masks.pt", decoder, optimiser, steps, warm_up=50, floor=0.05, log=log,
                processes=processes, keep=0.97)  # fmt: skip
    labelled = [i for i in rows if np.bincount(np.asarray(cache.labels[i]).ravel(), minlength=2)[1:].max() >= SMALLEST]
    if not labelled:
        raise InvalidInput(f"no sample has a labelled structure of {SMALLEST} pixels to train the mask decoder on")
    for step in loop.left():
        rng = np.random.default_rng([seed, 17, step])
        drawn = None
        while drawn is None:
            i = labelled[int(rng.integers(len(labelled)))]
            structures, masks = cache.masks(i)
            features = torch.from_numpy(np.array(cache.features[i : i + 1])).float().to(device)
            with torch.no_grad():
                maps = head(features).maps[0].sigmoid().cpu().numpy()
            drawn = draw_prompts(structures, masks, states, maps, i, width, prompts, rng)
        feeds = {k: v[processes.part].to(device) for k, v in drawn.feeds.items()}
        with torch.autocast(device.type, torch.bfloat16):
            logits, iou = decoder(features, **feeds)
        loop.take(step, mask_loss(logits.float(), iou, drawn.masks[processes.part].to(device)))
    decoder.eval()
