"""COCO run lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from edgemed.errors import InvalidInput
from edgemed.report.rle import from_rle, to_rle


def test_hand_computed_mask_runs_down_the_columns() -> None:
    mask = np.array(
        [
            [1, 0, 0, 1],
            [1, 1, 0, 0],
            [0, 1, 0, 1],
        ],
        bool,
    )
    # columns: 110 011 000 101 -> inside first, so a zero leads
    assert to_rle(mask) == {"size": [3, 4], "counts": [0, 2, 2, 2, 3, 1, 1, 1]}


@pytest.mark.parametrize(("value", "counts"), [(False, [6]), (True, [0, 6])])
def test_uniform_mask_is_one_run(value: bool, counts: list[int]) -> None:
    assert to_rle(np.full((2, 3), value))["counts"] == counts


@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=17)))
def test_decoding_gives_the_mask_back(mask: np.ndarray) -> None:
    rle = to_rle(mask)
    assert np.array_equal(from_rle(rle), mask)
    assert sum(rle["counts"]) == mask.size
    assert all(count > 0 for count in rle["counts"][1:])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_encoding_gives_the_counts_back(counts: list[int]) -> None:
    rle = {"size": [sum(counts), 1], "counts": counts}
    assert to_rle(from_rle(rle)) == rle


@pytest.mark.parametrize("counts", [[5], [7], [], [-1, 7]])
def test_counts_that_do_not_fill_the_size_are_refused(counts: list[int]) -> None:
    with pytest.raises(InvalidInput, match="run lengths"):
        from_rle({"size": [2, 3], "counts": counts})


def test_mask_of_another_type_is_refused() -> None:
    with pytest.raises(InvalidInput, match="uint8"):
        to_rle(np.zeros((2, 2), np.uint8))
