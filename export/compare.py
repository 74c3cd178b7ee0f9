"""The graphs of a checkpoint against its modules in torch, on real slices, before anything is kept.

Graph by graph, both get torch's values, so that errors do not add up; the decoder's prefill and steps are compared on
the tokens that torch prefers. Then each answers by itself, from the picture to the masks. Covers checkpoints whose
weights fit the memory in float32. Does not cover whole answers between two bundles (`edgemed.evaluation`).
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgemed.backends import Device, Runner, open_runner
from edgemed.backends.torch_runner import TorchRunner
from edgemed.core import Prompt, PromptRegion, Scan
from edgemed.errors import BundleError
from edgemed.export.graph_writer import Precision
from edgemed.export.parity import Row, read_scans, row_of
from edgemed.export.portable_decoder import bf16_in_fp32, portable_spec
from edgemed.export.published import Conversion
from edgemed.families import Family, Question, Written, open_family
from edgemed.families.opened_torch import bundle_over, load_module
from edgemed.families.published_torch import Published
from edgemed.families.specs import every_logit
from edgemed.geometry import dice
from edgemed.graphs import Feeds, GraphSpec

LIMITS: Mapping[Precision, tuple[str, float]] = {
    "fp32": ("relative_error", 2e-3),
    "fp16": ("relative_error", 2e-2),
    "bf16": ("relative_error", 8e-2),
    "int8": ("cosine", 0.99),
}
"""Precision of a graph -> what of each output is checked, and its largest error or smallest cosine.

Measured on the tiny checkpoints: fp32, where nothing was rounded, below 2e-5; fp16 below 2e-3 (nano: 5e-3, of its
vision encoder); bf16 below 2e-2. int4 is recorded; no gate is set here.
"""
REROUTED = " (another expert)"
"""Behind the name of an output where a router chose otherwise than torch's; recorded, no gate: that is the router's."""
STEPS = 16
"""Tokens of each answer that are compared."""
_SHARE_OF_MEMORY = 4

Pairs = dict[tuple[str, str], list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]]

_QUESTIONS: Mapping[str, tuple[Prompt, ...]] = {
    "native": (Prompt("Segment the liver."), Prompt("请列出可见的结构", language="zh")),
    "medrega": (Prompt("Which organ is shown?"), Prompt("图像中是什么器官？", language="zh")),
    "medplib": (Prompt("Please segment the organ in this image."), Prompt("outline", settings={"task": "outline"})),
}
"""Family -> questions that touch all of its graphs; each is asked about a box in the middle of the image, too."""

Run = Callable[[str, Feeds], Feeds]
"""Runs the graph of a role on the feeds that its GraphSpec names."""


@dataclass(frozen=True, eq=False)
class Answered:
    """The first tokens of an answer, up to its end, and its masks, bool [height, width] each."""

    ids: tuple[int, ...]
    masks: tuple[npt.NDArray[np.bool_], ...]


def worth_comparing(published: Published) -> bool:
    """Return whether the modules fit: their weights in float32 take at most a quarter of the memory."""
    weights = sum(p.numel() for module in published.modules.values() for p in module.state_dict().values())
    return weights * 4 * _SHARE_OF_MEMORY <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compare_with_torch(
    published: Published, paths: Mapping[str, Path], conversion: Conversion, slices: Path | None
) -> tuple[list[Row], dict[str, Any]]:
    """Return (a row for each output, the JSON values of reports/parity.json).

    Raises BundleError naming the first output that does not agree.
    """
    scans = read_scans(slices)
    rows, answers = run_both(published, conversion.specs(published), paths, scans)
    for row in rows:
        _check(row, conversion.format_of(row.graph).precision)
    return rows, _report(rows, answers, conversion, published.specs, len(scans))


def run_both(
    published: Published, specs: Mapping[str, GraphSpec], paths: Mapping[str, Path], scans: Sequence[Scan]
) -> tuple[list[Row], dict[str, Any]]:
    """Return (a row for each output of the graphs in `paths`, how far whole answers agree: see `_agreement`).

    specs: of these graphs; torch's modules have those of `published`.
    """
    family = open_family(bundle_over(published, published.family, ""))
    ours: dict[str, Runner] = {}
    theirs: dict[str, Runner] = {}
    pairs: Pairs = {}
    last: dict[str, Feeds] = {}

    def run_ours(role: str, feeds: Feeds) -> Feeds:
        # Theirs may have a whole head, ours a split one.
        asked = every_logit(specs[role], 1) if role == "decoder" else {}
        return ours[role].run({**feeds, **asked})

    def both(role: str, feeds: Feeds) -> Feeds:
        expected, last[role] = theirs[role].run(feeds), run_ours(role, feeds)
        suffix = "" if _same_experts(expected, last[role]) else REROUTED
        for name, values in expected.items():
            if values.dtype.kind == "f":
                pair = (values.astype(np.float64), last[role][name].astype(np.float64))
                pairs.setdefault((role, name if name == "router" else name + suffix), []).append(pair)
        return expected

    def alone(role: str, feeds: Feeds) -> Feeds:
        return last[role] if role == "vision_encoder" else run_ours(role, feeds)  # whose feeds are the same

    try:
        for role, spec in specs.items():
            module = partial(load_module, published, role)
            theirs[role] = TorchRunner(module, published.specs[role], device=Device("cpu"))
            ours[role] = _opened(paths[role], spec)
        answers = [
            (_answered(family, scan, prompt, both), _answered(family, scan, prompt, alone))
            for scan in scans
            for prompt in _prompts(published.family, scan)
        ]
    finally:
        for runner in (*ours.values(), *theirs.values()):
            runner.close()
    return [row_of(graph, output, found) for (graph, output), found in pairs.items()], _agreement(answers)


def _opened(path: Path, spec: GraphSpec) -> Runner:
    """Return a Runner of a graph; one in bf16, which onnxruntime does not compute on a CPU, as `bf16_in_fp32` of it."""
    if all(t.dtype != "bfloat16" for t in spec.inputs):
        return open_runner("onnxruntime", path, spec, device="cpu")
    whole = path.with_suffix(".fp32.onnx")  # beside its weights
    try:
        onnx.save(bf16_in_fp32(onnx.load(path, load_external_data=False)), whole)
        return open_runner("onnxruntime", whole, portable_spec(spec, "fp32"), device="cpu")
    finally:
        whole.unlink(missing_ok=True)


def _same_experts(expected: Feeds, found: Feeds) -> bool:
    """Return whether all routers choose the same experts; two may be as likely, and what follows is then another."""
    if "router" not in expected:
        return True
    return np.array_equal(expected["router"].argmax(-1), found["router"].argmax(-1))


def _agreement(answers: Sequence[tuple[Answered, Answered]]) -> dict[str, Any]:
    """Return how many answers have the same tokens, and the Dice of their masks; a mask that one lacks counts 0."""
    written = [(a, b) for a, b in answers if a.ids or b.ids]
    found = []
    for a, b in answers:
        found += [dice(x, y) for x, y in zip(a.masks, b.masks, strict=False)]
        found += [0.0] * abs(len(a.masks) - len(b.masks))
    return {
        "tokens": STEPS,
        "questions": len(written),
        "same_ids": sum(a.ids == b.ids for a, b in written),
        "masks": len(found),
        "mean_dice": float(np.mean(found)) if found else None,
        "lowest_dice": min(found, default=None),
    }


def _prompts(family: str, scan: Scan) -> list[Prompt]:
    middle = PromptRegion("box", box=(scan.columns * 0.25, scan.rows * 0.25, scan.columns * 0.75, scan.rows * 0.75))
    asked = [replace(p, frame=scan.first_frame) for p in _QUESTIONS[family]]
    return [*(p for p in asked if not p.settings), *(replace(p, regions=(middle,)) for p in asked)]


def _answered(family: Family, scan: Scan, prompt: Prompt, run: Run) -> Answered:
    specs = family.graphs()

    def graph(role: str, feeds: Feeds, *earlier: Feeds) -> Feeds:
        known = {name: array for outputs in earlier for name, array in outputs.items()}
        return run(role, {t.name: feeds[t.name] if t.name in feeds else known[t.name] for t in specs[role].fed_inputs})

    prepared = family.prepare([scan], prompt)
    features = graph("vision_encoder", prepared.vision)
    projected = graph("projector", prepared.projector, features)
    question = family.ask(prompt, prepared, projected, constrained=False)
    written = _decoded(graph, question, specs["decoder"]) if question.prompt_ids else Written([], [])
    masks = [
        mask > 0
        for batch in family.mask_feeds(prompt, prepared, projected, written)
        for mask in graph("mask_decoder", batch, features)["mask_logits"]
    ]
    ids = tuple(written.ids)
    return Answered(ids[: ids.index(question.eos_id) + 1] if question.eos_id in ids else ids, tuple(masks))


def _decoded(graph: Callable[[str, Feeds], Feeds], question: Question, spec: GraphSpec) -> Written:
    """Return what is written greedily in `STEPS` steps, an end or not."""
    ids: list[int] = []
    hidden: dict[int, npt.NDArray[np.float32]] = {}
    new: Sequence[int] = question.prompt_ids
    past = 0
    for step in range(STEPS + 1):
        out = graph(
            "decoder",
            {
                **question.fixed,
                "input_ids": np.array([new], np.int64),
                "past_length": np.array([past], np.int64),
                "logits_from": np.array([len(new) - 1], np.int64),
                **every_logit(spec, 1),
            },
        )
        hidden[step - 1] = out["hidden"][0, -1]
        past += len(new)
        new = [int(out["logits"][0, -1].argmax())]
        ids += new
    return Written(ids[:-1], [0.0] * (len(ids) - 1), hidden, False)


def _check(row: Row, precision: Precision) -> None:
    if row.output.endswith(REROUTED):
        return
    measure, limit = LIMITS.get(precision, ("", 0.0))
    if measure == "relative_error" and not row.relative_error <= limit:
        raise BundleError(
            f"{row.graph}: output {row.output} differs from torch by {row.relative_error:.1e} (relative), "
            f"{limit:.0e} is allowed in {precision}; nothing was written"
        )
    if measure == "cosine" and not row.cosine >= limit:
        raise BundleError(
            f"{row.graph} in {precision}: cosine of {row.output} with torch is {row.cosine:.5f}, at least {limit} was "
            "expected; nothing was written"
        )


def _report(
    rows: Sequence[Row], answers: Mapping[str, Any], conversion: Conversion, roles: Mapping[str, Any], slices: int
) -> dict[str, Any]:
    return {
        "compared": True,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()} {platform.system()}, Python {platform.python_version()}",
        "slices": slices,
        "reference": "torch fp32 on the CPU",
        "precision": {role: conversion.format_of(role).precision for role in roles},
        "rows": [asdict(row) for row in rows],
        "answers": answers,
    }
