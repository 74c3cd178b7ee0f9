"""The language model of every family: a llama-style decoder (RMSNorm, RoPE, grouped-query attention, SwiGLU).

Covers the network in torch; `edgemed.export.decoder_graph` writes the same arithmetic as an ONNX graph. Does not
cover the KV cache (`cached_decoder`, the graph), the tokenizer or the loss.

In the native family one coordinate bin is one token: the 4 sides of a box are 4 tokens from `first_coordinate` on, and
an auxiliary head guesses all 4 at once from the hidden state at `<box>`. The published families have neither (`bins` is
0); a mixture of experts overrides a block's MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDES = 4
"""Sides of a box, in the order they are written: x0, y0, x1, y1."""

Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes key and value [batch, kv_heads, tokens, head_dim] of a call's tokens; returns those that they attend to."""

_INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of the decoder. `inner` is the SwiGLU width.

    `bins` coordinate tokens start at id `first_coordinate`; with 0 bins there is no coordinate and no box draft.
    """

    vocabulary: int
    first_coordinate: int = 0
    width: int = 384
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    inner: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True
    bins: int = 1000
    draft_rank: int = 64

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads or self.head_dim % 2 or self.draft_rank % 2 or self.width % 2:
            raise ValueError(
                f"heads {self.heads}, kv_heads {self.kv_heads}, head_dim {self.head_dim}, width {self.width}, "
                f"draft_rank {self.draft_rank}: kv_heads must divide heads, the other three must be even"
            )
        if not 0 <= self.first_coordinate <= self.vocabulary - self.bins:
            raise ValueError(
                f"{self.bins} coordinates from id {self.first_coordinate} do not fit a vocabulary of {self.vocabulary}"
            )


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, computed in fp32 whatever autocast says, returned in the dtype of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., width]."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin, fp32 [*positions.shape, head_dim / 2], of each position times theta ** (-2 i / head_dim)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angle = positions[..., None].float() * theta**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [batch, heads, tokens, head_dim] turned by its position, in fp32 inside.

    Channel i is paired with channel i + head_dim / 2 (not interleaved).

    cos, sin: [batch, 1, tokens, head_dim / 2].
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + swiglu(norm(x)). Query, key, value: one matrix; gate, up: one.

    A subclass with another MLP overrides `_add_mlp` (its submodules) and `_routed_mlp` (its arithmetic).
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.attention_norm = RMSNorm(c.width, c.norm_eps)
        self.qkv = nn.Linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=False)
        self.out = nn.Linear(c.heads * c.head_dim, c.width, bias=False)
        self.mlp_norm = RMSNorm(c.width, c.norm_eps)
        self._add_mlp()

    def _add_mlp(self) -> None:
        c = self.config
        self.gate_up = nn.Linear(c.width, 2 * c.inner, bias=False)
        self.down = nn.Linear(c.inner, c.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Return x [batch, tokens, width] after this layer."""
        return self.forward_routed(x, cos, sin, mask)[0]

    def forward_routed(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, remember: Remember | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (x [batch, tokens, width] after this layer, router probabilities [batch, tokens, experts] or None)."""
        x = x + self._attend(self.attention_norm(x), cos, sin, mask, remember)
        added, probabilities = self._routed_mlp(self.mlp_norm(x))
        return x + added, probabilities

    def _routed_mlp(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # [batch, tokens, inner] each
        return self.down(F.silu(gate) * up), None

    def _attend(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, remember: Remember | None = None
    ) -> Tensor:
        c = self.config
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, c.heads + 2 * c.kv_heads, c.head_dim).transpose(1, 2)
        query, key, value = qkv.split((c.heads, c.kv_heads, c.kv_heads), dim=1)  # [batch, heads, tokens, head_dim]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if remember is not None:
            key, value = remember(key, value)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        # One token attends to all there is: torch's is_causal would leave it the first key alone.
        causal = mask is None and tokens > 1
        mixed = F.scaled_dot_product_attention(
            query, key, value.to(query.dtype), attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, c.heads * c.head_dim))
        return result


class BoxDraft(nn.Module):
    """Guesses the 4 sides of a box from one hidden state: logit[side, bin] = (map[side] @ hidden) . table[bin]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.rank = config.draft_rank
        self.map = nn.Linear(config.width, SIDES * config.draft_rank, bias=False)
        self.table = nn.Parameter(coordinate_features(config.bins, config.draft_rank))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [..., 4, bins] for hidden [..., width]."""
        per_side = self.map(hidden).unflatten(-1, (SIDES, self.rank))  # [..., 4, rank]
        return F.linear(per_side, self.table)


class Llama(nn.Module):
    """The decoder. `forward` maps embeddings to hidden states; `embed` and `logits` are its two ends over token ids.

    block: what makes one layer from the config: `Block`, or a subclass of it.
    """

    def __init__(self, config: LlamaConfig, block: Callable[[LlamaConfig], Block] = Block) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tied else nn.Linear(config.width, config.vocabulary, bias=False)
        self.box_draft = BoxDraft(config) if config.bins else None
        self._initialise()

    def forward(self, embeddings: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return hidden states [batch, tokens, width] after the final norm.

        embeddings: [batch, tokens, width]; positions: int [batch, tokens], free to restart inside a row.
        mask: bool (True = may be attended) or additive float, [tokens, tokens], [batch, tokens, tokens] or
        [batch, 1, tokens, tokens], last dim the attended token; None means each token sees itself and those before it.
        """
        return self.forward_tapped(embeddings, positions, mask, tap=0)[0]

    def forward_tapped(
        self, embeddings: Tensor, positions: Tensor, mask: Tensor | None, tap: int
    ) -> tuple[Tensor, Tensor]:
        """Return (hidden as `forward`, the residual stream [batch, tokens, width] before layer `tap`, not normed)."""
        cos, sin = rope_table(positions, self.config.head_dim, self.config.rope_theta)
        cos, sin = cos[:, None], sin[:, None]  # [batch, 1, tokens, head_dim / 2]
        if mask is not None and mask.ndim == 3:
            mask = mask[:, None]
        x = tapped = embeddings
        for i, layer in enumerate(self.layers):
            if i == tap:
                tapped = x
            x = layer(x, cos, sin, mask)
        hidden: Tensor = self.norm(x)
        return hidden, tapped

    def forward_routed(
        self,
        embeddings: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        remember: Sequence[Remember | None] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return (hidden as `forward`, router probabilities [batch, tokens, experts] of each layer with experts).

        remember: one for each layer, where keys and values of earlier calls are attended to; the mask's last dim counts
        those too.
        """
        cos, sin = rope_table(positions, self.config.head_dim, self.config.rope_theta)
        cos, sin = cos[:, None], sin[:, None]  # [batch, 1, tokens, head_dim / 2]
        if mask is not None and mask.ndim == 3:
            mask = mask[:, None]
        x, routed = embeddings, []
        for layer, own in zip(self.layers, remember or [None] * len(self.layers), strict=True):
            assert isinstance(layer, Block)
            x, probabilities = layer.forward_routed(x, cos, sin, mask, own)
            if probabilities is not None:
                routed.append(probabilities)
        hidden: Tensor = self.norm(x)
        return hidden, tuple(routed)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embedding rows [*ids.shape, width]."""
        rows: Tensor = self.embedding(ids)
        return rows

    def embed_mixed(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Return embeddings [*ids.shape, width]: id vocabulary + i is row i of `rows`, as in the decoder graph.

        rows: [any number, width], image rows and region rows in the order the ids count them.
        """
        first = self.config.vocabulary
        mixed = self.embed(ids.clamp(max=first - 1))
        from_rows = ids >= first
        mixed[from_rows] = rows[ids[from_rows] - first].to(mixed.dtype)
        return mixed

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., vocabulary] of hidden states after the final norm."""
        return F.linear(hidden, self.embedding.weight if self.head is None else self.head.weight)

    def box_draft_logits(self, hidden: Tensor) -> Tensor:
        """Return [..., 4, bins]: for each side of a box a logit per bin, from hidden states where `<box>` went in.

        Raises ValueError where the decoder has no coordinates.
        """
        if self.box_draft is None:
            raise ValueError("this decoder has 0 bins: there is no box draft")
        guess: Tensor = self.box_draft(hidden)
        return guess

    @torch.no_grad()
    def _initialise(self) -> None:
        """Normal weights; what writes into the residual stream is scaled by depth; coordinates start smooth."""
        c = self.config
        for name, p in self.named_parameters():
            if p.ndim == 2 and name != "box_draft.table":
                nn.init.normal_(p, std=p.shape[1] ** -0.5 if name.startswith("box_draft") else _INIT_STD)
            if name.endswith(("out.weight", "down.weight")):
                p.mul_((2 * c.layers) ** -0.5)
        for table in (self.embedding, self.head):
            if table is not None and c.bins:
                rows = slice(c.first_coordinate, c.first_coordinate + c.bins)
                features = coordinate_features(c.bins, c.width)
                # A random turn spreads the features over all channels; it keeps the distances between bins.
                turn = torch.linalg.qr(torch.randn(c.width, c.width)).Q
                table.weight[rows] = features @ turn * (_INIT_STD * math.sqrt(c.width))


def coordinate_features(bins: int, width: int) -> Tensor:
    """Return unit rows [bins, width]: cosine and sine of each bin's centre at width / 2 rates, 1/2 to bins / 8 turns.

    The product of two rows falls smoothly with the distance of their bins, so neighbouring coordinates start alike.
    """
    centre = (torch.arange(bins, dtype=torch.float32) + 0.5) / bins
    turns = torch.logspace(math.log10(0.5), math.log10(max(bins / 8, 1.0)), width // 2)
    angle = 2 * math.pi * centre[:, None] * turns
    return torch.cat((angle.cos(), angle.sin()), dim=1) / math.sqrt(width / 2)
