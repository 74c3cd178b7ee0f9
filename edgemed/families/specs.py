"""The GraphSpec of a llama-style decoder, which all families share. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgemed.graphs import DimRange, Feeds, GraphSpec, TensorSpec

if TYPE_CHECKING:
    from edgemed.models.llama import LlamaConfig

SIDES = 4
"""Sides of a box in the order they are written: x0, y0, x1, y1."""

TEXT, BOXED = "texts", "boxed"
"""Dims of a decoder with a split head: positions that may go on with any token, and with a coordinate alone."""

SPLIT_HEAD = ("text_at", "box_at")
"""The inputs of a decoder with a split head; one without a part for coordinates has the first. See `decoder_spec`."""


def has_split_head(spec: GraphSpec) -> bool:
    """Return whether a decoder computes logits only where they are asked for."""
    return any(t.name == SPLIT_HEAD[0] for t in spec.inputs)


def has_box_head(spec: GraphSpec) -> bool:
    """Return whether the head of a decoder has a part for coordinates alone."""
    return any(t.name == SPLIT_HEAD[1] for t in spec.inputs)


def with_split_head(spec: GraphSpec) -> GraphSpec:
    """Return the spec of a decoder that computes logits where they are asked for, without a part for coordinates."""
    if has_split_head(spec):
        return spec
    fed = len(spec.fed_inputs)  # state comes last
    where = TensorSpec(SPLIT_HEAD[0], "int64", (TEXT,))
    logits = next(t for t in spec.outputs if t.name == "logits")
    batch, _, vocabulary = logits.shape
    return replace(
        spec,
        inputs=(*spec.inputs[:fed], where, *spec.inputs[fed:]),
        outputs=tuple(replace(t, shape=(batch, TEXT, vocabulary)) if t is logits else t for t in spec.outputs),
        dims={**spec.dims, TEXT: DimRange(0, 1, spec.dims["kept"].max)},
    )


def every_logit(spec: GraphSpec, kept: int) -> Feeds:
    """Return the feeds with which a decoder gives all logits that it has for all kept positions."""
    fed = {t.name for t in spec.fed_inputs}
    return {name: np.arange(kept) for name in SPLIT_HEAD if name in fed}


def decoder_spec(
    config: LlamaConfig,
    *,
    image_rows: DimRange,
    cache: int = 1024,
    draft: bool = True,
    split_head: bool = False,
    experts: Sequence[int] = (),
) -> GraphSpec:
    """Return the GraphSpec of the decoder: prefill, steps and several tokens on top of a cache, in one graph.

    image_rows: how many rows of `image_tokens` (image and region tokens) a prompt may bring.
    cache: tokens the cache holds: prompt and answer together.
    split_head: logits are computed where they are asked for: of the kept positions `text_at` over the whole vocabulary,
    of `box_at` over the coordinates alone (`box_logits`). Without, of all kept positions over the whole vocabulary.
    experts: how many each layer has; where a layer has more than one, an output `router` holds what each of these
    layers' router said, float32 [1, kept, layers with experts, experts].
    """
    state_shape = (1, config.kv_heads, "cache", config.head_dim)
    names = [f"{kind}_{i}" for i in range(config.layers) for kind in ("key", "value")]
    fed: tuple[TensorSpec, ...] = (
        TensorSpec("input_ids", "int64", (1, "sequence")),
        TensorSpec("image_tokens", "float32", ("rows", config.width)),
        TensorSpec("past_length", "int64", (1,)),
        TensorSpec("logits_from", "int64", (1,)),
    )
    returned = [
        TensorSpec("logits", "float32", (1, TEXT if split_head else "kept", config.vocabulary)),
        TensorSpec("hidden", "float32", (1, "kept", config.width)),
    ]
    if draft:
        returned.append(TensorSpec("box_draft", "int64", (1, "kept", SIDES)))
    if routed := [count for count in experts if count > 1]:
        returned.append(TensorSpec("router", "float32", (1, "kept", len(routed), max(routed))))
    dims = {
        "sequence": DimRange(1, 1, cache),
        "kept": DimRange(1, 1, cache),
        "rows": image_rows,
        "cache": DimRange(cache, cache, cache),
    }
    if split_head:
        fed = (*fed, *(TensorSpec(name, "int64", (dim,)) for name, dim in zip(SPLIT_HEAD, (TEXT, BOXED), strict=True)))
        returned.append(TensorSpec("box_logits", "float32", (1, BOXED, config.bins)))
        dims |= {TEXT: DimRange(0, 1, cache), BOXED: DimRange(0, 0, cache)}
    return GraphSpec(
        role="decoder",
        inputs=(*fed, *(TensorSpec(f"past_{n}", "float32", state_shape) for n in names)),
        outputs=(*returned, *(TensorSpec(f"present_{n}", "float32", state_shape) for n in names)),
        dims=dims,
        state=tuple((f"present_{n}", f"past_{n}") for n in names),
    )
