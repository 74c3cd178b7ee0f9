"""How fast the decoder runs on this machine, beside the limit that memory sets: `python tests/bench/bench_decoder.py`.

Random weights of nano's size: speed does not depend on what they are. The limit is what a read of a buffer reaches in
the same run, with the same threads: once over 256 MiB (main memory) and once over as many bytes as a step reads (which
a large last-level cache may hold). Decode is through the Runner, as `edgemed infer` decodes, one token a call.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from machine import processor

from edgemed.backends import Runner, open_runner
from edgemed.backends.onnxruntime_runner import physical_cores
from edgemed.calibration.weight_only import WeightPlan, quantize_weights
from edgemed.export.decoder_graph import build_decoder_graph
from edgemed.families.specs import decoder_spec
from edgemed.graphs import DimRange, Feeds
from edgemed.models.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(vocabulary=5120, first_coordinate=11)
ROWS = 186
PROMPT = 230
STEPS = 64
ONCE_PER_STEP_EXCEPT = ("embedding.weight", "rope_cos", "rope_sin")
"""Constants of which a step reads one row, not all."""

HEADER = (
    "weights",
    "file MB",
    "MB/token",
    "open ms",
    "prefill/s",
    "decode/s",
    "(median)",
    "limit/s",
    "in cache",
    "share",
    "cosine",
)
ROW = "{:>16}" + " {:>9}" * (len(HEADER) - 1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    threads, repeat = options.threads, options.repeat
    print(f"{datetime.date.today()}  {processor()}  {threads} threads  onnxruntime {onnxruntime.__version__}  batch 1")
    print(f"decoder: {CONFIG.layers} x {CONFIG.width}, vocabulary {CONFIG.vocabulary}; prompt {PROMPT}, {STEPS} steps")
    main_memory = bandwidth(256 << 20, threads)
    print(f"read bandwidth, 256 MiB buffer: {main_memory:.1f} GB/s\n")
    print(ROW.format(*HEADER))
    exact = None
    with tempfile.TemporaryDirectory() as folder:
        for name, graph in graphs().items():
            path = Path(folder) / f"{name.replace(' ', '_')}.onnx"
            onnx.save(graph, path)
            start = time.perf_counter()
            runner = open_runner("onnxruntime", path, SPEC, threads=threads)
            open_ms = (time.perf_counter() - start) * 1000
            prefill, steps, logits = measure(runner, repeat)
            exact = logits if exact is None else exact
            cosine = float((exact * logits).sum() / np.sqrt((exact**2).sum() * (logits**2).sum()))
            read = bytes_per_step(graph)
            roofline, cached = main_memory * 1e9 / read, bandwidth(read, threads) * 1e9 / read
            best, median = 1 / min(steps), 1 / float(np.median(steps))
            values = (path.stat().st_size / 1e6, read / 1e6, open_ms, PROMPT / min(prefill), best, median)
            texts = [f"{v:.1f}" for v in values[:2]] + [f"{v:.0f}" for v in (*values[2:], roofline, cached)]
            print(ROW.format(name, *texts, f"{best / roofline:.2f}", f"{cosine:.6f}"))
            runner.close()


SPEC = decoder_spec(CONFIG, image_rows=DimRange(1, ROWS, ROWS))


def graphs() -> dict[str, onnx.ModelProto]:
    """Return the decoder in full precision and quantized in several ways."""
    weights = {k: v.numpy() for k, v in Llama(CONFIG).state_dict().items()}
    full = build_decoder_graph(CONFIG, weights, SPEC, embedding_dtype="float32")
    half = build_decoder_graph(CONFIG, weights, SPEC)
    plans = {
        "int8": WeightPlan(),
        "int8 block 128": WeightPlan(block=128),
        "int8 level 0": WeightPlan(accuracy_level=0),
    }
    return {"fp32": full, **{name: quantize_weights(half, plan)[0] for name, plan in plans.items()}}


def measure(runner: Runner, repeat: int) -> tuple[list[float], list[float], np.ndarray]:
    """Return seconds of each prefill and each step, and the logits float64 [PROMPT, vocabulary] of a prefill."""
    rng = np.random.default_rng(0)
    image = rng.normal(0, 0.02, (ROWS, CONFIG.width)).astype(np.float32)
    text = rng.integers(0, CONFIG.vocabulary, PROMPT - ROWS)
    prompt = np.concatenate((CONFIG.vocabulary + np.arange(ROWS), text))

    def feed(ids: np.ndarray, past: int, logits_from: int) -> Feeds:
        lengths = {"past_length": np.array([past]), "logits_from": np.array([logits_from])}
        return {"input_ids": ids[None], "image_tokens": image, **lengths}

    logits = runner.run(feed(prompt, 0, 0))["logits"][0].astype(np.float64)
    prefill, steps = [], []
    for _ in range(repeat):
        prefill.append(seconds(lambda: runner.run(feed(prompt, 0, PROMPT - 1))))
        for step in range(STEPS):
            token = text[step % len(text) :][:1]
            steps.append(seconds(lambda token=token, past=PROMPT + step: runner.run(feed(token, past, 0))))
    return prefill, steps, logits


def bytes_per_step(graph: onnx.ModelProto) -> int:
    """Return how many bytes of constants one step reads; the cache adds 1 to 6 MB more, by its length."""
    return sum(len(t.raw_data) for t in graph.graph.initializer if t.name not in ONCE_PER_STEP_EXCEPT)


def bandwidth(size: int, threads: int) -> float:
    """Return GB/s of the fastest of 15 reads of a buffer of `size` bytes, split over `threads`."""
    part = np.ones(size // 4 // threads, np.float32)
    parts = [part.copy() for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        best = min(seconds(lambda: list(pool.map(lambda a: np.dot(a, a), parts))) for _ in range(15))
    return part.nbytes * threads / best / 1e9


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
