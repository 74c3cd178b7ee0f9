"""The NumPy reference against the loop of its docstring, and the kernel under the interpreter against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgemed.errors import InvalidInput
from edgemed.triton_kernels.masked_argmax import FORMATS, masked_argmax, run_masked_argmax
from edgemed.triton_kernels.weights import pack


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


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("positions", [1, 3, 8])
@pytest.mark.parametrize(("width", "vocabulary"), [(64, 256), (301, 203)], ids=["round", "odd"])
def test_kernel_equals_the_reference(
    interpret: Callable[..., Any], form: str, positions: int, width: int, vocabulary: int
) -> None:
    rng = np.random.default_rng(positions)
    hidden = rng.normal(0, 1, (positions, width)).astype(np.float16)
    head = pack(rng.normal(0, 0.2, (vocabulary, width)).astype(np.float32), form)
    allowed = rng.random((positions, vocabulary)) < 0.3
    allowed[:, vocabulary // 2] = True
    expected = masked_argmax(hidden.astype(np.float32) @ head.to_float32().T, allowed)
    found = interpret(run_masked_argmax, hidden, head, allowed)
    np.testing.assert_array_equal(found.index, expected.index)
    # Products are exact in float32; only the order of the sums differs.
    np.testing.assert_allclose(found.peak, expected.peak, rtol=0, atol=2e-5)
    np.testing.assert_allclose(found.log_sum_exp, expected.log_sum_exp, rtol=0, atol=2e-5)


def test_kernel_refuses_more_rows_than_it_can_join(interpret: Callable[..., Any]) -> None:
    rows = 64 * 4096 + 1
    with pytest.raises(InvalidInput, match="more than 262144 rows"):
        interpret(
            run_masked_argmax, np.ones((1, 1), np.float16), pack(np.ones((rows, 1)), "fp16"), np.ones((1, rows)) > 0
        )


def test_kernel_keeps_the_smaller_token_of_a_tie(interpret: Callable[..., Any]) -> None:
    allowed = np.ones((1, 300), np.bool_)
    allowed[0, :130] = False
    head = pack(np.ones((300, 32), np.float32), "int8")
    assert interpret(run_masked_argmax, np.ones((1, 32), np.float16), head, allowed).index[0] == 130


def test_kernel_refuses_an_empty_allowed_set(interpret: Callable[..., Any]) -> None:
    head = pack(np.ones((40, 32), np.float32), "fp16")
    allowed = np.array([[True] * 40, [False] * 40])
    with pytest.raises(InvalidInput, match="no token is allowed"):
        interpret(run_masked_argmax, np.ones((2, 32), np.float16), head, allowed)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_kernel_refuses_logits_that_are_not_finite(interpret: Callable[..., Any], bad: float) -> None:
    weights = np.ones((200, 32), np.float32)
    head = pack(weights, "fp16")
    head.values[77] = bad
    hidden, allowed = np.ones((1, 32), np.float16), np.ones((1, 200), np.bool_)
    with pytest.raises(InvalidInput, match="not finite"):
        interpret(run_masked_argmax, hidden, head, allowed)
    allowed[0, 77] = False
    assert interpret(run_masked_argmax, hidden, head, allowed).index[0] == 0


def test_kernel_refuses_a_format_it_does_not_have(interpret: Callable[..., Any]) -> None:
    head = pack(np.ones((40, 32), np.float32), "int8_block32")
    with pytest.raises(InvalidInput, match="go together"):
        interpret(run_masked_argmax, np.ones((1, 32), np.float16), head, np.ones((1, 40), np.bool_))
