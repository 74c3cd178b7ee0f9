"""The graphs of a published checkpoint against its modules in torch, on real slices, before anything is kept.

Both get torch's values at every graph, so that errors do not add up; the decoder's prefill and steps are compared on
the tokens that torch prefers. Covers checkpoints whose weights fit the memory in float32. Does not cover whole answers
between two bundles (`edgemed.evaluation`).
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemed.backends import Device, Runner, open_runner
from edgemed.backends.torch_runner import TorchRunner
from edgemed.core import Prompt, PromptRegion, Scan
from edgemed.errors import BundleError
from edgemed.export.parity import Row, read_scans, row_of
from edgemed.export.published import Conversion
from edgemed.families import Family, Question, Written, open_family
from edgemed.families.opened_torch import bundle_over, load_module
from edgemed.families.published_torch import Published
from edgemed.graphs import Feeds

EXACT_LIMIT = 2e-3
"""Largest relative error where nothing was rounded. Measured on the tiny checkpoints: below 2e-5."""
INT8_COSINE = 0.99
"""Smallest cosine of an output of a graph with 8-bit matrices. 4-bit graphs are recorded; no gate is set here."""
STEPS = 8
_SHARE_OF_MEMORY = 4

Pairs = dict[tuple[str, str], list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]]

_QUESTIONS: Mapping[str, tuple[Prompt, ...]] = {
    "medrega": (Prompt("Which organ is shown?"), Prompt("图像中是什么器官？", language="zh")),
    "medplib": (Prompt("Please segment the organ in this image."), Prompt("outline", settings={"task": "outline"})),
}
"""Family -> questions that touch all of its graphs; each is asked about a box in the middle of the image, too."""


def worth_comparing(published: Published) -> bool:
    """Return whether the modules fit: their weights in float32 take at most a quarter of the memory."""
    weights = sum(p.numel() for module in published.modules.values() for p in module.state_dict().values())
    return weights * 4 * _SHARE_OF_MEMORY <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def compare_with_torch(
    published: Published, paths: Mapping[str, Path], conversion: Conversion, slices: Path | None
) -> dict[str, bytes]:
    """Return the bundle's report files. Raises BundleError naming the first output that does not agree."""
    scans = read_scans(slices)
    bundle = bundle_over(published, conversion.name, "")
    family = open_family(bundle)
    specs = published.specs
    ours: dict[str, Runner] = {}
    theirs: dict[str, Runner] = {}
    pairs: Pairs = {}
    try:
        for role in specs:
            theirs[role] = TorchRunner(partial(load_module, published, role), specs[role], device=Device("cpu"))
            ours[role] = open_runner("onnxruntime", paths[role], specs[role], device="cpu")
        for scan in scans:
            for prompt in _prompts(published.family, scan):
                _ask_both(family, scan, prompt, theirs, ours, pairs)
    finally:
        for runner in (*ours.values(), *theirs.values()):
            runner.close()
    rows = [row_of(graph, output, found) for (graph, output), found in pairs.items()]
    for row in rows:
        _check(row, conversion.format_of(row.graph).precision)
    return {"reports/parity.json": json.dumps(_report(rows, conversion, specs, len(scans)), indent=1).encode()}


def _prompts(family: str, scan: Scan) -> list[Prompt]:
    middle = PromptRegion("box", box=(scan.columns * 0.25, scan.rows * 0.25, scan.columns * 0.75, scan.rows * 0.75))
    asked = [replace(p, frame=scan.first_frame) for p in _QUESTIONS[family]]
    return [*(p for p in asked if not p.settings), *(replace(p, regions=(middle,)) for p in asked)]


def _ask_both(
    family: Family, scan: Scan, prompt: Prompt, theirs: Mapping[str, Runner], ours: Mapping[str, Runner], pairs: Pairs
) -> None:
    specs = family.graphs()

    def both(role: str, feeds: Feeds, *earlier: Feeds) -> Feeds:
        known = {name: array for outputs in earlier for name, array in outputs.items()}
        feeds = {t.name: feeds[t.name] if t.name in feeds else known[t.name] for t in specs[role].fed_inputs}
        expected, found = theirs[role].run(feeds), ours[role].run(feeds)
        for name in expected:
            pairs.setdefault((role, name), []).append(
                (expected[name].astype(np.float64), found[name].astype(np.float64))
            )
        return expected

    prepared = family.prepare([scan], prompt)
    features = both("vision_encoder", prepared.vision)
    projected = both("projector", prepared.projector, features)
    question = family.ask(prompt, prepared, projected, constrained=False)
    written = _decode_both(both, question) if question.prompt_ids else Written([], [])
    for batch in family.mask_feeds(prompt, prepared, projected, written):
        both("mask_decoder", batch, features)


def _decode_both(both: Any, question: Question) -> Written:
    """Return what torch writes in a few steps, every step being taken by both."""
    ids: list[int] = []
    hidden: dict[int, npt.NDArray[np.float32]] = {}
    new: Sequence[int] = question.prompt_ids
    past = 0
    for step in range(STEPS + 1):
        out = both(
            "decoder",
            {
                **question.fixed,
                "input_ids": np.array([new], np.int64),
                "past_length": np.array([past], np.int64),
                "logits_from": np.array([len(new) - 1], np.int64),
            },
        )
        hidden[step - 1] = out["hidden"][0, -1]
        past += len(new)
        new = [int(out["logits"][0, -1].argmax())]
        ids += new
    return Written(ids[:-1], [0.0] * (len(ids) - 1), hidden, False)


def _check(row: Row, precision: str) -> None:
    if precision == "fp32" and not row.relative_error <= EXACT_LIMIT:
        raise BundleError(
            f"{row.graph}: output {row.output} differs from torch by {row.relative_error:.1e} (relative), "
            f"{EXACT_LIMIT:.0e} is allowed; nothing was written"
        )
    if precision == "int8" and not row.cosine >= INT8_COSINE:
        raise BundleError(
            f"{row.graph} in int8: cosine of {row.output} with torch is {row.cosine:.5f}, at least {INT8_COSINE} was "
            "expected; nothing was written"
        )


def _report(rows: Sequence[Row], conversion: Conversion, roles: Mapping[str, Any], slices: int) -> dict[str, Any]:
    return {
        "compared": True,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()} {platform.system()}, Python {platform.python_version()}",
        "slices": slices,
        "reference": "torch fp32 on the CPU",
        "precision": {role: conversion.format_of(role).precision for role in roles},
        "rows": [asdict(row) for row in rows],
    }
