"""The LM head of a decoder's graph as a matrix, for the kernels that read it beside an engine.

Covers every form in which edgemed writes or quantizes it: plain, in blocks of integers, behind Q/DQ pairs. Reads the
weights of the head alone. Does not cover the kernels' formats (`triton_kernels.weights`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from edgemed.blocks import unpack_rows
from edgemed.errors import BundleError
from edgemed.triton_kernels.weights import Matrix, pack

_FORMATS = {"int8": "int8", "uint8": "int8", "int4": "int8", "float8_e4m3fn": "fp8"}
"""Type in which a graph stores its head -> format in which kernels read it; fp16 for all others. Quantization may have
left the head as it was: kernels are not to round what the gates kept."""

_PASSES_ON = ("Cast", "Identity", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Gather", "Reshape")
"""Operators between the hidden states and the product, whose first input is what they pass on."""

Read = Callable[[str], npt.NDArray[Any]]
"""Name of a stored tensor -> its value."""


def packed_head(graph: Path) -> Matrix:
    """Return the head of a decoder's graph in the format that belongs to how the graph stores it.

    Raises BundleError as `head_matrix`.
    """
    matrix, stored = _read_head(graph)
    return pack(matrix, _FORMATS.get(stored, "fp16"))


def head_matrix(graph: Path) -> npt.NDArray[np.float32]:
    """Return float32 [vocabulary, width], with which the graph multiplies its output `hidden` to get `logits`.

    Raises BundleError where the graph computes its logits in another way.
    """
    return _read_head(graph)[0]


def _read_head(graph: Path) -> tuple[npt.NDArray[np.float32], str]:
    """Return (the matrix, the type in which it is stored)."""
    model = onnx.load(graph, load_external_data=False)
    made = {output: node for node in model.graph.node for output in node.output}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    product = made.get("logits")
    while product is not None and product.op_type in ("Cast", "Identity"):
        product = made.get(product.input[0])
    if product is None or product.op_type not in ("MatMul", "MatMulNBits"):
        raise _unknown(graph, "logits do not come from a product with a matrix")
    if _source(product.input[0], made) != _source("hidden", made):
        raise _unknown(graph, "what is multiplied is not the output `hidden`")

    types: list[str] = []  # of what was read, the values before their scales

    def read(name: str) -> npt.NDArray[Any]:
        tensor = stored[name]
        if uses_external_data(tensor):
            load_external_data_for_tensor(tensor, str(graph.parent))
        array = np.asarray(numpy_helper.to_array(tensor))
        types.append(array.dtype.name)
        return array

    if product.op_type == "MatMul":
        matrix = np.ascontiguousarray(_weight(product.input[1], made, read, graph).T, np.float32)
        return matrix, types[0]
    how = {a.name: helper.get_attribute_value(a) for a in product.attribute}
    if len(product.input) > 3 and any(product.input[3:]):
        raise _unknown(graph, "its blocks have zero points")
    blocks = -(-how["K"] // how["block_size"])
    packed = read(product.input[1]).reshape(how["N"], blocks, -1)
    scales = read(product.input[2]).reshape(how["N"], blocks).astype(np.float32)
    return np.ascontiguousarray(unpack_rows(packed, scales, how["bits"])[:, : how["K"]], np.float32), types[0]


def _source(name: str, made: dict[str, onnx.NodeProto]) -> str:
    """Return the tensor that is passed on as `name`."""
    while name in made and made[name].op_type in _PASSES_ON:
        name = made[name].input[0]
    return name


def _weight(name: str, made: dict[str, onnx.NodeProto], read: Read, graph: Path) -> npt.NDArray[Any]:
    """Return the value of a weight, through what turns its stored form into numbers."""
    if name not in made:
        return np.asarray(read(name))
    node = made[name]
    if node.op_type in ("Cast", "Identity", "Reshape"):
        return _weight(node.input[0], made, read, graph)
    if node.op_type == "Transpose":
        how = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        return _weight(node.input[0], made, read, graph).transpose(how.get("perm"))
    if node.op_type != "DequantizeLinear":
        raise _unknown(graph, f"its matrix goes through {node.op_type}")
    how = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    values = read(node.input[0]).astype(np.float32)
    scales = read(node.input[1]).astype(np.float32)
    zero = read(node.input[2]).astype(np.float32) if len(node.input) > 2 and node.input[2] else np.zeros_like(scales)
    axis, block = how.get("axis", 1) % values.ndim, how.get("block_size", 0)
    if block:
        scales, zero = (np.repeat(array, block, axis)[tuple(map(slice, values.shape))] for array in (scales, zero))
    elif scales.ndim == 1:
        shape = [1] * values.ndim
        shape[axis] = -1
        scales, zero = scales.reshape(shape), zero.reshape(shape)
    return np.asarray((values - zero) * scales)


def _unknown(graph: Path, why: str) -> BundleError:
    return BundleError(f"{graph.name} has no head that kernels could read: {why}. Export the checkpoint again")
