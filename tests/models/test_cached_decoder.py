"""A decoder with a cache computes what the decoder computes without one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from edgemed.models.cached_decoder import CachedDecoder
from edgemed.models.llama import Llama, LlamaConfig
from edgemed.models.moe import MoeLlama

CACHE = 24
DENSE = LlamaConfig(
    vocabulary=90, first_coordinate=10, width=48, layers=2, heads=4, kv_heads=2, head_dim=16, inner=80, bins=64,
    draft_rank=8,
)  # fmt: skip
MIXED = dataclasses.replace(DENSE, layers=3, kv_heads=4, first_coordinate=0, bins=0, tied=False)
IDS = torch.tensor([[5, 90, 91, 92, 7, 30, 93, 11, 12, 13, 80, 2]])
"""Four image rows among the tokens."""


def decoder(kind: str) -> Llama:
    torch.manual_seed(4)
    made = Llama(DENSE) if kind == "dense" else MoeLlama(MIXED, (2, 1, 2))
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.2)
    return made.eval()


@pytest.fixture(params=["dense", "experts"])
def cached(request: pytest.FixtureRequest) -> CachedDecoder:
    return CachedDecoder(decoder(request.param), CACHE)


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(4, 48, generator=torch.Generator().manual_seed(5))


@torch.inference_mode()
def call(cached: CachedDecoder, ids: Tensor, rows: Tensor, past: int, first: int = 0) -> tuple[Tensor, ...]:
    out: tuple[Tensor, ...] = cached(ids, rows, torch.tensor([past]), torch.tensor([first]))
    return out


@torch.inference_mode()
def whole(cached: CachedDecoder, ids: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """The outputs of a run of all tokens without a cache."""
    model = cached.decoder
    hidden, routed = model.forward_routed(model.embed_mixed(ids, rows), torch.arange(ids.shape[1])[None])
    out = [model.logits(hidden), hidden]
    if model.config.bins:
        out.append(model.box_draft_logits(hidden).argmax(-1))
    return (*out, *([torch.stack(routed, dim=2)] if routed else []))


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected) == 3
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "parts", [(12,), (1,) * 12, (5, 7), (9, 1, 1, 1), (3, 4, 1, 4)], ids=lambda parts: "+".join(map(str, parts))
)
def test_tokens_in_parts_give_what_they_give_at_once(
    cached: CachedDecoder, rows: Tensor, parts: tuple[int, ...]
) -> None:
    expected, past = whole(cached, IDS, rows), 0
    for count in parts:
        out = call(cached, IDS[:, past : past + count], rows, past)
        assert_equal(out, tuple(t[:, past : past + count] for t in expected))
        past += count


def test_only_what_was_asked_for_is_returned(cached: CachedDecoder, rows: Tensor) -> None:
    expected = whole(cached, IDS, rows)
    assert_equal(call(cached, IDS, rows, 0, first=11), tuple(t[:, 11:] for t in expected))


def test_a_smaller_past_rolls_back(cached: CachedDecoder, rows: Tensor) -> None:
    call(cached, IDS, rows, 0)
    other = torch.tensor([[40, 41, 92, 42]])
    changed = torch.cat([IDS[:, :6], other], dim=1)
    assert_equal(call(cached, other, rows, 6), tuple(t[:, 6:] for t in whole(cached, changed, rows)))
    assert_equal(call(cached, IDS[:, :3], rows, 0), tuple(t[:, :3] for t in whole(cached, IDS, rows)))


def test_shapes_are_those_of_the_graph(rows: Tensor) -> None:
    logits, hidden, draft = call(CachedDecoder(decoder("dense"), CACHE), IDS, rows, 0, first=4)
    assert (logits.shape, hidden.shape, draft.shape, draft.dtype) == ((1, 8, 90), (1, 8, 48), (1, 8, 4), torch.int64)
    router = call(CachedDecoder(decoder("experts"), CACHE), IDS, rows, 0, first=4)[2]
    assert router.shape == (1, 8, 2, 2)
    torch.testing.assert_close(router.sum(-1), torch.ones(1, 8, 2))


def test_the_cache_is_written_in_place_and_is_no_weight(cached: CachedDecoder, rows: Tensor) -> None:
    place = cached.kept.data_ptr()
    call(cached, IDS, rows, 0)
    assert cached.kept.data_ptr() == place
    assert cached.kept.abs().amax((0, 1, 2, 3, 5)).ne(0).tolist() == [True] * 12 + [False] * 12
    assert not any("kept" in name for name in cached.state_dict())
    cached.reset()
    assert not cached.kept.any()


@pytest.mark.parametrize(("past", "count"), [(0, 25), (13, 12), (-1, 1)])
def test_tokens_that_do_not_fit_the_cache_are_refused(
    cached: CachedDecoder, rows: Tensor, past: int, count: int
) -> None:
    with pytest.raises(ValueError, match=f"{count} tokens after {past} do not fit a cache of 24"):
        call(cached, IDS[:, :1].expand(1, count), rows, past)
