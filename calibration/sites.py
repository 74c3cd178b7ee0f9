"""The places of a graph that can be quantized: products with a constant weight, in the main graph and in branches (If).

Covers finding them, why a default plan leaves some out, and a form of the graph without branches, whose inner tensors
can be measured. Does not cover changing a graph (`qdq`, `weight_only`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from edgemed.calibration.plan import Precision, QuantPlan
from edgemed.errors import InvalidInput

MIN_INPUTS = 16
"""Where an output value sums up fewer products, the pairs cost more than small weights save."""


@dataclass(frozen=True)
class Site:
    """A node with a constant weight, or an attention product: what could be quantized.

    activation, weight: tensor names; the weight is "" where both inputs are computed, and what a Cast reads where it
    is stored in fewer bytes than it is computed in. dtype: what it is computed in, an ONNX type. axis: of the weight's
    output channels. inputs: products that an output value sums up. reason: why a plan leaves it out, or "". matrix:
    whether the weight is a constant of a form that can be quantized. outputs: channels.
    """

    node: str
    operator: str
    activation: str
    weight: str
    axis: int
    inputs: int
    dtype: int = TensorProto.FLOAT
    reason: str = ""
    matrix: bool = True
    outputs: int = 0


_BY_NAME = {
    "router": "a router: a small change sends a token to another expert",
    "hypernetwork": "a hypernetwork: what it makes is multiplied by every pixel of a mask",
    "iou_head": "it scores masks and is a thousandth of the work",
}
"""Part of a weight's name -> why it stays."""


def name_of(node: onnx.NodeProto) -> str:
    """Return what a plan calls a node: its name, or its first output's."""
    return str(node.name or node.output[0])


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the graph and every graph inside it (branches of If), outer ones first."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from graphs_of(inner)


def sites(model: onnx.ModelProto) -> tuple[Site, ...]:
    """Return every MatMul, Gemm and Conv in order, with why a default plan leaves some out."""
    stored = {t.name: t for t in model.graph.initializer}
    every = [node for graph in graphs_of(model.graph) for node in graph.node]
    casts = {n.output[0]: n for n in every if n.op_type == "Cast"}
    nodes = [n for n in every if n.op_type in ("MatMul", "Gemm", "Conv") and n.domain in ("", "ai.onnx")]
    convolutions = [name_of(n) for n in nodes if n.op_type == "Conv"]
    found = []
    for node in nodes:
        constant = stored.get(behind_casts(node.input[1], casts))
        if constant is None:
            reason = "both inputs are computed: attention, kept for accuracy"
            found.append(Site(name_of(node), node.op_type, node.input[0], "", 0, 0, reason=reason, matrix=False))
            continue
        if behind_casts(node.input[0], casts) in stored:
            continue  # a constant, which any runtime computes once
        shape = tuple(constant.dims) or (1,)
        axis = _output_axis(node, len(shape))
        inputs = int(np.prod(shape)) // shape[axis] if shape[axis] else 0
        cannot = _cannot(node, constant)
        reason = cannot or _reason(node, constant, inputs, convolutions)
        cast = casts.get(node.input[1])
        dtype = _attribute(cast, "to", 0) if cast else constant.data_type
        where = name_of(node), node.op_type, node.input[0], constant.name, axis, inputs
        found.append(Site(*where, dtype, reason, matrix=not cannot, outputs=shape[axis]))
    return tuple(found)


def behind_casts(tensor: str, casts: Mapping[str, onnx.NodeProto]) -> str:
    """Return what a tensor is before all Casts. casts: output -> Cast node."""
    while tensor in casts:
        tensor = casts[tensor].input[0]
    return tensor


def _output_axis(node: onnx.NodeProto, rank: int) -> int:
    if node.op_type == "Conv" or (node.op_type == "Gemm" and _attribute(node, "transB", 0)):
        return 0
    return rank - 1


def _cannot(node: onnx.NodeProto, weight: TensorProto) -> str:
    """Return why a node cannot be quantized, or ""."""
    if weight.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
        return "its weight is no matrix of floats"
    if len(weight.dims) != 2 and node.op_type != "Conv":
        return f"its weight has {len(weight.dims)} dimensions, 2 can be quantized"
    if node.op_type == "Gemm" and (_attribute(node, "transA", 0) or _attribute(node, "alpha", 1.0) != 1.0):
        return "a Gemm that transposes or scales its input"
    return ""


def _reason(node: onnx.NodeProto, weight: TensorProto, inputs: int, convolutions: list[str]) -> str:
    """Return why a node had better not be quantized, or ""."""
    for part, reason in _BY_NAME.items():
        if part in weight.name or part in node.name:
            return reason
    if node.op_type == "Conv" and name_of(node) == convolutions[0]:
        return "the first convolution: it reads the picture"
    if node.op_type == "Conv" and name_of(node) == convolutions[-1]:
        return "the last convolution: its output is what other graphs read"
    if inputs < MIN_INPUTS or _attribute(node, "group", 1) > 1:
        return f"{inputs} products an output value: nothing to gain"
    return ""


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def default_plan(models: Mapping[str, onnx.ModelProto], precision: Mapping[str, Precision], **how: Any) -> QuantPlan:
    """Return a plan for the graphs of `precision` that leaves out what `sites` gives a reason for.

    how: `method` and `block` of the plan.
    """
    excluded: dict[str, dict[str, str]] = {}
    for role, wanted in precision.items():
        reasons = {site.node: site.reason or _not_in(wanted, site) for site in sites(models[role])}
        excluded[role] = {node: reason for node, reason in reasons.items() if reason and wanted != "fp32"}
    return QuantPlan(dict(precision), excluded={role: found for role, found in excluded.items() if found}, **how)


def _not_in(precision: Precision, site: Site) -> str:
    """Return why a node cannot have a precision that the rest of its graph gets, or ""."""
    if precision == "int4-weights" and site.operator == "Conv":
        return "a convolution: TensorRT takes blocks of 4 bits in matrices only"
    if precision == "int4-weights" and site.outputs % 2:
        return f"{site.outputs} outputs: TensorRT takes rows of 4-bit weights in whole bytes only"
    if precision == "int4-weights" and site.inputs % MIN_INPUTS:
        return f"{site.inputs} inputs: blocks of 4 bits need a multiple of {MIN_INPUTS}"
    return ""


def planned(model: onnx.ModelProto, role: str, plan: QuantPlan) -> list[tuple[Site, Precision]]:
    """Return the nodes that the plan quantizes, each with its precision.

    What a precision for the whole graph cannot mean, attention and weights of other forms, stays as it is.

    Raises InvalidInput where the plan names a node that is not one of `sites`, or wants one quantized that cannot be.
    """
    known = sites(model)
    named = plan.nodes.get(role, {})
    if unknown := sorted({*named, *plan.excluded.get(role, {})} - {site.node for site in known}):
        raise InvalidInput(f"the plan names {unknown[0]}, which is no MatMul, Gemm or Conv of the {role}")
    found: list[tuple[Site, Precision]] = []
    for site in known:
        if (precision := plan.of(role, site.node)) == "fp32":
            continue
        if site.weight and site.matrix:
            found.append((site, precision))
        elif site.node in named:
            raise InvalidInput(f"{site.node} of the {role} cannot be quantized: {site.reason}; take it out of the plan")
    return found


def activations(model: onnx.ModelProto, role: str, plan: QuantPlan) -> tuple[str, ...]:
    """Return the tensors whose bounds `quantize` needs."""
    names = [site.activation for site, precision in planned(model, role, plan) if precision in ("int8", "fp8")]
    return tuple(dict.fromkeys(names))


def products_wanted(model: onnx.ModelProto, role: str, plan: QuantPlan) -> dict[str, int]:
    """Return the tensors whose products `quantize` can use, each with the axis of a node's inputs.

    Those of matrices and 1 x 1 convolutions with integer weights.
    """
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    found = {}
    for site, precision in planned(model, role, plan):
        if precision != "fp8":
            if site.operator != "Conv":
                found[site.activation] = -1
            elif site.inputs == shapes[site.weight][1]:
                found[site.activation] = 1
    return found


def names_read(graph: onnx.GraphProto) -> set[str]:
    """Return the tensors that the nodes of a graph read, those of graphs inside it and their outputs included."""
    found = {name for inner in graphs_of(graph) for node in inner.node for name in node.input}
    return found | {o.name for inner in list(graphs_of(graph))[1:] for o in inner.output}


def without_branches(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph without If that computes the same: `then` everywhere, over rows that are zero where it would not.

    For the experts of `edgemed.export.portable_decoder`, whose condition says whether any row is an expert's own: the
    rows that are not become zero, so that what is measured inside comes from the expert's own rows alone.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    producers = {output: node for node in made.graph.node for output in node.output}
    nodes: list[onnx.NodeProto] = []
    for node in made.graph.node:
        if node.op_type != "If":
            nodes.append(node)
            continue
        own = node.input[0]  # Cast <- ReduceMax <- Cast <- which rows are the expert's, bool [rows]
        while own in producers and producers[own].op_type in ("Cast", "ReduceMax"):
            own = producers[own].input[0]
        then, other = (_branch(node, name) for name in ("then_branch", "else_branch"))
        (rows,) = other.node[0].input
        out = node.output[0]
        nodes += [
            helper.make_node("Unsqueeze", [own, f"{out}.last"], [f"{out}.own"], f"{out}.own"),
            helper.make_node("CastLike", [f"{out}.own", rows], [f"{out}.one"], f"{out}.one"),
            helper.make_node("Mul", [rows, f"{out}.one"], [f"{out}.rows_of_own"], f"{out}.rows_of_own"),
        ]
        made.graph.initializer.append(helper.make_tensor(f"{out}.last", TensorProto.INT64, [1], [-1]))
        for inner in then.node:
            inner.input[:] = [f"{out}.rows_of_own" if name == rows else name for name in inner.input]
            inner.output[:] = [out if name == then.output[0].name else name for name in inner.output]
            nodes.append(inner)
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made


def _branch(node: onnx.NodeProto, name: str) -> onnx.GraphProto:
    (graph,) = (attribute.g for attribute in node.attribute if attribute.name == name)
    return graph  # type: ignore[no-any-return]
