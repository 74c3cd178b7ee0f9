"""The GraphSpec of a llama-style decoder, which all families share. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgemed.graphs import DimRange, GraphSpec, TensorSpec

if TYPE_CHECKING:
    from edgemed.models.llama import LlamaConfig

SIDES = 4
"""Sides of a box in the order they are written: x0, y0, x1, y1."""


def decoder_spec(
    config: LlamaConfig,
    *,
    image_rows: DimRange,
    cache: int = 1024,
    draft: bool = True,
    experts: Sequence[int] = (),
) -> GraphSpec:
    """Return the GraphSpec of the decoder: prefill, steps and several tokens on top of a cache, in one graph.

    image_rows: how many rows of `image_tokens` (image and region tokens) a prompt may bring.
    cache: tokens the cache holds: prompt and answer together.
    experts: how many each layer has; where a layer has more than one, an output `router` holds what each of these
    layers' router said, float32 [1, kept, layers with experts, experts].
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
    if routed := [count for count in experts if count > 1]:
        returned.append(TensorSpec("router", "float32", (1, "kept", len(routed), max(routed))))
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
