"""A decoder with its KV cache: what the torch back end calls token by token, inputs and outputs as the ONNX graph's.

Covers prefill, steps and several tokens on top of a cache, for a dense decoder and one with experts. Does not cover
batches above 1, the decoding loop or training. `edgemed.export.decoder_graph` writes the same as an ONNX graph.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from edgemed.models.llama import Llama


class CachedDecoder(nn.Module):
    """A decoder and the keys and values of up to `cache` tokens, allocated once and written in place."""

    def __init__(self, decoder: Llama, cache: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.cache = cache
        c = decoder.config
        weight = decoder.embedding.weight
        shape = (c.layers, 2, 1, c.kv_heads, cache, c.head_dim)
        self.register_buffer("kept", torch.zeros(shape, dtype=weight.dtype, device=weight.device), persistent=False)
        self.kept: Tensor

    def forward(
        self,
        input_ids: Tensor,
        image_tokens: Tensor,
        past_length: Tensor,
        logits_from: Tensor,
        text_at: Tensor | None = None,
        box_at: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return (logits [1, kept, vocabulary], hidden [1, kept, width], then box_draft and router where there is one).

        With text_at and box_at, int64 [positions] among the kept ones, logits are those of text_at alone, and the last
        of what is returned is box_logits [1, positions, bins] of box_at, over the coordinates.

        input_ids int64 [1, tokens]: id vocabulary + i is row i of image_tokens [rows, width]. past_length [1]: how many
        tokens of the cache are valid; a smaller number than last time rolls back. logits_from [1]: the first of these
        tokens that is returned. box_draft int64 [1, kept, 4]: the likeliest bin of each side. router fp32 [1, kept,
        layers with experts, experts]: probabilities.

        Raises ValueError where the tokens do not fit the cache.
        """
        past, first, tokens = int(past_length), int(logits_from), input_ids.shape[1]
        if not 0 <= past <= self.cache - tokens:
            raise ValueError(f"{tokens} tokens after {past} do not fit a cache of {self.cache}")
        positions = torch.arange(past, past + tokens, device=input_ids.device)[None]
        mask = None
        if past and tokens > 1:  # row i sees the past and the tokens up to itself
            mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=input_ids.device).tril(past)
        hidden, routed = self.decoder.forward_routed(
            self.decoder.embed_mixed(input_ids, image_tokens),
            positions,
            mask,
            [partial(self._remember, layer, past) for layer in range(len(self.kept))],
        )
        hidden = hidden[:, first:]
        returned = [self.decoder.logits(hidden if text_at is None else hidden[:, text_at]), hidden]
        if self.decoder.box_draft is not None:
            returned.append(self.decoder.box_draft(hidden).argmax(-1))
        if routed:
            returned.append(torch.stack([probabilities[:, first:] for probabilities in routed], dim=2))
        if box_at is not None:
            c = self.decoder.config
            returned.append(self.decoder.logits(hidden[:, box_at])[..., c.first_coordinate :][..., : c.bins])
        return tuple(returned)

    def reset(self) -> None:
        """Forget all tokens: every key and value is zero again."""
        self.kept.zero_()

    def _remember(self, layer: int, past: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [1, kv_heads, past + tokens, head_dim] after writing those of this call's tokens."""
        end = past + key.shape[2]
        keys, values = self.kept[layer]  # [1, kv_heads, cache, head_dim] each
        keys[:, :, past:end] = key
        values[:, :, past:end] = value
        return keys[:, :, :end], values[:, :, :end]
