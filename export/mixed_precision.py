"""A float32 graph with its products in float16: the form in which an engine that is built strongly typed is fast.

Covers matrix products and convolutions; everything between them, norms and softmax first of all, stays float32, and so
do the graph's inputs and outputs. Does not cover decoders (`portable_decoder` writes the type of each value itself) or
whether the result is good enough: a product beyond 65504 is infinite, so compare before it is used.

No weight is read or written: a Cast stands behind it, which onnxruntime and TensorRT-RTX work out once.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"})
"""Operators that are computed in float16."""

_HALF = TensorProto.FLOAT16


def in_mixed_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a graph whose products are computed in float16; one that is already stays as it is.

    Not in bfloat16: convolutions have it from opset 22 on only.

    Names of inputs, outputs and weights stay, and so do references to weight files.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:]
    lowered: set[str] = set()
    half = {n.output[0] for n in model.graph.node if any(a.name == "to" and a.i == _HALF for a in n.attribute)}
    for node in model.graph.node:
        if node.op_type not in PRODUCTS or node.domain or node.input[0] in half:
            made.graph.node.append(node)
            continue
        for name in node.input:
            if name and name not in lowered:
                made.graph.node.append(_cast(name, f"{name}.fp16", _HALF))
                lowered.add(name)
        product = made.graph.node.add()
        product.CopyFrom(node)
        product.input[:] = [name and f"{name}.fp16" for name in node.input]
        product.output[:] = [f"{node.output[0]}.product"]
        made.graph.node.append(_cast(product.output[0], node.output[0], TensorProto.FLOAT))
    return made


def _cast(x: str, output: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [x], [output], name=f"{output}.cast", to=kind)
