"""The decoding loop: prompt ids in, answer ids out, as few decoder calls as give the same answer.

Covers prefill, the grammar's masks, greedy choice and sampling, tokens without a choice, drafts and their check, the
hidden states a mask decoder needs, and ending well at the token limit. Does not see the KV cache (the Runner has it),
text (the family has the tokenizer), where drafts come from (`drafts`), or logits (`token_choice`, `kernel_head`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np
import numpy.typing as npt

from edgemed.backends import Outputs, Runner
from edgemed.box_grammar import Grammar, State
from edgemed.decoder_calls import Calls, PromptCache
from edgemed.drafts import Drafter, Guess
from edgemed.errors import InvalidInput
from edgemed.graphs import Feeds
from edgemed.kernel_head import KernelHead
from edgemed.token_choice import NO_NUMBERS, Logits, Mask, NextToken, Numbers

Vector = npt.NDArray[np.float32]

MAX_DRAFT = 24
"""Most tokens of a draft: a check of 16 costs a CPU about what two or three single tokens do."""


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """How to decode.

    max_new_tokens: the longest answer. temperature: 0 is greedy; above 0 tokens are drawn, reproducibly for a `seed`.
    eos_id: ends the answer. keep_hidden: token ids whose hidden state is returned; None: every position's.
    cache: tokens the decoder's cache holds, prompt and answer together. router: keep what the routers said.
    numbers: tokens that write a number (a coordinate's bin, a digit); for these `Decoded.spreads` is measured.
    split_head: the decoder computes logits where they are asked for. box_head: its `box_logits` are those of `numbers`.
    """

    eos_id: int
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    keep_hidden: frozenset[int] | None = frozenset()
    cache: int = 1024
    router: bool = False
    numbers: Numbers = NO_NUMBERS
    split_head: bool = False
    box_head: bool = False

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
    head: KernelHead | None = None,
) -> Decoded:
    """Return the answer to `prompt_ids`, each token the best (or drawn) one that `grammar` allows.

    fixed: the decoder's feeds that stay the same from call to call (`image_tokens`). Where the grammar refuses a place
    once its name is known, decoding goes back to before it and goes on with another token.

    drafter: with one, a token that the grammar leaves no choice about costs no call, and what the drafter proposes is
    checked in one call; the answer is the same, token for token, drawn ones too. Without, every token is a call.

    prompts: with one, images that the last prompt began with, too, are not read again.

    head: with one, a decoder with a split head ends in the hidden state, and kernels choose the tokens. Greedy only.

    Raises InvalidInput where the prompt is empty or leaves no room in the cache, or where logits are not finite.
    """
    check_prompt(prompt_ids, options)
    if head is not None and (options.temperature or not options.split_head):
        raise InvalidInput("kernels choose greedily, for a decoder that computes logits where they are asked for alone")
    walk = _Walk(grammar, options, min(options.max_new_tokens, options.cache - len(prompt_ids)))
    calls = Calls(runner, fixed, options.split_head, options.box_head)
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
        masks = walk.masks(draft) if options.split_head else []
        asked = Asked.nothing() if head is not None else walk.asked(masks, read_from)
        out = calls.run([*feed, *draft], start, asked.text_at, asked.box_at)
        rows: Sequence[NextToken | None]
        if head is not None:
            with calls.timed():
                rows = head.rows(out["hidden"][0][read_from:], masks, walk.numbers)
        else:
            rows = walk.rows(out, asked, read_from, 1 + len(draft))
        if calls.count == 1:
            prefill_ms = calls.milliseconds
        before = calls.past - len(draft)
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
class Asked:
    """Kept positions of a call whose logits are wanted: over the vocabulary (None: all), over coordinates alone."""

    text_at: Sequence[int] | None = None
    box_at: Sequence[int] = ()

    @classmethod
    def nothing(cls) -> Asked:
        """Return what asks for no logits at all."""
        return cls(())


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
        self.numbers = options.numbers
        self.end = 0  # how many ids there are where the grammar last allowed an end
        self.ended = False
        self.finished = False
        self._rest: tuple[int, State, NextToken | None] | None = None  # past, state and what came next there
        self._refused: set[int] = set()  # tokens that led to a refusal from there

    def keeps(self, index: int) -> bool:
        """Return whether the hidden state where ids[index] goes in is wanted; -1 is the prompt's last token."""
        wanted = self._options.keep_hidden
        if wanted is None:
            return -1 <= index < len(self.ids)
        return 0 <= index < len(self.ids) and self.ids[index] in wanted

    def masks(self, draft: Sequence[int]) -> list[Mask | None]:
        """Return what is allowed at 1 + len(draft) positions; None where there is nothing to choose."""
        if self.finished:  # the call is for a hidden state alone
            return [None] * (1 + len(draft))
        found: list[Mask | None] = []
        state = self._state
        for token in (*draft, None):
            allowed = self._grammar.allowed(state)
            found.append(allowed if np.count_nonzero(allowed) > 1 else None)
            if token is not None:
                state = self._grammar.advance(state, token)
        return found

    def asked(self, masks: Sequence[Mask | None], start: int) -> Asked:
        """Return the positions, from `start` on, whose logits a decoder with a split head is asked for."""
        if not self._options.split_head:
            return Asked()
        text_at: list[int] = []
        box_at: list[int] = []
        for position, allowed in enumerate(masks, start):
            if allowed is None:
                continue
            boxed = self._options.box_head and self.numbers.are_all_of(allowed)
            (box_at if boxed else text_at).append(position)
        return Asked(text_at, box_at)

    def rows(self, out: Outputs, asked: Asked, start: int, count: int) -> list[NextToken | None]:
        """Return what `take` wants of a call's outputs, for `count` positions from `start` on."""
        if asked.text_at is None:
            return [Logits(row) for row in out["logits"][0][start:]]
        found: dict[int, NextToken] = {
            position: Logits(row) for position, row in zip(asked.text_at, out["logits"][0], strict=True)
        }
        for position, coordinates in zip(asked.box_at, out["box_logits"][0] if asked.box_at else (), strict=True):
            row = np.full(out["logits"].shape[-1], -np.inf, np.float32)
            row[self.numbers.ids] = coordinates
            found[position] = Logits(row)
        return [found.get(start + i) for i in range(count)]

    def take(self, rows: Sequence[NextToken | None], draft: Sequence[int], past: int) -> _Stay:
        """Return what stays of a call after its logits were read, row by row, as long as the draft was right.

        rows: of 1 + len(draft) positions, None where there is nothing to choose. past: tokens in the cache up to the
        first row.
        """
        if self.finished:  # the call was for a hidden state alone
            return _Stay([], past, 0, len(self.ids))
        before = len(self.ids)
        lowest = before
        for row, after in enumerate(rows):
            token, back = self._choose(after, past + row)
            if back is not None:
                lowest = min(lowest, self.end)
            if token is None:
                return _Stay([], past + row, row, min(lowest, self.end) if back is not None else before + row)
            if back is not None:
                return _Stay([token], back, row, lowest)
            if row == len(draft) or token != draft[row]:
                return _Stay([token], past + row, row, before + row)
        raise AssertionError("one row more than draft tokens was expected")

    def _choose(self, after: NextToken | None, past: int) -> tuple[int | None, int | None]:
        """Return (the next token or None at the end, where the cache is rolled back to or None)."""
        back: int | None = None
        while True:
            allowed = self._note_end(past, after)
            if self.finished:
                return None, back
            token, log_prob, spread = self._pick(after, allowed)
            if token == self._options.eos_id:
                self.ended = self.finished = True
                return None, back
            self._add(token, log_prob, spread)
            if not self._grammar.refuses(self._state):
                self._stop_at_limit()
                return token, back
            assert self._rest is not None
            self._refused.add(self.ids[self.end])
            del self.ids[self.end :], self.log_probs[self.end :], self.spreads[self.end :]
            past, self._state, after = self._rest  # the cache is rolled back by its length alone
            back = past

    def _note_end(self, past: int, after: NextToken | None) -> Mask:
        """Return what is allowed here, after noting whether the answer may end here."""
        allowed = self._grammar.allowed(self._state)
        if allowed[self._options.eos_id]:
            if self._rest is None or len(self.ids) != self.end:
                self._refused = set()
                self.end, self._rest = len(self.ids), (past, self._state, None if after is None else after.kept())
            if self._refused:
                allowed = allowed.copy()
                allowed[list(self._refused)] = False
        return allowed

    def _pick(self, after: NextToken | None, allowed: Mask) -> tuple[int, float, float | None]:
        """Return the token, the log of its probability, and its spread if it is a number."""
        only = _only(allowed)
        if only is not None:
            return only, 0.0, 0.0 if only in self.numbers else None
        assert after is not None, "a position with a choice was not asked for"
        token, log_prob = after.pick(allowed, self._options.temperature, self._rng)
        return token, log_prob, after.spread(allowed, self.numbers) if token in self.numbers else None

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
            self._add(token, 0.0, 0.0 if token in self.numbers else None)
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
