"""Which token may follow: the state machine that makes every decoded answer one that can be read.

Answers are text in which a place is `<ref>NAME</ref><box><cA><cB><cC><cD></box>`, with `<seg>` after it where a mask is
wanted. A grammar is asked before each token (`allowed`) and told after it (`advance`). Pure NumPy, no tokenizer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from edgemed.errors import InvalidInput

Allowed = npt.NDArray[np.bool_]
State = TypeVar("State")


class Grammar(Protocol[State]):
    """Says which tokens may come next. States are values: going back means keeping an old one."""

    def start(self) -> State:
        """Return the state before the first token of an answer."""

    def allowed(self, state: State) -> Allowed:
        """Return bool [vocabulary], read-only: which tokens may come next. At least one is True."""

    def advance(self, state: State, token: int) -> State:
        """Return the state after `token`. Raises InvalidInput if `token` is not allowed in `state`."""

    def refuses(self, state: State) -> bool:
        """Return True where what was begun may not be finished: go back to where an end was last allowed."""


@dataclass(frozen=True)
class BoxTokens:
    """The ids the grammar speaks of: tags, end of answer, the `bins` coordinates from `first_coordinate`, and `never`.

    never: ids that belong to prompts only (padding, begin, speaker tags, region marker).
    """

    box: int
    box_end: int
    ref: int
    ref_end: int
    seg: int
    eos: int
    first_coordinate: int
    bins: int
    never: tuple[int, ...] = ()


class Place(IntEnum):
    """Where in an answer a state is."""

    TEXT = 0  # free text
    NAME_START = 1  # just after <ref>
    NAME = 2  # inside <ref>, at least one token of the name is there
    NAMED = 3  # just after </ref>
    X0 = 4  # inside <box>: the coordinate that comes next
    Y0 = 5
    X1 = 6
    Y1 = 7
    FULL = 8  # four coordinates are there
    BOXED = 9  # just after </box>
    START = 10  # nothing is there yet; else as TEXT


@dataclass(frozen=True)
class BoxState:
    """A place in an answer; inside a box also the bins of its first corner.

    name: the name's tokens so far or of the box that is being written, bins: that box's coordinates so far, named: the
    names that were finished; all are kept only where the grammar knows boxes by name.
    """

    place: Place = Place.TEXT
    x0: int = 0
    y0: int = 0
    name: tuple[int, ...] = field(default=(), repr=False)
    bins: tuple[int, ...] = field(default=(), repr=False)
    named: frozenset[tuple[int, ...]] = field(default=frozenset(), repr=False)


class BoxGrammar:
    """The grammar of grounded answers.

    - `<ref>`, then at least one text token, then `</ref>`; no other tag inside.
    - After `</ref>` always `<box>`, and `<box>` nowhere else.
    - After `<box>` exactly four coordinates x0, y0, x1, y1 with x0 < x1 and y0 < y1, then `</box>`.
    - Coordinates nowhere else.
    - `<seg>` only right after `</box>`; the end of the answer only outside of tags.
    - Made by `knowing` (tokens of a name -> the boxes that stand for it): after a name known there, only those boxes;
      a name without boxes, or named before, is refused. Tokens of `never_first` do not begin an answer.

    >>> tokens = BoxTokens(box=0, box_end=1, ref=2, ref_end=3, seg=4, eos=5, first_coordinate=6, bins=10)
    >>> grammar = BoxGrammar(tokens, vocabulary=20)
    >>> state = grammar.start()
    >>> for token in (2, 18, 3, 0, 9, 13):
    ...     state = grammar.advance(state, token)
    >>> state, grammar.allowed(state).nonzero()[0].tolist()
    (BoxState(place=<Place.X1: 6>, x0=3, y0=7), [10, 11, 12, 13, 14, 15])
    """

    def __init__(self, tokens: BoxTokens, vocabulary: int) -> None:
        t = tokens
        self._boxes: dict[tuple[int, ...], tuple[tuple[int, int, int, int], ...]] = {}
        self._start: Allowed | None = None
        special = (t.box, t.box_end, t.ref, t.ref_end, t.seg, t.eos, *t.never)
        last_coordinate = t.first_coordinate + t.bins - 1
        if t.bins < 2 or not all(0 <= i < vocabulary for i in (*special, t.first_coordinate, last_coordinate)):
            raise InvalidInput(f"grammar tokens {t} do not fit a vocabulary of {vocabulary}")
        text = np.ones(vocabulary, np.bool_)
        text[list(special)] = False
        text[t.first_coordinate : last_coordinate + 1] = False
        self.tokens = tokens
        self.vocabulary = vocabulary
        self._masks = {
            Place.TEXT: _with(text, t.ref, t.eos),
            Place.NAME_START: _with(text),
            Place.NAME: _with(text, t.ref_end),
            Place.NAMED: _with(np.zeros_like(text), t.box),
            Place.FULL: _with(np.zeros_like(text), t.box_end),
            Place.BOXED: _with(text, t.ref, t.eos, t.seg),
        }
        if not text.any():
            raise InvalidInput(f"a vocabulary of {vocabulary} has no text token beside tags and coordinates")

    def knowing(
        self,
        boxes: Mapping[tuple[int, ...], tuple[tuple[int, int, int, int], ...]],
        never_first: Collection[int] = (),
    ) -> BoxGrammar:
        """Return this grammar with boxes by name; a name with no boxes stands for what is not in the image."""
        grounded = copy(self)
        grounded._boxes = dict(boxes)
        grounded._start = self._masks[Place.TEXT].copy()
        grounded._start[list(never_first)] = False
        grounded._start.flags.writeable = False
        return grounded

    def start(self) -> BoxState:
        """Return the state before the first token of an answer."""
        return BoxState(Place.START)

    def allowed(self, state: BoxState) -> Allowed:
        """Return bool [vocabulary], read-only: which tokens may come next."""
        if state.place == Place.START:
            return self._masks[Place.TEXT] if self._start is None else self._start
        if state.place in self._masks:
            return self._masks[state.place]
        mask = np.zeros(self.vocabulary, np.bool_)
        low, high = self._bin_range(state)
        at = len(state.bins)
        if known := [box[at] for box in self._boxes.get(state.name, ()) if box[:at] == state.bins]:
            mask[[self.tokens.first_coordinate + b for b in known if low <= b < high]] = True
        if not mask.any():
            mask[self.tokens.first_coordinate + low : self.tokens.first_coordinate + high] = True
        mask.flags.writeable = False
        return mask

    def advance(self, state: BoxState, token: int) -> BoxState:
        """Return the state after `token`. Raises InvalidInput if `token` is not allowed in `state`."""
        if not (0 <= token < self.vocabulary and self.allowed(state)[token]):
            raise InvalidInput(f"token {token} may not follow at {state.place.name}")
        after = self._advance(state, token)
        if not self._boxes:
            return after
        name, bins = state.name, state.bins
        if state.place in (Place.NAME_START, Place.NAME) and token != self.tokens.ref_end:
            name = (*name, token)
        elif Place.X0 <= state.place <= Place.Y1:
            bins = (*bins, token - self.tokens.first_coordinate)
        elif state.place not in (Place.NAME, Place.NAMED):
            name, bins = (), ()
        named = state.named | {name} if state.place == Place.NAMED else state.named
        return BoxState(after.place, after.x0, after.y0, name, bins, named)

    def refuses(self, state: BoxState) -> bool:
        """Return True just after a name that stands for nothing in the image, or that was given before."""
        if state.place != Place.NAMED or state.name not in self._boxes:
            return False
        return not self._boxes[state.name] or state.name in state.named

    def _advance(self, state: BoxState, token: int) -> BoxState:
        t, bin_ = self.tokens, token - self.tokens.first_coordinate
        match state.place:
            case Place.NAME_START:
                return BoxState(Place.NAME)
            case Place.NAME:
                return BoxState(Place.NAMED) if token == t.ref_end else state
            case Place.NAMED:
                return BoxState(Place.X0)
            case Place.X0:
                return BoxState(Place.Y0, x0=bin_)
            case Place.Y0:
                return BoxState(Place.X1, x0=state.x0, y0=bin_)
            case Place.X1:
                return BoxState(Place.Y1, x0=state.x0, y0=state.y0)
            case Place.Y1:
                return BoxState(Place.FULL)
            case Place.FULL:
                return BoxState(Place.BOXED)
            case _:  # START, TEXT, BOXED
                return BoxState(Place.NAME_START if token == t.ref else Place.TEXT)

    def _bin_range(self, state: BoxState) -> tuple[int, int]:
        """Return (first, one past the last) bin that may come next; the first corner leaves room for the other."""
        bins = self.tokens.bins
        match state.place:
            case Place.X1:
                return state.x0 + 1, bins
            case Place.Y1:
                return state.y0 + 1, bins
            case _:
                return 0, bins - 1


class FreeGrammar:
    """No constraint: any token may follow any other. The state is 0 before the first token, then 1.

    not_first: a token that no answer begins with, if there is one (an end: answers are not empty).

    >>> FreeGrammar(3).allowed(0).tolist()
    [True, True, True]
    >>> FreeGrammar(3, not_first=2).allowed(0).tolist()
    [True, True, False]
    """

    def __init__(self, vocabulary: int, not_first: int | None = None) -> None:
        self._all = _with(np.ones(vocabulary, np.bool_))
        first = np.ones(vocabulary, np.bool_)
        if not_first is not None:
            first[not_first] = False
        self._first = _with(first)

    def start(self) -> int:
        """Return the state before the first token of an answer."""
        return 0

    def allowed(self, state: int) -> Allowed:
        """Return bool [vocabulary], read-only: all True, but for what may not come first."""
        return self._all if state else self._first

    def advance(self, state: int, token: int) -> int:
        """Return 1. Raises InvalidInput if `token` is outside the vocabulary."""
        if not 0 <= token < len(self._all):
            raise InvalidInput(f"token {token} is outside the vocabulary of {len(self._all)}")
        return 1

    def refuses(self, state: int) -> bool:
        """Return False."""
        return False


def _with(mask: Allowed, *tokens: int) -> Allowed:
    """Return a read-only copy of `mask` that allows `tokens` too."""
    result = mask.copy()
    result[list(tokens)] = True
    result.flags.writeable = False
    return result
