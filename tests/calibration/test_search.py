"""Which nodes are left out so that errors that add up as squares stay below what is allowed."""

from __future__ import annotations

import pytest

from edgemed.calibration.plan import QuantPlan
from edgemed.calibration.search import left_out, share_of, with_excluded, with_nodes
from edgemed.calibration.sensitivity import OutputError, Sensitivity


def row(node: str, error: float) -> Sensitivity:
    return Sensitivity(node, "MatMul", "int8", OutputError("features", error, 1 - error**2 / 2, 1 - error**2 / 2))


ROWS = [row("a", 0.03), row("b", 0.04), row("c", 0.001), row("d", 0.2)]
EVEN = dict.fromkeys("abcd", 1.0)


@pytest.mark.parametrize(
    ("allowed", "expected"), [(1.0, []), (0.0501, ["d"]), (0.04, ["d", "b"]), (0.0005, ["d", "b", "a", "c"])]
)
def test_the_worst_go_until_the_rest_is_allowed(allowed: float, expected: list[str]) -> None:
    assert [r.node for r in left_out(ROWS, EVEN, allowed)] == expected


def test_a_node_that_does_most_of_the_work_is_kept_before_cheaper_ones() -> None:
    work = {**EVEN, "b": 100.0}
    assert [r.node for r in left_out(ROWS, work, 0.0401)] == ["d", "a"]


def test_the_share_of_nodes_is_that_of_their_work() -> None:
    assert share_of(["a", "d"], {"a": 1, "b": 2, "d": 1}) == pytest.approx(0.5)


def test_a_node_that_is_left_out_is_excluded_with_its_cost_and_has_no_other_precision() -> None:
    plan = with_nodes(QuantPlan({"decoder": "int4-weights"}), "decoder", ["d", "a"], "int8-weights")
    assert plan.of("decoder", "d") == "int8-weights"
    plan = with_excluded(plan, "decoder", ROWS[3:])
    assert plan.of("decoder", "d") == "fp32"
    assert plan.of("decoder", "a") == "int8-weights"
    assert "features by 0.2" in plan.excluded["decoder"]["d"]
