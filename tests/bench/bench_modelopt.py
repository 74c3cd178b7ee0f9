"""Q/DQ graphs of edgemed beside those of NVIDIA ModelOpt, as a Markdown table.

    python tests/bench/bench_modelopt.py --modelopt-python PATH

PATH is a Python of its own with `nvidia-modelopt[onnx]==0.47.0` and `requests`: its pins (onnx 1.21, onnxruntime-gpu
1.24) fit no environment of edgemed's. Both calibrate on the same slices, and their graphs run in the same onnxruntime
(this Python's) on the same others. "all": every MatMul and Conv with a constant weight; "MatMul": those alone; in both,
neither touches attention. "edgemed's choice": what edgemed's default plan takes, in both. "ModelOpt's choice": what
that quantizes if it is told nothing but the precision.
Does not cover speed: engines are built, and run nowhere.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from edgemed import __version__
from edgemed.backends.engine_build import build_engine, find_library, library_version
from edgemed.bundle import open_bundle
from edgemed.calibration.equalize import equalized, sample_rows, to_equalize
from edgemed.calibration.plan import QuantPlan
from edgemed.calibration.qdq import quantize
from edgemed.calibration.ranges import bounds, measure
from edgemed.calibration.rounding import measure_products
from edgemed.calibration.sensitivity import Outputs, errors_of, outputs_of
from edgemed.calibration.sites import activations, default_plan, products_wanted, sites
from edgemed.calibration.slices import QUESTIONS, Sequences, read_slices, record_feeds
from edgemed.errors import EdgemedError
from edgemed.graphs import GraphSpec

ROLE = "vision_encoder"
SETS = ("all", "MatMul", "edgemed's choice", "ModelOpt's choice")
METHODS: tuple[tuple[Any, Any], ...] = (("int8", "minmax"), ("int8", "entropy"), ("fp8", "minmax"))

THEIRS = """
import json, sys
from importlib.metadata import version
import numpy as np
from modelopt.onnx.quantization import quantize
jobs = json.load(open(sys.argv[1]))
for job in jobs["jobs"]:
    quantize(
        jobs["model"], calibration_data={jobs["input"]: np.load(jobs["data"])}, calibration_eps=["cpu"],
        high_precision_dtype="fp32", mha_accumulation_dtype="fp32", log_level="ERROR", **job,
    )
names = ("nvidia-modelopt", "onnx", "onnxruntime-gpu")
json.dump({name: version(name) for name in names}, open(sys.argv[1] + ".versions", "w"))
"""
"""What the other Python runs: ModelOpt on each job of a file. mha_accumulation_dtype: no fp16 inside fp8 attention."""


@dataclass(frozen=True)
class Row:
    """A quantized graph, and who made it how."""

    nodes: str
    precision: str
    maker: str
    path: Path


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modelopt-python", type=Path, required=True)
    parser.add_argument("--slices", type=Path)
    parser.add_argument("--calibrate", type=int, default=6, metavar="SLICES")
    parser.add_argument("--judge", type=int, default=6, metavar="SLICES")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for the graphs (default: one that is removed)")
    options = parser.parse_args()
    slices = read_slices(options.slices, options.calibrate + options.judge)
    first, held_out = slices.split(min(options.judge, len(slices.scans) - 1))
    bundle = open_bundle("nano")
    spec, path = bundle.spec(ROLE), bundle.graph_path(ROLE)
    calls, judged = (
        record_feeds(bundle, s.scans, questions=QUESTIONS[:1], threads=options.threads).calls[ROLE]
        for s in (first, held_out)
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = onnx.load(path)
        left_out = plans(model)["edgemed's choice"].excluded[ROLE]
        versions, rows = theirs(options.modelopt_python, path, calls, folder, left_out)
        rows += ours(model, spec, calls, folder, options.threads)
        print(
            f"{datetime.date.today()}, {os.cpu_count()} cores, edgemed {__version__}, {versions}; run by onnxruntime "
        )
        print(f"{onnxruntime.__version__} on the CPU, built by {library_version(find_library())}; nano's {ROLE}, ")
        print(f"{len(first.scans)} slices to calibrate, {len(held_out.scans)} to judge {slices.modalities}\n")
        print("| quantized | precision | made by | nodes | cosine | smallest | relative error | MB | engine |")
        print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        exact = outputs_of(model, spec, judged, threads=options.threads)
        order = {name: place for place, name in enumerate(SETS)}
        for row in sorted(rows, key=lambda r: (order[r.nodes], r.precision[:3] == "fp8", r.precision, r.maker)):
            print("| " + " | ".join(figures(row, spec, exact, judged, options.threads)) + " |", flush=True)


def plans(model: onnx.ModelProto) -> dict[str, QuantPlan]:
    """Return what each of SETS means for edgemed, in int8."""
    convolutions = {s.node: "a convolution" for s in sites(model) if s.operator == "Conv"}
    return {
        "all": QuantPlan({ROLE: "int8"}),
        "MatMul": QuantPlan({ROLE: "int8"}, excluded={ROLE: convolutions}),
        "edgemed's choice": default_plan({ROLE: model}, {ROLE: "int8"}),
    }


def ours(model: onnx.ModelProto, spec: GraphSpec, calls: Sequences, folder: Path, threads: int) -> list[Row]:
    """Return edgemed's graphs: weights to the nearest; INT8 also with channels equalized and rounded for outputs."""
    rows, how = [], {"threads": threads}
    for nodes, plan in plans(model).items():
        found = measure(model, spec, activations(model, ROLE, plan), calls, **how)
        for precision, method in METHODS:
            own = replace(plan, precision={ROLE: precision}, method=method)
            rows.append(Row(nodes, f"{precision} {method}", "edgemed, nearest", folder / f"e{len(rows)} {nodes}.onnx"))
            onnx.save(quantize(model, ROLE, own, bounds(found, method))[0], rows[-1].path)
        even = equalized(model, ROLE, plan, sample_rows(model, spec, to_equalize(model, ROLE, plan), calls, **how))
        limits = measure(even, spec, activations(even, ROLE, plan), calls, **how)
        products = measure_products(even, spec, products_wanted(even, ROLE, plan), calls, **how)
        rows.append(Row(nodes, "int8 minmax", "edgemed, as `quantize` does", folder / f"e{len(rows)} {nodes}.onnx"))
        onnx.save(quantize(even, ROLE, plan, bounds(limits, "minmax"), products)[0], rows[-1].path)
    return rows


def theirs(
    python: Path, model: Path, calls: Sequences, folder: Path, left_out: Collection[str]
) -> tuple[str, list[Row]]:
    """Return (versions, ModelOpt's graphs). left_out: nodes that edgemed's default plan leaves as they are."""
    (name,) = calls[0][0]
    np.save(folder / "calibration.npy", np.concatenate([feeds[name] for sequence in calls for feeds in sequence]))
    rows, jobs = [], []
    for nodes in SETS:
        told: dict[str, Any] = {"disable_mha_qdq": True, "op_types_to_quantize": ["MatMul", "Conv"]}
        if nodes == "MatMul":
            told["op_types_to_quantize"] = ["MatMul"]
        elif nodes == "edgemed's choice":
            told["nodes_to_exclude"] = [f"{re.escape(name)}$" for name in left_out]  # matched from the start
        elif nodes == "ModelOpt's choice":
            told = {}
        for precision, method in METHODS:
            path = folder / f"m{len(rows)} {nodes}.onnx"
            rows.append(Row(nodes, f"{precision} {method}", "ModelOpt", path))
            method = "max" if method == "minmax" else method
            jobs.append(
                {"quantize_mode": precision, "calibration_method": method, "output_path": str(path.absolute())} | told
            )
    file = folder.absolute() / "jobs.json"
    copy = folder.absolute() / "exact.onnx"  # it writes beside its source
    copy.write_bytes(model.read_bytes())
    data = str(folder.absolute() / "calibration.npy")
    file.write_text(json.dumps({"model": str(copy), "input": name, "data": data, "jobs": jobs}))
    done = subprocess.run([python, "-c", THEIRS, str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ModelOpt ended with {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(file.with_name(file.name + ".versions").read_text())
    return ", ".join(f"{name} {version}" for name, version in found.items()), rows


def figures(row: Row, spec: GraphSpec, exact: Outputs, judged: Sequence[Sequence[Any]], threads: int) -> Iterator[str]:
    """Yield the cells of a row."""
    yield from (row.nodes, row.precision, row.maker)
    model = onnx.load(row.path)
    yield str(quantized_products(model))
    try:
        (error,) = errors_of(exact, outputs_of(model, spec, judged, threads=threads))
        yield from (f"{error.cosine:.5f}", f"{error.smallest:.5f}", f"{error.relative_error:.4f}")
    except EdgemedError as refused:
        yield from (str(refused), "-", "-")
    yield f"{row.path.stat().st_size / 1e6:.1f}"
    start = time.perf_counter()
    try:
        size = len(build_engine(row.path, spec)) / 1e6
        yield f"{size:.1f} MB, {time.perf_counter() - start:.0f} s"
    except EdgemedError as refused:
        yield str(refused)


def quantized_products(model: onnx.ModelProto) -> int:
    """Return how many products have both inputs from a DequantizeLinear, what only moves numbers aside."""
    made = {output: node for node in model.graph.node for output in node.output}

    def from_pair(name: str) -> bool:
        while name in made and made[name].op_type in ("Transpose", "Reshape", "Cast"):
            name = made[name].input[0]
        return name in made and made[name].op_type == "DequantizeLinear"

    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    return sum(from_pair(node.input[0]) and from_pair(node.input[1]) for node in products)


if __name__ == "__main__":
    main()
