"""The NumPy reference against the loop of its docstring, and the kernel under the interpreter against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgemed.errors import InvalidInput
from edgemed.triton_kernels.box_head import FORMATS, BoxBest, Rows, box_head, run_box_head
from edgemed.triton_kernels.weights import Matrix, pack

Case = tuple[npt.NDArray[np.float16], Matrix, Rows, npt.NDArray[np.bool_]]

# Products are exact in float32 and sums differ in order. Of blocks, the kernel rounds value * scale to float16.
TOLERANCE = {"fp16": 2e-5, "int8": 2e-5, "fp8": 2e-5, "int8_block32": 4e-3}


def case(form: str, positions: int, width: int, vocabulary: int, rows: Rows, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    hidden = rng.normal(0, 1, (positions, width)).astype(np.float16)
    head = pack(rng.normal(0, 2 / math.sqrt(width), (vocabulary, width)).astype(np.float32), form)
    allowed = rng.random((positions, len(rows))) < 0.6
    allowed[:, len(rows) // 2] = True
    return hidden, head, rows, allowed


def check_equal(found: BoxBest, expected: BoxBest, tolerance: float, entries: int) -> None:
    np.testing.assert_array_equal(found.index, expected.index)
    np.testing.assert_allclose(found.peak, expected.peak, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.log_sum_exp, expected.log_sum_exp, rtol=0, atol=tolerance)
    # An offset of up to `entries`, each weight of it wrong by at most exp(tolerance).
    np.testing.assert_allclose(found.expected, expected.expected, rtol=0, atol=entries * tolerance)
    np.testing.assert_allclose(found.spread, expected.spread, rtol=0, atol=entries * tolerance)


@pytest.mark.parametrize("rows", [range(3, 40), np.array([30, 2, 7, 41])], ids=["range", "list"])
def test_reference_equals_the_loop_of_the_docstring(rows: Rows) -> None:
    hidden, head, rows, allowed = case("fp16", 3, 24, 50, rows)
    weights = head.to_float32()
    best = box_head(hidden, head, rows, allowed)
    for p in range(3):
        index, peak, mass, first, second = -1, -math.inf, 0.0, 0.0, 0.0
        for i, t in enumerate(rows):
            if allowed[p, i]:
                logit = float(hidden[p].astype(np.float64) @ weights[t].astype(np.float64))
                if logit > peak:
                    index, peak = int(t), logit
                mass += math.exp(logit)
                first += math.exp(logit) * i
                second += math.exp(logit) * i * i
        assert best.index[p] == index
        assert best.peak[p] == pytest.approx(peak, abs=1e-5)
        assert best.log_sum_exp[p] == pytest.approx(math.log(mass), abs=1e-5)
        assert best.expected[p] == pytest.approx(first / mass, rel=1e-5)
        assert best.spread[p] == pytest.approx(math.sqrt(second / mass - (first / mass) ** 2), rel=1e-4)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("positions", [1, 3, 8])
@pytest.mark.parametrize(
    ("width", "vocabulary", "rows"),
    [(64, 128, range(128)), (517, 203, range(5, 196)), (80, 60, np.array([59, 3, 11, 40, 7, 8, 0, 1, 33, 21]))],
    ids=["round", "odd", "list"],
)
def test_kernel_equals_the_reference(
    interpret: Callable[..., Any], form: str, positions: int, width: int, vocabulary: int, rows: Rows
) -> None:
    arguments = case(form, positions, width, vocabulary, rows, seed=positions)
    check_equal(interpret(run_box_head, *arguments), box_head(*arguments), TOLERANCE[form], len(rows))


@pytest.mark.parametrize("rows", [range(2, 40), np.arange(40)[::-1]], ids=["range", "falling list"])
def test_a_tie_keeps_the_smaller_token(interpret: Callable[..., Any], rows: Rows) -> None:
    head = pack(np.ones((40, 32), np.float32), "fp16")
    hidden, allowed = np.ones((2, 32), np.float16), np.ones((2, len(rows)), np.bool_)
    found, expected = interpret(run_box_head, hidden, head, rows, allowed), box_head(hidden, head, rows, allowed)
    assert found.index.tolist() == expected.index.tolist() == [min(rows)] * 2
    np.testing.assert_allclose(found.spread, expected.spread, rtol=1e-6)


def test_a_narrow_spread_far_from_the_origin_is_kept(interpret: Callable[..., Any]) -> None:
    weights = np.full((1000, 32), -1.0, np.float32)
    weights[[990, 991]] = 1
    arguments = np.ones((1, 32), np.float16), pack(weights, "fp16"), range(1000), np.ones((1, 1000), np.bool_)
    for best in (box_head(*arguments), interpret(run_box_head, *arguments)):
        assert best.expected[0] == pytest.approx(990.5, abs=1e-4)
        assert best.spread[0] == pytest.approx(0.5, abs=1e-4)


def test_masked_rows_count_for_nothing_whatever_they_hold(interpret: Callable[..., Any]) -> None:
    hidden, head, rows, allowed = case("fp16", 2, 64, 70, range(70))
    allowed[:, 17] = False
    head.values[17] = np.nan
    found = interpret(run_box_head, hidden, head, rows, allowed)
    head.values[17] = 0
    check_equal(found, box_head(hidden, head, rows, allowed), TOLERANCE["fp16"], 70)


def test_large_logits_do_not_overflow(interpret: Callable[..., Any]) -> None:
    weights = np.zeros((20, 64), np.float32)
    weights[4] = 60
    hidden = np.full((1, 64), 60, np.float16)
    for sign in (1, -1):
        best = interpret(run_box_head, sign * hidden, pack(weights, "fp16"), range(4, 5), np.ones((1, 1), np.bool_))
        assert best.peak[0] == best.log_sum_exp[0] == sign * 64 * 3600


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(interpret: Callable[..., Any], bad: float) -> None:
    hidden, head, rows, allowed = case("fp16", 2, 64, 70, range(70))
    head.values[35] = bad
    with pytest.raises(InvalidInput, match="not finite"):
        interpret(run_box_head, np.abs(hidden) + np.float16(1), head, rows, allowed)


def test_an_empty_allowed_set_is_refused(interpret: Callable[..., Any]) -> None:
    hidden, head, rows, allowed = case("int8", 3, 64, 40, range(40))
    allowed[1] = False
    with pytest.raises(InvalidInput, match="no token is allowed"):
        box_head(hidden, head, rows, allowed)
    with pytest.raises(InvalidInput, match="no token is allowed"):
        interpret(run_box_head, hidden, head, rows, allowed)


@pytest.mark.parametrize("rows", [range(0), range(0, 8, 2), np.zeros(0, np.int64), np.zeros((2, 2), np.int64)])
def test_rows_that_are_none_are_refused(rows: Rows) -> None:
    with pytest.raises(InvalidInput, match="no rows"):
        box_head(np.zeros((1, 8), np.float16), pack(np.ones((9, 8)), "fp16"), rows, np.ones((1, len(rows)), np.bool_))


@pytest.mark.parametrize("rows", [range(5, 10), np.array([-1, 3])])
def test_rows_outside_the_vocabulary_are_refused(rows: Rows) -> None:
    with pytest.raises(InvalidInput, match="it has 9"):
        box_head(np.zeros((1, 8), np.float16), pack(np.ones((9, 8)), "fp16"), rows, np.ones((1, len(rows)), np.bool_))


def test_more_than_eight_positions_are_refused(interpret: Callable[..., Any]) -> None:
    with pytest.raises(InvalidInput, match="9 positions"):
        interpret(run_box_head, *case("fp16", 9, 64, 40, range(40)))


def test_more_rows_than_the_kernel_joins_are_refused(interpret: Callable[..., Any]) -> None:
    with pytest.raises(InvalidInput, match="more than 16384 rows"):
        interpret(run_box_head, *case("fp16", 1, 1, 16385, range(16385)))


def test_shapes_that_do_not_fit_are_refused(interpret: Callable[..., Any]) -> None:
    hidden, head, rows, allowed = case("fp16", 2, 64, 40, range(40))
    with pytest.raises(InvalidInput, match="go together"):
        interpret(run_box_head, hidden[:, :32], head, rows, allowed)
    with pytest.raises(InvalidInput, match="go together"):
        interpret(run_box_head, hidden, head, rows, allowed[:, :-1])
