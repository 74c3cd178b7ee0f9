"""The connected pieces of a structure in three dimensions."""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

from edgemed.core import Mask

_MAX_RUNS = 4000  # of one mask; beyond, it is noise, and pairs of runs would take more than 16 MB


class Pieces:
    """The connected pieces (26 neighbours) of masks in consecutive slices, by runs down the columns and union-find."""

    def __init__(self) -> None:
        self._parent = array("i")  # not lists: a slice has some 300 runs, and an int takes 36 bytes there
        self._sizes = array("i")
        self.slices: dict[int, int] = {}
        """Slice -> the number of its first run."""
        self._runs: dict[int, npt.NDArray[np.int32]] = {}
        self._shape = (0, 0)

    def add(self, index: int, mask: Mask) -> bool:
        """Take the next slice; return False if the mask has more runs than a structure has."""
        runs = _runs(mask)
        if len(runs) > _MAX_RUNS:
            return False
        self._shape = (mask.shape[0], mask.shape[1])
        base = len(self._parent)
        self._parent.extend(range(base, base + len(runs)))
        self._sizes.extend((runs[:, 2] - runs[:, 1]).tolist())
        self.slices[index] = base
        self._runs[index] = runs
        self._link(runs, base, runs, base)
        if index - 1 in self.slices:
            self._link(runs, base, self._runs[index - 1], self.slices[index - 1])
        return True

    def _link(self, a: npt.NDArray[np.int32], a_base: int, b: npt.NDArray[np.int32], b_base: int) -> None:
        near = np.abs(a[:, None, 0] - b[None, :, 0]) <= 1
        near &= (a[:, None, 1] <= b[None, :, 2]) & (b[None, :, 1] <= a[:, None, 2])
        for i, j in np.argwhere(near).tolist():
            self._parent[self._root(a_base + i)] = self._root(b_base + j)

    def _root(self, run: int) -> int:
        while self._parent[run] != run:
            self._parent[run] = self._parent[self._parent[run]]
            run = self._parent[run]
        return run

    def smaller_than(self, share: float) -> set[int]:
        """Return the pieces with less than `share` of the largest one's pixels."""
        totals: dict[int, int] = {}
        for run, size in enumerate(self._sizes):
            root = self._root(run)
            totals[root] = totals.get(root, 0) + size
        most = max(totals.values(), default=0)
        return {root for root, size in totals.items() if size < share * most}

    def of(self, index: int) -> list[int]:
        """Return the piece of each run of a slice."""
        base = self.slices[index]
        return [self._root(base + i) for i in range(len(self._runs[index]))]

    def mask_without(self, index: int, pieces: set[int]) -> Mask:
        """Return the mask of a slice without these pieces."""
        mask = np.zeros(self._shape, np.bool_)
        for (column, start, end), piece in zip(self._runs[index].tolist(), self.of(index), strict=True):
            if piece not in pieces:
                mask[start:end, column] = True
        return mask


def _runs(mask: Mask) -> npt.NDArray[np.int32]:
    """Return [runs, 3]: column, first row, row after the last, of the True pixels down each column."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((1, 1), (0, 0))), axis=0).T  # [columns, rows + 1]
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    return np.column_stack((starts, ends[:, 1])).astype(np.int32)
