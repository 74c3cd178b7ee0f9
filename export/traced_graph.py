"""A torch module as an ONNX graph without its weights in memory: traced hollow, weights written afterwards one by one.

Covers modules whose graph torch can trace: encoders, projectors, mask decoders. While a module is traced every weight
is a single zero spread over its shape. Does not cover decoders, whose cache torch cannot express (`decoder_graph`), or
what the graph computes.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx import helper
from torch import Tensor, nn

from edgemed.export.decoder_graph import to_numpy
from edgemed.export.graph_writer import GraphWriter
from edgemed.export.mixed_precision import PRODUCTS
from edgemed.graphs import GraphSpec, TensorSpec

_LINEAR = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
"""Attributes of the Gemm that is x @ weight.T + bias."""


def build_traced_graph(
    module: nn.Module, tensors: Mapping[str, Any], spec: GraphSpec, writer: GraphWriter | None = None
) -> onnx.ModelProto:
    """Return the ONNX model of a module whose forward takes the spec's inputs in order and gives its outputs.

    module: may be on the meta device; it loses its weights and cannot be used afterwards. tensors: its weights by their
    names in `state_dict()`, each read once, when it is written.
    """
    writer = writer or GraphWriter()
    _fill(traced(module, spec), module, tensors, writer)
    return writer.model(spec)


def traced(module: nn.Module, spec: GraphSpec) -> onnx.ModelProto:
    """Return the graph of `module` whose weights are inputs of the graph, under the names they have in the module."""
    sizes = {name: min(r.max, r.opt + 1) for name, r in spec.dims.items()}  # above 1, so that no dim is taken as fixed
    inputs = tuple(_sample(t, sizes) for t in spec.inputs)
    dims = {name: torch.export.Dim(name, min=r.min, max=r.max) for name, r in spec.dims.items()}
    dynamic = tuple({i: dims[d] for i, d in enumerate(t.shape) if isinstance(d, str)} or None for t in spec.inputs)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells at length that torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        program = torch.onnx.export(
            _hollow(module).eval(), inputs, dynamo=True, verbose=False, optimize=False,
            input_names=[t.name for t in spec.inputs], output_names=[t.name for t in spec.outputs],
            dynamic_shapes=dynamic if any(dynamic) else None,
        )  # fmt: skip
        assert program is not None
        model = program.model
        # As inputs the weights are unknown to the optimizer: it would merge them, all being zero, or fold them.
        for name in [n for n in model.graph.initializers if n in module.state_dict()]:
            value = model.graph.initializers.pop(name)
            value.const_value = None
            model.graph.inputs.append(value)
        onnxscript.optimizer.optimize(model, input_size_limit=1 << 20, output_size_limit=1 << 20)
    proto: onnx.ModelProto = ir.serde.serialize_model(model)
    return proto


def _hollow(module: nn.Module) -> nn.Module:
    """Return the module with every weight of its `state_dict` replaced by one zero seen under the weight's shape."""
    for name, value in module.state_dict().items():
        owner = module.get_submodule(name.rpartition(".")[0])
        zeros = torch.zeros((), dtype=value.dtype).expand(value.shape)
        is_parameter = isinstance(getattr(owner, name.rpartition(".")[2]), nn.Parameter)
        setattr(owner, name.rpartition(".")[2], nn.Parameter(zeros, requires_grad=False) if is_parameter else zeros)
    return module


def _fill(proto: onnx.ModelProto, module: nn.Module, tensors: Mapping[str, Any], writer: GraphWriter) -> None:
    """Add the nodes of `proto` to the writer, with the weights."""
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    readers = {name: (lambda n=name: to_numpy(tensors[n])) for name in shapes}
    turned = {  # output of a Transpose -> the weight [outputs, inputs] it turns
        node.output[0]: node.input[0]
        for node in proto.graph.node
        if node.op_type == "Transpose" and len(shapes.get(node.input[0], ())) == 2
    }
    for tensor in proto.graph.initializer:
        writer.initializers[tensor.name] = tensor
    for node in proto.graph.node:  # names and traces of the machine that exported it do not belong in a bundle
        if node.output[0] in turned and all(
            other.op_type == "MatMul" and other.input[0] != node.output[0]
            for other in proto.graph.node
            if node.output[0] in other.input
        ):
            continue
        del node.metadata_props[:]
        if node.op_type == "MatMul" and node.input[1] in turned:
            name = turned[node.input[1]]
            rows, columns = shapes[name]
            writer.matmul(node.input[0], name, rows, columns, readers[name], node.output[0])
            continue
        if writer.matrices.packed and _is_linear(node, shapes):  # torch's layer, given rows of a matrix
            x, name, bias = node.input
            rows, columns = shapes[name]
            product = writer.matmul(x, name, rows, columns, readers[name], f"{node.output[0]}.product")
            added = writer.weight(bias, rows, readers[bias])
            writer.node("Add", [product, added], node.output[0])
            continue
        store = writer.factor if node.op_type in PRODUCTS else writer.weight
        for i, name in enumerate(node.input):
            if name in shapes:
                size = int(np.prod(shapes[name], dtype=np.int64))
                node.input[i] = store(name, size, readers[name])
        writer.nodes.append(node)


def _is_linear(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether the node is x @ weight.T + bias, both of them weights."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | given == _LINEAR
    return node.op_type == "Gemm" and plain and len(node.input) == 3 and set(node.input[1:]) <= set(shapes)


def _sample(tensor: TensorSpec, sizes: Mapping[str, int]) -> Tensor:
    shape = [sizes[d] if isinstance(d, str) else d for d in tensor.shape]
    return torch.zeros(*shape, dtype=getattr(torch, tensor.dtype))
