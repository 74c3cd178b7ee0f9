"""Writes the graphs of a bundle: trained weights to ONNX, and the comparison of the two. Imports on use only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

    from edgemed.bundle import Bundle

__all__ = ["export_bundle"]


def export_bundle(
    checkpoint: Path,
    output: Path,
    *,
    name: str | None = None,
    slices: Path | None = None,
    shrink_decoder: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None,
    replace: bool = False,
) -> Bundle:
    """Return the bundle made from a checkpoint folder; see `edgemed.export.write.write_native_bundle`."""
    from edgemed.export.write import write_native_bundle

    return write_native_bundle(
        checkpoint, output, name=name, slices=slices, shrink_decoder=shrink_decoder, replace=replace
    )
