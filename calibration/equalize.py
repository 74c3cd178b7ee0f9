"""Scales moved from the channels of an activation into the weights behind it: the same graph, easier to quantize.

One scale for a whole activation is wasted where a few channels are much larger than the others. Dividing each channel
by a factor of its own and multiplying the weight's rows by it changes nothing in exact arithmetic. Source: Xiao et
al., "SmoothQuant", ICML 2023; the exponent is not fixed but chosen for each product by the error on real rows, as Lin
et al., "AWQ", MLSys 2024, do for weights.

Covers matrices and 1 x 1 convolutions that get INT8. A factor goes into the LayerNormalization before where that has no
other reader, else into a Mul. Does not cover FP8, which has an exponent for each value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgemed.calibration.graph_run import GraphRun
from edgemed.calibration.plan import QuantPlan
from edgemed.calibration.sites import Site, behind_casts, name_of, planned
from edgemed.graphs import Feeds, GraphSpec

Floats = npt.NDArray[np.float32]

EXPONENTS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Tried for each activation: factor = (largest of the channel) ^ e / (largest of the weight row) ^ (1 - e); 0: none."""
_ROWS = 512  # of an activation over all calls that the exponent is chosen on
_LEVELS = 127.0


@dataclass(eq=False)
class Rows:
    """Some rows [n, channels] of an activation, and the largest magnitude of each channel over all of them."""

    sample: Floats
    largest: Floats


def sample_rows(
    model: onnx.ModelProto,
    spec: GraphSpec,
    tensors: Mapping[str, int],
    sequences: Sequence[Sequence[Feeds]],
    *,
    threads: int | None = None,
) -> dict[str, Rows]:
    """Return rows of each of `tensors` (name -> axis of its channels), evenly from every call."""
    fed = {t.name for t in spec.inputs}
    flat = [feeds for sequence in sequences for feeds in sequence]
    each = max(1, _ROWS // max(1, len(flat)))
    found: dict[str, list[Floats]] = {name: [] for name in tensors}
    largest: dict[str, Floats] = {}
    run = GraphRun(model, spec, extra=[name for name in tensors if name not in fed], threads=threads)
    for feeds, outputs in zip(flat, run.run_all(sequences), strict=True):
        for name, axis in tensors.items():
            rows: npt.NDArray[Any] = np.moveaxis(feeds[name] if name in feeds else outputs[name], axis, -1)
            rows = rows.reshape(-1, rows.shape[-1]).astype(np.float32)
            if len(rows):
                most = np.abs(rows).max(axis=0)
                largest[name] = np.maximum(largest.get(name, most), most)
                found[name].append(rows[:: max(1, len(rows) // each)][:each])
    return {name: Rows(np.concatenate(parts), largest[name]) for name, parts in found.items() if parts}


def to_equalize(model: onnx.ModelProto, role: str, plan: QuantPlan) -> dict[str, int]:
    """Return the activations whose channels can be scaled, each with their axis; those of the main graph alone."""
    return {group[0].activation: _axis(group[0]) for group in _groups(model, role, plan)}


def equalized(model: onnx.ModelProto, role: str, plan: QuantPlan, rows: Mapping[str, Rows]) -> onnx.ModelProto:
    """Return a copy of `model` with the channels of every activation that gains by it scaled; names of nodes stay."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    stored = {t.name: t for t in made.graph.initializer}
    for group in _groups(made, role, plan):
        if group[0].activation not in rows:
            continue
        weights = {site.weight: _matrix(stored[site.weight], site) for site in group}
        factors = best_factors(rows[group[0].activation], np.concatenate(list(weights.values()), axis=1))
        if factors is None:
            continue
        for site in {site.weight: site for site in group}.values():
            tensor = stored[site.weight]
            scaled = weights[site.weight] * factors[:, None]
            tensor.CopyFrom(numpy_helper.from_array(_stored(scaled, tensor, site), site.weight))
        _divide(made, stored, group, factors)
    return made


def best_factors(rows: Rows, weight: Floats) -> Floats | None:
    """Return the factor of each channel, or None where plain INT8 loses least. weight: [channels, outputs]."""
    exact = rows.sample @ weight
    behind = np.maximum(np.abs(weight).max(axis=1), 1e-8)
    channels = np.maximum(rows.largest, 1e-5 * max(float(rows.largest.max()), 1e-8))
    best, least = None, np.inf
    for exponent in EXPONENTS:
        factors = (channels**exponent / behind ** (1 - exponent)).astype(np.float32) if exponent else None
        if factors is not None:
            factors = (factors / np.exp(np.log(factors).mean())).astype(np.float32)
        error = float(((_rounded_product(rows, weight, factors) - exact) ** 2).sum())
        if error < least * (1 if factors is None else 0.95):  # another node for the last few percent is not worth it
            best, least = factors, error
    return best


def _rounded_product(rows: Rows, weight: Floats, factors: Floats | None) -> Floats:
    divisor = np.float32(1) if factors is None else factors
    scale = max(float((rows.largest / divisor).max()), 1e-30) / _LEVELS
    x = np.rint(rows.sample / divisor / scale).clip(-_LEVELS, _LEVELS) * np.float32(scale)
    w = weight if factors is None else weight * factors[:, None]
    scales = np.maximum(np.abs(w).max(axis=0), 1e-30) / _LEVELS
    return np.asarray(x @ (np.rint(w / scales) * scales), np.float32)


def _groups(model: onnx.ModelProto, role: str, plan: QuantPlan) -> list[list[Site]]:
    """Return the sites that read the same activation, all of them INT8, of weights that no other node reads."""
    casts = {n.output[0]: n for n in model.graph.node if n.op_type == "Cast"}
    readers: dict[str, int] = {}
    for node in model.graph.node:
        for name in () if node.op_type == "Cast" else node.input:
            weight = behind_casts(name, casts)
            readers[weight] = readers.get(weight, 0) + 1
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    main = {name_of(node) for node in model.graph.node}
    found: dict[str, list[Site]] = {}
    for site, precision in planned(model, role, plan):
        matrix = site.operator != "Conv" or site.inputs == shapes[site.weight][1]
        alone = readers.get(site.weight) == 1
        if precision == "int8" and site.node in main and matrix and alone:
            found.setdefault(site.activation, []).append(site)
    return list(found.values())


def _axis(site: Site) -> int:
    return 1 if site.operator == "Conv" else -1


def _matrix(tensor: onnx.TensorProto, site: Site) -> Floats:
    """Return a weight as [inputs, outputs]."""
    array = numpy_helper.to_array(tensor).astype(np.float32)
    array = array.reshape(array.shape[:2]) if site.operator == "Conv" else array
    return np.asarray(array.T if site.axis == 0 else array, np.float32)


def _stored(matrix: Floats, tensor: onnx.TensorProto, site: Site) -> npt.NDArray[Any]:
    """Return [inputs, outputs] in the layout and the type of the weight's tensor."""
    array = matrix.T if site.axis == 0 else matrix
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.ascontiguousarray(array.reshape(tuple(tensor.dims)).astype(kind))


def _divide(
    model: onnx.ModelProto, stored: Mapping[str, onnx.TensorProto], group: Sequence[Site], factors: Floats
) -> None:
    """Divide the channels of the group's activation by `factors`, in the norm before it or by a Mul."""
    graph, activation = model.graph, group[0].activation
    nodes = [node for node in graph.node if name_of(node) in {site.node for site in group}]
    norm = _norm_before(graph, stored, activation, len(nodes))
    if norm is not None:
        for name in norm.input[1:3]:
            tensor = stored[name]
            values = numpy_helper.to_array(tensor).astype(np.float32) / factors
            kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.CopyFrom(numpy_helper.from_array(values.astype(kind), name))
        return
    output = f"{activation}.equalized"
    inverse = (1 / factors).astype(helper.tensor_dtype_to_np_dtype(group[0].dtype))
    shaped = inverse.reshape(1, -1, 1, 1) if _axis(group[0]) == 1 else inverse
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(shaped), f"{output}.factors"))
    at = min(i for i, node in enumerate(graph.node) if node in nodes)
    for node in nodes:
        node.input[0] = output
    graph.node.insert(at, helper.make_node("Mul", [activation, f"{output}.factors"], [output], output))


def _norm_before(
    graph: onnx.GraphProto, stored: Mapping[str, onnx.TensorProto], activation: str, readers: int
) -> onnx.NodeProto | None:
    """Return the LayerNormalization that makes the activation, for these readers alone, by a Cast at most."""
    outputs = {o.name for o in graph.output}
    for _ in range(2):
        made = next((node for node in graph.node if activation in node.output), None)
        if made is None or activation in outputs or sum(activation in n.input for n in graph.node) != readers:
            return None
        if made.op_type == "LayerNormalization":
            own = [sum(name in n.input for n in graph.node) == 1 and name in stored for name in made.input[1:3]]
            return made if len(own) == 2 and all(own) else None
        if made.op_type != "Cast":
            return None
        activation, readers = made.input[0], 1
    return None
