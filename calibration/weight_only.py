"""Weight-only integers: the constant matrices of a graph's MatMuls become blocks of 8-bit integers with a scale each.

Covers any ONNX graph, symmetric, round to nearest, no calibration data; the result runs on onnxruntime's `MatMulNBits`.
Does not cover activations, 4 bits, or TensorRT, which needs another form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgemed.blocks import pack_rows, unpack_rows
from edgemed.errors import InvalidInput

_FUSED = "com.microsoft"
_BITS = 8


@dataclass(frozen=True)
class WeightPlan:
    """What `quantize_weights` does.

    block: weights that share a scale, along the input dimension; a power of two from 16 on.
    accuracy_level: 4 lets the runtime round activations to 8 bits block by block (fastest); 0 computes in fp32.
    excluded: initializer name -> why it keeps its precision.
    """

    block: int = 32
    accuracy_level: int = 4
    excluded: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.block < 16 or self.block & (self.block - 1):
            raise InvalidInput(f"block is {self.block}; a power of two from 16 on was expected")
        if self.accuracy_level not in range(5):
            raise InvalidInput(f"accuracy_level is {self.accuracy_level}; 0 to 4 was expected")


@dataclass(frozen=True)
class QuantizedWeight:
    """One matrix [inputs, outputs] that was quantized, and |error| / |weight| (Frobenius norms)."""

    name: str
    shape: tuple[int, int]
    relative_error: float


def quantize_weights(
    model: onnx.ModelProto, plan: WeightPlan | None = None
) -> tuple[onnx.ModelProto, tuple[QuantizedWeight, ...]]:
    """Return a copy of `model` with every constant 2-D MatMul weight in 8 bits, and one row for each matrix.

    Raises InvalidInput where `plan.excluded` names something that is not such a weight.
    """
    plan = plan or WeightPlan()
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    stored = {t.name: t for t in graph.initializer}
    matrices = {name for name, t in stored.items() if len(t.dims) == 2}
    nodes = [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in matrices]
    weights = list(dict.fromkeys(n.input[1] for n in nodes))
    if unknown := sorted(set(plan.excluded) - set(weights)):
        raise InvalidInput(f"the plan excludes {', '.join(unknown)}, which are not weights of this graph's MatMuls")
    rows = []
    for name in weights:
        if name not in plan.excluded:
            matrix = numpy_helper.to_array(stored[name]).astype(np.float32).T  # [outputs, inputs]
            packed, scales = pack_rows(matrix, plan.block, _BITS)
            back = unpack_rows(packed, scales, _BITS)[:, : matrix.shape[1]]
            error = float(np.linalg.norm(back - matrix) / max(float(np.linalg.norm(matrix)), 1e-30))
            rows.append(QuantizedWeight(name, (matrix.shape[1], matrix.shape[0]), error))
            graph.initializer.append(numpy_helper.from_array(packed, f"{name}.int8"))
            graph.initializer.append(numpy_helper.from_array(scales, f"{name}.scales"))
    done = {row.name: row.shape for row in rows}
    for node in nodes:
        if node.input[1] in done:
            _to_nbits(node, done[node.input[1]], plan)
    _drop_unused(graph)
    if not any(o.domain == _FUSED for o in result.opset_import):
        result.opset_import.append(helper.make_opsetid(_FUSED, 1))
    return result, tuple(rows)


def _to_nbits(node: onnx.NodeProto, shape: tuple[int, int], plan: WeightPlan) -> None:
    """Turn the MatMul `node` into a MatMulNBits over the stored blocks."""
    name = node.input[1]
    attributes: dict[str, Any] = {
        "K": shape[0], "N": shape[1], "bits": _BITS, "block_size": plan.block, "accuracy_level": plan.accuracy_level,
    }  # fmt: skip
    replacement = helper.make_node(
        "MatMulNBits", [node.input[0], f"{name}.int8", f"{name}.scales"], list(node.output), node.name, domain=_FUSED,
        **attributes,
    )  # fmt: skip
    node.CopyFrom(replacement)


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove initializers that no node reads any more."""
    used = {name for node in graph.node for name in node.input}
    kept = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
