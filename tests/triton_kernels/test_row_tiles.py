"""Masks as bits."""

from __future__ import annotations

import numpy as np
import pytest

from edgemed.errors import InvalidInput
from edgemed.triton_kernels.row_tiles import pack_mask


@pytest.mark.parametrize("entries", [1, 31, 32, 33, 100])
def test_bit_i_of_the_words_is_entry_i(entries: int) -> None:
    allowed = np.random.default_rng(entries).random((3, entries)) < 0.5
    allowed[:, -1] = True
    words = pack_mask(allowed)
    assert words.shape == (3, -(-entries // 32))
    assert words.dtype == np.int32
    unpacked = words[:, np.arange(entries) // 32] >> (np.arange(entries) % 32) & 1
    np.testing.assert_array_equal(unpacked != 0, allowed)


def test_a_position_that_allows_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no token is allowed"):
        pack_mask(np.array([[True, False], [False, False]]))
