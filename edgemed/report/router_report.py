"""What the routers of a mixture of experts said about one question: shares by layer, and every token's probabilities.

Covers text and image tokens apart. Does not cover what an expert is good at.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgemed.core import Answer, Prompt
from edgemed.errors import InvalidInput

SCHEMA = "edgemed.router/1"


def to_router_report(answer: Answer, prompt: Prompt) -> dict[str, Any]:
    """Return plain JSON values: for each layer with experts the share of tokens that each expert got, and all
    probabilities [tokens, layers, experts], prompt tokens first.

    image: tokens that stand for rows of the image or of a region; their ids lie above every id that was written or
    could be. Raises InvalidInput if the answer was made without looking at the routers.
    """
    if answer.router is None:
        raise InvalidInput("the routers were not looked at; ask with InferOptions(router=True)")
    probabilities = answer.router  # [tokens, layers, experts]
    ids = np.array([*answer.prompt_ids, *answer.generated_ids])[: len(probabilities)]
    rows = np.zeros(len(ids), np.bool_) if answer.vocabulary is None else ids >= answer.vocabulary
    chosen = probabilities.argmax(axis=2)  # [tokens, layers]
    experts = probabilities.shape[2]

    def shares(of: Any) -> list[list[float]] | None:
        if not of.any():
            return None
        return [[round(float((layer == e).mean()), 4) for e in range(experts)] for layer in chosen[of].T]

    return {
        "schema": SCHEMA,
        "prompt": prompt.text,
        "tokens": {"image": int(rows.sum()), "text": int((~rows).sum())},
        "share_by_layer": {"image": shares(rows), "text": shares(~rows), "all": shares(rows | True)},
        "margin_min": round(float(np.abs(np.diff(np.sort(probabilities, axis=2)[..., -2:], axis=2)).min()), 6),
        "probabilities": [[[round(float(p), 6) for p in row] for row in token] for token in probabilities],
    }
