"""Which nodes of a graph suffer from quantization: each is quantized alone and the outputs are compared.

Covers errors of outputs against full precision, of whole quantized graphs too. Does not cover answers
(`edgemed.evaluation`) or the choice of a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx

from edgemed.calibration.graph_run import GraphRun
from edgemed.calibration.plan import Precision, QuantPlan
from edgemed.calibration.qdq import quantize
from edgemed.calibration.sites import Site, planned
from edgemed.graphs import Feeds, GraphSpec

Outputs = Sequence[Mapping[str, npt.NDArray[np.float32]]]


@dataclass(frozen=True)
class OutputError:
    """One output against the exact one: |error| / |value| (norms) and cosine over all calls, smallest cosine of one."""

    output: str
    relative_error: float
    cosine: float
    smallest: float


@dataclass(frozen=True)
class Sensitivity:
    """What becomes of the outputs if one node alone is quantized."""

    node: str
    operator: str
    precision: Precision
    error: OutputError


def outputs_of(
    model: onnx.ModelProto, spec: GraphSpec, sequences: Sequence[Sequence[Feeds]], *, threads: int | None = None
) -> Outputs:
    """Return the float outputs of every call, as float32."""
    run = GraphRun(model, spec, threads=threads)
    return [
        {name: array.astype(np.float32) for name, array in outputs.items() if array.dtype.kind == "f"}
        for outputs in run.run_all(sequences)
    ]


def errors_of(expected: Outputs, found: Outputs) -> tuple[OutputError, ...]:
    """Return the error of each output."""
    rows = []
    for name in expected[0]:
        pairs = [(a[name].astype(np.float64).ravel(), b[name].ravel()) for a, b in zip(expected, found, strict=True)]
        error = sum(float(((b - a) ** 2).sum()) for a, b in pairs) ** 0.5
        ours, theirs = (sum(float(pair[i] @ pair[i]) for pair in pairs) ** 0.5 for i in (0, 1))
        cosine = _cosine(sum(float(a @ b) for a, b in pairs), ours, theirs)
        each = [_cosine(float(a @ b), float(np.linalg.norm(a)), float(np.linalg.norm(b))) for a, b in pairs]
        rows.append(OutputError(name, error / max(ours, 1e-30), cosine, min(each)))
    return tuple(rows)


def _cosine(product: float, a: float, b: float) -> float:
    """Return the cosine; of what is zero with what is not: 0, of two zeros: 1."""
    return min(product / (a * b), 1.0) if a and b else float(a == b)


def compare(expected: Outputs, found: Outputs) -> OutputError:
    """Return the error of the output that is worst."""
    return max(errors_of(expected, found), key=lambda row: (row.relative_error, -row.cosine))


def sensitivities(
    model: onnx.ModelProto,
    spec: GraphSpec,
    plan: QuantPlan,
    bounds: Mapping[str, float],
    sequences: Sequence[Sequence[Feeds]],
    *,
    products: Mapping[str, npt.NDArray[np.float32]] | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Sensitivity, ...]:
    """Return a row for each node that `plan` quantizes, the worst first.

    bounds, products: as `quantize` takes them. sequences: a few calls are enough; every node takes a session and one
    run of them. progress: (done, in all).
    """
    expected = outputs_of(model, spec, sequences, threads=threads)
    wanted = planned(model, spec.role, plan)
    rows = []
    for done, (site, precision) in enumerate(wanted, 1):
        quantized, _ = quantize(model, spec.role, _alone(plan, spec.role, site, precision), bounds, products)
        error = compare(expected, outputs_of(quantized, spec, sequences, threads=threads))
        rows.append(Sensitivity(site.node, site.operator, precision, error))
        if progress:
            progress(done, len(wanted))
    return tuple(sorted(rows, key=lambda row: -row.error.relative_error))


def _alone(plan: QuantPlan, role: str, site: Site, precision: Precision) -> QuantPlan:
    return replace(plan, precision={}, nodes={role: {site.node: precision}}, excluded={})


def to_markdown(rows: Sequence[Sensitivity]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| node | operator | precision | output | relative error | cosine |",
        "| --- | --- | --- | --- | ---: | ---: |",
    ]
    lines += [
        f"| {r.node} | {r.operator} | {r.precision} | {r.error.output} | {r.error.relative_error:.2e} | "
        f"{r.error.cosine:.6f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"
