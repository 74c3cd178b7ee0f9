"""The NumPy reference and the kernel under the interpreter against the loop of the docstring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgemed.errors import InvalidInput
from edgemed.triton_kernels.accept_draft import Accepted, accept_draft, run_accept_draft


def loop(draft: list[int], best: list[int]) -> Accepted:
    accepted = 0
    while accepted < len(draft) and draft[accepted] == best[accepted]:
        accepted += 1
    return Accepted(accepted, best[accepted])


CASES = [
    ([4, 5, 6], [4, 5, 6, 7]),
    ([4, 5, 6], [4, 9, 6, 7]),
    ([4, 5, 6], [9, 5, 6, 7]),
    ([4, 5, 6], [4, 5, 9, 7]),
    ([4], [4, 5]),
    ([4], [5, 4]),
    ([0, 0], [0, 0, 0]),
    (list(range(32)), list(range(33))),
    (list(range(31)), [*range(30), 99, 5]),
]


@pytest.mark.parametrize(("draft", "best"), CASES)
def test_reference_and_kernel_equal_the_loop(interpret: Callable[..., Any], draft: list[int], best: list[int]) -> None:
    arrays = np.array(draft, np.int32), np.array(best, np.int32)
    assert accept_draft(*arrays) == interpret(run_accept_draft, *arrays) == loop(draft, best)


@pytest.mark.parametrize(("draft", "best"), [([], [1]), ([1, 2], [1, 2]), ([1], [1, 2, 3])])
def test_lengths_that_do_not_fit_are_refused(draft: list[int], best: list[int]) -> None:
    with pytest.raises(InvalidInput, match=r"\[n \+ 1\]"):
        accept_draft(np.array(draft, np.int32), np.array(best, np.int32))


def test_kernel_refuses_a_draft_that_is_too_long(interpret: Callable[..., Any]) -> None:
    with pytest.raises(InvalidInput, match="33 tokens"):
        interpret(run_accept_draft, np.zeros(33, np.int32), np.zeros(34, np.int32))
