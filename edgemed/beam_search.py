"""Beam search over the same decoder calls as `decoding`: the answer whose mean log-probability a token is best.

Covers one prompt, a fixed number of beams, a length penalty of 1, and stopping once no running beam can beat the worst
of the finished ones. Does not cover sampling.

Beams share one cache. It is rolled back to what two beams have in common and the rest is decoded again, so that no
cache is copied; a step costs as many calls as there are beams, of as many tokens as they have not in common.

Source of the rule: github huggingface/transformers 4.37.2, beam search with early_stopping False, which MedRegA's
published code calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemed.backends import Runner
from edgemed.box_grammar import Grammar, State
from edgemed.decoder_calls import Calls
from edgemed.decoding import Decoded, DecodeOptions, check_prompt
from edgemed.graphs import Feeds


@dataclass(frozen=True)
class _Beam:
    """A running answer: its ids, the log-probability of each, and the grammar's state after them."""

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    state: Any

    @property
    def total(self) -> float:
        return math.fsum(self.log_probs)


def beam_search(
    runner: Runner,
    prompt_ids: Sequence[int],
    fixed: Feeds,
    grammar: Grammar[State],
    options: DecodeOptions,
    beams: int,
) -> Decoded:
    """Return the best answer that a search with `beams` beams finds; with 1 it is the greedy one.

    Raises InvalidInput as `decoding.decode` does.
    """
    check_prompt(prompt_ids, options)
    cache = _Cache(Calls(runner, fixed, options.split_head, options.box_head), prompt_ids)
    logits, first_hidden = cache.prefill()
    prefill_ms = cache.calls.milliseconds
    running = [_Beam((), (), grammar.start())]
    finished: list[tuple[float, _Beam]] = []
    room = min(options.max_new_tokens, options.cache - len(prompt_ids))
    length = 0
    while running and length < room:
        rows = [_log_probs(logits if length == 0 else cache.logits(beam.ids)) for beam in running]
        length += 1
        running = _step(running, rows, grammar, options.eos_id, beams, length, finished)
        if len(finished) == beams:
            worst = min(score for score, _ in finished)
            if worst >= max((beam.total for beam in running), default=-math.inf) / length:
                break
    else:
        for beam in running:  # the token limit was reached: what is running counts as it is
            _keep(finished, beam, beam.total / max(length, 1), beams)
    best = max(finished, key=lambda pair: pair[0])[1]
    ended = bool(best.ids) and best.ids[-1] == options.eos_id
    ids, log_probs = (best.ids[:-1], best.log_probs[:-1]) if ended else (best.ids, best.log_probs)
    hidden = cache.hidden(ids, options.keep_hidden)
    if options.keep_hidden is None:
        hidden.insert(0, (-1, first_hidden))
    return Decoded(
        ids=ids,
        log_probs=log_probs,
        hidden=tuple(hidden),
        ended=ended,
        decoder_calls=cache.calls.count,
        prompt_tokens=len(prompt_ids),
        prefill_ms=prefill_ms,
        step_ms=cache.calls.milliseconds - prefill_ms,
    )


def _step(
    running: Sequence[_Beam],
    rows: Sequence[npt.NDArray[np.float64]],
    grammar: Grammar[State],
    eos_id: int,
    beams: int,
    length: int,
    finished: list[tuple[float, _Beam]],
) -> list[_Beam]:
    """Return the next running beams; those that end among the best `beams` candidates go to `finished`."""
    scores = np.stack(
        [np.where(grammar.allowed(b.state), b.total + row, -np.inf) for b, row in zip(running, rows, strict=True)]
    )  # [running, vocabulary]
    flat = scores.reshape(-1)
    candidates = np.argsort(-flat, kind="stable")[: 2 * beams]
    following: list[_Beam] = []
    for rank, index in enumerate(candidates.tolist()):
        if not math.isfinite(flat[index]) or len(following) == beams:
            break
        source, token = divmod(index, scores.shape[1])
        beam = running[source]
        log_prob = float(rows[source][token])
        if token == eos_id:
            if rank < beams:
                ended = _Beam((*beam.ids, token), (*beam.log_probs, log_prob), beam.state)
                _keep(finished, ended, ended.total / length, beams)
            continue
        state = grammar.advance(beam.state, token)
        if not grammar.refuses(state):
            following.append(_Beam((*beam.ids, token), (*beam.log_probs, log_prob), state))
    return following


def _keep(finished: list[tuple[float, _Beam]], beam: _Beam, score: float, beams: int) -> None:
    """Add a finished beam, and drop the worst one where there are more than `beams`."""
    finished.append((score, beam))
    if len(finished) > beams:
        finished.remove(min(finished, key=lambda pair: pair[0]))


class _Cache:
    """The decoder behind one cache: knows which ids lie in it after the prompt."""

    def __init__(self, calls: Calls, prompt_ids: Sequence[int]) -> None:
        self.calls = calls
        self._prompt = prompt_ids
        self._held: tuple[int, ...] = ()

    def prefill(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
        """Return (logits, hidden state) at the prompt's last token."""
        out = self.calls.run(self._prompt)
        return out["logits"][0, -1].copy(), out["hidden"][0, -1].copy()

    def logits(self, ids: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return the logits after the prompt and `ids`, decoding only what is not in the cache."""
        common = 0
        while common < len(ids) - 1 and common < len(self._held) and ids[common] == self._held[common]:
            common += 1
        self.calls.past = len(self._prompt) + common
        out = self.calls.run(ids[common:])
        self._held = ids
        return np.asarray(out["logits"][0, -1]).copy()

    def hidden(self, ids: Sequence[int], wanted: frozenset[int] | None) -> list[tuple[int, npt.NDArray[np.float32]]]:
        """Return (index, state) where an id that is wanted goes in; None: every id's."""
        places = [i for i, index in enumerate(ids) if wanted is None or index in wanted]
        if not places:
            return []
        self.calls.past = len(self._prompt)
        states = self.calls.run(ids, logits_from=0)["hidden"][0]
        return [(i, states[i].copy()) for i in places]


def _log_probs(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    peak = wide.max()
    return np.asarray(wide - (peak + math.log(float(np.exp(wide - peak).sum()))))
