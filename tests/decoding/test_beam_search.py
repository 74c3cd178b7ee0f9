"""Beam search over a Runner without a model: the best answer there is, the greedy one with one beam, one cache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from edgemed.beam_search import beam_search
from edgemed.box_grammar import FreeGrammar
from edgemed.decoding import Decoded, DecodeOptions, decode
from edgemed.errors import InvalidInput

EOS, VOCABULARY, WIDTH = 0, 4, 3
PROMPT = [3, 1, 2]
FIXED = {"image_tokens": np.zeros((1, WIDTH), np.float32)}


class Fixed:
    """Logits that only depend on the ids after the prompt, the same for every run; counts tokens that went in."""

    backend, device = "fake", "none"

    def __init__(self, seed: int) -> None:
        self.seed, self.seen, self.tokens = seed, list[int](), 0

    def logits(self, answer: Sequence[int]) -> np.ndarray:
        return np.random.default_rng([self.seed, *answer]).normal(0, 1.5, VOCABULARY)

    def run(self, feeds):
        past, ids = int(feeds["past_length"][0]), feeds["input_ids"][0].tolist()
        assert past <= len(self.seen)
        self.seen[past:] = ids
        self.tokens += len(ids)
        first = int(feeds["logits_from"][0])
        ends = range(past + first + 1, len(self.seen) + 1)
        rows = [self.logits(self.seen[len(PROMPT) : end]) for end in ends]
        hidden = [np.full(WIDTH, self.seen[end - 1] * 100 + end, np.float32) for end in ends]
        return {"logits": np.array([rows], np.float32), "hidden": np.array([hidden])}


def log_prob(model: Fixed, answer: Sequence[int]) -> float:
    total = 0.0
    for i, token in enumerate(answer):
        row = model.logits(answer[:i]).astype(np.float32).astype(np.float64)
        total += row[token] - math.log(np.exp(row).sum())
    return total


def best_of_all(model: Fixed, longest: int) -> tuple[int, ...]:
    """The answer with the best mean log-probability: one that ends, or one as long as is allowed."""
    words = range(1, VOCABULARY)
    ended = [(*w, EOS) for n in range(longest) for w in itertools.product(words, repeat=n)]
    cut = list(itertools.product(words, repeat=longest))
    return max([*ended, *cut], key=lambda answer: log_prob(model, answer) / len(answer))


def search(model: Fixed, beams: int, **options) -> Decoded:
    return beam_search(model, PROMPT, FIXED, FreeGrammar(VOCABULARY), DecodeOptions(eos_id=EOS, **options), beams)


@pytest.mark.parametrize("seed", range(12))
def test_with_enough_beams_nothing_better_exists(seed: int) -> None:
    model = Fixed(seed)
    found = search(model, 200, max_new_tokens=4)
    best = best_of_all(model, 4)
    assert (*found.ids, *([EOS] if found.ended else [])) == best
    assert math.fsum(found.log_probs) == pytest.approx(log_prob(model, found.ids), abs=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_one_beam_is_the_greedy_answer(seed: int) -> None:
    options = DecodeOptions(eos_id=EOS, max_new_tokens=12)
    greedy = decode(Fixed(seed), PROMPT, FIXED, FreeGrammar(VOCABULARY), options)
    found = search(Fixed(seed), 1, max_new_tokens=12)
    assert (found.ids, found.ended) == (greedy.ids, greedy.ended)


def test_what_beams_have_in_common_is_not_decoded_again() -> None:
    model = Fixed(3)
    barred = np.where(np.arange(VOCABULARY) == EOS, -50.0, 0.0)
    whole = model.logits
    model.logits = lambda answer: whole(answer) + barred  # never ends
    found = search(model, 3, max_new_tokens=10)
    assert len(found.ids) == 10
    assert model.tokens < len(PROMPT) + 3 * sum(range(1, 11))  # every beam from the prompt on, at every step


def test_hidden_states_are_those_of_the_answer() -> None:
    found = search(Fixed(5), 4, max_new_tokens=6, keep_hidden=None)
    assert [index for index, _ in found.hidden] == list(range(-1, len(found.ids)))
    expected = [PROMPT[-1] * 100 + len(PROMPT), *(t * 100 + len(PROMPT) + 1 + i for i, t in enumerate(found.ids))]
    assert [float(state[0]) for _, state in found.hidden] == expected


def test_what_the_grammar_bars_is_never_written() -> None:
    options = DecodeOptions(eos_id=EOS, max_new_tokens=3)
    for seed in range(8):
        found = beam_search(Fixed(seed), PROMPT, FIXED, FreeGrammar(VOCABULARY, not_first=EOS), options, 4)
        assert len(found.ids) >= 1


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(InvalidInput, match="3 tokens"):
        search(Fixed(0), 2, cache=3)
