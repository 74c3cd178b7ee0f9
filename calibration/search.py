"""Which nodes keep their precision so that a graph stays close enough to full precision, and which those nodes are.

Each node is quantized alone and judged by its outputs (`sensitivity`); errors of different nodes add up as squares, so
the cheapest choice leaves out those with the largest square for the work they save. Covers one graph at a time.
Does not cover whole answers (`gates`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from edgemed.calibration.plan import Precision, QuantPlan
from edgemed.calibration.sensitivity import Sensitivity

ROUNDS = 4
"""Times that more nodes are left out before the search gives up."""
MOST = 0.7
"""Share of a graph's products that may be left out; beyond it the graph had better stay as it is."""


def left_out(rows: Sequence[Sensitivity], work: Mapping[str, float], allowed: float) -> list[Sensitivity]:
    """Return the nodes that must keep their precision for the relative error to stay below `allowed`, worst first.

    work: node -> products it computes. Those that bring the largest squared error for their work go first.
    """
    by_cost = sorted(rows, key=lambda row: row.error.relative_error**2 / max(work.get(row.node, 1.0), 1.0))
    total, kept = 0.0, 0
    for row in by_cost:
        total += row.error.relative_error**2
        if total > allowed**2:
            break
        kept += 1
    return sorted(by_cost[kept:], key=lambda row: -row.error.relative_error)


def share_of(nodes: Sequence[str], work: Mapping[str, float]) -> float:
    """Return the share of all products that these nodes compute."""
    return sum(work.get(node, 0.0) for node in nodes) / max(sum(work.values()), 1e-30)


def with_excluded(plan: QuantPlan, role: str, rows: Sequence[Sensitivity]) -> QuantPlan:
    """Return the plan that leaves these nodes out, each with what it would cost as its reason."""
    reasons = {
        row.node: f"alone in {row.precision} it changes {row.error.output} by {row.error.relative_error:.2g}"
        for row in rows
    }
    excluded = {**plan.excluded, role: {**plan.excluded.get(role, {}), **reasons}}
    nodes = {r: {n: p for n, p in found.items() if n not in reasons or r != role} for r, found in plan.nodes.items()}
    return replace(plan, nodes={r: found for r, found in nodes.items() if found}, excluded=excluded)


def with_nodes(plan: QuantPlan, role: str, nodes: Sequence[str], precision: Precision) -> QuantPlan:
    """Return the plan that gives these nodes another precision."""
    return replace(plan, nodes={**plan.nodes, role: {**plan.nodes.get(role, {}), **dict.fromkeys(nodes, precision)}})
