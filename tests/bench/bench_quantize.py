"""A graph of a bundle in every quantized form beside full precision, as a Markdown table.

    python tests/bench/bench_quantize.py                               nano's vision encoder, public slices
    python tests/bench/bench_quantize.py --slices FOLDER --sensitivity also which nodes suffer most

Bounds are measured on some slices, errors on others. Time: best of several runs of one call on the CPU, forms in turn
so that what else the machine does meets all of them. "MatMul": convolutions stay in full precision, too.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from edgemed.bundle import open_bundle
from edgemed.calibration.graph_run import GraphRun
from edgemed.calibration.plan import Precision, QuantPlan
from edgemed.calibration.qdq import quantize
from edgemed.calibration.ranges import Method, bounds, measure
from edgemed.calibration.rounding import measure_products
from edgemed.calibration.sensitivity import compare, outputs_of, sensitivities, to_markdown
from edgemed.calibration.sites import activations, default_plan, products_wanted, sites
from edgemed.calibration.slices import QUESTIONS, read_slices, record_feeds

FORMS: tuple[tuple[str, Precision, Method, str], ...] = (
    ("all", "int8", "minmax", "nearest"),
    ("MatMul", "int8", "minmax", "nearest"),
    ("MatMul", "int8", "percentile", "nearest"),
    ("MatMul", "int8", "entropy", "nearest"),
    ("MatMul", "int8", "minmax", "output"),
    ("all", "fp8", "minmax", "nearest"),
    ("MatMul", "fp8", "minmax", "nearest"),
    ("all", "int8-weights", "minmax", "nearest"),
    ("all", "int8-weights", "minmax", "output"),
    ("MatMul", "int8-weights", "minmax", "nearest"),
    ("MatMul", "int8-weights", "minmax", "output"),
    ("MatMul", "int4-weights", "minmax", "nearest"),
    ("MatMul", "int4-weights", "minmax", "output"),
)
"""Nodes, precision, bounds, and what weights are rounded for: themselves, or the output on the slices."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="nano")
    parser.add_argument("--role", default="vision_encoder")
    parser.add_argument("--slices", type=Path)
    parser.add_argument("--calibrate", type=int, default=6, metavar="SLICES")
    parser.add_argument("--judge", type=int, default=6, metavar="SLICES")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--sensitivity", action="store_true")
    options = parser.parse_args()
    slices = read_slices(options.slices, options.calibrate + options.judge)
    first, held_out = slices.split(min(options.judge, len(slices.scans) - 1))
    bundle, role = open_bundle(options.bundle), options.role
    spec, model = bundle.spec(role), onnx.load(bundle.graph_path(role))
    calls, judged = (
        record_feeds(bundle, s.scans, questions=QUESTIONS[:2], threads=options.threads).calls[role]
        for s in (first, held_out)
    )
    everything = default_plan({role: model}, {role: "int8"})
    convolutions = {s.node: "a convolution" for s in sites(model) if s.operator == "Conv"}
    matmul = replace(everything, excluded={role: {**convolutions, **everything.excluded[role]}})
    found = measure(model, spec, activations(model, role, everything), calls, threads=options.threads)
    exact = outputs_of(model, spec, judged, threads=options.threads)
    print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, ",
        end="",
    )
    print(f"onnxruntime {onnxruntime.__version__}, {options.threads} threads, {bundle.manifest.name} {role}, ", end="")
    print(f"{len(first.scans)} slices to calibrate, {len(held_out.scans)} to judge {slices.modalities}\n")
    rows, runs = [("-", "fp32", "-", model.ByteSize(), "1", "0")], [GraphRun(model, spec, threads=options.threads)]
    products = measure_products(model, spec, products_wanted(model, role, everything), calls, threads=options.threads)
    for nodes, precision, method, goal in FORMS:
        plan = replace(everything if nodes == "all" else matmul, precision={role: precision}, method=method)
        quantized, _ = quantize(model, role, plan, bounds(found, method), products if goal == "output" else None)
        error = compare(exact, outputs_of(quantized, spec, judged, threads=options.threads))
        figures = f"{error.cosine:.5f}", f"{error.relative_error:.4f}"
        rows.append((f"{nodes}, {goal}", precision, method, quantized.ByteSize(), *figures))
        runs.append(GraphRun(quantized, spec, threads=options.threads))
    times = np.full((options.runs, len(runs)), np.inf)
    for turn in range(options.runs):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run.run(judged[0][0])
            times[turn, i] = time.perf_counter() - start
    print("| nodes, rounded for | precision | bounds | MB | smallest cosine | relative error | best ms | median ms |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for i, (nodes, precision, method, size, cosine, relative) in enumerate(rows):
        best, median = times[:, i].min() * 1000, np.median(times[:, i]) * 1000
        print(
            f"| {nodes} | {precision} | {method} | {size / 1e6:.1f} | {cosine} | {relative} | {best:.0f} "
            f"| {median:.0f} |"
        )
    if options.sensitivity:
        plan = QuantPlan({role: "int8"}, excluded=everything.excluded)
        few = judged[:1]
        table = sensitivities(model, spec, plan, bounds(found, plan.method), few, threads=options.threads)
        print("\n" + to_markdown(table))


if __name__ == "__main__":
    main()
