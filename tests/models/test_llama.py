"""The decoder against a plain restatement of the llama equations, and the properties training relies on."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from edgemed.models.llama import Llama, LlamaConfig, coordinate_features

SMALL = LlamaConfig(
    vocabulary=90,
    first_coordinate=10,
    width=48,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    inner=80,
    bins=64,
    draft_rank=8,
)


def make(config: LlamaConfig = SMALL) -> Llama:
    torch.manual_seed(0)
    return Llama(config).eval()


def plain_llama(model: Llama, x: torch.Tensor) -> torch.Tensor:
    """The equations one head and one token at a time, complex numbers for the rotation, float64. x: [tokens, width]."""
    c = model.config
    w = {k: v.double() for k, v in model.state_dict().items()}
    x = x.double()
    tokens = x.shape[0]
    frequency = c.rope_theta ** (-torch.arange(c.head_dim // 2).double() * 2 / c.head_dim)
    turn = torch.polar(torch.ones(tokens, c.head_dim // 2).double(), torch.arange(tokens).double()[:, None] * frequency)

    def norm(v: torch.Tensor, name: str) -> torch.Tensor:
        return v / (v.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[name]

    def rotated(v: torch.Tensor) -> torch.Tensor:
        half = c.head_dim // 2
        z = torch.complex(v[:, :half], v[:, half:]) * turn
        return torch.cat((z.real, z.imag), 1)

    for i in range(c.layers):
        p = f"layers.{i}."
        qkv = norm(x, p + "attention_norm.weight") @ w[p + "qkv.weight"].T
        heads = qkv.split(c.head_dim, dim=1)
        mixed = []
        for h in range(c.heads):
            kv = c.heads + h // (c.heads // c.kv_heads)
            score = rotated(heads[h]) @ rotated(heads[kv]).T / c.head_dim**0.5
            score = score.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
            mixed.append(score.softmax(-1) @ heads[kv + c.kv_heads])
        x = x + torch.cat(mixed, 1) @ w[p + "out.weight"].T
        inner = norm(x, p + "mlp_norm.weight") @ w[p + "gate_up.weight"].T
        gate, up = inner.split(c.inner, dim=1)
        x = x + (gate * torch.sigmoid(gate) * up) @ w[p + "down.weight"].T
    return norm(x, "norm.weight")


def test_hidden_states_equal_the_plain_equations() -> None:
    model = make()
    x = torch.randn(1, 13, SMALL.width)
    with torch.no_grad():
        ours = model(x, torch.arange(13)[None])
    assert torch.allclose(ours[0].double(), plain_llama(model, x[0]), atol=2e-5)


def test_two_turns_packed_behind_one_prefix_equal_two_separate_runs() -> None:
    model = make()
    prefix, a, b = torch.randn(1, 5, SMALL.width), torch.randn(1, 4, SMALL.width), torch.randn(1, 3, SMALL.width)
    packed = torch.cat((prefix, a, b), 1)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7]])
    turn = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
    mask = torch.ones(12, 12).tril().bool() & ((turn[:, None] == turn) | (turn == 0))
    with torch.no_grad():
        together = model(packed, positions, mask)
        additive = model(packed, positions, torch.zeros(1, 12, 12).masked_fill(~mask, float("-inf")))
        alone_a = model(torch.cat((prefix, a), 1), positions[:, :9])
        alone_b = model(torch.cat((prefix, b), 1), torch.arange(8)[None])
    assert torch.allclose(together[:, 5:9], alone_a[:, 5:], atol=1e-5)
    assert torch.allclose(together[:, 9:], alone_b[:, 5:], atol=1e-5)
    assert torch.allclose(together, additive, atol=1e-5)


def test_neighbouring_coordinates_start_alike_and_distant_ones_do_not() -> None:
    rows = coordinate_features(1000, 384)
    assert torch.allclose(rows.norm(dim=1), torch.ones(1000), atol=1e-5)
    near, far = rows[500] @ rows[501], rows[500] @ rows[700]
    assert near > 0.9 and far < 0.4
    table = make().embedding.weight[SMALL.first_coordinate : SMALL.first_coordinate + SMALL.bins]
    assert (table[1:] * table[:-1]).sum(-1).min() > (table[20:] * table[:-20]).sum(-1).max()


def test_first_logits_are_small_and_close_to_uniform() -> None:
    model = make(dataclasses.replace(SMALL, vocabulary=400, width=96))
    hidden = model(torch.randn(1, 20, 96), torch.arange(20)[None])
    loss = torch.nn.functional.cross_entropy(model.logits(hidden)[0], torch.randint(0, 400, (20,)))
    assert abs(loss.item() - torch.tensor(400.0).log().item()) < 0.3


def test_box_draft_gives_one_distribution_for_each_side() -> None:
    model = make()
    guess = model.box_draft_logits(torch.randn(2, 7, SMALL.width))
    assert guess.shape == (2, 7, 4, SMALL.bins)


@pytest.mark.parametrize("tied", [True, False])
def test_bf16_autocast_trains_every_weight(tied: bool) -> None:
    model = make(dataclasses.replace(SMALL, tied=tied))
    ids = torch.randint(0, SMALL.vocabulary, (2, 9))
    mask = torch.ones(9, 9).tril().bool()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(model.embed(ids), torch.arange(9).expand(2, 9), mask)
        loss = (
            model.logits(hidden).float().logsumexp(-1).mean()
            + model.box_draft_logits(hidden).float().logsumexp(-1).mean()
        )
    loss.backward()
    assert hidden.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="kv_heads"):
        dataclasses.replace(SMALL, kv_heads=3)
    with pytest.raises(ValueError, match="do not fit"):
        dataclasses.replace(SMALL, first_coordinate=60)


def test_routed_and_plain_forward_of_a_dense_decoder_are_the_same() -> None:
    model, x, positions = make(), torch.randn(1, 6, SMALL.width), torch.arange(6)[None]
    with torch.no_grad():
        hidden, routed = model.forward_routed(x, positions)
        assert torch.equal(hidden, model(x, positions))
    assert routed == ()


def test_remembered_keys_and_values_are_attended_to() -> None:
    model, x = make(), torch.randn(1, 6, SMALL.width)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept.append((key, value))
        return key, value

    def append(layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat((kept[layer][0], key), 2), torch.cat((kept[layer][1], value), 2)

    with torch.no_grad():
        expected = model(x, torch.arange(6)[None])
        model.forward_routed(x[:, :5], torch.arange(5)[None], None, [keep] * SMALL.layers)
        appends = [partial(append, layer) for layer in range(SMALL.layers)]
        last, _ = model.forward_routed(x[:, 5:], torch.tensor([[5]]), None, appends)
    assert kept[0][0].shape == (1, SMALL.kv_heads, 5, SMALL.head_dim)
    torch.testing.assert_close(last[:, 0], expected[:, 5], rtol=0, atol=1e-5)
