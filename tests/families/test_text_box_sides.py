"""Numbers that were written in digits, token by token."""

from __future__ import annotations

import math

import pytest

from edgemed.families import Written
from edgemed.families.text_box_sides import WrittenNumber, sides_of, written_numbers

TEXTS = [b"", b"", *(str(d).encode() for d in range(10)), b"[[", b", ", b"]]", b"12", b" cm"]
FIRST, LAST, OPEN, COMMA, CLOSE, TWELVE, CM = 0, 1, 12, 13, 14, 15, 16


def digit(value: int) -> int:
    return value + 2


def answer(*ids: int, spread: float | None = 0.5) -> Written:
    spreads = [spread if 2 <= token < 12 else None for token in ids]
    return Written(ids, [math.log(0.5)] * len(ids), spreads=spreads)


def test_a_digit_counts_by_its_place() -> None:
    (number,) = written_numbers(answer(FIRST, OPEN, digit(3), digit(0), digit(7), CLOSE, LAST), TEXTS, FIRST, LAST)
    assert (number.value, number.probability) == (307, pytest.approx(0.125))
    assert number.spread == pytest.approx(math.sqrt(50**2 + 5**2 + 0.5**2))


def test_numbers_outside_of_a_box_are_text() -> None:
    said = answer(digit(3), CM, FIRST, digit(4), COMMA, digit(5), LAST, digit(6), FIRST, digit(7))
    assert [n.value for n in written_numbers(said, TEXTS, FIRST, LAST)] == [4, 5, 7]


def test_a_token_of_several_digits_has_a_probability_and_no_spread() -> None:
    (number,) = written_numbers(answer(FIRST, TWELVE, digit(3), LAST), TEXTS, FIRST, LAST)
    assert number == WrittenNumber(123, pytest.approx(0.25), None)


def test_without_probabilities_there_are_no_numbers() -> None:
    assert written_numbers(Written((FIRST, digit(1), LAST), ()), TEXTS, FIRST, LAST) == []


def test_the_numbers_of_a_box_are_found_in_order() -> None:
    numbers = [WrittenNumber(v, 1 / (i + 1), None) for i, v in enumerate((9, 1, 2, 3, 4, 1, 2, 3, 4))]
    first, after = sides_of((1, 2, 3, 4), numbers, 0)
    second, end = sides_of((1, 2, 3, 4), numbers, after)
    assert (first, second) == (numbers[1:5], numbers[5:9])
    assert sides_of((1, 2, 3, 4), numbers, end) == (None, end)
