"""Writes a llama-style decoder as one ONNX graph of onnxruntime's fused operators, straight from its weights.

Covers prefill, steps and several tokens on top of a cache, in one graph: grouped-query attention with an in-place
cache, fused norms, experts in place of a layer's MLP, logits from a given position on, the hidden states, and the box
draft. Does not cover TensorRT, which has none of these operators (`portable_decoder` builds on what is here), nor
batches above 1.

Nothing is traced: the arithmetic is that of `edgemed.models.llama` and `edgemed.models.moe`, node by node, and the
parity test compares the two. Weights are read one at a time, so that a decoder larger than the memory can be written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from edgemed.blocks import as_float32
from edgemed.errors import InvalidInput
from edgemed.export.graph_writer import FUSED, GraphWriter, smallest
from edgemed.families.specs import SIDES, has_box_head, has_split_head
from edgemed.graphs import GraphSpec

if TYPE_CHECKING:
    from edgemed.models.llama import LlamaConfig

Array = npt.NDArray[Any]
Tensors = Mapping[str, Any]

_LENGTHS = ("seqlens_k", "total_sequence_length")
ROPE = ("rope_cos", "rope_sin")
WHOLE = slice(None)
_TO_THE_END = np.iinfo(np.int64).max


def build_decoder_graph(
    config: LlamaConfig,
    tensors: Tensors,
    spec: GraphSpec,
    *,
    embedding_dtype: str = "float16",
    experts: Sequence[int] = (),
    writer: GraphWriter | None = None,
) -> onnx.ModelProto:
    """Return the ONNX model of a decoder with the weights `tensors`, its inputs and outputs as `spec` says.

    tensors: the names and [out, in] layouts of `edgemed.models.llama.Llama.state_dict()`, any float dtype, NumPy or
    torch; each is read once, when it is written.
    embedding_dtype: how the embedding table is stored; float16 halves it, at a relative error of 2 ** -11; "exact": in
    the smallest type that holds it. experts: how many each layer has; () means that all are dense. writer: where
    weights go and in which format.

    Ids below config.vocabulary are tokens, id vocabulary + i is row i of `image_tokens`. `past_length` tokens of the
    cache are valid; a smaller number than last time rolls back. `logits_from` counts within this call's ids.

    Raises InvalidInput where a tensor is missing or has another shape than `config` says.
    """
    return DecoderBuilder(config, tensors, spec, experts or [1] * config.layers, writer or GraphWriter()).build(
        embedding_dtype
    )


class DecoderBuilder:
    """Adds the parts of a decoder to a GraphWriter. A method adds one part and returns the name of what it computes.

    What another dialect writes in other operators has a method with a public name.
    """

    def __init__(
        self, config: LlamaConfig, tensors: Tensors, spec: GraphSpec, experts: Sequence[int], writer: GraphWriter
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.spec = spec
        self.experts = experts
        self.writer = writer
        self.cache = spec.dims["cache"].max
        self.draft = any(t.name == "box_draft" for t in spec.outputs)
        self.split_head = has_split_head(spec)
        self.box_head = has_box_head(spec)
        self.node, self.constant = writer.node, writer.constant
        self.routed: list[str] = []  # probabilities of each layer with experts, [1, kept, experts]

    def build(self, embedding_dtype: str) -> onnx.ModelProto:
        """Return the model."""
        c = self.config
        self.positions()
        x = self._embed(embedding_dtype)  # [1, sequence, width]
        normed = self.norm(x, "layers.0.attention_norm")
        for i in range(c.layers):
            x, normed = self._layer(i, x, normed)
        self._ends(normed)
        return self.writer.model(self.spec)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def positions(self) -> None:
        """Compute what every attention node needs: the cache's length after this call (seqlens_k: less 1), tables."""
        sequence = self.node("Shape", ["input_ids"], "sequence", start=1, end=2)  # [1]
        total = self.node("Add", ["past_length", sequence], "total")  # [1]
        last = self.node("Sub", [total, self.constant("one", np.array([1]))], "last")
        self.node("Cast", [last], _LENGTHS[0], to=TensorProto.INT32)  # [1]: batch of one
        total_int32 = self.node("Cast", [total], "total_int32", to=TensorProto.INT32)
        self.node("Squeeze", [total_int32], _LENGTHS[1])  # a scalar
        self.tables()

    def tables(self) -> None:
        """Store cosine and sine of every position's angles, float32 [cache, head_dim / 2], as `ROPE`."""
        c = self.config
        exponent = np.arange(0, c.head_dim, 2, dtype=np.float64) / c.head_dim
        angle = np.arange(self.cache, dtype=np.float64)[:, None] * c.rope_theta**-exponent  # [cache, head_dim / 2]
        self.constant(ROPE[0], np.cos(angle).astype(np.float32))
        self.constant(ROPE[1], np.sin(angle).astype(np.float32))

    def _embed(self, dtype: str) -> str:
        """Return [1, sequence, width]: embedding rows, or rows of image_tokens where the id is past the vocabulary."""
        c = self.config
        read = self.tensor("embedding.weight", c.vocabulary, c.width)
        table = self.writer.stored(
            "embedding.weight", c.vocabulary * c.width, lambda: self.embedding_table(read(), dtype)
        )
        vocabulary, zero = self.constant("vocabulary", np.array(c.vocabulary)), self.constant("zero", np.array(0))
        from_image = self.node("GreaterOrEqual", ["input_ids", vocabulary], "from_image")
        token = self.node("Where", [from_image, zero, "input_ids"], "token")
        shifted = self.node("Sub", ["input_ids", vocabulary], "shifted")
        row = self.node("Where", [from_image, shifted, zero], "row")
        text = self.node("Gather", [table, token], "text_rows", axis=0)
        if dtype != "float32":  # a cast of float32 to itself costs nothing
            text = self.node("Cast", [text], "text_rows_fp32", to=TensorProto.FLOAT)
        image = self.node("Gather", ["image_tokens", row], "image_rows", axis=0)
        choose = self.node("Unsqueeze", [from_image, self.constant("last_axis", np.array([-1]))], "choose")
        return self.node("Where", [choose, image, text], "embeddings")

    def embedding_table(self, table: Array, dtype: str) -> Array:
        """Return the embedding table as it is stored."""
        return smallest(table) if dtype == "exact" else as_float32(table).astype(dtype)

    def _layer(self, i: int, x: str, normed: str) -> tuple[str, str]:
        """Add layer i. Return (residual stream after it, its norm for what follows)."""
        c, p = self.config, f"layers.{i}."
        heads = c.heads + 2 * c.kv_heads
        qkv = self.linear(normed, p + "qkv", heads * c.head_dim, c.width)  # [1, sequence, heads * head_dim]
        mixed = self.add_attention(qkv, p, i)
        last = i == c.layers - 1
        if last:  # from here on only the positions that are returned are needed
            mixed, x = self.kept(mixed, p + "mixed_kept"), self.kept(x, p + "residual_kept")
        attended = self.linear(mixed, p + "out", c.width, c.heads * c.head_dim)
        normed, x = self.add_norm(attended, x, p + "mlp_norm")
        mlp = self.swiglu(normed, p) if self.experts[i] == 1 else self._mixture(normed, p + "mlp.", i)
        normed, x = self.add_norm(mlp, x, "norm" if last else f"layers.{i + 1}.attention_norm")
        return x, normed

    def add_attention(self, qkv: str, p: str, i: int) -> str:
        """Return [1, sequence, heads * head_dim]: attention of layer i over the cache, which gets this call's tokens.

        qkv: queries, keys and values before the rotation, [1, sequence, (heads + 2 kv_heads) * head_dim].
        """
        c = self.config
        return self.node(
            "GroupQueryAttention",
            [qkv, "", "", f"past_key_{i}", f"past_value_{i}", *_LENGTHS, *ROPE],
            p + "mixed",
            more_outputs=[f"present_key_{i}", f"present_value_{i}"],
            domain=FUSED,
            num_heads=c.heads,
            kv_num_heads=c.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=c.head_dim**-0.5,
        )

    def swiglu(self, x: str, p: str) -> str:
        """Return down(silu(gate(x)) * up(x)) with the weights under the prefix `p`, any shape [..., width]."""
        c = self.config
        gate_up = self.linear(x, p + "gate_up", 2 * c.inner, c.width)
        gate, up = p + "gate", p + "up"
        self.node("Split", [gate_up], gate, more_outputs=[up], axis=-1, num_outputs=2)
        inner = self.node("Mul", [self.silu(gate, p + "silu"), up], p + "inner")
        return self.linear(inner, p + "down", c.width, c.inner)

    def silu(self, x: str, name: str) -> str:
        """Return x * sigmoid(x)."""
        return self.node("QuickGelu", [x], name, domain=FUSED, alpha=1.0)

    def _mixture(self, x: str, p: str, i: int) -> str:
        """Return [1, tokens, width]: each token through the one expert that the router prefers, times its probability.

        The router is never rounded: margins of 2e-4 between two experts occur.
        """
        c, count = self.config, self.experts[i]
        read = self.tensor(p + "router.weight", count, c.width)
        router = self.writer.weight(p + "router.weight", count * c.width, lambda: read().T)
        logits = self.router_logits(x, router, p + "router.logits")
        probabilities = self.node("Softmax", [logits], p + "router.probabilities", axis=-1)  # [1, tokens, experts]
        last = i == c.layers - 1  # its tokens are cut to those that are returned already
        self.routed.append(probabilities if last else self.kept(probabilities, p + "router.kept"))
        chosen = self.node("ArgMax", [probabilities], p + "chosen", axis=-1, keepdims=0)  # [1, tokens]
        best = self.node("ReduceMax", [probabilities, self.constant("last_axis", np.array([-1]))], p + "best")
        rows = self.node("Squeeze", [x, self.constant("axis_0", np.array([0]))], p + "rows")  # [tokens, width]
        first = self.node("Squeeze", [chosen, "axis_0"], p + "expert_of_row")  # [tokens]
        mine = [
            self.node("Equal", [first, self.constant(f"expert_{e}", np.array(e))], f"{p}mine.{e}") for e in range(count)
        ]
        merged = self.merge_experts(rows, mine, p)
        whole = self.node("Unsqueeze", [merged, "axis_0"], p + "whole")
        return self.node("Mul", [whole, best], p + "out")

    def router_logits(self, x: str, router: str, name: str) -> str:
        """Return x @ router [width, experts] in float32."""
        return self.node("MatMul", [x, router], name)

    def merge_experts(self, rows: str, mine: Sequence[str], p: str) -> str:
        """Return [tokens, width]: every row through the expert e for which mine[e], bool [tokens], holds.

        Each expert gets its own tokens only. One that has none multiplies an empty matrix, for which the runtime reads
        no weight: a decoding step costs one expert, a prefill as many products as a dense model.
        """
        places, parts = [], []
        for e, own_rows in enumerate(mine):
            nonzero = self.node("NonZero", [own_rows], f"{p}nonzero.{e}")
            places.append(self.node("Transpose", [nonzero], f"{p}places.{e}"))
            own = self.node("GatherND", [rows, places[-1]], f"{p}own.{e}")  # [tokens of this expert, width]
            parts.append(self.swiglu(own, f"{p}experts.{e}."))
        order = self.node("Concat", places, p + "order", axis=0)  # [tokens, 1]
        sorted_rows = self.node("Concat", parts, p + "by_expert", axis=0)
        return self.node("ScatterND", [rows, order, sorted_rows], p + "merged")  # every row is replaced

    def _ends(self, hidden: str) -> None:
        """Add the graph's outputs: hidden, logits, the box draft, what the routers said, all [1, kept, ...]."""
        c = self.config
        self.node("Identity", [hidden], "hidden")
        head = "embedding" if c.tied else "head"
        asked = self.node("Gather", [hidden, "text_at"], "text_hidden", axis=1) if self.split_head else hidden
        self.linear(asked, head, c.vocabulary, c.width, stored="head", output="logits")
        if self.box_head:
            # Rows of the head a second time, 25 % of nano's and no part of a larger model's worth counting: a matrix in
            # blocks of integers cannot be cut at run time.
            boxed = self.node("Gather", [hidden, "box_at"], "box_hidden", axis=1)
            coordinates = slice(c.first_coordinate, c.first_coordinate + c.bins)
            self.linear(boxed, head, c.vocabulary, c.width, stored="box_head", output="box_logits", part=coordinates)
        if self.routed:
            axis = self.constant("axis_2", np.array([2]))
            per_layer = [self.node("Unsqueeze", [r, axis], f"{r}.layer") for r in self.routed]
            self.node("Concat", per_layer, "router", axis=2)
        if not self.draft:
            return
        rank = c.draft_rank
        mapped = self.linear(hidden, "box_draft.map", SIDES * rank, c.width)
        shape = self.constant("draft_shape", np.array([0, 0, SIDES, rank]))
        per_side = self.node("Reshape", [mapped, shape], "draft_per_side")  # [1, kept, 4, rank]
        table = as_float32(self.tensor("box_draft.table", c.bins, rank)())
        scores = self.draft_scores(per_side, table.T)
        self.node("ArgMax", [scores], "box_draft", axis=-1, keepdims=0)

    def draft_scores(self, x: str, table: Array) -> str:
        """Return x @ table [rank, bins] in float32."""
        return self.node("MatMul", [x, self.constant("box_draft.table", table)], "draft_scores")

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def linear(
        self, x: str, name: str, rows: int, columns: int, *, stored: str = "", output: str = "", part: slice = WHOLE
    ) -> str:
        """Return x @ weight[part].T for the [rows, columns] tensor `name`.weight."""
        read, rows = self.part_of(f"{name}.weight", rows, columns, part)
        return self.writer.matmul(x, f"{stored or name}.weight", rows, columns, read, output or f"{name}.output")

    def part_of(self, name: str, rows: int, columns: int, part: slice) -> tuple[Callable[[], Array], int]:
        """Return (what reads `part` of the rows of a matrix, how many these are)."""
        read = self.tensor(name, rows, columns)
        return lambda: read()[part], len(range(rows)[part])

    def norm(self, x: str, name: str) -> str:
        """Return x / rms(x) * weight over the last dim."""
        scale = self.scale(name)
        eps = self.config.norm_eps
        return self.node(
            "SimplifiedLayerNormalization", [x, scale], f"{name}.output", axis=-1, epsilon=eps, stash_type=1
        )

    def add_norm(self, x: str, residual: str, name: str) -> tuple[str, str]:
        """Return (norm of x + residual, x + residual)."""
        scale = self.scale(name)
        total = f"{name}.sum"
        normed = self.node(
            "SkipSimplifiedLayerNormalization",
            [x, residual, scale],
            f"{name}.output",
            more_outputs=["", "", total],
            domain=FUSED,
            epsilon=self.config.norm_eps,
        )
        return normed, total

    def kept(self, x: str, name: str) -> str:
        """Return x [1, sequence, width] from position logits_from on."""
        end = self.constant("to_the_end", np.array([_TO_THE_END]))
        return self.node("Slice", [x, "logits_from", end, self.constant("axis_1", np.array([1]))], name)

    def scale(self, name: str) -> str:
        """Store the weight of a norm and return its name."""
        return self.constant(f"{name}.weight", as_float32(self.tensor(f"{name}.weight", self.config.width)()))

    def tensor(self, name: str, *shape: int) -> Callable[[], Array]:
        """Return what reads the weight `name`, checked against `shape`."""

        def read() -> Array:
            if name not in self.tensors:
                raise InvalidInput(
                    f"the checkpoint has no tensor {name}; this decoder needs {self.config.layers} layers"
                )
            value = to_numpy(self.tensors[name])
            if value.shape != shape:
                raise InvalidInput(f"tensor {name} is {list(value.shape)}; the decoder's config says {list(shape)}")
            return value

        return read


def to_numpy(value: Any) -> Array:
    """Return an array, or a torch tensor's values without a copy; bfloat16 as `ml_dtypes` has it."""
    if isinstance(value, np.ndarray):
        return value
    import torch

    value = value.detach()
    if value.dtype == torch.bfloat16:
        return np.asarray(value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(value.numpy())
