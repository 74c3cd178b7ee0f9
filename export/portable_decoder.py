"""The decoder of `decoder_graph` in standard ONNX operators only (opset 24), for TensorRT-RTX and any runtime.

Covers what the fused graph covers, with the same inputs and outputs by name; the cache is float16, bfloat16 or float32
as the products are. Packed matrices are integers behind a DequantizeLinear each, within the branch that reads them.
Does not cover bounds: an id or a position past its table is refused by onnxruntime and not by an engine, so that a
caller has to check both.

The residual stream, norms, rotation and router are float32, whatever the matrices are, and an engine that is built
strongly typed computes what is written here; the precision of a softmax within Attention is the runtime's, since
TensorRT-RTX does not let a graph set it. Four forms are as TensorRT-RTX 1.7.1 needs them: an additive mask over the
whole cache (it takes none beside is_causal, and ignores nonpad_kv_seqlen in silence), a cache of fixed length written
by TensorScatter, `If` around each expert (it has no NonZero), and attention in products and a softmax where it has no
kernel (`_attend`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from edgemed.errors import InvalidInput
from edgemed.export.decoder_graph import ROPE, WHOLE, DecoderBuilder
from edgemed.export.graph_writer import TYPES, Computed, GraphWriter, rounded
from edgemed.families.specs import with_split_head
from edgemed.graphs import GraphSpec

if TYPE_CHECKING:
    from edgemed.models.llama import LlamaConfig

Array = npt.NDArray[Any]
OPSET, IR_VERSION = 24, 11

_MASKED = -3e4
"""What is added to the score of a position that must not be seen: float16 holds it, and exp of it is 0 in float32."""


def portable_spec(spec: GraphSpec, dtype: Computed = "fp16") -> GraphSpec:
    """Return the GraphSpec of the portable form of a decoder: that of the fused one with the cache in `dtype`.

    Its head is split, so that it can end in the hidden state, which kernels beside an engine take.

    bf16: NumPy knows the type only where ml_dtypes is imported, which a workstation does not have.
    """
    state = {name for pair in spec.state for name in pair}
    kind = TYPES[dtype].name
    inputs, outputs = (
        tuple(replace(t, dtype=kind) if t.name in state else t for t in tensors)
        for tensors in (spec.inputs, spec.outputs)
    )
    return with_split_head(replace(spec, inputs=inputs, outputs=outputs))


def build_portable_decoder(
    config: LlamaConfig,
    tensors: Mapping[str, Any],
    spec: GraphSpec,
    *,
    dtype: Computed = "fp16",
    experts: Sequence[int] = (),
    writer: GraphWriter | None = None,
) -> onnx.ModelProto:
    """Return the ONNX model; `portable_spec(spec, dtype)` describes it.

    spec: of the decoder, fused or portable. dtype: of products, the embedding table and the cache; logits, hidden and
    router are float32. tensors, experts and writer are as `build_decoder_graph` takes them; packed matrices must be
    of the standard form, and dtype fp16.

    Raises InvalidInput where a tensor is missing, has another shape than `config` says or does not fit `dtype`.
    """
    writer = writer or GraphWriter()
    if writer.matrices.packed and not (writer.matrices.standard and dtype == "fp16"):
        raise InvalidInput(
            f"the portable decoder takes {writer.matrices.precision} in standard operators beside fp16; the matrices "
            f"are to be packed for onnxruntime, or {dtype} was asked for"
        )
    spec = _with_fixed_cache(portable_spec(spec, dtype))
    model = _PortableBuilder(config, tensors, spec, experts or [1] * config.layers, writer, dtype).build(
        TYPES[dtype].name
    )
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", OPSET))
    model.ir_version = IR_VERSION
    return model


def bf16_in_fp32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a decoder in bf16 for a runtime that has none: inputs rounded to bf16 as before, products in fp32.

    For comparisons. `portable_spec(spec, "fp32")` describes it; references to weight files stay.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    _widen(made.graph)
    return made


def _widen(graph: onnx.GraphProto) -> None:
    """Make every bf16 value of a graph and of those inside it float32, rounded where it was cast."""
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes, graph_nodes = list(graph.node), graph.node
    del graph_nodes[:]
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            name, tensor.name = tensor.name, f"{tensor.name}.bf16"
            graph_nodes.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _widen(attribute.g)
        output = node.output[0]
        rounds = node.op_type == "Cast" and node.attribute[0].i == TensorProto.BFLOAT16
        if rounds:
            node.output[0] = f"{output}.bf16"
        graph_nodes.append(node)
        if rounds:
            graph_nodes.append(helper.make_node("Cast", [node.output[0]], [output], to=TensorProto.FLOAT))


def _with_fixed_cache(spec: GraphSpec) -> GraphSpec:
    """Return the spec with the cache's length as a number: the graph of an engine may not leave it open."""
    length = spec.dims["cache"].max
    inputs, outputs = (
        tuple(replace(t, shape=tuple(length if d == "cache" else d for d in t.shape)) for t in tensors)
        for tensors in (spec.inputs, spec.outputs)
    )
    return replace(spec, inputs=inputs, outputs=outputs)


class _PortableBuilder(DecoderBuilder):
    """`DecoderBuilder` in standard operators. Names of values in the matrices' type are in `low`; others are float32.

    Weights lie in the outer graph, also those that only a branch reads.
    """

    def __init__(
        self,
        config: LlamaConfig,
        tensors: Mapping[str, Any],
        spec: GraphSpec,
        experts: Sequence[int],
        writer: GraphWriter,
        dtype: Computed,
    ) -> None:
        super().__init__(config, tensors, spec, experts, writer)
        self.dtype = dtype
        self.type = TYPES[dtype]
        self.kind = helper.np_dtype_to_tensor_dtype(self.type)
        self.in_branch = False
        self.low: set[str] = set()
        self.cast: dict[str, str] = {}  # float32 value -> the same in the matrices' type

    def positions(self) -> None:
        """Compute the position of each token and which places of the cache it must not see."""
        places = self.constant("places", np.arange(self.cache))
        sequence = self.node("Shape", ["input_ids"], "sequence", start=1, end=2)  # [1]
        zero = self.constant("first_place", np.array([0]))
        steps = self.node("Slice", [places, zero, sequence, self.constant("axis_0", np.array([0]))], "steps")
        position = self.node("Add", [steps, "past_length"], "position")  # [sequence]
        self.node("Unsqueeze", [position, "axis_0"], "position_ids")  # [1, sequence]
        column = self.node("Unsqueeze", [position, self.constant("axis_1", np.array([1]))], "position_column")
        hidden = self.node("Greater", [places, column], "unseen")  # [sequence, cache]
        masked, seen = (self.constant(n, np.array(v, np.float32)) for n, v in (("masked", _MASKED), ("seen", 0)))
        mask = self.node("Where", [hidden, masked, seen], "mask_2d")
        self.node("Unsqueeze", [mask, self.constant("axes_01", np.array([0, 1]))], "mask")  # [1, 1, sequence, cache]
        self.tables()

    def add_attention(self, qkv: str, p: str, i: int) -> str:
        """Return [1, sequence, heads * head_dim], as the fused graph's node does."""
        c = self.config
        turned, values = c.heads + c.kv_heads, c.kv_heads
        split = self.constant("qk_v", np.array([turned * c.head_dim, values * c.head_dim]))
        self.node("Split", [qkv, split], p + "qk", more_outputs=[p + "v"], axis=-1)
        parts = []
        for name, heads in (("qk", turned), ("v", values)):
            shape = self.constant(f"{name}_shape", np.array([1, -1, heads, c.head_dim]))
            apart = self.node("Reshape", [p + name, shape], f"{p}{name}_apart")
            parts.append(self.node("Transpose", [apart], f"{p}{name}_heads", perm=[0, 2, 1, 3]))
        self.low.add(parts[0])
        rotated = self.node("RotaryEmbedding", [self.float32(parts[0]), *ROPE, "position_ids"], p + "rotated")
        both = self.constant("q_k", np.array([c.heads, c.kv_heads]))
        self.node("Split", [rotated, both], p + "q", more_outputs=[p + "k"], axis=1)
        for kind, new in (("key", self.lowered(p + "k")), ("value", parts[1])):
            past = [f"past_{kind}_{i}", new, "past_length"]
            self.node("TensorScatter", past, f"present_{kind}_{i}", axis=2, mode="linear")
        mixed = self._attend(p + "q", p, i)  # [1, heads, sequence, head_dim]
        back = self.node("Transpose", [mixed], p + "mixed_turned", perm=[0, 2, 1, 3])
        joined = self.constant("joined_shape", np.array([1, -1, c.heads * c.head_dim]))
        return self._low(self.node("Reshape", [back, joined], p + "mixed"))

    def _attend(self, q: str, p: str, i: int) -> str:
        """Return what the queries q, float32 [1, heads, sequence, head_dim], find in the cache of layer i.

        By Attention where TensorRT-RTX 1.7.1 has a kernel for it. It has none in fp32, and none for some layers of a
        graph with experts (measured: 2, 1 experts do not build, 2, 2 do); there by products and a softmax in float32.
        """
        c, keys, values = self.config, f"present_key_{i}", f"present_value_{i}"
        if self.dtype != "fp32" and max(self.experts) == 1:
            given = [self.lowered(q), keys, values, self.lowered("mask")]
            return self.node("Attention", given, p + "mixed_heads", is_causal=0, scale=c.head_dim**-0.5)
        scaled = self.node("Mul", [q, self.constant("scale", np.array(c.head_dim**-0.5, np.float32))], p + "q_scaled")
        group = c.heads // c.kv_heads  # queries that share a key lie behind each other
        shape = self.constant("group_shape", np.array([1, c.kv_heads, -1, c.head_dim]))
        grouped = self.node("Reshape", [self.lowered(scaled), shape], p + "q_grouped")
        turned = self.node("Transpose", [keys], p + "keys_turned", perm=[0, 1, 3, 2])
        scores = self._low(
            self.node("MatMul", [grouped, turned], p + "scores")
        )  # [1, kv_heads, group * sequence, cache]
        apart = self.constant("scores_shape", np.array([1, c.kv_heads, group, -1, self.cache]))
        masked = self.node("Add", [self.node("Reshape", [self.float32(scores), apart], p + "scores_apart"), "mask"],
                           p + "scores_masked")  # fmt: skip
        share = self.lowered(self.node("Softmax", [masked], p + "shares", axis=-1))
        joined = self.node("Reshape", [share, self.constant("shares_shape", np.array([1, c.kv_heads, -1, self.cache]))],
                           p + "shares_joined")  # fmt: skip
        found = self.node("MatMul", [joined, values], p + "found")  # [1, kv_heads, group * sequence, head_dim]
        heads = self.constant("heads_shape", np.array([1, c.heads, -1, c.head_dim]))
        return self.node("Reshape", [found, heads], p + "mixed_heads")

    def embedding_table(self, table: Array, dtype: str) -> Array:
        """Return the embedding table as it is stored. Raises InvalidInput where `dtype` does not hold it."""
        return rounded(table, self.dtype, "embedding.weight")

    def silu(self, x: str, name: str) -> str:
        """Return x * sigmoid(x)."""
        return self.node("Mul", [x, self.node("Sigmoid", [x], f"{name}.sigmoid")], name)

    def router_logits(self, x: str, router: str, name: str) -> str:
        """Return x @ router without a matrix product, which a runtime may round to TF32 and sm75 has none of."""
        column = self.node("Unsqueeze", [x, self.constant("last_axis", np.array([-1]))], f"{name}.column")
        products = self.node("Mul", [column, router], f"{name}.products")  # [1, tokens, width, experts]
        return self.node("ReduceSum", [products, self.constant("axis_2", np.array([2]))], name, keepdims=0)

    def draft_scores(self, x: str, table: Array) -> str:
        """Return x @ table [rank, bins], float32."""
        stored = self.constant("box_draft.table", table.astype(self.type))
        return self.float32(self._low(self.node("MatMul", [x, stored], "draft_scores")))

    def merge_experts(self, rows: str, mine: Sequence[str], p: str) -> str:
        """Return float32 [tokens, width]. An expert that has no token is skipped; one that has any computes all rows.

        A decoding step costs one expert, a prefill of mixed tokens as many times a dense one as there are experts.
        """
        rows = self.lowered(rows)  # here, since a value made in a branch cannot be seen outside of it
        axis_0, last = self.constant("axis_0", np.array([0])), self.constant("last_axis", np.array([-1]))
        merged = ""
        for e, own in enumerate(mine):
            counted = self.node("Cast", [own], f"{p}counted.{e}", to=TensorProto.INT32)
            most = self.node("ReduceMax", [counted, axis_0], f"{p}most.{e}", keepdims=0)
            needed = self.node("Cast", [most], f"{p}needed.{e}", to=TensorProto.BOOL)  # a scalar
            out = f"{p}expert_out.{e}"
            self._if(needed, rows, f"{p}experts.{e}.", out)
            if merged:
                column = self.node("Unsqueeze", [own, last], f"{p}mine_column.{e}")
                merged = self.node("Where", [column, out, merged], f"{p}merged.{e}")
            else:
                merged = out
        return self.float32(self._low(merged))

    def _if(self, condition: str, rows: str, p: str, out: str) -> str:
        """Return the MLP with the prefix `p` over `rows` where the scalar condition holds, else `rows` as they are."""
        outer, self.writer.nodes = self.writer.nodes, []
        self.in_branch = True
        try:
            self.swiglu(rows, p)
            then = self._branch(f"{out}.computed", self.writer.nodes)
        finally:
            self.writer.nodes, self.in_branch = outer, False
        skip = self._branch(f"{out}.skip", [helper.make_node("Identity", [rows], [f"{out}.rows"], name=f"{out}.rows")])
        return self._low(self.node("If", [condition], out, then_branch=then, else_branch=skip))

    def _branch(self, name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        """Return a graph whose output is that of the last node."""
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(nodes[-1].output[0], self.kind, None)])

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def linear(
        self, x: str, name: str, rows: int, columns: int, *, stored: str = "", output: str = "", part: slice = WHOLE
    ) -> str:
        """Return x @ weight[part].T in the matrices' type; as the graph's `output`, in float32."""
        read, rows = self.part_of(f"{name}.weight", rows, columns, part)
        stored = f"{stored or name}.weight"
        if self.writer.matrices.packed:
            weight = self.writer.dequantized(stored, rows, columns, read)
            if self.in_branch:
                # onnxruntime 1.31 makes one operator of the two, which in a branch computes something else (measured:
                # relative error 1) or does not load; a Reshape between them keeps it from that, and engines as small.
                own_shape = self.constant(f"shape_{columns}_{rows}", np.array([columns, rows]))
                weight = self.node("Reshape", [weight, own_shape], f"{weight}.kept_apart")
        else:
            weight = self.writer.stored(stored, rows * columns, lambda: rounded(read().T, self.dtype, f"{name}.weight"))
        given = self.lowered(x)
        if output and self.dtype != "fp32":
            product = self.node("MatMul", [given, weight], f"{output}.{self.dtype}")
            return self.node("Cast", [product], output, to=TensorProto.FLOAT)
        return self._low(self.node("MatMul", [given, weight], output or f"{name}.output"))

    def norm(self, x: str, name: str) -> str:
        """Return x / rms(x) * weight over the last dim, float32."""
        return self.node(
            "RMSNormalization", [x, self.scale(name)], f"{name}.output",
            axis=-1, epsilon=self.config.norm_eps, stash_type=TensorProto.FLOAT,
        )  # fmt: skip

    def add_norm(self, x: str, residual: str, name: str) -> tuple[str, str]:
        """Return (norm of x + residual, x + residual), both float32."""
        total = self.node("Add", [self.float32(x), residual], f"{name}.sum")
        return self.norm(total, name), total

    def kept(self, x: str, name: str) -> str:
        """Return x [1, sequence, width] from position logits_from on."""
        out = super().kept(x, name)
        return self._low(out) if x in self.low else out

    def float32(self, x: str) -> str:
        """Return x as float32."""
        if self.dtype == "fp32" or x not in self.low:
            return x
        return self.node("Cast", [x], f"{x}.fp32", to=TensorProto.FLOAT)

    def lowered(self, x: str) -> str:
        """Return x in the matrices' type, made once for all that use it."""
        if self.dtype == "fp32" or x in self.low:
            return x
        if x not in self.cast:
            self.cast[x] = self._low(self.node("Cast", [x], f"{x}.{self.dtype}", to=self.kind))
        return self.cast[x]

    def _low(self, name: str) -> str:
        self.low.add(name)
        return name
