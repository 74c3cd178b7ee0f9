"""Stage 2: the language model and the projector's rows, on scenes.

Several question-answer turns share one picture: a row of the batch is <bos>, the image rows, then turns that each see
the picture and themselves but not each other, with positions that restart. Loss on answers only, plus the auxiliary
head that guesses a whole box at `<box>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemed.families.native_text import NativeText, parse, structure_of
from edgemed.models.llama import Block, Llama, rope_table, rotate
from edgemed.models.projector import FIRST_PROPOSAL, ROWS, Projector
from edgemed.training.device import ALONE, Processes
from edgemed.training.loop import Log, Loop
from edgemed.training.scenes import Scene, batch_rows, made_up, nudged
from edgemed.training.tasks import Turn, make_turns

IGNORED = -100
TAP = 3
"""The layer from which on boxes are looked up; the layers below work out whose box and which side comes next."""


@dataclass(frozen=True, eq=False)
class Packed:
    """One row of a batch before the image rows are filled in.

    ids: token ids, image row r as vocabulary + r, region k as vocabulary + ROWS + k; turn: which turn each token
    belongs to (0 = the shared picture); position; label: the next token where it is part of an answer, else IGNORED;
    source: where the next token is side k of structure s, 4 s + k, else IGNORED.
    """

    ids: list[int]
    turn: list[int]
    position: list[int]
    label: list[int]
    source: list[int]


def pack(text: NativeText, scene: Scene, turns: Sequence[Turn]) -> Packed:
    """Return the turns of one scene in one sequence."""
    special = text.tokens()
    shared = [special.bos, *range(text.vocabulary, text.vocabulary + ROWS)]
    out = Packed(list(shared), [0] * len(shared), list(range(len(shared))), [IGNORED] * len(shared), [])
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
        boxes = [i for i, t in enumerate(answer) if t == special.box]
        places = [piece for piece in parse(turn.answer) if not isinstance(piece, str)]
        source = [IGNORED] * len(ids)
        for box, place in zip(boxes, places, strict=True):
            structure = structure_of(place.name)
            if structure is not None and place.bins == scene.facts.visible.get(structure):
                proposal = int(np.flatnonzero(scene.index == structure)[0])
                row = 1 + FIRST_PROPOSAL + 5 * proposal + 1  # after <bos>, its x0
                source[len(prompt) + box : len(prompt) + box + 4] = range(row, row + 4)
        out.source.extend(source)
    out.source[:0] = [IGNORED] * (len(out.ids) - len(out.source))
    return out


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed rows padded to one length. mask: bool [batch, tokens, tokens], True where a token may be attended."""

    ids: Tensor
    position: Tensor
    mask: Tensor
    label: Tensor
    source: Tensor


def collate(rows: Sequence[Packed], pad: int, device: torch.device) -> Batch:
    """Return a batch; padding attends to padding only."""
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
                 fill([r.label for r in rows], IGNORED), fill([r.source for r in rows], IGNORED))  # fmt: skip


def embed_batch(batch: Batch, scenes: Sequence[Scene], model: Llama, projector: Projector) -> Tensor:
    """Return embeddings [batch, tokens, width]: text from the table, image and region rows from the projector."""
    vocabulary = model.config.vocabulary
    coordinates = model.embedding.weight[model.config.first_coordinate :][: model.config.bins]
    images = batch_rows(scenes, projector, coordinates)  # [batch, ROWS, width]
    most = max(1, max(len(s.regions) for s in scenes))
    width = projector.region_features
    pooled = np.zeros((len(scenes), most, width), np.float32)
    for i, s in enumerate(scenes):
        pooled[i, : len(s.regions)] = s.regions.reshape(len(s.regions), -1) if len(s.regions) else 0
    regions = projector.region_rows(torch.from_numpy(pooled).to(batch.ids.device))
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


@torch.no_grad()
def start_from_copying(model: Llama) -> None:
    """Set one head of each key-value group, in the upper half, to attend to what resembles the token and to copy it.

    With W_q = W_k = a P and W_o W_v = b^2 R'R (P, R orthonormal) a head starts as soft look-up by similarity; P uses
    the slow half of the rotary channels only, whose angle hardly changes over a prompt. Writing a box is such a
    look-up, and from random weights it was not learned in 700 steps. Idea: mimetic initialisation (Trockman and Kolter,
    2023). Embeddings start with unit spread, and the last norm makes up for it: at the usual 0.02 the stream was 100
    times larger after one layer, and nothing of a coordinate was left in it to be copied (cosine 0.02).
    """
    c = model.config
    model.embedding.weight.div_(float(model.embedding.weight.std()))
    model.norm.weight.fill_(c.width**-0.5)
    per_group = c.heads // c.kv_heads
    keys, values = c.heads * c.head_dim, (c.heads + c.kv_heads) * c.head_dim
    half = c.head_dim // 2
    slow = [i for pair in range(half * 5 // 8, half) for i in (pair, pair + half)]
    for layer in list(model.layers)[TAP:]:
        assert isinstance(layer, Block)
        for group in range(c.kv_heads):
            look = torch.zeros(c.head_dim, c.width)
            look[slow] = torch.linalg.qr(torch.randn(c.width, len(slow))).Q.T
            copy = torch.linalg.qr(torch.randn(c.width, c.head_dim)).Q.T  # [head_dim, width]
            head = slice(group * per_group * c.head_dim, group * per_group * c.head_dim + c.head_dim)
            own = slice(group * c.head_dim, (group + 1) * c.head_dim)
            layer.qkv.weight[head] = 1.6 * look
            layer.qkv.weight[keys:values][own] = 1.6 * look
            layer.qkv.weight[values:][own] = 1.1 * copy
            layer.out.weight[:, head] = 1.1 * copy.T


def look_up_loss(batch: Batch, tapped: Tensor, model: Llama) -> Tensor:
    """Return how badly the copying heads of layer TAP look at the coordinate row that holds the next token.

    Cross-entropy of their attention against the row's place. The layers below learn to say whose box and which side
    comes next, those above get the right row to copy from the start. Without it, coordinates stayed at chance for 700
    steps, also with the identity of the row as an auxiliary target (right in 98 %).
    """
    c = model.config
    layer = model.layers[TAP]
    assert isinstance(layer, Block)
    cos, sin = rope_table(batch.position, c.head_dim, c.rope_theta)
    qkv = layer.qkv(layer.attention_norm(tapped)).unflatten(-1, (c.heads + 2 * c.kv_heads, c.head_dim)).transpose(1, 2)
    query = rotate(qkv[:, : c.heads : c.heads // c.kv_heads], cos[:, None], sin[:, None]).float()
    key = rotate(qkv[:, c.heads : c.heads + c.kv_heads], cos[:, None], sin[:, None]).float()
    rows, at = (batch.source != IGNORED).nonzero(as_tuple=True)
    if len(rows) == 0:
        return tapped.sum() * 0
    scores = torch.einsum("nhd,nhtd->nht", query[rows, :, at], key[rows]) * c.head_dim**-0.5  # [n, groups, tokens]
    scores = scores.masked_fill(~batch.mask[rows, at][:, None], float("-inf"))
    wanted = batch.source[rows, at][:, None].expand(-1, scores.shape[1])
    return F.cross_entropy(scores.flatten(0, 1), wanted.flatten()) * 0.5


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
    processes: Processes = ALONE,
) -> None:
    """Train `model` and the projector's row layers in place; resumes from `folder/language.pt`.

    batch: pictures a step, of all processes together; turns: questions and answers a picture.

    Half of the scenes are made up, a quarter nudged, the rest as they are.
    """
    processes.check_batch(batch, "language.batch")
    for p in projector.head.parameters():
        p.requires_grad_(False)
    projector.head.eval()
    model.train()
    both = nn.ModuleDict({"model": model, "projector": projector})
    decayed = [p for p in both.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in both.parameters() if p.requires_grad and p.ndim < 2]
    optimiser = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
                                  lr=rate, betas=(0.9, 0.98))  # fmt: skip
    loop = Loop("language", "both", folder / "language.pt", both, optimiser, steps, warm_up=100, floor=0.03, log=log,
                processes=processes)  # fmt: skip
    special = text.tokens()
    for step in loop.left():
        rng = np.random.default_rng([seed, 11, step])
        chosen = [scenes[int(k)] for k in rng.integers(len(scenes), size=batch)]
        kinds = rng.random(batch)
        chosen = [
            made_up(s, rng) if k < 1 / 2 else nudged(s, rng) if k < 3 / 4 else s
            for s, k in zip(chosen, kinds, strict=True)
        ]
        rows = [pack(text, s, make_turns(s.facts, rng, turns)) for s in chosen][processes.part]
        chosen = chosen[processes.part]
        packed = collate(rows, special.pad, device)
        with torch.autocast(device.type, torch.bfloat16):
            embedded = embed_batch(packed, chosen, model, projector)
            hidden, tapped = model.forward_tapped(embedded, packed.position, packed.mask, TAP)
            losses = language_loss(packed, hidden, model, special.box)
            losses["look-up"] = look_up_loss(packed, tapped, model)
        loop.take(step, losses)
    with torch.no_grad():
        first_row = model.config.first_coordinate
        projector.coordinates.copy_(model.embedding.weight[first_row : first_row + model.config.bins])
    model.eval()
    projector.eval()
