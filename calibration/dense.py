"""Matrices in blocks of integers turned back into plain ones, so that a graph can be quantized another way.

Covers onnxruntime's `MatMulNBits`, symmetric. What was lost when the blocks were made stays lost.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgemed.blocks import unpack_rows
from edgemed.errors import InvalidInput


def without_blocks(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of `model` with a float32 MatMul in place of each MatMulNBits; `model` itself where there is none.

    Raises InvalidInput where a block has a zero point of its own, which edgemed does not write.
    """
    if all(node.op_type != "MatMulNBits" for node in model.graph.node):
        return model
    made = onnx.ModelProto()
    made.CopyFrom(model)
    stored = {t.name: t for t in made.graph.initializer}
    dense: dict[str, str] = {}  # blocks -> matrix: a tied one is read twice
    for node in made.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        if len(node.input) > 3 and any(node.input[3:]):
            raise InvalidInput(f"{node.name} has zero points or a bias, which edgemed's own graphs do not have")
        how = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        blocks = node.input[1]
        if blocks not in dense:
            packed, scales = (numpy_helper.to_array(stored[name]) for name in node.input[1:3])
            packed = packed.reshape(how["N"], -1, how["block_size"] * how["bits"] // 8)
            matrix = unpack_rows(packed, scales.reshape(packed.shape[:2]), how["bits"])[:, : how["K"]]
            dense[blocks] = f"{blocks}.dense"
            made.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(matrix.T), dense[blocks]))
        node.CopyFrom(helper.make_node("MatMul", [node.input[0], dense[blocks]], list(node.output), node.name))
    read = {name for node in made.graph.node for name in node.input}
    kept = [t for t in made.graph.initializer if t.name in read]
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)
    return made
