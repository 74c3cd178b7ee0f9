"""accept_draft: how much of a draft plain greedy decoding would have written, and the token that follows.

Meaning, with best[i] the best token after draft[:i] under the grammar's mask for that position:

    accepted = 0
    while accepted < len(draft) and draft[accepted] == best[accepted]:
        accepted += 1
    next = best[accepted]

`best` has one more entry than `draft` and may have lain on the device since `box_head` or `masked_argmax` wrote it, so
that a checked draft costs one copy of two integers to the host. Covers greedy decoding; sampling needs probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgemed.errors import InvalidInput
from edgemed.triton_kernels.variants import Buffer, Grid, Launcher, Variant

if TYPE_CHECKING:
    import triton.language as tl

LONGEST = 32


@dataclass(frozen=True)
class Accepted:
    """How many tokens of the draft hold, and the token after them."""

    count: int
    next_token: int


def accept_draft(draft: npt.NDArray[np.integer], best: npt.NDArray[np.integer]) -> Accepted:
    """Return the longest accepted prefix and the next token. NumPy reference, and the path of the CPU.

    draft: [n]; best: [n + 1]. Raises InvalidInput where the lengths do not fit.
    """
    _check(draft.shape, best.shape)
    wrong = np.flatnonzero(draft != best[:-1])
    count = int(wrong[0]) if len(wrong) else len(draft)
    return Accepted(count, int(best[count]))


def accept_draft_prefix(
    draft: tl.pointer_type,
    best: tl.pointer_type,
    result: tl.pointer_type,
    length: tl.int32,
    longest: tl.constexpr,
) -> None:
    """Write [accepted, next] to `result`."""
    place = tl.arange(0, longest)
    there = place < length
    differs = tl.load(draft + place, mask=there, other=0) != tl.load(best + place, mask=there, other=0)
    accepted = tl.min(tl.where(there & differs, place, length), axis=0)
    tl.store(result, accepted)
    tl.store(result + 1, tl.load(best + accepted))


def variants() -> list[Variant]:
    """Return what is compiled: one kernel of one warp, for drafts of up to 32 tokens."""
    return [
        Variant(
            name="accept_draft",
            op="accept_draft",
            kernel="accept_draft_prefix",
            arguments={"draft": "*i32", "best": "*i32", "result": "*i32", "length": "i32"},
            constants={"longest": LONGEST},
            grid=Grid(),
            warps=1,
        )
    ]


@dataclass(frozen=True, eq=False)
class AcceptedBuffer:
    """The result on a device: int32 [2]."""

    result: Buffer

    def download(self, launcher: Launcher) -> Accepted:
        """Return the result on the host."""
        count, next_token = launcher.download(self.result).tolist()
        return Accepted(count, next_token)


def launch_accept_draft(launcher: Launcher, draft: Buffer, best: Buffer) -> AcceptedBuffer:
    """Start the kernel and return where its result will be. draft: int32 [n], best: int32 [n + 1], on the device.

    Raises InvalidInput where the lengths do not fit or the draft has more than 32 tokens.
    """
    _check(tuple(draft.shape), tuple(best.shape))
    if draft.shape[0] > LONGEST:
        raise InvalidInput(f"a draft of {draft.shape[0]} tokens; up to {LONGEST} were expected")
    found = AcceptedBuffer(launcher.empty((2,), np.int32))
    launcher.launch(variants()[0], draft=draft, best=best, result=found.result, length=draft.shape[0])
    return found


def run_accept_draft(launcher: Launcher, draft: npt.NDArray[np.int32], best: npt.NDArray[np.int32]) -> Accepted:
    """Return what `accept_draft` returns, by the kernel: everything goes to the device and comes back."""
    return launch_accept_draft(launcher, launcher.upload(draft), launcher.upload(best)).download(launcher)


def _check(draft: tuple[int, ...], best: tuple[int, ...]) -> None:
    if len(draft) != 1 or not draft[0] or best != (draft[0] + 1,):
        raise InvalidInput(f"draft {draft}, best {best}; [n] with n from 1 on and [n + 1] were expected")
