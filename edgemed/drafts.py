"""Guesses at what an answer goes on with, to be checked by the decoder several tokens at a time.

Covers phrases that came before (in the answer, the prompt, or a list that a family brings). What a guess says never
changes an answer, only how many calls it takes: see `decoding`. Pure Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

Guess = tuple[int, ...]


class Drafter(Protocol):
    """Proposes tokens. Knows a family's answers; never decides."""

    def propose(self, ids: Sequence[int], state: Any, guesses: Mapping[int, Guess]) -> Sequence[int]:
        """Return tokens that may follow `ids`, the best guess; () where there is none.

        state: the grammar's after `ids`. guesses: index in `ids` -> the four bins that the decoder's box head guessed
        where that token went in, as far as they are known.
        """


class PhraseDrafts:
    """What followed the last tokens when they came before: longest match first, the latest place first.

    phrases: token sequences known beforehand. longest: tokens of context compared. most: tokens proposed at a time.

    >>> drafts = PhraseDrafts([(5, 6, 7, 8)])
    >>> drafts.propose((1, 5, 6)), drafts.propose((1, 2, 3, 1, 2))
    ((7, 8), (3, 1, 2))
    """

    def __init__(self, phrases: Iterable[Sequence[int]], longest: int = 4, most: int = 12) -> None:
        self._phrases = [tuple(phrase) for phrase in phrases]
        self._longest = longest
        self._most = most
        self._places: dict[Guess, tuple[int, int]] = {}  # tokens of context -> (phrase, where it goes on)
        for number, phrase in enumerate(self._phrases):
            for end in range(1, len(phrase)):
                for start in range(max(0, end - longest), end):
                    self._places.setdefault(phrase[start:end], (number, end))

    def propose(self, ids: Sequence[int], state: Any = None, guesses: Mapping[int, Guess] | None = None) -> Guess:
        """Return what followed; see `Drafter`."""
        known = tuple(ids)
        for size in range(min(self._longest, len(known)), 0, -1):
            context = known[-size:]
            if size > 1 and (at := _last(known, context)) is not None:
                return known[at : at + self._most]
            if context in self._places:
                number, end = self._places[context]
                return self._phrases[number][end : end + self._most]
        return ()


def _last(ids: Guess, context: Guess) -> int | None:
    """Return where `ids` goes on after the latest earlier place of `context`, or None."""
    size = len(context)
    for at in range(len(ids) - size - 1, -1, -1):
        if ids[at : at + size] == context:
            return at + size
    return None
