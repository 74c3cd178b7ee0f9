"""One command for every family: finds a checkpoint's family and turns its options into that family's export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from edgemed.bundle import Bundle, bundle_name
from edgemed.checkpoints import open_checkpoint, read_json
from edgemed.errors import CannotRead, InvalidInput
from edgemed.export import FORMATS, ExportOptions
from edgemed.export.compare import compare_with_torch, worth_comparing
from edgemed.export.graph_writer import MatrixFormat
from edgemed.export.published import Conversion, write_published_bundle
from edgemed.export.write import write_native_bundle
from edgemed.families import opened_torch

_BLOCKS = {"int8": 32, "int4": 64}


def convert_checkpoint(folder: Path, output: Path, options: ExportOptions) -> Bundle:
    """Return the bundle; see `edgemed.export.export_bundle`."""
    for value in (options.decoder, options.vision):
        if value not in FORMATS:
            raise InvalidInput(f"format is {value!r}; one of {', '.join(FORMATS)} was expected")
    if not (folder / "config.json").is_file():
        raise CannotRead(f"{folder} has no config.json; the folder of a checkpoint was expected")
    if opened_torch.family_of(read_json(folder / "config.json")) == "native":
        return _native(folder, output, options)
    return _published(folder, output, options)


def _native(folder: Path, output: Path, options: ExportOptions) -> Bundle:
    if options.vision not in ("auto", "fp32") or options.decoder == "int4" or options.compat or options.cache:
        raise InvalidInput("a native checkpoint exports with decoder int8 or fp32 and none of vision, compat and cache")
    shrink = None if options.decoder == "fp32" else options.shrink
    return write_native_bundle(
        folder, output, name=options.name, slices=options.slices, shrink_decoder=shrink, replace=options.replace
    )


def _published(folder: Path, output: Path, options: ExportOptions) -> Bundle:
    checkpoint = open_checkpoint(folder, extra=options.extra)
    asked = {"compat": options.compat, "cache": options.cache}
    published = opened_torch.describe(checkpoint, **{k: v for k, v in asked.items() if v is not None})
    for note in published.notes:
        options.tell(note)
    if checkpoint.replaced:
        options.tell(f"{len(checkpoint.replaced)} tensors of the folder are replaced by those given beside it")
    conversion = Conversion(options.name or bundle_name(folder.resolve()), _formats(options))
    wanted = worth_comparing(published) if options.compare is None else options.compare
    if options.compare is None and not wanted:
        options.tell("the graphs are not compared with torch: the weights are too large for this machine's memory")

    def check(paths: Mapping[str, Path]) -> dict[str, bytes]:
        if not wanted:
            return {"reports/parity.json": json.dumps({"compared": False}).encode()}
        return compare_with_torch(published, paths, conversion, options.slices)

    return write_published_bundle(
        checkpoint, published, output, conversion, replace=options.replace, progress=options.progress, check=check
    )


def _formats(options: ExportOptions) -> dict[str, MatrixFormat]:
    formats = {}
    for role, wanted in (("decoder", options.decoder), ("vision_encoder", options.vision)):
        if wanted in _BLOCKS:
            formats[role] = MatrixFormat(wanted, options.block or _BLOCKS[wanted])  # type: ignore[arg-type]
    return formats
