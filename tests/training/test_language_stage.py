"""Packed turns: none sees another, only answers are learned, and packing changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from edgemed.families.native_text import NativeText, tag
from edgemed.models.llama import Llama, LlamaConfig
from edgemed.models.projector import FIRST_PROPOSAL, PROPOSALS, ROWS, Projector
from edgemed.training.facts import ImageFacts, RegionFact
from edgemed.training.language_stage import (
    IGNORED,
    TAP,
    collate,
    embed_batch,
    language_loss,
    look_up_loss,
    pack,
    start_from_copying,
)
from edgemed.training.scenes import Scene
from edgemed.training.slices import INDEX
from edgemed.training.tasks import Turn

LIVER = INDEX["liver"]
BOX = (100, 200, 300, 400)
CPU = torch.device("cpu")

TURNS = (
    Turn("Where is the liver?", f"The {tag('liver', BOX)} is here.", "en"),
    Turn("What is in this region?", tag("liver", BOX), "en", regions=(1,)),
    Turn("这是什么？", "CT。", "zh"),
)


@pytest.fixture(scope="module")
def scene(make_projector: Callable[[], Projector]) -> Scene:
    """A scene of random numbers with two regions."""
    rng = np.random.default_rng(0)
    regions = (
        RegionFact("box", None, (1, 2, 3, 4), None),
        RegionFact("box", LIVER, (90, 190, 310, 410), BOX),
    )
    low = rng.integers(0, 500, (PROPOSALS, 2))
    return Scene(
        sample=0,
        pooled=rng.normal(0, 1, (64, 256)).astype(np.float16),
        modality=np.full(9, 1 / 9, np.float32),
        body_part=np.full(12, 1 / 12, np.float32),
        index=np.arange(PROPOSALS),
        presence=np.linspace(0.9, 0.1, PROPOSALS).astype(np.float32),
        bins=np.concatenate([low, low + 100], axis=1),
        regions=rng.normal(0, 1, (2, make_projector().region_features)).astype(np.float32),
        facts=ImageFacts(0, 0, {LIVER: BOX}, (), regions),
    )


@pytest.fixture(scope="module")
def model(text: NativeText) -> Llama:
    torch.manual_seed(0)
    first = text.tokens().first_coordinate
    config = LlamaConfig(vocabulary=text.vocabulary, first_coordinate=first, width=32, layers=4, heads=4,
                         kv_heads=2, head_dim=8, inner=48, draft_rank=8)  # fmt: skip
    return Llama(config).eval()


def test_a_turn_sees_the_picture_and_itself_and_no_other_turn(text: NativeText, scene: Scene) -> None:
    packed = pack(text, scene, TURNS)
    mask = collate([packed], text.tokens().pad, CPU).mask[0].numpy()
    turn = np.array(packed.turn)
    tokens = len(turn)
    assert tokens % 32  # so there is padding
    for i in range(tokens):
        for j in range(tokens):
            assert mask[i, j] == (j <= i and turn[j] in (0, turn[i]))
    assert not mask[:tokens, tokens:].any()
    assert mask.diagonal().all()  # no row without anything to attend to


def test_positions_restart_after_the_picture(text: NativeText, scene: Scene) -> None:
    packed = pack(text, scene, TURNS)
    turn, position = np.array(packed.turn), np.array(packed.position)
    assert position[turn == 0].tolist() == list(range(1 + ROWS))
    for number in (1, 2, 3):
        own = position[turn == number]
        assert own.tolist() == list(range(1 + ROWS, 1 + ROWS + len(own)))


def test_labels_are_the_next_tokens_of_answers_only(text: NativeText, scene: Scene) -> None:
    packed = pack(text, scene, TURNS)
    for number, turn in enumerate(TURNS, start=1):
        at = [i for i, t in enumerate(packed.turn) if t == number]
        labels = [packed.label[i] for i in at]
        answer = text.encode_answer(turn.answer)
        assert [v for v in labels if v != IGNORED] == answer
        first = labels.index(answer[0])
        assert packed.ids[at[first]] == text.tokens().assistant
        assert labels[-1] == IGNORED
        assert [packed.ids[i + 1] for i in at[first:-1]] == labels[first:-1]
    assert {packed.label[i] for i, t in enumerate(packed.turn) if t == 0} == {IGNORED}


def test_the_sides_of_a_box_know_the_rows_that_hold_them(text: NativeText, scene: Scene) -> None:
    packed = pack(text, scene, TURNS)
    at = [i for i, s in enumerate(packed.source) if s != IGNORED]
    assert len(packed.source) == len(packed.ids)
    rows = [packed.ids[packed.source[i]] - text.vocabulary for i in at]
    proposal = scene.index.tolist().index(LIVER)
    assert rows == [FIRST_PROPOSAL + 5 * proposal + 1 + k for k in range(4)] * 2
    first = text.tokens().first_coordinate
    assert [packed.label[i] - first for i in at] == list(BOX) * 2
    assert packed.ids[at[0]] == text.tokens().box


def test_a_region_keeps_its_number_in_the_scene(text: NativeText, scene: Scene) -> None:
    packed = pack(text, scene, TURNS)
    rows = [
        t - text.vocabulary for t, turn in zip(packed.ids, packed.turn, strict=True) if turn and t >= text.vocabulary
    ]
    assert rows == [ROWS + 1]


def hidden_of(text: NativeText, model: Llama, projector: Projector, scene: Scene, *turns: Turn) -> list[torch.Tensor]:
    """Return the hidden states of each turn's tokens."""
    packed = pack(text, scene, turns)
    batch = collate([packed], text.tokens().pad, CPU)
    with torch.no_grad():
        hidden = model(embed_batch(batch, [scene], model, projector), batch.position, batch.mask)[0]
    turn = torch.tensor(packed.turn)
    return [hidden[: len(turn)][turn == number] for number in range(1, len(turns) + 1)]


def test_a_packed_turn_is_what_it_is_alone(
    text: NativeText, model: Llama, make_projector: Callable[[], Projector], scene: Scene
) -> None:
    projector = make_projector()
    together = hidden_of(text, model, projector, scene, *TURNS)
    for turn, states in zip(TURNS, together, strict=True):
        alone = hidden_of(text, model, projector, scene, turn)[0]
        assert torch.allclose(states, alone, atol=2e-5)
    backwards = hidden_of(text, model, projector, scene, *TURNS[::-1])
    assert torch.allclose(backwards[2], together[0], atol=2e-5)


def test_rows_of_a_batch_do_not_touch_each_other(
    text: NativeText, model: Llama, make_projector: Callable[[], Projector], scene: Scene
) -> None:
    projector = make_projector()
    rows = [pack(text, scene, TURNS), pack(text, scene, TURNS[:1])]
    batch = collate(rows, text.tokens().pad, CPU)
    with torch.no_grad():
        hidden = model(embed_batch(batch, [scene, scene], model, projector), batch.position, batch.mask)
    alone = hidden_of(text, model, projector, scene, TURNS[0])[0]
    start, end = 1 + ROWS, 1 + ROWS + len(alone)
    assert torch.isfinite(hidden).all()
    assert torch.allclose(hidden[1, start:end], alone, atol=2e-5)


def test_losses_fall_where_the_answer_is_known(
    text: NativeText, model: Llama, make_projector: Callable[[], Projector], scene: Scene
) -> None:
    projector = make_projector()
    batch = collate([pack(text, scene, TURNS)], text.tokens().pad, CPU)
    with torch.no_grad():
        embedded = embed_batch(batch, [scene], model, projector)
        hidden, tapped = model.forward_tapped(embedded, batch.position, batch.mask, TAP)
        losses = language_loss(batch, hidden, model, text.tokens().box)
        uniform = np.log(text.vocabulary)
        assert losses["text"].item() == pytest.approx(uniform, rel=0.2)  # random weights
        assert losses["draft"].item() == pytest.approx(0.1 * np.log(1000), rel=0.2)
        assert look_up_loss(batch, tapped, model).item() > 0.5
        talk = collate([pack(text, scene, TURNS[2:])], text.tokens().pad, CPU)
        embedded = embed_batch(talk, [scene], model, projector)
        hidden, tapped = model.forward_tapped(embedded, talk.position, talk.mask, TAP)
        assert language_loss(talk, hidden, model, text.tokens().box)["draft"].item() == 0
        assert look_up_loss(talk, tapped, model).item() == 0


def test_the_look_up_loss_is_that_of_the_attention_of_the_layer(
    text: NativeText, model: Llama, make_projector: Callable[[], Projector], scene: Scene
) -> None:
    """Turning the queries of the copying heads towards the keys of the right rows brings the loss down."""
    batch = collate([pack(text, scene, TURNS)], text.tokens().pad, CPU)
    tuned = copy.deepcopy(model)
    weight = tuned.layers[TAP].qkv.weight  # type: ignore[union-attr]
    with torch.no_grad():
        embedded = embed_batch(batch, [scene], tuned, make_projector())
        _, tapped = tuned.forward_tapped(embedded, batch.position, batch.mask, TAP)
    optimiser = torch.optim.Adam([weight], lr=0.02)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = look_up_loss(batch, tapped, tuned)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    changed = (weight != model.layers[TAP].qkv.weight).any(dim=1)  # type: ignore[union-attr]
    c = model.config
    heads = [h for h in range(c.heads + 2 * c.kv_heads) if changed[h * c.head_dim : (h + 1) * c.head_dim].any()]
    assert heads == [0, 2, 4, 5]  # the first query head of each group, and the keys


def test_copying_heads_leave_the_other_heads_alone(text: NativeText, model: Llama) -> None:
    torch.manual_seed(0)
    changed = Llama(model.config)
    before = {k: v.clone() for k, v in changed.state_dict().items()}
    start_from_copying(changed)
    after = changed.state_dict()
    same = {k for k, v in before.items() if torch.equal(v, after[k])}
    assert {"box_draft.table", "layers.0.qkv.weight", "layers.3.gate_up.weight"} <= same
    assert {"embedding.weight", "layers.3.qkv.weight", "layers.3.out.weight"}.isdisjoint(same)
    c = model.config
    second_head = slice(c.head_dim, 2 * c.head_dim)  # head 1 of group 0
    assert torch.equal(before["layers.3.qkv.weight"][second_head], after["layers.3.qkv.weight"][second_head])
