"""Grids and the check of arguments."""

from __future__ import annotations

import pytest

from edgemed.errors import InvalidInput
from edgemed.triton_kernels.box_head import variants
from edgemed.triton_kernels.variants import Grid

BOX_HEAD = variants()[0]


@pytest.mark.parametrize(
    ("grid", "programs"), [(Grid(), 1), (Grid("rows", 16), 63), (Grid("rows", 8), 125), (Grid("rows"), 1000)]
)
def test_a_grid_covers_its_argument(grid: Grid, programs: int) -> None:
    assert grid.programs({"rows": 1000}) == programs


def test_arguments_in_order_and_divisible_are_taken() -> None:
    BOX_HEAD.check(dict.fromkeys(BOX_HEAD.arguments, 32))


def test_arguments_in_another_order_are_refused() -> None:
    with pytest.raises(InvalidInput, match="were expected"):
        BOX_HEAD.check(dict.fromkeys(reversed(BOX_HEAD.arguments), 32))


def test_a_width_that_16_byte_reads_cannot_take_is_refused() -> None:
    with pytest.raises(InvalidInput, match="width is 33; a multiple of 16"):
        BOX_HEAD.check({**dict.fromkeys(BOX_HEAD.arguments, 32), "width": 33})
