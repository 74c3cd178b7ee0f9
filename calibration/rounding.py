"""Rounding weights so that outputs, not weights, stay close: each column's error is made good by the columns after it.

Covers integers with given scales, and the sums over real activations that it needs. Source: Frantar et al., "GPTQ:
accurate post-training quantization for generative pre-trained transformers", ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgemed.calibration.graph_run import GraphRun
from edgemed.errors import NoInput
from edgemed.graphs import Feeds, GraphSpec

Floats = npt.NDArray[np.float32]

_DAMPING = 0.01  # of the mean square, added to every square: directions that no slice showed keep their weights
_COLUMNS = 128  # rounded before what they lost reaches the columns beyond them


def measure_products(
    model: onnx.ModelProto,
    spec: GraphSpec,
    tensors: Mapping[str, int],
    sequences: Sequence[Sequence[Feeds]],
    *,
    threads: int | None = None,
    same_length: bool = False,
) -> dict[str, Floats]:
    """Return, for each of `tensors`, the sum of x xT over all places and calls: [inputs, inputs].

    tensors: name -> the axis of the inputs (`qdq.products_wanted`, `weight_only.products_wanted`). same_length: scale
    every x to the same length first. A language model needs it: its first token's x can be 50 times as long as all
    others (squared: 2,300 times, SmolLM2-135M, layer 28), and would be all that counts. Raises NoInput where there are
    no calls.
    """
    if not any(sequences):
        raise NoInput(f"graph {spec.role} has no feeds to calibrate on; ask questions that lead to it")
    fed = {t.name for t in spec.inputs}
    sums: dict[str, Floats] = {}
    run = GraphRun(model, spec, extra=[name for name in tensors if name not in fed], threads=threads)
    flat = [feeds for sequence in sequences for feeds in sequence]
    for feeds, outputs in zip(flat, run.run_all(sequences), strict=True):
        for name, axis in tensors.items():
            rows: npt.NDArray[Any] = np.moveaxis(feeds[name] if name in feeds else outputs[name], axis, -1)
            rows = rows.reshape(-1, rows.shape[-1]).astype(np.float32)
            if same_length:
                rows = rows / np.sqrt(np.square(rows).mean(axis=1, keepdims=True) + np.float32(1e-20))
            sums[name] = sums.get(name, np.float32(0)) + rows.T @ rows
    return sums


def rounded(
    weights: Floats,
    scales: Floats,
    products: Floats,
    lowest: float,
    highest: float,
    *,
    damping: float = _DAMPING,
    by_size: bool = False,
) -> Floats:
    """Return whole numbers [outputs, inputs] in lowest..highest whose products with `scales` stand for `weights`.

    scales: [outputs, inputs], that of each weight. products: of the inputs, as `measure_products` gives them.
    damping: how much each input counts by itself, as a part of the mean square: more suits inputs of another kind.
    by_size: the inputs with the largest squares go first, while all others can still make their loss good. Suits 4
    bits; in 8 bits, where little is lost, it made nano's vision encoder worse (same text 0.98 -> 0.88 of answers).
    """
    order = np.argsort(-np.diag(products), kind="stable") if by_size else np.arange(len(products))
    exact = _damped(products, damping)[np.ix_(order, order)]
    inverse = np.linalg.cholesky(np.linalg.inv(exact)).T.astype(np.float32)  # upper triangle
    # One input after the other: half the time where each one's weights lie side by side.
    left, steps = (part.T[order].astype(np.float32, order="C") for part in (weights, scales))  # [inputs, outputs]
    values = np.empty_like(left)
    for start in range(0, len(left), _COLUMNS):
        end = min(start + _COLUMNS, len(left))
        lost = np.empty((end - start, left.shape[1]), np.float32)
        for i in range(start, end):
            values[i] = np.rint(left[i] / steps[i]).clip(lowest, highest)
            lost[i - start] = (left[i] - values[i] * steps[i]) / inverse[i, i]
            left[i + 1 : end] -= np.outer(inverse[i, i + 1 : end], lost[i - start])
        left[end:] -= inverse[start:end, end:].T @ lost
    back = np.empty_like(values)
    back[order] = values
    return np.ascontiguousarray(back.T)


def _damped(products: Floats, damping: float) -> npt.NDArray[np.float64]:
    """Return products with a part of their mean square added to each square."""
    exact = products.astype(np.float64)
    mean = float(np.diag(exact).mean()) or 1.0
    exact[np.diag_indices_from(exact)] += damping * mean
    return exact
