"""The NumPy reference against the pseudo-code of its own docstring, one token at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgemed.errors import InvalidInput
from edgemed.triton_kernels.masked_argmax import masked_argmax


@pytest.mark.parametrize("shape", [(1, 64), (3, 1003), (8, 1)])
def test_reference_equals_the_loop_of_the_docstring(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 8, shape).astype(np.float32).round(1)
    allowed = rng.random(shape) < 0.4
    allowed[:, shape[1] // 2] = True
    best = masked_argmax(logits, allowed)
    for p in range(shape[0]):
        index, peak, mass = -1, -math.inf, 0.0
        for t in range(shape[1]):
            if allowed[p, t]:
                if logits[p, t] > peak:
                    index, peak = t, float(logits[p, t])
                mass += math.exp(logits[p, t])
        assert (best.index[p], best.peak[p]) == (index, np.float32(peak))
        assert best.log_sum_exp[p] == pytest.approx(math.log(mass), abs=1e-5)


def test_a_tie_keeps_the_smaller_token() -> None:
    best = masked_argmax(np.zeros((1, 5), np.float32), np.array([[False, True, True, False, True]]))
    assert best.index[0] == 1
    assert best.log_sum_exp[0] == pytest.approx(math.log(3))


def test_large_logits_do_not_overflow() -> None:
    best = masked_argmax(np.array([[1e30, -1e30, 3.0]], np.float32), np.ones((1, 3), np.bool_))
    assert (best.index[0], best.log_sum_exp[0]) == (0, np.float32(1e30))


def test_an_empty_allowed_set_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no token is allowed"):
        masked_argmax(np.zeros((2, 4), np.float32), np.array([[True] * 4, [False] * 4]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = np.zeros((1, 4), np.float32)
    logits[0, 2] = bad
    with pytest.raises(InvalidInput, match="not finite"):
        masked_argmax(logits, np.ones((1, 4), np.bool_))
    assert masked_argmax(logits, np.array([[True, True, False, True]])).index[0] == 0
