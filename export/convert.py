"""One command for every family: finds a checkpoint's family and turns its options into that family's export."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgemed.bundle import Bundle, bundle_name
from edgemed.checkpoints import open_checkpoint, read_json
from edgemed.errors import CannotRead, InvalidInput
from edgemed.export import FORMATS, ExportOptions
from edgemed.export.card import notice_text
from edgemed.export.compare import compare_with_torch, worth_comparing
from edgemed.export.graph_writer import MatrixFormat, Precision
from edgemed.export.parity import Row
from edgemed.export.published import ONNXRUNTIME, TARGETS, Conversion, Target, write_published_bundle
from edgemed.export.write import LICENCES, native_card, write_native_bundle
from edgemed.families import opened_torch
from edgemed.families.native_torch import read_config

_BLOCKS = {"int8": 32, "int4": 64}


def convert_checkpoint(folder: Path, output: Path, options: ExportOptions) -> Bundle:
    """Return the bundle; see `edgemed.export.export_bundle`."""
    if options.target not in TARGETS:
        raise InvalidInput(f"target is {options.target!r}; one of {', '.join(TARGETS)} was expected")
    for value in (options.decoder, options.vision):
        if value not in FORMATS:
            raise InvalidInput(f"format is {value!r}; one of {', '.join(FORMATS)} was expected")
    if not (folder / "config.json").is_file():
        raise CannotRead(f"{folder} has no config.json; the folder of a checkpoint was expected")
    target = TARGETS[options.target]
    native = opened_torch.family_of(read_json(folder / "config.json")) == "native"
    if native and target is ONNXRUNTIME:
        return _native(folder, output, options)
    conversion = Conversion(options.name or bundle_name(folder.resolve()), _formats(target, options), target)
    if not native:
        return _streamed(folder, output, options, conversion)
    if options.compat:
        raise InvalidInput("a native checkpoint has no compat; leave --compat out")
    conversion = replace(conversion, notice=notice_text(read_config(folder)), licences=LICENCES)
    return _streamed(folder, output, options, conversion, lambda rows: native_card(folder, rows))


def _native(folder: Path, output: Path, options: ExportOptions) -> Bundle:
    if (
        options.vision not in ("auto", "fp32")
        or options.decoder not in ("auto", "fp32", "int8")
        or options.compat
        or options.cache
    ):
        raise InvalidInput("a native checkpoint exports with decoder int8 or fp32 and none of vision, compat and cache")
    shrink = None if options.decoder == "fp32" else options.shrink
    return write_native_bundle(
        folder, output, name=options.name, slices=options.slices, shrink_decoder=shrink, replace=options.replace
    )


def _streamed(
    folder: Path,
    output: Path,
    options: ExportOptions,
    conversion: Conversion,
    card: Callable[[Sequence[Row]], bytes] | None = None,
) -> Bundle:
    checkpoint = open_checkpoint(folder, extra=options.extra)
    asked = {"compat": options.compat, "cache": options.cache}
    published = opened_torch.describe(checkpoint, **{k: v for k, v in asked.items() if v is not None})
    for note in published.notes:
        options.tell(note)
    if checkpoint.replaced:
        options.tell(f"{len(checkpoint.replaced)} tensors of the folder are replaced by those given beside it")
    wanted = worth_comparing(published) if options.compare is None else options.compare
    if options.compare is None and not wanted:
        options.tell("the graphs are not compared with torch: the weights are too large for this machine's memory")

    def check(paths: Mapping[str, Path]) -> dict[str, bytes]:
        rows: Sequence[Row] = ()
        report: Mapping[str, Any] = {"compared": False}
        if wanted:
            rows, report = compare_with_torch(published, paths, conversion, options.slices)
        reports = {"reports/parity.json": json.dumps(report, indent=1 if wanted else None).encode()}
        return reports | ({"reports/card.md": card(rows)} if card else {})

    return write_published_bundle(
        checkpoint, published, output, conversion, replace=options.replace, progress=options.progress, check=check
    )


def _formats(target: Target, options: ExportOptions) -> dict[str, MatrixFormat]:
    """Return the format of every role whose matrices are not exact. Raises InvalidInput where a target has it not."""
    chosen: dict[str, Precision] = {}
    for role, option, wanted, allowed in (
        ("decoder", "decoder", options.decoder, target.decoder),
        ("vision_encoder", "vision", options.vision, target.vision),
    ):
        if wanted != "auto" and wanted not in allowed:
            raise InvalidInput(
                f"--{option} is {wanted}, --target {target.name} takes auto, {', '.join(allowed)} there; choose one of "
                "them or another target"
            )
        chosen[role] = allowed[0] if wanted == "auto" else wanted  # type: ignore[assignment]
    if target.standard and chosen["vision_encoder"] != "fp32":
        chosen |= {"projector": "fp16", "mask_decoder": "fp16"}
    return {
        role: MatrixFormat(wanted, options.block or _BLOCKS.get(wanted, 32), standard=target.standard)
        for role, wanted in chosen.items()
        if wanted != "fp32"
    }
