"""Calls of the decoder graph, and what its cache still holds of the prompt before.

Covers counting, timing, the number of tokens that the cache holds, and a prompt's beginning that needs no second
reading: most of a prompt are the rows of its images, which the next question about them has, too. Does not see answers,
grammars or drafts (`decoding`, `beam_search`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemed.backends import Outputs, Runner
from edgemed.graphs import Feeds

Rows = npt.NDArray[Any]

IMAGE_RUN = 16
"""So many rows in a row are an image, after which a prompt is cut; a region has fewer."""


@dataclass(eq=False)
class PromptCache:
    """The pieces of the last prompt that a Runner's cache begins with, by digest. One for each Runner.

    Whoever calls the Runner without it must `forget` first. rows: the array that `row_digests` are of, by the bytes of
    the ids that name the rows: reading 285 kB of nano's rows for each question takes 0.3 ms. It is not to be changed.
    """

    digests: list[bytes] = field(default_factory=list)
    rows: Rows | None = None
    row_digests: dict[bytes, bytes] = field(default_factory=dict)

    def forget(self) -> None:
        """Hold nothing: the next prompt is read from its first token."""
        self.digests.clear()

    def digest_of(self, rows: Rows, places: npt.NDArray[np.int64]) -> bytes:
        """Return a digest of some rows of an image, remembered as long as the same array is asked about."""
        if rows is not self.rows:
            self.rows, self.row_digests = rows, {}
        named = places.tobytes()
        if named not in self.row_digests:
            self.row_digests[named] = hashlib.blake2b(rows[places].tobytes(), digest_size=32).digest()
        return self.row_digests[named]


class Calls:
    """Calls the decoder with the next ids, and counts. `past`: how many ids its cache holds; less rolls it back."""

    def __init__(self, runner: Runner, fixed: Feeds, split_head: bool = False, box_head: bool = False) -> None:
        self.runner = runner
        self.fixed = fixed
        self.split_head = split_head
        self.box_head = box_head
        self.count = 0
        self.past = 0
        self.milliseconds = 0.0
        self.routed: list[npt.NDArray[np.float32]] = []  # of each call, [kept, layers with experts, experts]

    def run(
        self,
        ids: Sequence[int],
        logits_from: int = -1,
        text_at: Sequence[int] | None = None,
        box_at: Sequence[int] = (),
    ) -> Outputs:
        """Return the decoder's outputs from position `logits_from` of `ids` on, which follow the first `past` ids.

        text_at, box_at: of these positions, counted from `logits_from` on, logits are wanted, over the whole vocabulary
        and over the coordinates; default: of all, over the whole. A decoder without a split head gives all.
        """
        with self.timed():
            return self._run(ids, logits_from % len(ids), text_at, box_at)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of the block as the decoder's."""
        start = time.perf_counter()
        yield
        self.milliseconds += (time.perf_counter() - start) * 1000

    def _run(self, ids: Sequence[int], first: int, text_at: Sequence[int] | None, box_at: Sequence[int]) -> Outputs:
        feeds = {
            **self.fixed,
            "input_ids": np.array([ids], np.int64),
            "past_length": np.array([self.past], np.int64),
            "logits_from": np.array([first], np.int64),
        }
        if self.split_head:
            feeds["text_at"] = np.array(range(len(ids) - first) if text_at is None else text_at, np.int64)
        if self.box_head:
            feeds["box_at"] = np.array(box_at, np.int64)
        out = self.runner.run(feeds)
        if "router" in out:
            self.routed.append(out["router"][0])
        self.past += len(ids)
        self.count += 1
        return out

    def read_images(self, prompt_ids: Sequence[int], vocabulary: int, prompts: PromptCache) -> int:
        """Return how many ids of the prompt the cache held already; afterwards it holds all up to the last image.

        A call for each image that it did not hold: always cut at the same places, so that an answer is the same, bit
        for bit, whatever was asked before. These calls are timed and not counted. vocabulary: the id of row 0 of
        `image_tokens`.
        """
        rows = self.fixed["image_tokens"]
        ids = np.asarray(prompt_ids, np.int64)
        state, start, held, kept = hashlib.blake2b(digest_size=32), 0, 0, prompts.digests[:]
        prompts.forget()  # until a call that fails is over
        same = True
        for end in _image_ends(ids >= vocabulary):
            piece = ids[start:end]
            state.update(piece.tobytes())
            state.update(prompts.digest_of(rows, piece[piece >= vocabulary] - vocabulary))
            digest = state.digest()
            same = same and kept[len(prompts.digests) : len(prompts.digests) + 1] == [digest]
            if same:
                held = self.past = end
            else:
                self.run(piece.tolist(), text_at=())
            prompts.digests.append(digest)
            start = end
        self.count, self.routed = 0, []
        return held


def _image_ends(from_image: npt.NDArray[np.bool_]) -> list[int]:
    """Return where runs of IMAGE_RUN rows and more end, before the prompt's last token."""
    edges = np.flatnonzero(np.diff(from_image.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return [int(end) for start, end in edges if end - start >= IMAGE_RUN and end < len(from_image)]
