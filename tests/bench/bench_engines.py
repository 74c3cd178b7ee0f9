"""Engines beside other ways to run a graph on a GPU, as Markdown tables.

    python tests/bench/bench_engines.py                        nano's graphs, a decoder of its size, in each precision
    python tests/bench/bench_engines.py --bundle FOLDER ...    the graphs of bundles (edgemed export --target tensorrt)
    python tests/bench/bench_engines.py --checkpoint FOLDER    also the modules of a checkpoint in torch

With a GPU: milliseconds of one run of each graph with the copies to and from the host, as `edgemed infer` runs it
(median, least), by TensorRT-RTX, by onnxruntime where it has CUDA, by torch eager and compiled where it has; for a
decoder also tokens a second, one token a call, and the share of the GPU's bandwidth at which its matrices are then
read. Bandwidth: copies of 1 GiB on the device, bytes read and written. Speed does not depend on weights.

Without a GPU, which it says: seconds to build each engine, and its size; nothing is run. What fails is told in its row.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx

from edgemed.backends import Runner, open_runner
from edgemed.backends.cuda_device import CudaStream, Gpu, find_gpu
from edgemed.backends.engine_build import ANY, build_engine, find_library, library_version
from edgemed.bundle import open_bundle
from edgemed.errors import BackendUnavailable, EdgemedError
from edgemed.graphs import DimRange, GraphSpec

PROMPT, STEPS = 230, 64
ONCE_PER_STEP_EXCEPT = ("embedding.weight", "rope_cos", "rope_sin")
"""Constants of which a step reads one row, not all."""


@dataclass(frozen=True)
class Graph:
    """A graph in one precision, of nano or of a bundle."""

    source: str
    precision: str
    path: Path
    spec: GraphSpec

    @property
    def megabytes(self) -> float:
        data = self.path.with_name(f"{self.path.name}.data")
        return (self.path.stat().st_size + (data.stat().st_size if data.is_file() else 0)) / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", action="append", default=[])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--gpu", type=int, default=0)
    options = parser.parse_args()
    trt = find_library()
    print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, ",
        end="",
    )
    print(f"{library_version(trt)}, ", end="")
    with tempfile.TemporaryDirectory() as folder:
        graphs = of_bundles(options.bundle) if options.bundle else of_nano(Path(folder))
        try:
            gpu = find_gpu(options.gpu)
        except BackendUnavailable as error:
            print(f"target {ANY}\n\nnot run: no GPU ({error})\n")
            print_builds(graphs)
        else:
            os.environ["EDGEMED_HOME"] = folder  # engines of this sitting, none of the user's
            print_runs(graphs, gpu, options.checkpoint, options.runs)


# --- graphs -----------------------------------------------------------------------------------------------------------


def of_bundles(names: list[str]) -> Iterator[Graph]:
    """Yield every graph of bundles."""
    for name in names:
        bundle = open_bundle(name)
        for role, spec in bundle.manifest.graphs.items():
            yield Graph(bundle.manifest.name, bundle.manifest.precision[role], bundle.graph_path(role), spec)


def of_nano(folder: Path) -> Iterator[Graph]:
    """Yield nano's encoder, projector and mask decoder, and a portable decoder of its size with random weights."""
    from edgemed.export.mixed_precision import in_mixed_precision
    from edgemed.export.portable_decoder import build_portable_decoder, portable_spec
    from edgemed.families.specs import decoder_spec
    from edgemed.models.llama import Llama, LlamaConfig

    nano = open_bundle("nano")
    for role in ("vision_encoder", "projector", "mask_decoder"):
        path, spec = nano.graph_path(role), nano.spec(role)
        yield Graph("nano", "fp32", path, spec)
        half = folder / f"{role}.onnx"
        onnx.save(in_mixed_precision(onnx.load(path)), half)
        yield Graph("nano", "fp16", half, spec)
    config = LlamaConfig(vocabulary=5120, first_coordinate=11)
    spec = decoder_spec(config, image_rows=DimRange(1, 186, 186))
    tensors = {name: weight.numpy() for name, weight in Llama(config).state_dict().items()}
    for dtype in ("fp32", "fp16", "bf16"):
        path = folder / f"decoder.{dtype}.onnx"
        onnx.save(build_portable_decoder(config, tensors, spec, dtype=dtype), path)  # type: ignore[arg-type]
        yield Graph("random weights", dtype, path, portable_spec(spec, dtype))  # type: ignore[arg-type]


def feeds_of(spec: GraphSpec) -> dict[str, np.ndarray]:
    """Return feeds of the sizes to optimise for; of a decoder, those of a prefill of PROMPT tokens."""
    rng, made = np.random.default_rng(0), {}
    sizes = {name: dim.opt for name, dim in spec.dims.items()} | (
        {"sequence": PROMPT} if spec.role == "decoder" else {}
    )
    for tensor in spec.fed_inputs:
        shape = [d if isinstance(d, int) else sizes[d] for d in tensor.shape]
        made[tensor.name] = (rng.random(shape) if tensor.dtype.startswith("float") else np.zeros(shape)).astype(
            tensor.dtype
        )
    if spec.role == "decoder":
        made["logits_from"][:] = PROMPT - 1
    return made


def bytes_per_step(graph: Graph) -> int:
    """Return how many bytes of constants one step of a decoder reads; its cache comes on top."""
    tensors = onnx.load(graph.path, load_external_data=False).graph.initializer
    return sum(
        int(np.prod(t.dims)) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize
        for t in tensors
        if t.name not in ONCE_PER_STEP_EXCEPT
    )


# --- without a GPU ----------------------------------------------------------------------------------------------------


def print_builds(graphs: Iterator[Graph]) -> None:
    """Print what building each engine takes and gives."""
    print("| graph | of | precision | ONNX MB | build s | engine MB |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for graph in graphs:
        start = time.perf_counter()
        try:
            size = f"{len(build_engine(graph.path, graph.spec)) / 1e6:.1f}"
        except EdgemedError as error:
            size = _told(error)
        seconds = time.perf_counter() - start
        row = graph.spec.role, graph.source, graph.precision, f"{graph.megabytes:.1f}", f"{seconds:.1f}", size
        print(f"| {' | '.join(row)} |", flush=True)


# --- with a GPU -------------------------------------------------------------------------------------------------------


def print_runs(graphs: Iterator[Graph], gpu: Gpu, checkpoint: Path | None, runs: int) -> None:
    """Print the time of each graph by each engine."""
    peak = bandwidth(gpu)
    print(f"{gpu.name} ({gpu.target}), bandwidth {peak / 1e9:.0f} GB/s, batch 1, {runs} runs\n")
    print("| graph | of | precision | engine | median ms | least ms | tokens/s | of the bandwidth |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | ---: |")
    for graph in graphs:
        for name in ("tensorrt", "onnxruntime"):
            opened = partial(open_runner, name, graph.path, graph.spec, device=f"gpu:{gpu.index}", tell=print)
            label = graph.spec.role, graph.source, graph.precision, name
            print_run(label, opened, graph.spec, runs, bytes_per_step(graph) / peak)
    if checkpoint is not None:
        print_torch(checkpoint, gpu, runs)


def print_torch(folder: Path, gpu: Gpu, runs: int) -> None:
    """Print the time of the modules of a checkpoint, in float32, eager and compiled."""
    import torch

    from edgemed.families.opened_torch import open_folder

    bundle, artifact = open_folder(folder)
    for role, spec in bundle.manifest.graphs.items():
        eager = artifact(role)
        compiled = partial(lambda load: torch.compile(load()), eager)
        for name, load in (("torch eager", eager), ("torch compiled", compiled)):
            opened = partial(open_runner, "torch", load, spec, device=f"gpu:{gpu.index}")
            print_run((role, bundle.manifest.name, "fp32", name), opened, spec, runs, 0.0)


def print_run(label: tuple[str, ...], opened: Callable[[], Runner], spec: GraphSpec, runs: int, floor: float) -> None:
    """Print one row; floor: the seconds in which a step's constants can be read, 0 where that is not known."""
    try:
        runner = opened()
        times = milliseconds(runner, feeds_of(spec), runs)
        tokens = tokens_per_second(runner, spec) if spec.role == "decoder" else None
        runner.close()
    except (EdgemedError, RuntimeError) as error:
        row = *label, _told(error), "", "", ""
    else:
        share = f"{floor * tokens:.2f}" if tokens and floor else ""
        row = *label, f"{statistics.median(times):.2f}", f"{min(times):.2f}", f"{tokens:.0f}" if tokens else "", share
    print(f"| {' | '.join(row)} |", flush=True)


def milliseconds(runner: Runner, feeds: dict[str, np.ndarray], runs: int) -> list[float]:
    """Return the time of each of `runs` runs, after three that are not counted."""
    for _ in range(3):
        runner.run(feeds)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        runner.run(feeds)
        times.append((time.perf_counter() - start) * 1000)
    return times


def tokens_per_second(runner: Runner, spec: GraphSpec) -> float:
    """Return how fast a decoder takes one token a call behind a prompt: the median over STEPS calls."""
    prompt = feeds_of(spec)
    runner.run(prompt)
    times = []
    for step in range(-3, STEPS):
        one = {
            "input_ids": np.zeros((1, 1), np.int64),
            "past_length": np.array([PROMPT + max(step, 0)], np.int64),
            "logits_from": np.zeros(1, np.int64),
        }
        start = time.perf_counter()
        runner.run({**prompt, **one})
        times.append(time.perf_counter() - start)
    return 1 / statistics.median(times[3:])


def bandwidth(gpu: Gpu, size: int = 1 << 30, copies: int = 20) -> float:
    """Return bytes a second that copies within the GPU's memory read and write."""
    from cuda.bindings import driver

    stream = CudaStream(gpu)
    there, here = (stream.allocate(size, "a copy of 1 GiB") for _ in range(2))
    seconds = []
    for _ in range(3):
        stream.wait()
        start = time.perf_counter()
        for _ in range(copies):
            driver.cuMemcpyDtoDAsync(here, there, size, driver.CUstream(stream.handle))
        stream.wait()
        seconds.append(time.perf_counter() - start)
    for address in (there, here):
        stream.free(address)
    stream.close()
    return 2 * size * copies / min(seconds)


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:160].replace("|", "/")


if __name__ == "__main__":
    main()
