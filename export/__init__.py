"""Writes the graphs of a bundle: a checkpoint's weights to ONNX, and the comparison of the two. Imports on use only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

    from edgemed.bundle import Bundle

__all__ = ["ExportOptions", "export_bundle"]

FORMATS = ("auto", "fp32", "fp16", "bf16", "int8", "int4")
"""How the matrices of a graph may be stored; which of them a target takes, and what auto means, is in `published`."""


@dataclass(frozen=True)
class ExportOptions:
    """What an export may be told.

    target: "onnxruntime" or "tensorrt", whose graphs have standard operators only. decoder, vision: one of FORMATS;
    for tensorrt, projector and mask decoder are fp32 where the vision encoder is, else fp16. block: weights that share
    a scale; None: 32 for int8, 64 for int4.
    compat, cache: as `describe` of the published families takes them. extra: prefix -> file whose tensors come with the
    checkpoint's. slices: scans to compare on. compare: whether the graphs are compared with torch; None: where the
    weights in float32 take at most a quarter of the memory.
    progress: called with (weights done, weights in all). shrink: makes a native decoder int8.
    """

    name: str | None = None
    target: str = "onnxruntime"
    decoder: str = "auto"
    vision: str = "auto"
    block: int | None = None
    compat: str | None = None
    cache: int | None = None
    extra: Mapping[str, Path] = field(default_factory=dict)
    slices: Path | None = None
    compare: bool | None = None
    replace: bool = False
    progress: Callable[[int, int], None] | None = None
    shrink: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None
    tell: Callable[[str], None] = print


def export_bundle(checkpoint: Path, output: Path, options: ExportOptions | None = None) -> Bundle:
    """Return the bundle made from a checkpoint folder of any family, which its config.json tells.

    Raises InvalidInput, CannotRead or NoInput where the checkpoint does not hold, BundleError where a graph does not
    compute what torch does, CannotWrite where the disk refuses; then nothing is written.
    """
    from edgemed.export.convert import convert_checkpoint

    return convert_checkpoint(checkpoint, output, options or ExportOptions())
