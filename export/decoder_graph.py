"""Writes a llama-style decoder as one ONNX graph of onnxruntime's fused operators, straight from its weights.

Covers prefill, steps and several tokens on top of a cache, in one graph: grouped-query attention with an in-place
cache, fused norms, logits from a given position on, the hidden states, and the box draft. The weights are fp32;
`edgemed.calibration.weight_only` makes the int8 graph from it. Does not cover TensorRT, which has none of these
operators, nor batches above 1.

Nothing is traced: the arithmetic is that of `edgemed.models.llama`, node by node, and the parity test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgemed.errors import InvalidInput
from edgemed.graphs import DimRange, GraphSpec, TensorSpec

if TYPE_CHECKING:
    from edgemed.models.llama import LlamaConfig

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]

SIDES = 4
"""Sides of a box in the order they are written: x0, y0, x1, y1."""

_FUSED = "com.microsoft"
_OPSET = 21
_IR_VERSION = 10
_LENGTHS = ("seqlens_k", "total_sequence_length")
_ROPE = ("rope_cos", "rope_sin")
_TO_THE_END = np.iinfo(np.int64).max


def decoder_spec(config: LlamaConfig, *, image_rows: DimRange, cache: int = 1024, draft: bool = True) -> GraphSpec:
    """Return the GraphSpec of the decoder that `build_decoder_graph` writes.

    image_rows: how many rows of `image_tokens` (image and region tokens) a prompt may bring.
    cache: tokens the cache holds: prompt and answer together.
    """
    state_shape = (1, config.kv_heads, "cache", config.head_dim)
    names = [f"{kind}_{i}" for i in range(config.layers) for kind in ("key", "value")]
    fed = (
        TensorSpec("input_ids", "int64", (1, "sequence")),
        TensorSpec("image_tokens", "float32", ("rows", config.width)),
        TensorSpec("past_length", "int64", (1,)),
        TensorSpec("logits_from", "int64", (1,)),
    )
    returned = [
        TensorSpec("logits", "float32", (1, "kept", config.vocabulary)),
        TensorSpec("hidden", "float32", (1, "kept", config.width)),
    ]
    if draft:
        returned.append(TensorSpec("box_draft", "int64", (1, "kept", SIDES)))
    return GraphSpec(
        role="decoder",
        inputs=(*fed, *(TensorSpec(f"past_{n}", "float32", state_shape) for n in names)),
        outputs=(*returned, *(TensorSpec(f"present_{n}", "float32", state_shape) for n in names)),
        dims={
            "sequence": DimRange(1, 1, cache),
            "kept": DimRange(1, 1, cache),
            "rows": image_rows,
            "cache": DimRange(cache, cache, cache),
        },
        state=tuple((f"present_{n}", f"past_{n}") for n in names),
    )


def build_decoder_graph(
    config: LlamaConfig, tensors: Tensors, spec: GraphSpec, *, embedding_dtype: str = "float16"
) -> onnx.ModelProto:
    """Return the ONNX model of a decoder with the weights `tensors`, its inputs and outputs as `spec` says.

    tensors: the names and [out, in] layouts of `edgemed.models.llama.Llama.state_dict()`, any float dtype.
    embedding_dtype: how the embedding table is stored; float16 halves it, at a relative error of 2 ** -11.

    Ids below config.vocabulary are tokens, id vocabulary + i is row i of `image_tokens`. `past_length` tokens of the
    cache are valid; a smaller number than last time rolls back. `logits_from` counts within this call's ids.

    Raises InvalidInput where a tensor is missing or has another shape than `config` says.
    """
    return _Builder(config, tensors, spec).build(embedding_dtype)


class _Builder:
    """Collects nodes and initializers. A method adds the nodes of one part and returns the name of what it computes."""

    def __init__(self, config: LlamaConfig, tensors: Tensors, spec: GraphSpec) -> None:
        self.config = config
        self.tensors = tensors
        self.spec = spec
        self.cache = spec.dims["cache"].max
        self.draft = any(t.name == "box_draft" for t in spec.outputs)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def build(self, embedding_dtype: str) -> onnx.ModelProto:
        """Return the checked model."""
        c = self.config
        self._positions()
        x = self._embed(embedding_dtype)  # [1, sequence, width]
        normed = self._norm(x, "layers.0.attention_norm")
        for i in range(c.layers):
            x, normed = self._layer(i, x, normed)
        self._ends(normed)
        graph = helper.make_graph(
            self.nodes,
            "decoder",
            [_value_info(t) for t in self.spec.inputs],
            [_value_info(t) for t in self.spec.outputs],
            list(self.initializers.values()),
        )
        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_FUSED, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="edgemed")

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _positions(self) -> None:
        """Compute what every attention node needs: the cache's length after this call (seqlens_k: less 1), tables."""
        c = self.config
        sequence = self.node("Shape", ["input_ids"], "sequence", start=1, end=2)  # [1]
        total = self.node("Add", ["past_length", sequence], "total")  # [1]
        last = self.node("Sub", [total, self.constant("one", np.array([1]))], "last")
        self.node("Cast", [last], _LENGTHS[0], to=TensorProto.INT32)  # [1]: batch of one
        total_int32 = self.node("Cast", [total], "total_int32", to=TensorProto.INT32)
        self.node("Squeeze", [total_int32], _LENGTHS[1])  # a scalar
        exponent = np.arange(0, c.head_dim, 2, dtype=np.float64) / c.head_dim
        angle = np.arange(self.cache, dtype=np.float64)[:, None] * c.rope_theta**-exponent  # [cache, head_dim / 2]
        self.constant(_ROPE[0], np.cos(angle).astype(np.float32))
        self.constant(_ROPE[1], np.sin(angle).astype(np.float32))

    def _embed(self, dtype: str) -> str:
        """Return [1, sequence, width]: embedding rows, or rows of image_tokens where the id is past the vocabulary."""
        c = self.config
        table = self.constant("embedding.weight", self.tensor("embedding.weight", c.vocabulary, c.width).astype(dtype))
        vocabulary, zero = self.constant("vocabulary", np.array(c.vocabulary)), self.constant("zero", np.array(0))
        from_image = self.node("GreaterOrEqual", ["input_ids", vocabulary], "from_image")
        token = self.node("Where", [from_image, zero, "input_ids"], "token")
        shifted = self.node("Sub", ["input_ids", vocabulary], "shifted")
        row = self.node("Where", [from_image, shifted, zero], "row")
        text = self.node("Gather", [table, token], "text_rows", axis=0)
        if dtype != "float32":
            text = self.node("Cast", [text], "text_rows_fp32", to=TensorProto.FLOAT)
        image = self.node("Gather", ["image_tokens", row], "image_rows", axis=0)
        choose = self.node("Unsqueeze", [from_image, self.constant("last_axis", np.array([-1]))], "choose")
        return self.node("Where", [choose, image, text], "embeddings")

    def _layer(self, i: int, x: str, normed: str) -> tuple[str, str]:
        """Add layer i. Return (residual stream after it, its norm for what follows)."""
        c, p = self.config, f"layers.{i}."
        heads = c.heads + 2 * c.kv_heads
        qkv = self._linear(normed, p + "qkv", heads * c.head_dim, c.width)  # [1, sequence, heads * head_dim]
        mixed = self.node(
            "GroupQueryAttention",
            [qkv, "", "", f"past_key_{i}", f"past_value_{i}", *_LENGTHS, *_ROPE],
            p + "mixed",
            more_outputs=[f"present_key_{i}", f"present_value_{i}"],
            domain=_FUSED,
            num_heads=c.heads,
            kv_num_heads=c.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=c.head_dim**-0.5,
        )
        last = i == c.layers - 1
        if last:  # from here on only the positions that are returned are needed
            mixed, x = self._kept(mixed, p + "mixed_kept"), self._kept(x, p + "residual_kept")
        attended = self._linear(mixed, p + "out", c.width, c.heads * c.head_dim)
        normed, x = self._add_norm(attended, x, p + "mlp_norm")
        gate_up = self._linear(normed, p + "gate_up", 2 * c.inner, c.width)
        gate, up = p + "gate", p + "up"
        self.node("Split", [gate_up], gate, more_outputs=[up], axis=-1, num_outputs=2)
        silu = self.node("QuickGelu", [gate], p + "silu", domain=_FUSED, alpha=1.0)  # x * sigmoid(x)
        inner = self.node("Mul", [silu, up], p + "inner")
        mlp = self._linear(inner, p + "down", c.width, c.inner)
        normed, x = self._add_norm(mlp, x, "norm" if last else f"layers.{i + 1}.attention_norm")
        return x, normed

    def _ends(self, hidden: str) -> None:
        """Add the graph's outputs: hidden, logits and the box draft, all [1, kept, ...]."""
        c = self.config
        self.node("Identity", [hidden], "hidden")
        self._linear(hidden, "embedding" if c.tied else "head", c.vocabulary, c.width, stored="head", output="logits")
        if not self.draft:
            return
        rank = c.draft_rank
        mapped = self._linear(hidden, "box_draft.map", SIDES * rank, c.width)
        shape = self.constant("draft_shape", np.array([0, 0, SIDES, rank]))
        per_side = self.node("Reshape", [mapped, shape], "draft_per_side")  # [1, kept, 4, rank]
        table = self.tensor("box_draft.table", c.bins, rank)
        scores = self.node("MatMul", [per_side, self.constant("box_draft.table", table.T)], "draft_scores")
        self.node("ArgMax", [scores], "box_draft", axis=-1, keepdims=0)

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _linear(self, x: str, name: str, rows: int, columns: int, *, stored: str = "", output: str = "") -> str:
        """Return x @ weight.T for the [rows, columns] tensor `name`.weight, stored transposed as MatMul wants it."""
        matrix = self.tensor(f"{name}.weight", rows, columns).T
        weight = self.constant(f"{stored or name}.weight", matrix)
        return self.node("MatMul", [x, weight], output or f"{name}.output")

    def _norm(self, x: str, name: str) -> str:
        scale = self.constant(f"{name}.weight", self.tensor(f"{name}.weight", self.config.width))
        eps = self.config.norm_eps
        return self.node(
            "SimplifiedLayerNormalization", [x, scale], f"{name}.output", axis=-1, epsilon=eps, stash_type=1
        )

    def _add_norm(self, x: str, residual: str, name: str) -> tuple[str, str]:
        """Return (norm of x + residual, x + residual)."""
        scale = self.constant(f"{name}.weight", self.tensor(f"{name}.weight", self.config.width))
        total = f"{name}.sum"
        normed = self.node(
            "SkipSimplifiedLayerNormalization",
            [x, residual, scale],
            f"{name}.output",
            more_outputs=["", "", total],
            domain=_FUSED,
            epsilon=self.config.norm_eps,
        )
        return normed, total

    def _kept(self, x: str, name: str) -> str:
        """Return x [1, sequence, width] from position logits_from on."""
        end = self.constant("to_the_end", np.array([_TO_THE_END]))
        return self.node("Slice", [x, "logits_from", end, self.constant("axis_1", np.array([1]))], name)

    def node(
        self, op: str, inputs: Sequence[str], output: str, *, more_outputs: Sequence[str] = (), **attributes: Any
    ) -> str:
        """Add one node, named after its first output, and return that output."""
        self.nodes.append(helper.make_node(op, inputs, [output, *more_outputs], name=output, **attributes))
        return output

    def constant(self, name: str, value: Array) -> str:
        """Store `value` under `name` unless it is there already, and return the name."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def tensor(self, name: str, *shape: int) -> npt.NDArray[np.float32]:
        """Return the weight `name` as float32, checked against `shape`."""
        if name not in self.tensors:
            raise InvalidInput(f"the checkpoint has no tensor {name}; this decoder needs {self.config.layers} layers")
        value = np.asarray(self.tensors[name])
        if value.shape != shape:
            raise InvalidInput(f"tensor {name} is {list(value.shape)}; the decoder's config says {list(shape)}")
        return value.astype(np.float32)


def _value_info(tensor: TensorSpec) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, kind, list(tensor.shape))
