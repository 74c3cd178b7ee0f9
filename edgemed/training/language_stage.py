"""Stage 2: the language model and the projector's rows, on scenes.

Several question-answer turns share one picture: a row of the batch is <bos>, the image rows, then turns that each see the
picture and themselves but not each other, with positions that restart. Loss on answers only, plus the auxiliary head
that guesses a whole box at `<box>`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemed.families.native_text import NativeText
from edgemed.models.llama import Llama
from edgemed.models.projector import ROWS, Projector
from edgemed.training.prepare import Log
from edgemed.training.scenes import Scene, batch_rows, made_up, nudged
from edgemed.training.tasks import Turn, make_turns

IGNORED = -100


@dataclass(frozen=True, eq=False)
class Packed:
    """One row of a batch before the image rows are filled in.

    ids: token ids, image row r as vocabulary + r, region k as vocabulary + ROWS + k; turn: which turn each token belongs
    to (0 = the shared picture); position; label: the next token where it is part of an answer, else IGNORED.
    """

    ids: list[int]
    turn: list[int]
    position: list[int]
    label: list[int]


def pack(text: NativeText, scene: Scene, turns: Sequence[Turn]) -> Packed:
    """Return the turns of one scene in one sequence."""
    special = text.tokens()
    shared = [special.bos, *range(text.vocabulary, text.vocabulary + ROWS)]
    out = Packed(list(shared), [0] * len(shared), list(range(len(shared))), [IGNORED] * len(shared))
    for number, turn in enumerate(turns, start=1):
        bins = [scene.facts.regions[k].box_bins for k in turn.regions]
        prompt = text.encode_prompt(turn.prompt, image_rows=ROWS, region_bins=bins, language=turn.language)[
            len(shared) :
        ]
        # encode_prompt numbers regions 0, 1, ...; the scene's own numbers are turn.regions
        renumber = {text.vocabulary + ROWS + i: text.vocabulary + ROWS + k for i, k in enumerate(turn.regions)}
        prompt = [renumber.get(t, t) for t in prompt]
        answer = text.encode_answer(turn.answer)
        ids = [*prompt, *answer]
        out.ids.extend(ids)
        out.turn.extend([number] * len(ids))
        out.position.extend(range(len(shared), len(shared) + len(ids)))
        out.label.extend([IGNORED] * (len(prompt) - 1) + answer + [IGNORED])
    return out


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed rows padded to one length. mask: bool [batch, tokens, tokens], True where a token may be attended."""

    ids: Tensor
    position: Tensor
    mask: Tensor
    label: Tensor


def collate(rows: Sequence[Packed], pad: int, device: torch.device) -> Batch:
    """Return a batch; padding attends to itself only."""
    length = max(len(r.ids) for r in rows)
    length = (length + 31) // 32 * 32  # few distinct shapes: oneDNN keeps its kernels

    def fill(values: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([v + [filler] * (length - len(v)) for v in values], device=device)

    turn = fill([r.turn for r in rows], -1)
    order = torch.arange(length, device=device)
    earlier = order[:, None] >= order[None, :]
    same = turn[:, :, None] == turn[:, None, :]
    shared = (turn[:, None, :] == 0) & (turn[:, :, None] >= 0)
    return Batch(fill([r.ids for r in rows], pad), fill([r.position for r in rows], 0), earlier & (same | shared),
                 fill([r.label for r in rows], IGNORED))  # fmt: skip


def embed_batch(batch: Batch, scenes: Sequence[Scene], model: Llama, projector: Projector) -> Tensor:
    """Return embeddings [batch, tokens, width]: text from the table, image and region rows from the projector."""
    vocabulary = model.config.vocabulary
    coordinates = model.embedding.weight[model.config.first_coordinate :][: model.config.bins]
    images = batch_rows(scenes, projector, coordinates)  # [batch, ROWS, width]
    most = max(1, max(len(s.regions) for s in scenes))
    width = projector.region[0].in_features
    pooled = np.zeros((len(scenes), most, width), np.float32)  # type: ignore[call-overload]
    for i, s in enumerate(scenes):
        pooled[i, : len(s.regions)] = s.regions.reshape(len(s.regions), -1) if len(s.regions) else 0
    regions = projector.region(torch.from_numpy(pooled).to(batch.ids.device))
    rows = torch.cat([images, regions.to(images.dtype)], dim=1)
    is_row = batch.ids >= vocabulary
    text = model.embed(batch.ids.clamp(max=vocabulary - 1))
    at = (batch.ids - vocabulary).clamp(min=0)
    picked = rows.gather(1, at[..., None].expand(-1, -1, rows.shape[-1]))
    return torch.where(is_row[..., None], picked.to(text.dtype), text)


def language_loss(batch: Batch, hidden: Tensor, model: Llama, box_token: int) -> dict[str, Tensor]:
    """Return the named losses: next token of answers, and the four sides of a box from the state at `<box>`."""
    wanted = batch.label != IGNORED
    loss = F.cross_entropy(model.logits(hidden[wanted]).float(), batch.label[wanted])
    first = model.config.first_coordinate
    at_box = (batch.ids == box_token) & (batch.label >= first) & (batch.label < first + model.config.bins)
    where = at_box.nonzero()
    if len(where) == 0:
        return {"text": loss, "draft": loss * 0}
    sides = torch.stack([batch.label[where[:, 0], where[:, 1] + k] for k in range(4)], dim=1) - first  # [n, 4]
    draft = model.box_draft_logits(hidden[where[:, 0], where[:, 1]]).float()
    at = torch.arange(model.config.bins, device=draft.device)
    soft = torch.softmax(-((at - sides[..., None]) ** 2) / (2 * 4.0**2), -1)
    return {"text": loss, "draft": -(soft * draft.log_softmax(-1)).sum(-1).mean() * 0.1}


def train_language(
    scenes: Sequence[Scene],
    projector: Projector,
    model: Llama,
    text: NativeText,
    folder: Path,
    *,
    steps: int,
    batch: int,
    turns: int,
    rate: float,
    seed: int,
    device: torch.device,
    log: Log,
) -> None:
    """Train `model` and the projector's row layers in place; resumes from `folder/language.pt`.

    A third of the scenes are made up, a third nudged, the rest as they are.
    """
    for p in projector.head.parameters():
        p.requires_grad_(False)
    projector.head.eval()
    model.train()
    both = nn.ModuleDict({"model": model, "projector": projector})
    decayed = [p for p in both.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in both.parameters() if p.requires_grad and p.ndim < 2]
    optimiser = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
                                  lr=rate, betas=(0.9, 0.98))  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: min(1.0, (s + 1) / 100) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps)))),
    )
    path, first = folder / "language.pt", 0
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        both.load_state_dict(saved["both"])
        optimiser.load_state_dict(saved["optimiser"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
    start = time.monotonic()
    running: dict[str, float] = {}
    box_token = text.tokens().box
    pad = text.tokens().pad
    for step in range(first, steps):
        rng = np.random.default_rng([seed, 11, step])
        chosen = [scenes[int(k)] for k in rng.integers(len(scenes), size=batch)]
        kinds = rng.random(batch)
        chosen = [
            made_up(s, rng) if k < 1 / 3 else nudged(s, rng) if k < 2 / 3 else s
            for s, k in zip(chosen, kinds, strict=True)
        ]
        packed = collate([pack(text, s, make_turns(s.facts, rng, turns)) for s in chosen], pad, device)
        with torch.autocast(device.type, torch.bfloat16):
            embedded = embed_batch(packed, chosen, model, projector)
            hidden = model(embedded, packed.position, packed.mask)
            losses = language_loss(packed, hidden, model, box_token)
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_([*decayed, *plain], 1.0)
        optimiser.step()
        schedule.step()
        for name, value in losses.items():
            running[name] = 0.95 * running.get(name, value.item()) + 0.05 * value.item()
        if step % 50 == 49 or step == steps - 1:
            each = (time.monotonic() - start) / (step + 1 - first)
            parts = ", ".join(f"{k} {v:.4f}" for k, v in running.items())
            log(
                f"language {step + 1}/{steps}, {each:.2f} s a step, {(steps - step - 1) * each / 60:.0f} min left: {parts}"
            )
        if step % 200 == 199 or step == steps - 1:
            temporary = path.with_suffix(".tmp")
            torch.save({"both": both.state_dict(), "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict(),
                        "step": step + 1}, temporary)  # fmt: skip
            temporary.replace(path)
    with torch.no_grad():
        first_row = model.config.first_coordinate
        projector.coordinates.copy_(model.embedding.weight[first_row : first_row + model.config.bins])
    model.eval()
    projector.eval()
