"""Experts in place of a llama block's MLP: each token goes through one of them, scaled by the router's probability.

Covers evaluation of a top-1 mixture: no token is dropped, no noise, no load balancing. Does not cover capacity limits:
DeepSpeed's capacity is ceil(tokens / experts * factor), so with two experts and factor 2 it never drops a token, and a
gather per token gives the same to 7e-6 (tests/reference/medplib-tiny).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemed.models.llama import Block, Llama, LlamaConfig


class SwiGLU(nn.Module):
    """One expert: down(silu(gate) * up); gate and up are one matrix, as in a dense block."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # [..., inner] each
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class TopOneExperts(nn.Module):
    """out = p[e] * expert[e](x) with p = softmax(router(x)) and e = argmax p, the first one where two are equal."""

    def __init__(self, width: int, inner: int, experts: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(width, inner) for _ in range(experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (out [..., width] in the dtype of x, probabilities fp32 [..., experts]) of x [..., width].

        Each expert computes its own tokens only.
        """
        # fp32, autocast or not: bf16 keeps 8 bits, and margins of 2e-4 between two experts occur in 6,000 tokens.
        with torch.autocast(x.device.type, enabled=False):
            probabilities = F.linear(x.float(), self.router.weight.float()).softmax(dim=-1)
        chosen = probabilities.argmax(dim=-1)  # [...]
        scale = probabilities.amax(dim=-1, keepdim=True).to(x.dtype)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            tokens = chosen == index
            out[tokens] = expert(x[tokens]).to(x.dtype)
        return out * scale, probabilities


class MoeBlock(Block):
    """A llama layer whose MLP is `TopOneExperts`, under the name `mlp`."""

    def __init__(self, config: LlamaConfig, experts: int) -> None:
        super().__init__(config)
        self.mlp = TopOneExperts(config.width, config.inner, experts)

    def _add_mlp(self) -> None:
        """Add no dense MLP."""

    def _routed_mlp(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        out: tuple[Tensor, Tensor] = self.mlp(x)
        return out


class MoeLlama(Llama):
    """A llama decoder whose layer i has experts[i] experts; 1 means a dense layer."""

    def __init__(self, config: LlamaConfig, experts: Sequence[int]) -> None:
        if len(experts) != config.layers or min(experts, default=1) < 1:
            raise ValueError(f"experts {list(experts)}: one number from 1 on was expected for each of {config.layers}")
        counts = iter(experts)

        def block(c: LlamaConfig) -> Block:
            count = next(counts)
            return Block(c) if count == 1 else MoeBlock(c, count)

        super().__init__(config, block)
