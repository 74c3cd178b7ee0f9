"""Checkpoint -> bundle, one weight at a time: what is larger than the memory is converted, too.

Covers the order of work, the two targets, going on where an earlier run was stopped, room on the disk, and leaving
nothing half-written. Does not cover what the graphs compute (`decoder_graph`, `portable_decoder`, `traced_graph`) or
which families there are (`edgemed.families.opened_torch`). A native bundle for onnxruntime is `write`'s.

While it runs, everything lies in `.<bundle>.part` beside the bundle. A run that is interrupted leaves it, and the same
command goes on from there; a run that fails removes it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from edgemed import __version__
from edgemed.bundle import MANIFEST, Bundle, graph_file, write_bundle
from edgemed.checkpoints import Checkpoint
from edgemed.errors import CannotWrite
from edgemed.export.decoder_graph import build_decoder_graph
from edgemed.export.graph_writer import TYPES, Computed, GraphWriter, MatrixFormat, Precision, WeightFile, room
from edgemed.export.mixed_precision import in_mixed_precision
from edgemed.export.portable_decoder import build_portable_decoder, portable_spec
from edgemed.export.traced_graph import build_traced_graph
from edgemed.families.published_torch import Published
from edgemed.graphs import GraphSpec

Progress = Callable[[int, int], None]
"""Called with (weights written, weights in all), in elements."""

_SPARE = 1.01  # what the estimate of the size leaves for nodes and norms
_NOT_PACKED = ("embedding.weight", "router.weight", "box_draft.table")
_LICENCE = (
    "Weights: those of the checkpoint that this bundle was made from. Their terms are their owner's; "
    "edgemed adds none.\n"
)


Build = Callable[[Published, str, GraphSpec, GraphWriter], onnx.ModelProto]


@dataclass(frozen=True)
class Target:
    """What a bundle is made for: the precisions its graphs may have, that of "auto" first, and how they are written.

    standard: only operators of the ONNX standard, every value in the type that it is computed in. spec: the GraphSpec
    of the decoder in a precision. build: writes the graph of a role.
    """

    name: str
    decoder: tuple[Precision, ...]
    vision: tuple[Precision, ...]
    standard: bool
    spec: Callable[[GraphSpec, Computed], GraphSpec]
    build: Build


def _fused(published: Published, role: str, spec: GraphSpec, writer: GraphWriter) -> onnx.ModelProto:
    if role != "decoder":
        return build_traced_graph(published.modules[role], published.tensors[role], spec, writer)
    return build_decoder_graph(
        published.decoder, published.tensors[role], spec,
        embedding_dtype="exact", experts=published.experts, writer=writer,
    )  # fmt: skip


def _portable(published: Published, role: str, spec: GraphSpec, writer: GraphWriter) -> onnx.ModelProto:
    computed = writer.matrices.computed
    if role != "decoder":
        graph = build_traced_graph(published.modules[role], published.tensors[role], spec, writer)
        return in_mixed_precision(graph) if computed == "fp16" else graph
    return build_portable_decoder(
        published.decoder, published.tensors[role], spec, dtype=computed, experts=published.experts, writer=writer
    )


ONNXRUNTIME = Target(
    "onnxruntime", ("fp32", "int8", "int4"), ("fp32", "int8", "int4"), False, lambda spec, _: spec, _fused
)
TENSORRT = Target(
    "tensorrt", ("fp16", "bf16", "fp32", "int8", "int4"), ("fp16", "fp32", "int8"), True, portable_spec, _portable
)
TARGETS: Mapping[str, Target] = {target.name: target for target in (ONNXRUNTIME, TENSORRT)}


@dataclass(frozen=True)
class Conversion:
    """How a checkpoint becomes a bundle: its name, the format of the matrices by role (others are exact), the target.

    notice, licences: of the weights, for the bundle.
    """

    name: str
    formats: Mapping[str, MatrixFormat] = field(default_factory=dict)
    target: Target = ONNXRUNTIME
    notice: str = _LICENCE
    licences: Mapping[str, str] = field(default_factory=lambda: {"weights": "as the checkpoint's owner says"})

    def format_of(self, role: str) -> MatrixFormat:
        """Return the format of a role's matrices."""
        return self.formats.get(role, MatrixFormat(standard=self.target.standard))

    def specs(self, published: Published) -> dict[str, GraphSpec]:
        """Return the GraphSpec of each graph that is written, by role."""
        decoder = self.format_of("decoder").computed
        return {
            role: self.target.spec(spec, decoder) if role == "decoder" else spec
            for role, spec in published.specs.items()
        }


def write_published_bundle(
    checkpoint: Checkpoint,
    published: Published,
    output: Path,
    conversion: Conversion,
    *,
    replace: bool = False,
    progress: Progress | None = None,
    check: Callable[[Mapping[str, Path]], dict[str, bytes]] | None = None,
) -> Bundle:
    """Return the bundle written to `output`.

    check: gets the graphs by role before anything is kept, gives report files for the bundle, or raises.

    Raises CannotWrite where the disk has no room or `output` is taken, and what `check` raises; then nothing is left.
    """
    output = Path(output).absolute()
    taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if taken and not (replace and (output / MANIFEST).is_file()):
        what = "it holds something that is not a bundle" if replace else "it exists already"
        raise CannotWrite(f"cannot write a bundle to {output}: {what}; choose another folder")
    part = output.with_name(f".{output.name}.part")
    try:
        _start(part, _plan(checkpoint, published, conversion), published, conversion)
        paths = _write_graphs(part, published, conversion, progress)
        reports = check(paths) if check else {}
        files: dict[str, bytes | Path] = {}
        for role, path in paths.items():
            files[graph_file(role)] = path
            if (data := _data_of(path)).exists():
                files[f"{graph_file(role)}.data"] = data
        bundle = write_bundle(
            output,
            name=conversion.name,
            family=published.family,
            graphs=conversion.specs(published),
            files={**files, **published.files, **reports, "NOTICE": conversion.notice.encode()},
            precision={role: conversion.format_of(role).precision for role in published.specs},
            versions={p: version(p) for p in ("onnx", "torch")} | {"edgemed": __version__},
            licences=conversion.licences,
            settings=published.settings,
            replace=replace,
            move=True,
        )
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CannotWrite(f"cannot write the bundle {output}: {error.strerror or 'refused'}") from error
    except Exception:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(part, ignore_errors=True)
    return bundle


def _plan(checkpoint: Checkpoint, published: Published, conversion: Conversion) -> dict[str, Any]:
    """Return what must be the same for a run to go on with what an earlier one wrote."""
    parts = [*checkpoint.stored.values(), *(s for a in checkpoint.adapters.values() for s in (a.down, a.up))]
    beside = {stored.file for stored in parts}  # a tensor may come from a file outside the folder
    files = sorted({p.resolve() for p in (*checkpoint.folder.rglob("*"), *beside) if p.is_file()})
    return {
        "edgemed": __version__,
        "files": [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files],
        "adapters": {name: adapter.scale for name, adapter in sorted(checkpoint.adapters.items())},
        "formats": {role: asdict(conversion.format_of(role)) for role in published.specs},
        "cache": published.specs["decoder"].dims["cache"].max,
    }


def _start(part: Path, plan: dict[str, Any], published: Published, conversion: Conversion) -> None:
    """Make the folder of the work in progress, or take that of a run with the same plan. Raises CannotWrite."""
    file = part / "plan.json"
    text = json.dumps(plan)
    if not (file.is_file() and file.read_text(encoding="utf-8") == text):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        file.write_text(text, encoding="utf-8")
    written = sum(p.stat().st_size for p in part.rglob("*") if p.is_file())
    needed = estimated_bytes(published, conversion) - written
    if (free := shutil.disk_usage(part).free) < needed:
        raise CannotWrite(
            f"the bundle needs about {needed / 1e9:.1f} GB and {part.parent} has {free / 1e9:.1f} GB free; "
            "free space there or choose another folder"
        )


def estimated_bytes(published: Published, conversion: Conversion) -> int:
    """Return about how many bytes the graphs take; what is not packed has at most as many as in the checkpoint."""
    config = published.decoder
    total = published.specs["decoder"].dims["cache"].max * config.head_dim * 4  # the rotary tables
    for role, module in published.modules.items():
        form, tensors = conversion.format_of(role), published.tensors[role]
        weights = [(name, name, tuple(weight.shape)) for name, weight in module.state_dict().items()]
        if role == "decoder" and config.tied:
            weights.append(("head.weight", "embedding.weight", (config.vocabulary, config.width)))
        for name, source, shape in weights:
            itemsize = TYPES[form.computed].itemsize if form.standard else min(4, tensors.itemsize(source))
            if form.packed and len(shape) == 2 and not name.endswith(_NOT_PACKED):
                total += form.packed_bytes(*shape)
            else:
                total += room(math.prod(shape), itemsize)
    return int(total * _SPARE)


def _write_graphs(
    part: Path, published: Published, conversion: Conversion, progress: Progress | None
) -> dict[str, Path]:
    """Return the graphs by role, each written unless an earlier run has finished it."""
    sizes = {r: sum(p.numel() for p in m.state_dict().values()) for r, m in published.modules.items()}
    total, done = sum(sizes.values()), 0
    paths = {}
    for role, spec in conversion.specs(published).items():
        path = paths[role] = part / graph_file(role)
        started = done

        def advance(size: int, most: int = started + sizes[role]) -> None:
            nonlocal done
            done = min(done + size, most)  # the scales of blocks come on top of their weights
            if progress:
                progress(done, total)

        if not path.exists():
            weights = WeightFile(_data_of(path))
            writer = GraphWriter(conversion.format_of(role), weights, advance)
            try:
                graph = conversion.target.build(published, role, spec, writer)
            finally:
                weights.close()
            weights.finish()
            temporary = path.with_suffix(".tmp")
            onnx.save(graph, temporary)
            temporary.replace(path)
        done = started
        advance(sizes[role])
    return paths


def _data_of(graph: Path) -> Path:
    return graph.with_name(f"{graph.name}.data")
