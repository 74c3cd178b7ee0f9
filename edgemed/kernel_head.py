"""The LM head beside an engine: Triton kernels take the decoder's hidden states and give the best allowed tokens.

Inside a box they read the rows of the coordinates alone, where a grammar leaves a few tokens those, else the whole
vocabulary; logits are never written. Covers choosing the kernel for each position, groups of eight positions, and
which GPU takes which format. Greedy decoding only: sampling and beams take logits from the engine's own head. Has not
run on a GPU yet; tests run it under Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgemed.backends.cuda_device import find_gpu
from edgemed.errors import BackendUnavailable
from edgemed.token_choice import NO_NUMBERS, Mask, NextToken, Numbers, spread_of
from edgemed.triton_kernels.box_head import BoxBest, LoadedRows, Rows, launch_box_head, load_rows
from edgemed.triton_kernels.head_file import check_head, read_head
from edgemed.triton_kernels.launch import CubinLauncher, target_for, targets_in
from edgemed.triton_kernels.masked_argmax import Best, launch_masked_argmax
from edgemed.triton_kernels.row_tiles import MOST_POSITIONS
from edgemed.triton_kernels.variants import Launcher
from edgemed.triton_kernels.weights import LOWEST, Matrix, load_matrix, pack

FEW = 1024
"""Up to so many allowed tokens are read as a list of rows; above, the whole vocabulary is."""

_LISTS_KEPT = 64  # of rows, on the device: 4 KiB each at most

Hidden = npt.NDArray[np.floating]


class KernelHead:
    """The head's matrix on one GPU, and the kernels that read it.

    head: [vocabulary, width] as `head_file.check_head` wants it.
    """

    def __init__(self, launcher: Launcher, head: Matrix) -> None:
        check_head(head)
        self.format = head.format
        self._launcher = launcher
        self._head = head
        self._matrix = load_matrix(launcher, head)
        self._loaded: dict[bytes, LoadedRows] = {}

    def rows(self, hidden: Hidden, masks: Sequence[Mask | None], numbers: Numbers) -> list[NextToken | None]:
        """Return what comes next at each position; None where its mask is None.

        hidden: [positions, width]. Raises InvalidInput where a logit is not finite.
        """
        states = hidden.astype(np.float16)
        found: list[NextToken | None] = [None] * len(masks)
        kinds: dict[str, list[int]] = {"numbers": [], "few": [], "all": []}
        for position, allowed in enumerate(masks):
            if allowed is not None:
                kinds[self._kind(allowed, numbers)].append(position)
        for kind, positions in kinds.items():
            for group in _groups(positions):
                wanted = [mask for position in group if (mask := masks[position]) is not None]
                for position, choice in zip(group, self._choose(kind, states[group], wanted, numbers), strict=True):
                    found[position] = choice
        return found

    def spread(self, hidden: npt.NDArray[np.float16], allowed: Mask, numbers: Numbers) -> float:
        """Return the standard deviation of the number that comes next among the allowed ones. hidden: [width].

        On the host: where numbers are not evenly spaced (ids of digits: a token each, and a byte) they are few.
        """
        open_here = allowed[numbers.ids]
        rows = self._head.take(numbers.ids[open_here]).to_float32()
        return spread_of(rows @ hidden.astype(np.float32), numbers.values[open_here])

    def _kind(self, allowed: Mask, numbers: Numbers) -> str:
        """Return which rows of the head a position needs."""
        if numbers.are_all_of(allowed):
            return "numbers"
        return "few" if np.count_nonzero(allowed) <= FEW else "all"

    def _choose(
        self, kind: str, states: npt.NDArray[np.float16], masks: Sequence[Mask], numbers: Numbers
    ) -> list[_Chosen]:
        """Return the best tokens of up to eight positions by one reading of the rows that they need."""
        allowed = np.stack(masks)
        hidden = self._launcher.upload(states)
        spreads: Sequence[float | None] = [None] * len(masks)
        best: Best | BoxBest
        if kind == "all":
            best = launch_masked_argmax(self._launcher, hidden, self._matrix, allowed).download(self._launcher)
        else:
            ids = numbers.ids if kind == "numbers" else np.flatnonzero(allowed.any(axis=0))
            found = launch_box_head(self._launcher, hidden, self._matrix, self._rows_of(ids), allowed[:, ids])
            best = found.download(self._launcher)
            if kind == "numbers" and (step := _step(numbers)) is not None:
                spreads = (best.spread * step).tolist()
        log_probs = best.peak.astype(np.float64) - best.log_sum_exp
        results = zip(states, masks, best.index.tolist(), log_probs.tolist(), spreads, strict=True)
        return [_Chosen(self, *result) for result in results]

    def _rows_of(self, ids: npt.NDArray[np.int64]) -> LoadedRows:
        """Return these rows, loaded once; a run of ids as the range that needs no list."""
        rows: Rows = ids
        if (np.diff(ids) == 1).all():
            rows = range(int(ids[0]), int(ids[-1]) + 1)
        key = ids.tobytes()
        if key not in self._loaded:
            if len(self._loaded) >= _LISTS_KEPT:
                self._loaded.clear()
            self._loaded[key] = load_rows(self._launcher, rows, self._head.rows)
        return self._loaded[key]


@dataclass(frozen=True, eq=False)
class _Chosen:
    """`NextToken` of one position: what a kernel chose under one mask; under another it is asked again."""

    head: KernelHead
    hidden: npt.NDArray[np.float16]
    allowed: Mask
    token: int
    log_prob: float
    known_spread: float | None

    def pick(self, allowed: Mask, temperature: float, rng: np.random.Generator) -> tuple[int, float]:
        """Return what `NextToken.pick` says."""
        assert temperature == 0
        if allowed is self.allowed or np.array_equal(allowed, self.allowed):
            return self.token, self.log_prob
        again = self.head.rows(self.hidden[None], [allowed], NO_NUMBERS)[0]
        assert again is not None
        return again.pick(allowed, temperature, rng)

    def spread(self, allowed: Mask, numbers: Numbers) -> float:
        """Return what `NextToken.spread` says."""
        if self.known_spread is not None and (allowed is self.allowed or np.array_equal(allowed, self.allowed)):
            return self.known_spread
        return self.head.spread(self.hidden, allowed, numbers)

    def kept(self) -> _Chosen:
        """Return itself: nothing lies in the decoder's memory."""
        return self


def _groups(positions: Sequence[int]) -> Iterator[list[int]]:
    """Yield the positions, as many at a time as a kernel takes."""
    for start in range(0, len(positions), MOST_POSITIONS):
        yield list(positions[start : start + MOST_POSITIONS])


def _step(numbers: Numbers) -> float | None:
    """Return by how much the numbers of neighbouring rows differ, or None where that is not the same for all."""
    steps = np.diff(numbers.values)
    return float(abs(steps[0])) if len(steps) and (steps == steps[0]).all() else None


def open_head(folder: Path, index: int, tell: Callable[[str], None]) -> KernelHead | None:
    """Return the head in a bundle's folder of kernels, on GPU `index`. tell: gets notes.

    None where there is no head, or no kernel for this GPU: the engine's own head does the same, and that is told. On a
    GPU that does not convert fp8 (before 8.9) the rows are rounded to int8, and that is told.

    Raises BundleError as `read_head`; BackendUnavailable and DeviceOutOfMemory as `CubinLauncher`.
    """
    head = read_head(folder)
    if head is None:
        return None
    try:
        target = target_for(find_gpu(index).capability, targets_in(folder))
    except BackendUnavailable as error:
        tell(f"GPU {index}: {error}; until then the engine's own head is used")
        return None
    if target < LOWEST.get(head.format, 0):
        tell(f"GPU {index} does not compute in fp8: the LM head is rounded to int8")
        head = pack(head.to_float32(), "int8")
    return KernelHead(CubinLauncher(folder, index), head)
