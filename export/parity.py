"""Does a graph compute what torch computes? Real slices through both, graph by graph, as a table.

Covers the numbers between torch and the exported graphs, decoder prefill and steps included. The comparison of whole
answers between two bundles is `edgemed.evaluation`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgemed.backends import Runner, open_runner
from edgemed.core import Scan
from edgemed.dicom import read_scan
from edgemed.errors import EdgemedError, NoInput
from edgemed.families.native_regions import box_map
from edgemed.families.native_text import NativeText
from edgemed.families.native_torch import NativeModel
from edgemed.families.native_view import model_image, model_view
from edgemed.families.specs import every_logit
from edgemed.graphs import GraphSpec

Array = npt.NDArray[Any]

PUBLIC_SLICES = (
    "CT_small.dcm",
    "MR_small.dcm",
    "693_J2KI.dcm",
    "examples_ybr_color.dcm",
    "US1_J2KR.dcm",
    "MR2_J2KI.dcm",
)
"""DICOM files inside the pydicom package, used where no folder of slices is given; those not installed are left out."""

STEPS = 8
"""Decoder steps compared after the prefill."""


@dataclass(frozen=True)
class Row:
    """One output of one graph, over all slices: largest |error|, |error| / |value| (norms) and smallest cosine."""

    graph: str
    output: str
    max_error: float
    relative_error: float
    cosine: float


def read_scans(folder: Path | None, most: int = 6) -> list[Scan]:
    """Return scans of `folder`, or of files inside the pydicom package; what is no scan is left out.

    Raises NoInput if there is none.
    """
    if folder is None:
        from pydicom.data import get_testdata_file

        found = [get_testdata_file(name, download=False) for name in PUBLIC_SLICES]
        paths = [Path(str(path)) for path in found if path is not None]
    else:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
    scans: list[Scan] = []
    for path in paths:
        if len(scans) == most:
            break
        try:
            scans.append(read_scan(path))
        except EdgemedError:
            continue  # a folder may hold reports and other files beside its slices
    if not scans:
        raise NoInput(f"no slices to compare on in {folder or 'the pydicom package'}; pass a folder with DICOM files")
    return scans


def read_slices(folder: Path | None, most: int = 6) -> list[npt.NDArray[np.float32]]:
    """Return native model inputs [3, 256, 256] of `read_scans`."""
    images = []
    for scan in read_scans(folder, most):
        shown = scan.shown(scan.first_frame)
        images.append(model_image(shown, model_view(shown, scan.modality, scan.pixel_spacing_mm)))
    return images


@torch.no_grad()
def compare(
    model: NativeModel,
    graphs: Mapping[str, Path],
    specs: Mapping[str, GraphSpec],
    text: NativeText,
    images: Sequence[Array],
) -> list[Row]:
    """Return one row for each compared output. Every graph is fed torch's values, so errors do not add up."""
    pairs: dict[tuple[str, str], list[tuple[Array, Array]]] = {}

    def note(graph: str, output: str, expected: torch.Tensor, actual: Array) -> None:
        pairs.setdefault((graph, output), []).append((expected.numpy().astype(np.float64), actual.astype(np.float64)))

    runners = {role: open_runner("onnxruntime", path, specs[role], device="cpu") for role, path in graphs.items()}
    try:
        for image in images:
            features = model.vision_encoder(torch.from_numpy(image[None]))
            note(
                "vision_encoder",
                "image_features",
                features,
                runners["vision_encoder"].run({"image": image[None]})["image_features"],
            )
            maps = np.stack([box_map((40, 60, 120, 150)), box_map((100, 20, 110, 200))])
            names = [t.name for t in specs["projector"].returned_outputs]
            expected = dict(zip(names, model.projector(features, torch.from_numpy(maps)), strict=True))
            actual = runners["projector"].run({"image_features": features.numpy(), "region_maps": maps})
            for name in names:
                note("projector", name, expected[name], actual[name])
            _compare_decoder(model, runners["decoder"], specs["decoder"], text, expected["image_tokens"], note)
            _compare_masks(model, runners["mask_decoder"], features, expected, note)
    finally:
        for runner in runners.values():
            runner.close()
    return [row_of(graph, output, found) for (graph, output), found in pairs.items()]


def _compare_decoder(
    model: NativeModel, runner: Runner, spec: GraphSpec, text: NativeText, rows: torch.Tensor, note: Any
) -> None:
    """Compare prefill and the next steps, the tokens being those that torch prefers."""
    config = model.decoder.config
    vocabulary, coordinates = config.vocabulary, slice(config.first_coordinate, config.first_coordinate + config.bins)
    for prompt in ("Where is the liver?", "请列出可见的结构"):
        ids = text.encode_prompt(prompt, image_rows=len(rows), language="zh" if prompt[0] == "请" else "en")
        feeds = {"image_tokens": rows.numpy()}
        past = 0
        for step in range(STEPS + 1):
            new = ids[past:]
            known = torch.tensor(ids)
            embedded = torch.where(
                (known >= vocabulary)[:, None],
                rows[(known - vocabulary).clamp(min=0)],
                model.decoder.embed(known.clamp(max=vocabulary - 1)),
            )
            hidden = model.decoder(embedded[None], torch.arange(len(ids))[None])[:, -1:]
            logits = model.decoder.logits(hidden)
            out = runner.run({**feeds, "input_ids": np.array([new], np.int64),
                              "past_length": np.array([past], np.int64),
                              "logits_from": np.array([len(new) - 1], np.int64),
                              **every_logit(spec, 1)})  # fmt: skip
            kind = "prefill" if step == 0 else "step"
            note("decoder", f"logits ({kind})", logits, out["logits"])
            if "box_logits" in out:
                note("decoder", f"box_logits ({kind})", logits[..., coordinates], out["box_logits"])
            note("decoder", f"hidden ({kind})", hidden, out["hidden"])
            past = len(ids)
            ids = [*ids, int(logits[0, -1].argmax())]
        runner.reset()


def _compare_masks(
    model: NativeModel, runner: Runner, features: torch.Tensor, projected: Mapping[str, torch.Tensor], note: Any
) -> None:
    likely = projected["presence"].topk(3).indices
    n = len(likely)
    feeds = {
        "boxes": projected["boxes"][likely].numpy(),
        "has_box": np.array([1, 0, 1], np.float32),
        "points": np.full((n, 1, 2), 128, np.float32),
        "point_labels": np.array([[-1], [1], [1]], np.int64),
        "mask_prompts": np.zeros((n, 256, 256), np.float32),
        "has_mask": np.zeros(n, np.float32),
        "seg_hidden": projected["image_tokens"][:n].numpy(),
        "has_seg": np.array([0, 0, 1], np.float32),
    }
    logits, iou = model.mask_decoder(features, **{k: torch.from_numpy(v) for k, v in feeds.items()})
    out = runner.run({"image_features": features.numpy(), **feeds})
    note("mask_decoder", "mask_logits", logits, out["mask_logits"])
    note("mask_decoder", "iou", iou, out["iou"])


def row_of(graph: str, output: str, found: Sequence[tuple[Array, Array]]) -> Row:
    """Return one row from pairs of (expected, found) float64 arrays."""
    largest = max(float(np.abs(a - b).max()) for a, b in found)
    error = sum(float(((a - b) ** 2).sum()) for a, b in found) ** 0.5
    size = sum(float((a**2).sum()) for a, _ in found) ** 0.5
    cosine = min(float((a * b).sum() / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30)) for a, b in found)
    return Row(graph, output, largest, error / max(size, 1e-30), cosine)


def to_markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| graph | output | max error | relative error | cosine |", "| --- | --- | ---: | ---: | ---: |"]
    lines += [f"| {r.graph} | {r.output} | {r.max_error:.2e} | {r.relative_error:.2e} | {r.cosine:.6f} |" for r in rows]
    return "\n".join(lines) + "\n"
