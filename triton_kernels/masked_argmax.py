"""masked_argmax: the best allowed token of each position, and what its probability needs, in one pass over the logits.

Meaning, for each position p:

    best[p], peak[p], mass[p] = none, -inf, 0
    for t in tokens:
        if allowed[p][t]:
            if logits[p][t] > peak[p]:          # a tie keeps the smaller t
                best[p], peak[p] = t, logits[p][t]
            mass[p] += exp(logits[p][t])
    log_sum_exp[p] = log(mass[p])               # computed relative to the peak, so that nothing overflows

so log(probability of best[p] among the allowed tokens) = peak[p] - log_sum_exp[p].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgemed.errors import InvalidInput


@dataclass(frozen=True, eq=False)
class Best:
    """Per position: the token id (int64), its logit (float32), log-sum-exp over the allowed logits (float32)."""

    index: npt.NDArray[np.int64]
    peak: npt.NDArray[np.float32]
    log_sum_exp: npt.NDArray[np.float32]


def masked_argmax(logits: npt.NDArray[np.float32], allowed: npt.NDArray[np.bool_]) -> Best:
    """Return the best allowed token of each position. NumPy reference.

    logits: float32 [positions, vocabulary]; allowed: bool, the same shape or broadcast to it.

    Raises InvalidInput where a position allows nothing, or where an allowed logit is NaN or infinite.
    """
    masked = np.where(allowed, logits, np.float32(-np.inf))  # [positions, vocabulary]
    index = masked.argmax(axis=1)
    peak = np.take_along_axis(masked, index[:, None], axis=1)  # [positions, 1]
    if not np.isfinite(peak).all():
        if not np.broadcast_to(allowed, logits.shape).any(axis=1).all():
            raise InvalidInput("no token is allowed at some position; a grammar must always allow one")
        raise InvalidInput("the decoder's logits are not finite; the weights or the image features are damaged")
    mass = np.exp(masked - peak).sum(axis=1)
    return Best(index, peak[:, 0], peak[:, 0] + np.log(mass))
