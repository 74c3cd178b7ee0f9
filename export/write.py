"""Checkpoint -> bundle: export, compare with torch, refuse what does not agree, write all of it or nothing."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from edgemed import __version__
from edgemed.box_confidence import to_markdown
from edgemed.bundle import Bundle, write_bundle
from edgemed.checkpoints import open_checkpoint
from edgemed.errors import BundleError
from edgemed.export.card import model_card, notice_text
from edgemed.export.compare import run_both
from edgemed.export.native import native_graphs
from edgemed.export.parity import Row, compare, read_scans, read_slices
from edgemed.families import opened_torch
from edgemed.families.native import TOKENIZER
from edgemed.families.native_text import NativeText
from edgemed.families.native_torch import (
    CONFIDENCE,
    CONFIDENCE_PLOT,
    FAMILY,
    load,
    native_specs,
    read_confidence,
    read_config,
    settings_of,
)

FP32_LIMIT = 2e-3
"""Largest relative error of an fp32 graph's output. Measured: below 1e-4; more means that the graph is wrong."""
INT8_COSINE = 0.999
"""Smallest cosine of the int8 decoder's logits with torch's."""
LICENCES: Mapping[str, str] = {"weights": "Apache-2.0", "LiteMedSAM weights": "Apache-2.0"}


def write_native_bundle(
    checkpoint: Path,
    output: Path,
    *,
    name: str | None = None,
    slices: Path | None = None,
    shrink_decoder: Callable[[onnx.ModelProto], onnx.ModelProto] | None = None,
    replace: bool = False,
) -> Bundle:
    """Return the bundle written to `output`.

    slices: folder of scans to compare on; default: files inside the pydicom package. shrink_decoder: makes the
    decoder's weights smaller (int8) after the fp32 graph was found to agree with torch; it is compared again.

    Raises BundleError naming graph and output if one does not agree, and what loading the checkpoint raises.
    """
    config = read_config(checkpoint)
    model = load(checkpoint)
    text = NativeText(checkpoint / "tokenizer.json")
    specs = native_specs(model)
    graphs = native_graphs(model, specs)
    images = read_slices(slices)
    precision = dict.fromkeys(graphs, "fp32")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = {role: folder / f"{role}.onnx" for role in graphs}
        for role, graph in graphs.items():
            onnx.save(graph, paths[role])
        rows = compare(model, paths, specs, text, images)
        for row in rows:
            if not row.relative_error <= FP32_LIMIT:
                raise BundleError(
                    f"{row.graph}: output {row.output} differs from torch by {row.relative_error:.1e} (relative), "
                    f"{FP32_LIMIT:.0e} is allowed; nothing was written"
                )
        small: list[Row] = []
        if shrink_decoder is not None:
            precision["decoder"] = "int8"
            onnx.save(shrink_decoder(graphs["decoder"]), paths["decoder"])
            small = [r for r in compare(model, paths, specs, text, images) if r.graph == "decoder"]
            for row in small:
                if row.output.startswith("logits") and not row.cosine >= INT8_COSINE:
                    raise BundleError(
                        f"decoder in int8: cosine of {row.output} with torch is {row.cosine:.5f}, "
                        f"at least {INT8_COSINE} was expected; nothing was written"
                    )
        published = opened_torch.describe(open_checkpoint(checkpoint))
        _, answers = run_both(published, specs, paths, read_scans(slices))
        parity = parity_report(rows, small, len(images), answers)
        files: dict[str, bytes | Path] = {f"graphs/{role}.onnx": path for role, path in paths.items()}
        files[TOKENIZER] = checkpoint / "tokenizer.json"
        files["reports/parity.json"] = json.dumps(parity, indent=1).encode()
        files["reports/card.md"] = model_card(config, rows, small, _read_table(checkpoint)).encode()
        files |= {f"reports/{n}": checkpoint / n for n in (CONFIDENCE, CONFIDENCE_PLOT) if (checkpoint / n).exists()}
        files["NOTICE"] = notice_text(config).encode()
        return write_bundle(
            output,
            name=name or checkpoint.resolve().name,
            family=FAMILY,
            graphs=specs,
            files=files,
            precision=precision,
            versions={p: version(p) for p in ("onnx", "onnxruntime", "torch")} | {"edgemed": __version__},
            licences=LICENCES,
            settings=settings_of(checkpoint),
            replace=replace,
        )


def parity_report(rows: Sequence[Row], small: Sequence[Row], slices: int, answers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON values of `reports/parity.json`."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()} {platform.system()}, Python {platform.python_version()}",
        "slices": slices,
        "reference": "torch fp32 on the CPU",
        "fp32": [asdict(r) for r in rows],
        "int8 decoder": [asdict(r) for r in small],
        "answers": answers,
    }


def native_card(checkpoint: Path, rows: Sequence[Row]) -> bytes:
    """Return the model card of a native checkpoint whose graphs agree with torch as `rows` say."""
    return model_card(read_config(checkpoint), rows, (), _read_table(checkpoint)).encode()


def _read_table(checkpoint: Path) -> str:
    """Return the quality tables that lie in the checkpoint folder, or a line that says there are none."""
    path = checkpoint / "quality.md"
    quality = path.read_text(encoding="utf-8") if path.exists() else "Not measured for this checkpoint.\n"
    found = read_confidence(checkpoint)
    return quality if found is None else f"{quality}\n### How true the scores of boxes are\n\n{to_markdown(found)}"
