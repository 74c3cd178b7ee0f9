"""The decoding loop: prompt ids in, answer ids out, one decoder call for each token.

Covers prefill, the grammar's masks, greedy choice and sampling, the hidden states a mask decoder needs, and ending well
at the token limit. Does not see the KV cache (the Runner has it) or text (the family has the tokenizer).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemed.backends import Outputs, Runner
from edgemed.box_grammar import Grammar, State
from edgemed.errors import InvalidInput
from edgemed.graphs import Feeds
from edgemed.triton_kernels.masked_argmax import masked_argmax

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How to decode.

    max_new_tokens: the longest answer. temperature: 0 is greedy; above 0 tokens are drawn, reproducibly for a `seed`.
    eos_id: ends the answer. keep_hidden: token ids whose hidden state is returned; None: every position's.
    cache: tokens the decoder's cache holds, prompt and answer together. router: keep what the routers said.
    """

    eos_id: int
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    keep_hidden: frozenset[int] | None = frozenset()
    cache: int = 1024
    router: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidInput(f"max-new-tokens is {self.max_new_tokens}; a number above 0 was expected")
        if not (self.temperature >= 0 and np.isfinite(self.temperature)):
            raise InvalidInput(f"temperature is {self.temperature:g}; 0 or a finite number above it was expected")
        if self.seed < 0:
            raise InvalidInput(f"seed is {self.seed}; 0 or a number above it was expected")


@dataclass(frozen=True, eq=False)
class Decoded:
    """What was decoded.

    ids: the answer without the end token.
    log_probs: for each id, the log of its probability among the tokens the grammar allowed, at temperature 1 also where
    it was drawn at another.
    hidden: (index in ids, float32 [width]) where an id of `keep_hidden` went in, in order; index -1 is the prompt's
    last token.
    ended: the model ended the answer; False where the token limit did, and then the ids stop where the grammar last
    allowed an end. decoder_calls counts the prefill too. Times in milliseconds.
    router: probabilities [tokens that went in, prompt first, layers with experts, experts], or None.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    hidden: tuple[tuple[int, Vector], ...]
    ended: bool
    decoder_calls: int
    prompt_tokens: int
    prefill_ms: float
    step_ms: float
    router: npt.NDArray[np.float32] | None = None


NOTHING_DECODED = Decoded((), (), (), True, 0, 0, 0.0, 0.0)
"""Where the mask decoder alone answers."""


def decode(
    runner: Runner, prompt_ids: Sequence[int], fixed: Feeds, grammar: Grammar[State], options: DecodeOptions
) -> Decoded:
    """Return the answer to `prompt_ids`, token by token, each the best (or drawn) one that `grammar` allows.

    fixed: the decoder's feeds that stay the same from call to call (`image_tokens`). Where the grammar refuses a place
    once its name is known, decoding goes back to before it and goes on with another token.

    Raises InvalidInput where the prompt is empty or leaves no room in the cache, or where logits are not finite.
    """
    check_prompt(prompt_ids, options)
    calls = Calls(runner, fixed)
    rng = np.random.default_rng(options.seed)
    room = min(options.max_new_tokens, options.cache - len(prompt_ids))
    ids: list[int] = []
    log_probs: list[float] = []
    hidden: list[tuple[int, Vector]] = []
    end = 0  # how many ids there are where the grammar last allowed an end
    ended = False
    out = calls.run(prompt_ids, logits_from=0 if options.router else -1)
    logits = out["logits"][0, -1]
    if options.keep_hidden is None:
        hidden.append((-1, out["hidden"][0, -1].copy()))
    prefill_ms = calls.milliseconds
    state = grammar.start()
    rest = (calls.past, state, logits)  # where `end` was reached: a refused place is taken back to there
    refused: set[int] = set()  # tokens that led to a refusal from there
    while not ended and len(ids) <= room:
        allowed = grammar.allowed(state)
        if allowed[options.eos_id]:
            if len(ids) != end:
                refused = set()
            end, rest = len(ids), (calls.past, state, logits.copy())
            if refused:
                allowed = allowed.copy()
                allowed[list(refused)] = False
        if len(ids) == room:
            break
        token, log_prob = _pick(logits, allowed, options.temperature, rng)
        ended = token == options.eos_id
        if not ended:
            ids.append(token)
            log_probs.append(log_prob)
            state = grammar.advance(state, token)
            if grammar.refuses(state):
                refused.add(ids[end])
                del ids[end:], log_probs[end:]
                calls.past, state, logits = rest  # the cache is rolled back by its length alone
                continue
            kept = options.keep_hidden is None or token in options.keep_hidden
            if len(ids) < room or kept:
                out = calls.run([token])
                logits = out["logits"][0, -1]
                if kept:
                    hidden.append((len(ids) - 1, out["hidden"][0, -1].copy()))
    return Decoded(
        ids=tuple(ids[:end]),
        log_probs=tuple(log_probs[:end]),
        hidden=tuple(pair for pair in hidden if pair[0] < end),
        ended=ended,
        decoder_calls=calls.count,
        prompt_tokens=len(prompt_ids),
        prefill_ms=prefill_ms,
        step_ms=calls.milliseconds - prefill_ms,
        router=np.concatenate(calls.routed)[: len(prompt_ids) + end] if options.router else None,
    )


def check_prompt(prompt_ids: Sequence[int], options: DecodeOptions) -> None:
    """Raise InvalidInput where the prompt is empty or leaves no room in the cache."""
    if not 0 < len(prompt_ids) < options.cache:
        raise InvalidInput(
            f"the prompt has {len(prompt_ids)} tokens; 1 to {options.cache - 1} fit. Ask a shorter question or about "
            "fewer regions"
        )


class Calls:
    """Calls the decoder with the next ids, and counts. `past`: how many ids its cache holds; less rolls it back."""

    def __init__(self, runner: Runner, fixed: Feeds) -> None:
        self.runner = runner
        self.fixed = fixed
        self.count = 0
        self.past = 0
        self.milliseconds = 0.0
        self.routed: list[npt.NDArray[np.float32]] = []  # of each call, [kept, layers with experts, experts]

    def run(self, ids: Sequence[int], logits_from: int = -1) -> Outputs:
        """Return the decoder's outputs from position `logits_from` of `ids` on, which follow the first `past` ids."""
        start = time.perf_counter()
        out = self.runner.run(
            {
                **self.fixed,
                "input_ids": np.array([ids], np.int64),
                "past_length": np.array([self.past], np.int64),
                "logits_from": np.array([logits_from % len(ids)], np.int64),
            }
        )
        if "router" in out:
            self.routed.append(out["router"][0])
        self.past += len(ids)
        self.count += 1
        self.milliseconds += (time.perf_counter() - start) * 1000
        return out


def _pick(
    logits: npt.NDArray[Any], allowed: npt.NDArray[np.bool_], temperature: float, rng: np.random.Generator
) -> tuple[int, float]:
    """Return (token, log probability as in `Decoded`): the best allowed token at temperature 0, else a draw."""
    best = masked_argmax(logits[None], allowed[None])
    token = int(best.index[0])
    if temperature > 0:
        choices = np.flatnonzero(allowed)
        with np.errstate(over="ignore"):  # a tiny temperature: exp(-inf) = 0 is right
            weights = np.exp((logits[choices].astype(np.float64) - float(best.peak[0])) / temperature)
        reached = np.cumsum(weights)
        drawn = np.searchsorted(reached, rng.random() * reached[-1], side="right")
        token = int(choices[min(drawn, len(choices) - 1)])
    return token, float(logits[token]) - float(best.log_sum_exp[0])
