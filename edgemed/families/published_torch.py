"""The weights of a published checkpoint under our names, read one at a time: what both published families build from.

Covers joining several published tensors into one of ours (query, key and value; gate and up). Does not cover which key
becomes which (`medrega_torch`, `medplib_torch`) or reading files (`edgemed.checkpoints`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edgemed.checkpoints import Checkpoint
from edgemed.errors import InvalidInput


@dataclass(frozen=True)
class Piece:
    """One published tensor: its key and the shape it must have."""

    key: str
    shape: tuple[int, ...]


class PublishedTensors(Mapping[str, Tensor]):
    """The weights of one role under our names, each read, and fused along dim 0, when it is asked for; none is kept.

    A decoder too large for the memory is exported from this mapping, without a module.
    """

    def __init__(self, checkpoint: Checkpoint, pieces: Mapping[str, tuple[Piece, ...]]) -> None:
        self._checkpoint = checkpoint
        self.pieces = pieces

    def __getitem__(self, name: str) -> Tensor:
        """Return one weight in the dtype it is stored in. Raises InvalidInput if that is no floating-point dtype."""
        parts = [self._read(piece.key) for piece in self.pieces[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    def _read(self, key: str) -> Tensor:
        tensor = self._checkpoint.read(key)
        if not tensor.is_floating_point():
            raise InvalidInput(
                f"the checkpoint's {key} is stored as {str(tensor.dtype).removeprefix('torch.')}, a floating-point "
                "type was expected; give the checkpoint as it was before it was quantized"
            )
        return tensor
