"""Weight-only integers: the constant matrices of a graph's MatMuls become blocks of 8- or 4-bit integers.

Covers any ONNX graph, symmetric, one scale a block; the result runs on onnxruntime's `MatMulNBits`. 8 bits are rounded
to nearest and need no data. 4 bits can be rounded so that outputs on real activations stay close. Does not cover
activations, or TensorRT, which needs another form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from edgemed.blocks import BITS, pack_rows, unpack_rows
from edgemed.calibration.rounding import rounded
from edgemed.errors import InvalidInput

Floats = npt.NDArray[np.float32]

_FUSED = "com.microsoft"
_DAMPING = 0.2  # SmolLM2-135M, calibrated on text of another kind: 0.05 and 0.2 lose the same
_PARTS = tuple(1 - 0.05 * i for i in range(-1, 7))  # of the scale that just holds the largest weight


@dataclass(frozen=True)
class WeightPlan:
    """What `quantize_weights` does.

    bits: 8 or 4, of every weight; bits_of: initializer name -> its own. 4 bits suit a decoder's layers; its head is
    better kept at 8. block: weights that share a scale, along the input dimension; a power of two from 16 on.
    accuracy_level: 4 lets the runtime round activations to 8 bits block by block (fastest); 0 computes in fp32.
    excluded: initializer name -> why it keeps its precision.
    """

    bits: int = 8
    block: int = 32
    accuracy_level: int = 4
    bits_of: Mapping[str, int] = field(default_factory=dict)
    excluded: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.block < 16 or self.block & (self.block - 1):
            raise InvalidInput(f"block is {self.block}; a power of two from 16 on was expected")
        for bits in (self.bits, *self.bits_of.values()):
            if bits not in BITS:
                raise InvalidInput(f"bits is {bits}; 4 or 8 was expected")
        if self.accuracy_level not in range(5):
            raise InvalidInput(f"accuracy_level is {self.accuracy_level}; 0 to 4 was expected")

    def bits_for(self, name: str) -> int:
        """Return the bits of a weight, 0 where it keeps its precision."""
        return 0 if name in self.excluded else self.bits_of.get(name, self.bits)


@dataclass(frozen=True)
class QuantizedWeight:
    """One matrix [inputs, outputs] that was quantized, and |error| / |weight| (Frobenius norms)."""

    name: str
    shape: tuple[int, int]
    relative_error: float
    bits: int


def products_wanted(model: onnx.ModelProto, plan: WeightPlan) -> dict[str, int]:
    """Return the activations whose products `quantize_weights` can use, as `rounding.measure_products` takes them."""
    nodes, _ = _products(model.graph, plan)
    return {n.input[0]: -1 for n in nodes if plan.bits_for(n.input[1]) == 4}


def quantize_weights(
    model: onnx.ModelProto, plan: WeightPlan | None = None, products: Mapping[str, Floats] | None = None
) -> tuple[onnx.ModelProto, tuple[QuantizedWeight, ...]]:
    """Return a copy of `model` with every constant 2-D MatMul weight in integers, and one row for each matrix.

    products: activation -> what `measure_products` gives of it (same_length): 4-bit weights that meet it are rounded
    for their outputs. Where two MatMuls share a weight, the sum of what they meet counts.

    Raises InvalidInput where `plan` names something that is not such a weight, or where products have another size.
    """
    plan = plan or WeightPlan()
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    nodes, stored = _products(graph, plan)
    met: dict[str, list[Floats]] = {}
    for node in nodes:
        if products and node.input[0] in products:
            met.setdefault(node.input[1], []).append(products[node.input[0]])
    rows = []
    for name, tensor in stored.items():
        bits = plan.bits_for(name)
        if not bits:
            continue
        matrix = numpy_helper.to_array(tensor).astype(np.float32).T  # [outputs, inputs]
        if bits == 4 and name in met:
            packed, scales = _packed_for_outputs(name, matrix, plan.block, np.sum(met[name], axis=0))
        else:
            packed, scales = pack_rows(matrix, plan.block, bits)
        back = unpack_rows(packed, scales, bits)[:, : matrix.shape[1]]
        error = float(np.linalg.norm(back - matrix) / max(float(np.linalg.norm(matrix)), 1e-30))
        rows.append(QuantizedWeight(name, (matrix.shape[1], matrix.shape[0]), error, bits))
        graph.initializer.append(numpy_helper.from_array(packed, f"{name}.int{bits}"))
        graph.initializer.append(numpy_helper.from_array(scales, f"{name}.scales"))
    done = {row.name: row for row in rows}
    for node in nodes:
        if node.input[1] in done:
            _to_nbits(node, done[node.input[1]], plan)
    _drop_unused(graph)
    if not any(o.domain == _FUSED for o in result.opset_import):
        result.opset_import.append(helper.make_opsetid(_FUSED, 1))
    return result, tuple(rows)


def _products(graph: onnx.GraphProto, plan: WeightPlan) -> tuple[list[onnx.NodeProto], dict[str, onnx.TensorProto]]:
    """Return (MatMuls with a constant 2-D weight, their weights in order), and raise what `quantize_weights` raises."""
    matrices = {t.name: t for t in graph.initializer if len(t.dims) == 2}
    nodes = [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in matrices]
    weights = {n.input[1]: matrices[n.input[1]] for n in nodes}
    if unknown := sorted({*plan.excluded, *plan.bits_of} - set(weights)):
        raise InvalidInput(f"the plan names {', '.join(unknown)}, which are not weights of this graph's MatMuls")
    return nodes, weights


def _packed_for_outputs(
    name: str, matrix: Floats, block: int, products: Floats
) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Return what `pack_rows` does for 4 bits, with scales and values chosen for `products` of the inputs."""
    outputs, inputs = matrix.shape
    if products.shape != (inputs, inputs):
        raise InvalidInput(f"products of {list(products.shape)} for weight {name}; [{inputs}, {inputs}] was expected")
    blocks = -(-inputs // block)
    padded = np.zeros((outputs, blocks * block), np.float32)
    padded[:, :inputs] = matrix
    importance = np.zeros(blocks * block, np.float32)
    importance[:inputs] = np.diag(products)
    scales = _scales(padded.reshape(outputs, blocks, block), importance.reshape(blocks, block))
    wide = np.repeat(scales, block, axis=1)[:, :inputs]
    values = np.zeros_like(padded)
    values[:, :inputs] = rounded(matrix, wide, products, -8, 7, damping=_DAMPING, by_size=True)
    stored = (values + 8).astype(np.uint8).reshape(outputs, blocks, block)
    return np.asarray(stored[..., 0::2] | stored[..., 1::2] << 4, np.uint8), scales


def _scales(grouped: Floats, importance: Floats) -> Floats:
    """Return [outputs, blocks]: of several scales for each block, the one with the least error, squared and weighted.

    A smaller scale cuts the largest weight off and is finer for all others. grouped: [outputs, blocks, block].
    """
    largest, smallest = grouped.max(axis=2), grouped.min(axis=2)
    whole = np.where(largest > -smallest, largest, smallest) / np.float32(-8)
    whole = np.where(whole != 0, whole, 1).astype(np.float32)
    best, least = whole, np.full(whole.shape, np.inf, np.float32)
    for part in _PARTS:
        scales = whole * np.float32(part)
        values = np.rint(grouped / scales[..., None]).clip(-8, 7)
        error = ((values * scales[..., None] - grouped) ** 2 * importance).sum(axis=2)
        best, least = np.where(error < least, scales, best), np.minimum(error, least)
    return best


def _to_nbits(node: onnx.NodeProto, row: QuantizedWeight, plan: WeightPlan) -> None:
    """Turn the MatMul `node` into a MatMulNBits over the stored blocks."""
    attributes: dict[str, Any] = {
        "K": row.shape[0], "N": row.shape[1], "bits": row.bits, "block_size": plan.block,
        "accuracy_level": plan.accuracy_level,
    }  # fmt: skip
    inputs = [node.input[0], f"{row.name}.int{row.bits}", f"{row.name}.scales"]
    node.CopyFrom(helper.make_node("MatMulNBits", inputs, list(node.output), node.name, domain=_FUSED, **attributes))


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove initializers that no node reads any more."""
    used = {name for node in graph.node for name in node.input}
    kept = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
