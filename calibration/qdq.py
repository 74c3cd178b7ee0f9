"""Graphs with QuantizeLinear and DequantizeLinear pairs, in the form that TensorRT takes.

Covers symmetric INT8 and FP8 (E4M3) of activations (a scale a tensor) and weights (a scale an output channel), and
weights alone in INT8 (a scale an output channel) or INT4 (a scale a block), around MatMul, Gemm and Conv with a
constant weight. Inside a branch the pairs lie in the branch: what is not taken is not dequantized. Does not cover
asymmetric scales, which TensorRT refuses, other operators, or onnxruntime's own `MatMulNBits` (`weight_only`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from edgemed.calibration.plan import Precision, QuantPlan
from edgemed.calibration.rounding import rounded
from edgemed.calibration.sites import MIN_INPUTS, Site, graphs_of, name_of, names_read, planned
from edgemed.errors import InvalidInput

Floats = npt.NDArray[np.float32]

FP8_MAX = 448.0
INT8_MAX, INT4_MAX = 127.0, 7.0
OPSETS: Mapping[Precision, int] = {"int8": 13, "int8-weights": 13, "fp8": 19, "int4-weights": 21}
"""The first operator set that has what is written. A graph is raised no further: from 21 on onnxruntime 1.31 gives the
pairs that it moves an `output_dtype`, then turns INT8 into UINT8 for x86 and refuses its own graph."""

_SMALL = 4096  # bytes up to which a constant may decide about shapes
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a block's largest weight, tried as the bound of INT4


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

    Raises what `planned` raises, and InvalidInput where a bound is missing or a weight is not finite or too narrow for
    a block.
    """
    wanted = {site.node: (site, precision) for site, precision in planned(model, role, plan)}
    needed = [OPSETS[precision] for _, precision in wanted.values()]
    writer = _Writer(with_opset(model, max(needed, default=1)), bounds or {}, products or {}, plan.block)
    rows: list[Quantized] = []
    for scope, graph in enumerate(graphs_of(writer.model.graph)):
        found = [node for node in graph.node if name_of(node) in wanted]
        rows += [writer.quantize(node, *wanted[name_of(node)], scope) for node in found]
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
    """Adds pairs to a graph. What several nodes of the main graph or of one branch read is quantized once for them."""

    def __init__(
        self, model: onnx.ModelProto, bounds: Mapping[str, float], products: Mapping[str, Floats], block: int
    ) -> None:
        self.model = model
        self._bounds, self._products, self._block = bounds, products, block
        self._stored = {t.name: t for t in model.graph.initializer}
        self._made: dict[str, tuple[str, float]] = {}
        self._before: dict[str, list[onnx.NodeProto]] = {}  # output of the node they go before -> new nodes
        self._at, self._scope = "", ""

    def quantize(self, node: onnx.NodeProto, site: Site, precision: Precision, scope: int) -> Quantized:
        """Put pairs before a node. scope: the number of its graph in `graphs_of`."""
        self._at, self._scope = node.output[0], f".{scope}" if scope else ""
        if precision in ("int8", "fp8"):
            node.input[0] = self._activation(site.activation, precision, site.dtype)
        node.input[1], error = self._weight(site, precision)
        return Quantized(site.node, site.weight, precision, error)

    def _activation(self, tensor: str, precision: Precision, dtype: int) -> str:
        name = f"{tensor}.{precision}{self._scope}"
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
        name = f"{site.weight}.{precision}.{site.axis}{self._scope}"
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
        # Inside an If onnxruntime 1.31 fuses what it comes from and the product to a MatMulNBits that is wrong.
        kept_apart = bool(self._scope)
        self._add("DequantizeLinear", [f"{name}.q", f"{name}.scale"], f"{name}.flat" if kept_apart else name, **how)
        if kept_apart:
            self._store(f"{name}.shape", np.array(exact.shape, np.int64))
            self._add("Reshape", [f"{name}.flat", f"{name}.shape"], name)
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
        return rounded(channels, wide, products, lowest, highest, by_size=highest < 8)  # 4 bits

    def _store(self, name: str, array: npt.NDArray[Any]) -> None:
        self.model.graph.initializer.append(numpy_helper.from_array(array, name))

    def _add(self, operator: str, inputs: Iterable[str], output: str, **attributes: Any) -> None:
        made = helper.make_node(operator, list(inputs), [output], f"{output}/{operator}", **attributes)
        self._before.setdefault(self._at, []).append(made)

    def finished(self) -> onnx.ModelProto:
        """Return the model: new nodes before those that first read them, without what is not read any more."""
        given = {o.name for o in self.model.graph.output}
        for graph in graphs_of(self.model.graph):
            nodes = [new for node in graph.node for new in (*self._before.get(node.output[0], ()), node)]
            del graph.node[:]
            graph.node.extend(nodes)
        used, before = names_read(self.model.graph) | given, set[str]()
        while used != before:  # Casts of weights, some behind another
            for graph in graphs_of(self.model.graph):
                nodes = [n for n in graph.node if n.op_type != "Cast" or n.output[0] in used]
                del graph.node[:]
                graph.node.extend(nodes)
            used, before = names_read(self.model.graph) | given, used
        kept = [t for t in self.model.graph.initializer if t.name in used]
        del self.model.graph.initializer[:]
        self.model.graph.initializer.extend(kept)
        return self.model


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
