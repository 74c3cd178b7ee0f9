"""The decoding loop: prompt ids in, answer ids out, as few decoder calls as give the same answer.

Covers prefill, the grammar's masks, greedy choice and sampling, tokens without a choice, drafts and their check, the
hidden states a mask decoder needs, and ending well at the token limit. Does not see the KV cache (the Runner has it),
text (the family has the tokenizer), or where drafts come from (`drafts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import numpy as np
import numpy.typing as npt

from edgemed.backends import Outputs, Runner
from edgemed.box_grammar import Grammar, State
from edgemed.decoder_calls import Calls, PromptCache
from edgemed.drafts import Drafter, Guess
from edgemed.errors import InvalidInput
from edgemed.graphs import Feeds
from edgemed.triton_kernels.masked_argmax import masked_argmax

Vector = npt.NDArray[np.float32]

MAX_DRAFT = 24
"""Most tokens of a draft: a check of 16 costs a CPU about what two or three single tokens do."""


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How to decode.

    max_new_tokens: the longest answer. temperature: 0 is greedy; above 0 tokens are drawn, reproducibly for a `seed`.
    eos_id: ends the answer. keep_hidden: token ids whose hidden state is returned; None: every position's.
    cache: tokens the decoder's cache holds, prompt and answer together. router: keep what the routers said.
    numbers: token id -> the number it writes (a coordinate's bin, a digit); for these `Decoded.spreads` is measured.
    split_head: the decoder computes logits where they are asked for, its `box_logits` being those of `numbers`.
    """

    eos_id: int
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    keep_hidden: frozenset[int] | None = frozenset()
    cache: int = 1024
    router: bool = False
    numbers: Mapping[int, float] = field(default_factory=dict)
    split_head: bool = False

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
    spreads: for each id of `numbers`, the standard deviation of the number among those the grammar allowed there, 0
    where it allowed one; None for other ids.
    hidden: (index in ids, float32 [width]) where an id of `keep_hidden` went in, in order; index -1 is the prompt's
    last token.
    ended: the model ended the answer; False where the token limit did, and then the ids stop where the grammar last
    allowed an end. decoder_calls counts the prefill too, but no calls that read images alone. held: so many tokens of
    the prompt were in the cache before. Times in milliseconds.
    router: probabilities [tokens that went in, prompt first, layers with experts, experts], or None.
    drafted, accepted: tokens that were proposed, and that the decoder confirmed; forced: tokens without a choice.
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
    drafted: int = 0
    accepted: int = 0
    forced: int = 0
    spreads: tuple[float | None, ...] = ()
    held: int = 0


NOTHING_DECODED = Decoded((), (), (), True, 0, 0, 0.0, 0.0)
"""Where the mask decoder alone answers."""


def decode(
    runner: Runner,
    prompt_ids: Sequence[int],
    fixed: Feeds,
    grammar: Grammar[State],
    options: DecodeOptions,
    drafter: Drafter | None = None,
    prompts: PromptCache | None = None,
) -> Decoded:
    """Return the answer to `prompt_ids`, each token the best (or drawn) one that `grammar` allows.

    fixed: the decoder's feeds that stay the same from call to call (`image_tokens`). Where the grammar refuses a place
    once its name is known, decoding goes back to before it and goes on with another token.

    drafter: with one, a token that the grammar leaves no choice about costs no call, and what the drafter proposes is
    checked in one call; the answer is the same, token for token, drawn ones too. Without, every token is a call.

    prompts: with one, images that the last prompt began with, too, are not read again.

    Raises InvalidInput where the prompt is empty or leaves no room in the cache, or where logits are not finite.
    """
    check_prompt(prompt_ids, options)
    walk = _Walk(grammar, options, min(options.max_new_tokens, options.cache - len(prompt_ids)))
    calls = Calls(runner, fixed, options.split_head)
    hidden: dict[int, Vector] = {}
    guesses: dict[int, Guess] = {}
    held = 0
    if prompts is not None:
        if options.router:
            prompts.forget()  # every token of the prompt is wanted
        else:
            held = calls.read_images(prompt_ids, len(grammar.allowed(grammar.start())), prompts)
    feed = list(prompt_ids[calls.past :])  # tokens that are certain and not in the cache yet
    draft = walk.draft(drafter, guesses) if drafter and not options.router else []
    prefill_ms = 0.0
    drafted = accepted = forced = 0
    while feed:
        first = len(walk.ids) - len(feed)  # index in the answer of feed[0], below 0 in the prompt
        start = len(feed) - 1  # position in this call from which on logits and hidden states are wanted
        if options.router:
            start = 0
        elif calls.count:
            start = next((i for i in range(len(feed)) if walk.keeps(first + i)), start)
        read_from = len(feed) - 1 - start  # of the positions that are kept, logits are read from this one on
        text_at, box_at = walk.wanted(draft, read_from) if options.split_head else (None, ())
        out = calls.run([*feed, *draft], start, text_at, box_at)
        if calls.count == 1:
            prefill_ms = calls.milliseconds
        before = calls.past - len(draft)
        rows = out["logits"][0][read_from:] if text_at is None else walk.rows(out, text_at, box_at, read_from, draft)
        stay = walk.take(rows, draft, before)
        stayed = stay.index - first  # so many tokens of this call are still part of prompt and answer
        for kept in (hidden, guesses):
            for index in [k for k in kept if k >= stay.index]:
                del kept[index]
        for position in range(start, min(stayed, len(feed) + len(draft))):
            if walk.keeps(first + position):
                hidden[first + position] = out["hidden"][0, position - start].copy()
            if "box_draft" in out:
                guesses[first + position] = tuple(int(b) for b in out["box_draft"][0, position - start])
        if options.router:
            calls.routed[-1] = calls.routed[-1][: max(stayed, 0)]
        drafted, accepted = drafted + len(draft), accepted + stay.accepted
        calls.past, feed, draft = stay.past, stay.feed, []
        if drafter is not None and not walk.finished:
            run = walk.force()
            forced += len(run)
            feed += run
            draft = [] if options.router else walk.draft(drafter, guesses)
        if walk.finished and not any(walk.keeps(len(walk.ids) - 1 - i) for i in range(len(feed))):
            break
    end = walk.end
    return Decoded(
        ids=tuple(walk.ids[:end]),
        log_probs=tuple(walk.log_probs[:end]),
        hidden=tuple((i, hidden[i]) for i in sorted(hidden) if i < end),
        ended=walk.ended,
        decoder_calls=calls.count,
        prompt_tokens=len(prompt_ids),
        prefill_ms=prefill_ms,
        step_ms=calls.milliseconds - prefill_ms,
        router=np.concatenate(calls.routed)[: len(prompt_ids) + end] if options.router else None,
        drafted=drafted,
        accepted=accepted,
        forced=forced,
        spreads=tuple(walk.spreads[:end]),
        held=held,
    )


@dataclass(frozen=True)
class _Stay:
    """What is left of a call: the ids that go in next, how many tokens the cache holds validly, drafts that were right.

    index: tokens of the answer from this index on are not those that went in.
    """

    feed: list[int]
    past: int
    accepted: int
    index: int


class _Walk(Generic[State]):
    """The answer as it grows, one token after the other, under its grammar. Knows no decoder."""

    def __init__(self, grammar: Grammar[State], options: DecodeOptions, room: int) -> None:
        self._grammar = grammar
        self._options = options
        self._room = room
        self._rng = np.random.default_rng(options.seed)
        self._state = grammar.start()
        self.ids: list[int] = []
        self.log_probs: list[float] = []
        self.spreads: list[float | None] = []
        self._number_ids = np.array(list(options.numbers), np.int64)
        self._numbers = np.array(list(options.numbers.values()), np.float64)
        self.end = 0  # how many ids there are where the grammar last allowed an end
        self.ended = False
        self.finished = False
        self._rest: tuple[int, State, npt.NDArray[Any]] | None = None  # past, state and logits there
        self._refused: set[int] = set()  # tokens that led to a refusal from there

    def keeps(self, index: int) -> bool:
        """Return whether the hidden state where ids[index] goes in is wanted; -1 is the prompt's last token."""
        wanted = self._options.keep_hidden
        if wanted is None:
            return -1 <= index < len(self.ids)
        return 0 <= index < len(self.ids) and self.ids[index] in wanted

    def wanted(self, draft: Sequence[int], start: int) -> tuple[list[int], list[int]]:
        """Return the positions, of 1 + len(draft) from `start` on, whose logits are wanted: all of them, the numbers'.

        None are wanted where the grammar leaves no choice; those of the numbers alone where it leaves nothing else.
        """
        text_at: list[int] = []
        box_at: list[int] = []
        if self.finished:  # the call is for a hidden state alone
            return text_at, box_at
        state = self._state
        for position, token in enumerate((*draft, None), start):
            allowed = self._grammar.allowed(state)
            open_here, numbers = np.count_nonzero(allowed), np.count_nonzero(allowed[self._number_ids])
            if numbers == open_here:
                box_at.append(position)
            elif open_here > 1:
                text_at.append(position)
            if token is not None:
                state = self._grammar.advance(state, token)
        return text_at, box_at

    def rows(
        self, out: Outputs, text_at: Sequence[int], box_at: Sequence[int], start: int, draft: Sequence[int]
    ) -> list[npt.NDArray[Any]]:
        """Return the logits of 1 + len(draft) positions, as `take` wants them, of what `wanted` named."""
        nothing = np.full(out["logits"].shape[-1], -np.inf, np.float32)
        found = dict(zip(text_at, out["logits"][0], strict=True))
        for position, numbers in zip(box_at, out["box_logits"][0], strict=True):
            found[position] = nothing.copy()
            found[position][self._number_ids] = numbers
        return [found.get(start + i, nothing) for i in range(1 + len(draft))]

    def take(self, rows: Sequence[npt.NDArray[Any]], draft: Sequence[int], past: int) -> _Stay:
        """Return what stays of a call after its logits were read, row by row, as long as the draft was right.

        rows: logits [vocabulary] of 1 + len(draft) positions; past: tokens in the cache up to the first row.
        """
        if self.finished:  # the call was for a hidden state alone
            return _Stay([], past, 0, len(self.ids))
        before = len(self.ids)
        lowest = before
        for row, logits in enumerate(rows):
            token, back = self._choose(logits, past + row)
            if back is not None:
                lowest = min(lowest, self.end)
            if token is None:
                return _Stay([], past + row, row, min(lowest, self.end) if back is not None else before + row)
            if back is not None:
                return _Stay([token], back, row, lowest)
            if row == len(draft) or token != draft[row]:
                return _Stay([token], past + row, row, before + row)
        raise AssertionError("one row more than draft tokens was expected")

    def _choose(self, logits: npt.NDArray[Any], past: int) -> tuple[int | None, int | None]:
        """Return (the next token or None at the end, where the cache is rolled back to or None)."""
        back: int | None = None
        while True:
            allowed = self._note_end(past, logits)
            if self.finished:
                return None, back
            token, log_prob = self._pick(logits, allowed)
            if token == self._options.eos_id:
                self.ended = self.finished = True
                return None, back
            spread = self._spread(logits, allowed) if token in self._options.numbers else None
            self._add(token, log_prob, spread)
            if not self._grammar.refuses(self._state):
                self._stop_at_limit()
                return token, back
            assert self._rest is not None
            self._refused.add(self.ids[self.end])
            del self.ids[self.end :], self.log_probs[self.end :], self.spreads[self.end :]
            past, self._state, logits = self._rest  # the cache is rolled back by its length alone
            back = past

    def _note_end(self, past: int, logits: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Return what is allowed here, after noting whether the answer may end here."""
        allowed = self._grammar.allowed(self._state)
        if allowed[self._options.eos_id]:
            if self._rest is None or len(self.ids) != self.end:
                self._refused = set()
                self.end, self._rest = len(self.ids), (past, self._state, logits.copy())
            if self._refused:
                allowed = allowed.copy()
                allowed[list(self._refused)] = False
        return allowed

    def _pick(self, logits: npt.NDArray[Any], allowed: npt.NDArray[np.bool_]) -> tuple[int, float]:
        only = _only(allowed)
        if only is not None:
            return only, 0.0
        return _pick(logits, allowed, self._options.temperature, self._rng)

    def _spread(self, logits: npt.NDArray[Any], allowed: npt.NDArray[np.bool_]) -> float:
        """Return the standard deviation of the number that comes next, if it is one."""
        open_here = allowed[self._number_ids]
        likely = logits[self._number_ids][open_here].astype(np.float64)
        weights = np.exp(likely - likely.max())
        weights /= weights.sum()
        numbers = self._numbers[open_here]
        return float(np.sqrt(weights @ np.square(numbers - weights @ numbers)))

    def _add(self, token: int, log_prob: float, spread: float | None) -> None:
        self.ids.append(token)
        self.log_probs.append(log_prob)
        self.spreads.append(spread)
        self._state = self._grammar.advance(self._state, token)

    def _stop_at_limit(self) -> None:
        if len(self.ids) == self._room:
            self.finished = True
            if self._grammar.allowed(self._state)[self._options.eos_id]:
                self.end = len(self.ids)

    def force(self) -> list[int]:
        """Return the tokens that the grammar leaves no choice about, added to the answer."""
        run: list[int] = []
        while not self.finished:
            token = _only(self._grammar.allowed(self._state))
            if token is None or token == self._options.eos_id:
                break
            if self._grammar.refuses(self._grammar.advance(self._state, token)):
                break  # going back needs the logits of a call
            self._add(token, 0.0, 0.0 if token in self._options.numbers else None)
            run.append(token)
            self._stop_at_limit()
        return run

    def draft(self, drafter: Drafter, guesses: Mapping[int, Guess]) -> list[int]:
        """Return tokens that may come next, as far as the grammar allows them, forced ones among them."""
        state, ids = self._state, list(self.ids)
        most = min(self._room, len(ids) + MAX_DRAFT)

        def add(token: int) -> bool:
            nonlocal state
            allowed = self._grammar.allowed(state)  # a prompt's ids of image rows lie beyond the vocabulary
            if len(ids) == most or token == self._options.eos_id or token >= len(allowed) or not allowed[token]:
                return False
            after = self._grammar.advance(state, token)
            if self._grammar.refuses(after):
                return False
            state = after
            ids.append(token)
            return True

        while len(ids) < most:
            proposed = list(drafter.propose(ids, state, guesses))
            known = len(ids)
            while proposed and add(proposed.pop(0)):
                while (token := _only(self._grammar.allowed(state))) is not None and add(token):
                    if proposed and proposed.pop(0) != token:
                        proposed = []
            if len(ids) == known:
                break
        return ids[len(self.ids) :]


def check_prompt(prompt_ids: Sequence[int], options: DecodeOptions) -> None:
    """Raise InvalidInput where the prompt is empty or leaves no room in the cache."""
    if not 0 < len(prompt_ids) < options.cache:
        raise InvalidInput(
            f"the prompt has {len(prompt_ids)} tokens; 1 to {options.cache - 1} fit. Ask a shorter question or about "
            "fewer regions"
        )


def _only(allowed: npt.NDArray[np.bool_]) -> int | None:
    """Return the only token that is allowed, or None if there are several."""
    token = int(allowed.argmax())
    return token if np.count_nonzero(allowed) == 1 else None


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
