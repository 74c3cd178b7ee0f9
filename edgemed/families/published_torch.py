"""The weights of a published checkpoint under our names, read one at a time: what both published families build from.

Covers joining several published tensors into one of ours (query, key and value; gate and up), and what the export and
the torch back end need to know of a checkpoint (`Published`). Does not cover which key becomes which (`medrega_torch`,
`medplib_torch`) or reading files (`edgemed.checkpoints`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgemed.checkpoints import Checkpoint
from edgemed.errors import InvalidInput
from edgemed.graphs import GraphSpec
from edgemed.models.llama import LlamaConfig


@dataclass(frozen=True)
class Piece:
    """One published tensor: its key and the shape it must have."""

    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Published:
    """An opened checkpoint: what of it goes into a bundle, and its modules and weights by role.

    specs: of each graph. files: name inside a bundle -> bytes. settings: of the bundle's manifest. notes: what the
    export must say, one line each. modules: by role, without memory for their weights (meta device). tensors: the
    weights by role. experts: how many each decoder layer has. kept_fp32: how the names of weights end that never get
    fewer bits.
    """

    family: str
    specs: Mapping[str, GraphSpec]
    files: Mapping[str, bytes]
    settings: Mapping[str, object]
    notes: tuple[str, ...]
    modules: Mapping[str, nn.Module]
    tensors: Mapping[str, PublishedTensors]
    decoder: LlamaConfig
    experts: tuple[int, ...]
    kept_fp32: tuple[str, ...] = ()

    def load(self, role: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the module of a role in evaluation mode, its weights copied in `dtype`."""
        tensors = self.tensors[role]
        state = {
            name: tensors[name].to(torch.float32 if name.endswith(self.kept_fp32) else dtype, copy=True)
            for name in tensors
        }
        self.modules[role].load_state_dict(state, assign=True)
        return self.modules[role].eval()


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

    def itemsize(self, name: str) -> int:
        """Return the bytes of one element as one weight is stored, without reading it."""
        return max(getattr(torch, self._checkpoint.dtype(piece.key)).itemsize for piece in self.pieces[name])

    def _read(self, key: str) -> Tensor:
        tensor = self._checkpoint.read(key)
        if not tensor.is_floating_point():
            raise InvalidInput(
                f"the checkpoint's {key} is stored as {str(tensor.dtype).removeprefix('torch.')}, a floating-point "
                "type was expected; give the checkpoint as it was before it was quantized"
            )
        return tensor
