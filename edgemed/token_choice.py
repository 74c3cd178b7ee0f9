"""What a decoder says of the token that comes next, and choosing one of those that a grammar allows.

`NextToken` is all that the decoding loop knows of it. `Logits` is made of a row of logits from the decoder's graph;
`kernel_head` makes one of a hidden state, without logits. Does not cover grammars, or which positions are asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgemed.triton_kernels.masked_argmax import masked_argmax

Mask = npt.NDArray[np.bool_]
"""bool [vocabulary]: the tokens that a grammar allows."""


class Numbers:
    """The tokens that write a number (a coordinate's bin, a digit) and the number of each.

    ids: int64 [n]; values: float64 [n]; both in the order they were given in.
    """

    def __init__(self, numbers: Mapping[int, float]) -> None:
        self.ids = np.array(list(numbers), np.int64)
        self.values = np.array(list(numbers.values()), np.float64)
        self._known = frozenset(numbers)

    def __contains__(self, token: int) -> bool:
        return token in self._known

    def are_all_of(self, allowed: Mask) -> bool:
        """Return whether a number is all that may come next."""
        return bool(np.count_nonzero(allowed[self.ids]) == np.count_nonzero(allowed))


NO_NUMBERS = Numbers({})
"""Of a model that writes none."""


class NextToken(Protocol):
    """How likely each token is after one position."""

    def pick(self, allowed: Mask, temperature: float, rng: np.random.Generator) -> tuple[int, float]:
        """Return (token, log of its probability among the allowed ones): at temperature 0 the best, else a draw.

        The log is that of temperature 1, whatever the draw's. Raises InvalidInput where a logit is not finite.
        """

    def spread(self, allowed: Mask, numbers: Numbers) -> float:
        """Return the standard deviation of the number that comes next, if it is one of the allowed ones."""

    def kept(self) -> NextToken:
        """Return the same, to be asked after later calls of the decoder too."""


class Logits:
    """`NextToken` of logits, float32 [vocabulary]; -inf where a position was asked about some tokens alone."""

    def __init__(self, logits: npt.NDArray[Any]) -> None:
        self._logits = logits

    def pick(self, allowed: Mask, temperature: float, rng: np.random.Generator) -> tuple[int, float]:
        """Return what `NextToken.pick` says."""
        best = masked_argmax(self._logits[None], allowed[None])
        token = int(best.index[0])
        if temperature > 0:
            choices = np.flatnonzero(allowed)
            with np.errstate(over="ignore"):  # a tiny temperature: exp(-inf) = 0 is right
                weights = np.exp((self._logits[choices].astype(np.float64) - float(best.peak[0])) / temperature)
            reached = np.cumsum(weights)
            drawn = np.searchsorted(reached, rng.random() * reached[-1], side="right")
            token = int(choices[min(drawn, len(choices) - 1)])
        return token, float(self._logits[token]) - float(best.log_sum_exp[0])

    def spread(self, allowed: Mask, numbers: Numbers) -> float:
        """Return what `NextToken.spread` says."""
        open_here = allowed[numbers.ids]
        return spread_of(self._logits[numbers.ids][open_here], numbers.values[open_here])

    def kept(self) -> Logits:
        """Return a copy: the decoder's outputs may lie in memory that its next call writes."""
        return Logits(self._logits.copy())


def spread_of(logits: npt.NDArray[Any], values: npt.NDArray[np.float64]) -> float:
    """Return the standard deviation of `values` [n] that are as likely as `logits` [n] say."""
    likely = logits.astype(np.float64)
    weights = np.exp(likely - likely.max())
    weights /= weights.sum()
    return float(np.sqrt(weights @ np.square(values - weights @ values)))
