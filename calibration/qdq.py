"""Graphs with QuantizeLinear and DequantizeLinear pairs, in the form that TensorRT takes, and plans of what gets them.

Covers symmetric INT8 and FP8 (E4M3) of activations (a scale a tensor) and weights (a scale an output channel), and
weights alone in INT8 (a scale an output channel) or INT4 (a scale a block), around MatMul, Gemm and Conv with a
constant weight. Does not cover asymmetric scales, which TensorRT refuses, other operators, graphs inside a graph (If),
or onnxruntime's own `MatMulNBits` (`weight_only`).
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from edgemed.calibration.ranges import Method
from edgemed.calibration.rounding import rounded
from edgemed.errors import InvalidInput
from edgemed.graphs import ROLES

Floats = npt.NDArray[np.float32]

Precision = Literal["fp32", "int8", "fp8", "int8-weights", "int4-weights"]
"""int8, fp8: weights and activations. int8-weights, int4-weights: activations stay as they are."""

FP8_MAX = 448.0
INT8_MAX, INT4_MAX = 127.0, 7.0
OPSETS: Mapping[Precision, int] = {"int8": 13, "int8-weights": 13, "fp8": 19, "int4-weights": 21}
"""The first operator set that has what is written. A graph is raised no further: from 21 on onnxruntime 1.31 gives the
pairs that it moves an `output_dtype`, then turns INT8 into UINT8 for x86 and refuses its own graph."""

MIN_INPUTS = 16
"""Where an output value sums up fewer products, the pairs cost more than small weights save."""

_SMALL = 4096  # bytes up to which a constant may decide about shapes
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a block's largest weight, tried as the bound of INT4


@dataclass(frozen=True)
class QuantPlan:
    """What is quantized, and how.

    precision: role -> of its nodes; a role that is missing stays as it is. nodes: role -> node -> another precision.
    excluded: role -> node -> why it stays as it is. method: where activations are clipped. block: weights with one
    scale in int4-weights, along the input dimension; a power of two from 16 on.
    """

    precision: Mapping[str, Precision] = field(default_factory=dict)
    nodes: Mapping[str, Mapping[str, Precision]] = field(default_factory=dict)
    excluded: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    method: Method = "minmax"
    block: int = 64

    def __post_init__(self) -> None:
        named = {*self.precision, *self.nodes, *self.excluded}
        if unknown := sorted(named - set(ROLES)):
            raise InvalidInput(f"the plan names graph {unknown[0]!r}; one of {', '.join(ROLES)} was expected")
        for value in (*self.precision.values(), *(p for found in self.nodes.values() for p in found.values())):
            if value not in get_args(Precision):
                raise InvalidInput(f"precision is {value!r}; one of {', '.join(get_args(Precision))} was expected")
        if self.method not in get_args(Method):
            raise InvalidInput(f"method is {self.method!r}; one of {', '.join(get_args(Method))} was expected")
        if self.block < 16 or self.block & (self.block - 1):
            raise InvalidInput(f"block is {self.block}; a power of two from 16 on was expected")
        for role, found in self.excluded.items():
            if bare := [node for node, reason in found.items() if not reason.strip()]:
                raise InvalidInput(f"the plan excludes {bare[0]} of the {role} without a reason; say why")

    def of(self, role: str, node: str) -> Precision:
        """Return the precision of one node."""
        if node in self.excluded.get(role, {}):
            return "fp32"
        return self.nodes.get(role, {}).get(node, self.precision.get(role, "fp32"))


def plan_to_toml(plan: QuantPlan) -> str:
    """Return the plan as TOML, tables in the order of the roles.

    >>> print(plan_to_toml(QuantPlan({"decoder": "int4-weights"}, excluded={"decoder": {"logits": "most sensitive"}})))
    method = "minmax"
    block = 64
    <BLANKLINE>
    [precision]
    "decoder" = "int4-weights"
    <BLANKLINE>
    [excluded.decoder]
    "logits" = "most sensitive"
    <BLANKLINE>
    """
    lines = [f'method = "{plan.method}"', f"block = {plan.block}"]
    tables: list[tuple[str, Mapping[str, str]]] = [("precision", plan.precision)]
    for name, by_role in (("nodes", plan.nodes), ("excluded", plan.excluded)):
        tables += [(f"{name}.{role}", by_role[role]) for role in ROLES if role in by_role]
    for title, values in tables:
        lines += ["", f"[{title}]", *(f"{_quoted(key)} = {_quoted(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Return a TOML basic string; JSON's escapes are TOML's, but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def plan_from_toml(text: str) -> QuantPlan:
    """Return the plan that `plan_to_toml` wrote. Raises InvalidInput where it is none."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"the plan is not TOML: {error}") from error
    if unknown := sorted(set(values) - {f.name for f in fields(QuantPlan)}):
        raise InvalidInput(f"the plan has {', '.join(unknown)}, which no plan has")
    if not isinstance(values.get("block", 64), int) or isinstance(values.get("block"), bool):
        raise InvalidInput(f"the plan's block is {values['block']!r}; a whole number was expected")
    tables = [values.get("precision", {}), values.get("nodes", {}), values.get("excluded", {})]
    for table in [*tables, *(inner for t in tables[1:] if isinstance(t, dict) for inner in t.values())]:
        if not isinstance(table, dict):
            raise InvalidInput(f"the plan has {table!r} where a table was expected")
    texts = [*tables[0].values(), *(v for table in tables[1:] for inner in table.values() for v in inner.values())]
    if wrong := [value for value in texts if not isinstance(value, str)]:
        raise InvalidInput(f"the plan has {wrong[0]!r} where a text was expected")
    return QuantPlan(**values)


@dataclass(frozen=True)
class Site:
    """A node with a constant weight, or an attention product: what could be quantized.

    activation, weight: tensor names; the weight is "" where both inputs are computed, and what a Cast reads where it
    is stored in fewer bytes than it is computed in. dtype: what it is computed in, an ONNX type. axis: of the weight's
    output channels. inputs: products that an output value sums up. reason: why a plan leaves it out, or "".
    """

    node: str
    operator: str
    activation: str
    weight: str
    axis: int
    inputs: int
    dtype: int = TensorProto.FLOAT
    reason: str = ""


_BY_NAME = {
    "router": "a router: a small change sends a token to another expert",
    "hypernetwork": "a hypernetwork: what it makes is multiplied by every pixel of a mask",
    "iou_head": "it scores masks and is a thousandth of the work",
}
"""Part of a weight's name -> why it stays."""


def name_of(node: onnx.NodeProto) -> str:
    """Return what a plan calls a node: its name, or its first output's."""
    return str(node.name or node.output[0])


def sites(model: onnx.ModelProto) -> tuple[Site, ...]:
    """Return every MatMul, Gemm and Conv of the main graph in order, with why a default plan leaves some out."""
    stored = {t.name: t for t in model.graph.initializer}
    casts = {n.output[0]: n for n in model.graph.node if n.op_type == "Cast" and n.input[0] in stored}
    nodes = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm", "Conv") and n.domain in ("", "ai.onnx")]
    convolutions = [name_of(n) for n in nodes if n.op_type == "Conv"]
    found = []
    for node in nodes:
        cast = casts.get(node.input[1])
        constant = stored.get(cast.input[0] if cast else node.input[1])
        if constant is None:
            reason = "both inputs are computed: attention, kept for accuracy"
            found.append(Site(name_of(node), node.op_type, node.input[0], "", 0, 0, reason=reason))
            continue
        if node.input[0] in stored or node.input[0] in casts:
            continue  # a constant, which any runtime computes once
        shape = tuple(constant.dims)
        axis = _output_axis(node, len(shape))
        inputs = int(np.prod(shape)) // shape[axis] if shape[axis] else 0
        reason = _reason(node, constant, inputs, convolutions)
        dtype = _attribute(cast, "to", 0) if cast else constant.data_type
        found.append(Site(name_of(node), node.op_type, node.input[0], constant.name, axis, inputs, dtype, reason))
    return tuple(found)


def _output_axis(node: onnx.NodeProto, rank: int) -> int:
    if node.op_type == "Conv" or (node.op_type == "Gemm" and _attribute(node, "transB", 0)):
        return 0
    return rank - 1


def _reason(node: onnx.NodeProto, weight: TensorProto, inputs: int, convolutions: list[str]) -> str:
    for part, reason in _BY_NAME.items():
        if part in weight.name or part in node.name:
            return reason
    if weight.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
        return "its weight is no matrix of floats"
    if len(weight.dims) != 2 and node.op_type != "Conv":
        return f"its weight has {len(weight.dims)} dimensions, 2 can be quantized"
    if node.op_type == "Gemm" and (_attribute(node, "transA", 0) or _attribute(node, "alpha", 1.0) != 1.0):
        return "a Gemm that transposes or scales its input"
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
    excluded = {
        role: {site.node: site.reason for site in sites(models[role]) if site.reason}
        for role, wanted in precision.items()
        if wanted != "fp32"
    }
    return QuantPlan(dict(precision), excluded={role: found for role, found in excluded.items() if found}, **how)


def activations(model: onnx.ModelProto, role: str, plan: QuantPlan) -> tuple[str, ...]:
    """Return the tensors whose bounds `quantize` needs."""
    names = [s.activation for s in sites(model) if plan.of(role, s.node) in ("int8", "fp8")]
    return tuple(dict.fromkeys(names))


def products_wanted(model: onnx.ModelProto, role: str, plan: QuantPlan) -> dict[str, int]:
    """Return the tensors whose products `quantize` can use, each with the axis of a node's inputs.

    Those of matrices and 1 x 1 convolutions with integer weights.
    """
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    found = {}
    for site in sites(model):
        if plan.of(role, site.node) in ("int8", "int8-weights", "int4-weights"):
            if site.operator != "Conv":
                found[site.activation] = -1
            elif site.inputs == shapes[site.weight][1]:
                found[site.activation] = 1
    return found


@dataclass(frozen=True)
class Quantized:
    """One node that was quantized, and |error| / |weight| of its weight (Frobenius norms)."""

    node: str
    weight: str
    precision: Precision
    relative_error: float


def quantize(
    model: onnx.ModelProto,
    role: str,
    plan: QuantPlan,
    bounds: Mapping[str, float] | None = None,
    products: Mapping[str, Floats] | None = None,
) -> tuple[onnx.ModelProto, tuple[Quantized, ...]]:
    """Return a copy of `model` with what `plan` says, and a row for each quantized node.

    The operator set is raised where it is too old for what is written.

    bounds: tensor -> the magnitude above which an activation is clipped (`ranges.bounds`); FP8 wants "minmax".
    products: tensor -> what `rounding.measure_products` gives of it: integer weights that meet it are rounded for
    the least error of the output; the others to the nearest.

    Raises InvalidInput where the plan names a node that is not one of `sites`, or wants to quantize one without a
    constant weight; where a bound is missing; where a weight is not finite or too narrow for a block.
    """
    known = {site.node: site for site in sites(model)}
    named = {*plan.nodes.get(role, {}), *plan.excluded.get(role, {})}
    if unknown := sorted(named - set(known)):
        raise InvalidInput(f"the plan names {unknown[0]}, which is no MatMul, Gemm or Conv of the {role}")
    needed = [OPSETS[p] for p in (plan.of(role, node) for node in known) if p != "fp32"]
    writer = _Writer(with_opset(model, max(needed, default=1)), bounds or {}, products or {}, plan.block)
    rows = []
    for node in list(writer.graph.node):
        site = known.get(name_of(node))
        if site is not None and (precision := plan.of(role, site.node)) != "fp32":
            if not site.weight:
                raise InvalidInput(f"{site.node} of the {role} has no constant weight; exclude it from the plan")
            rows.append(writer.quantize(node, site, precision))
    done = {row.node for row in rows if row.precision in ("int8", "fp8")}
    quantized = writer.finished()
    _keep_from_gemm(quantized, [n for n in quantized.graph.node if n.op_type == "MatMul" and name_of(n) in done])
    return quantized, tuple(rows)


def _keep_from_gemm(model: onnx.ModelProto, products: Sequence[onnx.NodeProto]) -> None:
    """Give the bias after each MatMul of rank 3 or more three dimensions; the sum is the same.

    With one dimension onnxruntime 1.31 makes a Gemm between two Reshapes of the two nodes, which no integer kernel
    takes: nano's vision encoder took 0.42 s instead of 0.28 s, and from operator set 21 on it refused the graph.
    """
    graph = model.graph
    stored = {t.name: t for t in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    ranks: Mapping[str, int] | None = None
    for product in products:
        for node in readers.get(product.output[0], ()):
            at = next((i for i, name in enumerate(node.input) if name in stored), None)
            if node.op_type != "Add" or at is None or len(stored[node.input[at]].dims) != 1:
                continue
            ranks = ranks if ranks is not None else _ranks(model)
            if ranks.get(product.output[0], 0) < 3:
                continue
            name = f"{node.input[at]}.rank3"
            if name not in stored:
                bias = numpy_helper.to_array(stored[node.input[at]]).reshape(1, 1, -1)
                graph.initializer.append(numpy_helper.from_array(bias, name))
                stored[name] = graph.initializer[-1]
            node.input[at] = name


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    """Return the rank of each tensor that is known; weights go into the inference without their values."""
    graph = model.graph
    bare = onnx.GraphProto(name=graph.name, node=graph.node, input=graph.input, output=graph.output)
    bare.value_info.extend(graph.value_info)
    for tensor in graph.initializer:
        if tensor.ByteSize() < _SMALL:
            bare.initializer.append(tensor)
        else:
            bare.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    found = onnx.shape_inference.infer_shapes(helper.make_model(bare, opset_imports=model.opset_import)).graph
    typed = (*found.value_info, *found.output)
    return {v.name: len(v.type.tensor_type.shape.dim) for v in typed if v.type.tensor_type.HasField("shape")}


def with_opset(model: onnx.ModelProto, least: int) -> onnx.ModelProto:
    """Return a copy of `model` in operator set `least` or later."""
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), least)
    if version < least:
        return version_converter.convert_version(model, least)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


class _Writer:
    """Adds pairs to a graph. What several nodes read is quantized once for all of them."""

    def __init__(
        self, model: onnx.ModelProto, bounds: Mapping[str, float], products: Mapping[str, Floats], block: int
    ) -> None:
        self.model, self.graph = model, model.graph
        self._bounds, self._products, self._block = bounds, products, block
        self._stored = {t.name: t for t in self.graph.initializer}
        self._made: dict[str, tuple[str, float]] = {}
        self._before: dict[str, list[onnx.NodeProto]] = {}  # output of the node they go before -> new nodes
        self._at = ""

    def quantize(self, node: onnx.NodeProto, site: Site, precision: Precision) -> Quantized:
        self._at = node.output[0]
        if precision in ("int8", "fp8"):
            node.input[0] = self._activation(site.activation, precision, site.dtype)
        node.input[1], error = self._weight(site, precision)
        return Quantized(site.node, site.weight, precision, error)

    def _activation(self, tensor: str, precision: Precision, dtype: int) -> str:
        name = f"{tensor}.{precision}"
        if name not in self._made:
            if tensor not in self._bounds:
                raise InvalidInput(f"there is no bound of {tensor}; measure it on slices first")
            largest, kind = (FP8_MAX, TensorProto.FLOAT8E4M3FN) if precision == "fp8" else (INT8_MAX, TensorProto.INT8)
            scale = np.asarray((self._bounds[tensor] or 1.0) / largest, helper.tensor_dtype_to_np_dtype(dtype))
            self._store(f"{name}.scale", scale)
            self._store(f"{name}.zero", np.zeros((), helper.tensor_dtype_to_np_dtype(kind)))
            beside = [f"{name}.scale", f"{name}.zero"]
            self._add("QuantizeLinear", [tensor, *beside], f"{name}.q")
            self._add("DequantizeLinear", [f"{name}.q", *beside], name)
            self._made[name] = (name, 0.0)
        return name

    def _weight(self, site: Site, precision: Precision) -> tuple[str, float]:
        name = f"{site.weight}.{precision}.{site.axis}"
        if name in self._made:
            return self._made[name]
        exact = numpy_helper.to_array(self._stored[site.weight]).astype(np.float32)
        dtype = helper.tensor_dtype_to_np_dtype(site.dtype)
        if not np.isfinite(exact).all():
            raise InvalidInput(f"weight {site.weight} has a value that is not finite; the graph is damaged")
        channels = np.moveaxis(exact, site.axis, 0).reshape(exact.shape[site.axis], -1)  # [outputs, inputs]
        if precision == "int4-weights":
            if exact.ndim != 2:
                raise InvalidInput(f"{site.node} is a {site.operator}; int4-weights are for matrices, exclude it")
            block = _block_of(site, self._block)
            values, scales = blocks_of(channels, block, dtype)
            values = self._compensated(site, channels, scales, values.reshape(channels.shape), -INT4_MAX - 1, INT4_MAX)
            values = values.reshape(len(channels), -1, block)
            back = (values.astype(np.float32) * scales.astype(np.float32)[..., None]).reshape(channels.shape)
            values, kind = values.reshape(channels.shape), TensorProto.INT4
            if site.axis == 1:
                values, scales = values.T, scales.T
            how = {"axis": 1 - site.axis, "block_size": block}
        else:
            values, scales = channels_of(channels, precision, dtype)
            if precision != "fp8":
                values = self._compensated(site, channels, scales[:, None], values, -INT8_MAX, INT8_MAX)
            back = values.astype(np.float32) * scales.astype(np.float32)[:, None]
            moved = tuple(np.delete(exact.shape, site.axis))
            values = np.moveaxis(values.reshape(exact.shape[site.axis], *moved), 0, site.axis)
            kind = TensorProto.FLOAT8E4M3FN if precision == "fp8" else TensorProto.INT8
            how = {"axis": site.axis}
        self._store(f"{name}.q", np.ascontiguousarray(values).astype(helper.tensor_dtype_to_np_dtype(kind)))
        self._store(f"{name}.scale", np.ascontiguousarray(scales))
        self._add("DequantizeLinear", [f"{name}.q", f"{name}.scale"], name, **how)
        error = float(np.linalg.norm(back - channels) / max(float(np.linalg.norm(channels)), 1e-30))
        self._made[name] = (name, error)
        return self._made[name]

    def _compensated(
        self, site: Site, channels: Floats, scales: npt.NDArray[Any], nearest: Floats, lowest: float, highest: float
    ) -> Floats:
        """Return the whole numbers to store: `nearest`, or better ones where the products of the inputs are known."""
        products = self._products.get(site.activation)
        if products is None or len(products) != channels.shape[1]:
            return nearest
        wide = np.repeat(scales.astype(np.float32), channels.shape[1] // scales.shape[1], axis=1)
        return rounded(channels, wide, products, lowest, highest)

    def _store(self, name: str, array: npt.NDArray[Any]) -> None:
        self.graph.initializer.append(numpy_helper.from_array(array, name))

    def _add(self, operator: str, inputs: Iterable[str], output: str, **attributes: Any) -> None:
        made = helper.make_node(operator, list(inputs), [output], f"{output}/{operator}", **attributes)
        self._before.setdefault(self._at, []).append(made)

    def finished(self) -> onnx.ModelProto:
        """Return the model: new nodes before those that first read them, without what is not read any more."""
        nodes = [new for node in self.graph.node for new in (*self._before.get(node.output[0], ()), node)]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        given = {o.name for o in self.graph.output}
        used = names_read(self.graph) | given
        nodes = [node for node in nodes if node.op_type != "Cast" or node.output[0] in used]  # of weights, once
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        used = names_read(self.graph) | given
        kept = [t for t in self.graph.initializer if t.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        return self.model


def names_read(graph: onnx.GraphProto) -> set[str]:
    """Return the tensors that the nodes of a graph read, those of graphs inside it (If, Loop) included."""
    found = {name for node in graph.node for name in node.input}
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                found |= names_read(inner) | {o.name for o in inner.output} if inner.node else set()
    return found


def channels_of(channels: Floats, precision: Precision, dtype: np.dtype[Any]) -> tuple[Floats, npt.NDArray[Any]]:
    """Return (what INT8 or FP8 stores as float32 [outputs, inputs], scales [outputs] of `dtype`)."""
    largest = FP8_MAX if precision == "fp8" else INT8_MAX
    bound = np.abs(channels).max(axis=1)
    scales = np.where(bound > 0, bound / largest, 1.0).astype(dtype)
    scaled = channels / scales.astype(np.float32)[:, None]
    if precision == "fp8":
        fp8 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
        return scaled.clip(-FP8_MAX, FP8_MAX).astype(fp8).astype(np.float32), scales
    return np.rint(scaled).clip(-INT8_MAX, INT8_MAX), scales


def blocks_of(channels: Floats, block: int, dtype: np.dtype[Any]) -> tuple[Floats, npt.NDArray[Any]]:
    """Return (INT4 values as float32 [outputs, blocks, block], scales [outputs, blocks] of `dtype`).

    Of a few bounds below the largest magnitude, each block takes the one with the least squared error.
    """
    grouped = channels.reshape(len(channels), -1, block)
    bound = np.abs(grouped).max(axis=2)
    least = np.full(bound.shape, np.inf)
    values, scales = np.zeros_like(grouped), np.ones(bound.shape, dtype)
    for share in _SHARES:
        tried = np.where(bound > 0, bound * share / INT4_MAX, 1.0).astype(dtype)
        wide = tried.astype(np.float32)[..., None]
        rounded = np.rint(grouped / wide).clip(-INT4_MAX - 1, INT4_MAX)
        error = ((rounded * wide - grouped) ** 2).sum(axis=2)
        better = error < least
        least = np.where(better, error, least)
        values, scales = np.where(better[..., None], rounded, values), np.where(better, tried, scales)
    return values, scales


def _block_of(site: Site, block: int) -> int:
    """Return the largest power of two up to `block` that divides the inputs: TensorRT takes whole blocks only."""
    fitting = min(block, site.inputs & -site.inputs)
    if fitting < MIN_INPUTS:
        raise InvalidInput(f"{site.node} has {site.inputs} inputs, no multiple of {MIN_INPUTS}; exclude it from int4")
    return fitting
