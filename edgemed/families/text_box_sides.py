"""How sure the sides of a box are that was written in digits.

From the ids of an answer, their probabilities and spreads to one number each with both, and the four of a box. Does not
cover what is a box (`medrega_text`) or scan pixels (`medrega_view`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgemed.families import Written


@dataclass(frozen=True)
class WrittenNumber:
    """A number in an answer, the probability of its digits together, and its standard deviation or None.

    A digit counts by its place, and digits as if one did not depend on the other.
    """

    value: int
    probability: float
    spread: float | None


def digits_of(texts: Sequence[bytes]) -> dict[int, float]:
    """Return token id -> digit for the tokens that are one digit. texts: of each token, in UTF-8.

    >>> digits_of([b"", b"7", b"12", b"a", b"0"])
    {1: 7.0, 4: 0.0}
    """
    return {i: float(text) for i, text in enumerate(texts) if len(text) == 1 and text.isdigit()}


def written_numbers(written: Written, texts: Sequence[bytes], first: int, last: int) -> list[WrittenNumber]:
    """Return the numbers between the tokens `first` and `last` (the tags of a box), in order.

    There are none where nothing is known of the tokens' probabilities.
    """
    if len(written.log_probs) != len(written.ids):
        return []
    found: list[WrittenNumber] = []
    run: list[int] = []
    inside = False
    for at, token in enumerate((*written.ids, last)):
        text = texts[token] if token < len(texts) else b""
        if inside and text.isdigit():
            run.append(at)
            continue
        if run:
            found.append(_number(run, written, texts))
            run = []
        inside = token == first or (inside and token != last)
    return found


def sides_of(
    box: Sequence[int], numbers: Sequence[WrittenNumber], start: int
) -> tuple[Sequence[WrittenNumber] | None, int]:
    """Return (the four numbers of `box`, where to look for the next box), searched from `start` on; None: not there."""
    for at in range(start, len(numbers) - 3):
        if [n.value for n in numbers[at : at + 4]] == list(box):
            return numbers[at : at + 4], at + 4
    return None, start


def _number(places: Sequence[int], written: Written, texts: Sequence[bytes]) -> WrittenNumber:
    pieces = [texts[written.ids[at]] for at in places]
    value = int(b"".join(pieces))
    probability = math.exp(min(math.fsum(written.log_probs[at] for at in places), 0.0))
    variance: float | None = 0.0
    below = sum(map(len, pieces))
    for at, piece in zip(places, pieces, strict=True):
        below -= len(piece)
        spread = written.spreads[at] if at < len(written.spreads) else None
        variance = None if variance is None or spread is None else variance + (spread * 10**below) ** 2
    return WrittenNumber(value, probability, None if variance is None else math.sqrt(variance))
