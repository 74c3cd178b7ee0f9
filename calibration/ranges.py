"""How large the values of tensors get inside a graph: one bound for each, from real feeds, values streamed.

Covers symmetric bounds by largest magnitude, percentile and entropy (Kullback-Leibler). Histograms are kept, never the
values. Does not cover scales or graphs (`qdq`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx

from edgemed.calibration.graph_run import GraphRun
from edgemed.errors import InvalidInput, NoInput
from edgemed.graphs import Feeds, GraphSpec

Method = Literal["minmax", "percentile", "entropy"]
Counts = npt.NDArray[np.int64]

BINS = 2048
PERCENTILE = 99.99
LEVELS = 128
"""Magnitudes that symmetric 8-bit integers can have: 0 to 127."""

_STEP = 8  # the entropy is computed for every 8th bound: 241 of them instead of 1,921


class Magnitudes:
    """A histogram of |values| that grows: where a larger value comes, neighbouring bins are merged two by two."""

    def __init__(self) -> None:
        self.largest = 0.0
        self.counts: Counts = np.zeros(BINS, np.int64)
        self._width = 0.0  # of a bin; 0 until a value other than 0 has come
        self._zeros = 0  # that came before it

    def add(self, values: npt.NDArray[Any]) -> None:
        """Count the magnitudes of `values`. Raises InvalidInput where one is not finite."""
        magnitudes = np.abs(values, dtype=np.float32).ravel()
        if not magnitudes.size:
            return
        top = float(magnitudes.max())
        if not np.isfinite(top):
            raise InvalidInput("a value is not finite")
        self.largest = max(self.largest, top)
        if self.largest == 0:
            self._zeros += magnitudes.size
            return
        if self._width == 0:
            self._width = self.largest / BINS
            self.counts[0] = self._zeros
        while self._width * BINS < self.largest:
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([merged, np.zeros(BINS // 2, np.int64)])
            self._width *= 2
        places = np.minimum((magnitudes * np.float32(1 / self._width)).astype(np.int64), BINS - 1)
        self.counts += np.bincount(places, minlength=BINS)

    def bound(self, method: Method, percentile: float = PERCENTILE) -> float:
        """Return the largest magnitude that is to be told apart; what is larger is clipped. 0: all values are 0."""
        if method not in get_args(Method):
            raise InvalidInput(f"method is {method!r}; one of {', '.join(get_args(Method))} was expected")
        if method == "minmax" or self.largest == 0:
            return self.largest
        if method == "percentile":
            total = np.cumsum(self.counts)
            wanted = total[-1] * percentile / 100
            place = int(np.searchsorted(total, wanted))
            before = int(total[place - 1]) if place else 0
            inside = (wanted - before) / max(int(self.counts[place]), 1)
            return min(float((place + inside) * self._width), self.largest)
        return min(best_bins(self.counts) * self._width, self.largest)


def best_bins(counts: Counts) -> int:
    """Return how many of the first bins are best kept: rounding them to 128 levels loses the least information.

    The measure is the Kullback-Leibler divergence of the clipped distribution from the rounded one.
    Source: Migacz, "8-bit inference with TensorRT", GTC 2017.
    """
    used = int(np.flatnonzero(counts)[-1]) + 1
    best, least = used, np.inf
    for bins in range(LEVELS, used + 1, _STEP):
        divergence = _divergence(counts, bins)
        if divergence <= least:  # where two are equal, less is clipped
            best, least = bins, divergence
    return best


def _divergence(counts: Counts, bins: int) -> float:
    kept = counts[:bins].astype(np.float64)
    clipped = kept.copy()
    clipped[-1] += counts[bins:].sum()
    starts = np.arange(LEVELS) * bins // LEVELS
    filled = kept > 0
    sums, places = np.add.reduceat(kept, starts), np.add.reduceat(filled.astype(np.float64), starts)
    level = np.repeat(sums / np.maximum(places, 1), np.diff(np.append(starts, bins)))
    rounded = np.where(filled, level, 0.0)
    if clipped[-1] and not rounded[-1]:
        rounded[-1] = 1e-9 * kept.sum()  # what is clipped falls where nothing was: as bad as can be, but finite
    seen = clipped > 0
    p, q = clipped[seen] / clipped.sum(), rounded[seen] / max(rounded.sum(), 1e-30)
    return float((p * np.log(p / q)).sum())


def measure(
    model: onnx.ModelProto,
    spec: GraphSpec,
    tensors: Collection[str],
    sequences: Sequence[Sequence[Feeds]],
    *,
    threads: int | None = None,
) -> dict[str, Magnitudes]:
    """Return the histogram of each of `tensors` (inputs or inner tensors of the graph) over all calls.

    Raises NoInput where there are no calls, InvalidInput naming a tensor with a value that is not finite.
    """
    if not any(sequences):
        raise NoInput(f"graph {spec.role} has no feeds to calibrate on; ask questions that lead to it")
    inputs = {t.name for t in spec.inputs}
    inner = [name for name in dict.fromkeys(tensors) if name not in inputs]
    found = {name: Magnitudes() for name in dict.fromkeys(tensors)}
    run = GraphRun(model, spec, extra=inner, threads=threads)
    fed = [feeds for sequence in sequences for feeds in sequence]
    for feeds, outputs in zip(fed, run.run_all(sequences), strict=True):
        for name, magnitudes in found.items():
            try:
                magnitudes.add(feeds[name] if name in feeds else outputs[name])
            except InvalidInput as error:
                raise InvalidInput(f"graph {spec.role}, tensor {name}: {error}") from None
    return found


def bounds(found: Mapping[str, Magnitudes], method: Method) -> dict[str, float]:
    """Return the bound of each tensor by one method."""
    return {name: magnitudes.bound(method) for name, magnitudes in found.items()}
