"""Perplexity of native decoders on what a radiologist's labels say of a series, in both languages, as a Markdown table.

    python tests/bench/bench_nano_text.py DICOM_FOLDER LABELS.nii.gz FULL_PRECISION_BUNDLE BUNDLE...

The text is made from the labels alone: where each structure is, what is visible, what kind of image it is. Every bundle
gets the same prompts, image rows (of the first bundle) and answers; only the decoder differs.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgemed.backends import open_runner
from edgemed.bundle import Bundle, open_bundle
from edgemed.core import Language, Prompt, Scan
from edgemed.dicom import read_scan
from edgemed.evaluation import MINIMUM_PIXELS, QUESTIONS, by_position, read_label_map
from edgemed.families import open_family
from edgemed.families.native_lexicon import BODY_PARTS, MODALITIES, STRUCTURES
from edgemed.families.native_text import NativeText
from edgemed.families.native_view import model_view
from edgemed.geometry import BINS, box_of, box_to_bins
from edgemed.graphs import Feeds
from edgemed.training.answers import say_image, say_list, say_place
from edgemed.training.facts import ImageFacts

SIDE = 256
LIST: dict[Language, str] = {"en": "List the visible structures.", "zh": "请列出可见的结构。"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("bundles", nargs="+", help="the first is full precision")
    parser.add_argument("--every", type=int, default=2, metavar="SLICES")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    bundles = [open_bundle(name) for name in options.bundles]
    calls = list(calls_of(bundles[0], options.series, options.labels, options.every, options.threads))
    tokens = sum(len(answer) for _, answer in calls)
    print(f"{datetime.date.today()}, {platform.machine()}, load {os.getloadavg()[0]:.1f}, ", end="")
    print(f"{len(calls)} answers, {tokens} tokens\n")
    print("| decoder | MB | words and tags | change | with coordinates | change |")
    print("| --- | --: | --: | --: | --: | --: |")
    exact: tuple[float, float] | None = None
    for bundle in bundles:
        found = perplexity(bundle, calls, options.threads)
        exact = exact or found
        told = " | ".join(
            f"{ours:.4f} | {100 * (ours / first - 1):+.2f} %" for ours, first in zip(found, exact, strict=True)
        )
        size = sum(p.stat().st_size for p in bundle.path.glob("graphs/decoder.onnx*"))
        name = bundle.manifest.precision["decoder"]
        print(f"| {name} | {size / 1e6:.1f} | {told} |", flush=True)


def calls_of(bundle: Bundle, series: Path, labels: Path, every: int, threads: int) -> Iterator[tuple[Feeds, list[int]]]:
    """Yield (feeds of one decoder call, ids of the answer that its logits should give)."""
    family, text = open_family(bundle), NativeText(bundle.file("tokenizer/tokenizer.json"))
    specs = family.graphs()
    runners = {
        role: open_runner("onnxruntime", bundle.graph_path(role), specs[role], device="cpu", threads=threads)
        for role in ("vision_encoder", "projector")
    }
    volume, names = read_label_map(labels)
    scans = [read_scan(path) for path in by_position(series)]
    for k in range(0, len(scans), every):
        scan, seg = scans[k], volume[:, :, k].T[::-1]
        facts = facts_of(scan, {name: np.ascontiguousarray(seg == value) for value, name in names.items()})
        features: Feeds = {}
        for language in ("en", "zh"):
            for question, answer in turns(facts, language):
                prompt = Prompt(question, language=language)
                prepared = family.prepare([scan], prompt)
                features = features or runners["vision_encoder"].run(prepared.vision)
                known = {t.name for t in specs["projector"].fed_inputs}
                fed = {**{n: a for n, a in features.items() if n in known}, **prepared.projector}
                asked = family.ask(prompt, prepared, runners["projector"].run(fed))
                ids = text.encode_answer(answer)
                yield (
                    {
                        **asked.fixed,
                        "input_ids": np.array([[*asked.prompt_ids, *ids[:-1]]], np.int64),
                        "past_length": np.zeros(1, np.int64),
                        "logits_from": np.array([len(asked.prompt_ids) - 1], np.int64),
                    },
                    list(ids),
                )


def facts_of(scan: Scan, masks: dict[str, np.ndarray]) -> ImageFacts:
    """Return what the labels of one slice say."""
    shown = scan.shown(scan.first_frame)
    view = model_view(shown, scan.modality, scan.pixel_spacing_mm)
    keys = {term.key: i for i, term in enumerate(STRUCTURES)}
    visible = {}
    for name, mask in masks.items():
        box = box_of(mask)
        if name in keys and box is not None and int(mask.sum()) >= MINIMUM_PIXELS:
            visible[keys[name]] = box_to_bins(view.box_to_model(box), SIDE)
    modality = next(i for i, term in enumerate(MODALITIES) if term.key == "ct")
    part = next(i for i, term in enumerate(BODY_PARTS) if term.key == "abdomen")
    return ImageFacts(modality, part, visible)


def turns(facts: ImageFacts, language: Language) -> Iterator[tuple[str, str]]:
    """Yield questions and answers."""
    for structure in facts.visible:
        term = STRUCTURES[structure]
        name = (term.en if language == "en" else term.zh)[0]
        yield QUESTIONS["where"][language].format(name), say_place(structure, facts, language)
    yield LIST[language], say_list(facts, language)
    yield QUESTIONS["modality"][language], say_image(facts, language)


def perplexity(bundle: Bundle, calls: list[tuple[Feeds, list[int]]], threads: int) -> tuple[float, float]:
    """Return exp of the mean negative log-likelihood of (words and tags, all tokens) of the answers.

    Coordinates are those of the labels, the model writes what its vision side proposes: most of their loss is not the
    decoder's.
    """
    ids = NativeText(bundle.file("tokenizer/tokenizer.json")).tokens()
    places = range(ids.first_coordinate, ids.first_coordinate + BINS)
    runner = open_runner(
        "onnxruntime", bundle.graph_path("decoder"), bundle.spec("decoder"), device="cpu", threads=threads
    )
    lost: list[float] = []
    words: list[float] = []
    for feeds, answer in calls:
        runner.reset()
        logits = runner.run(feeds)["logits"][0].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        likely = logits[np.arange(len(answer)), answer] - np.log(np.exp(logits).sum(axis=1))
        lost += [-value for value in likely.tolist()]
        words += [-value for token, value in zip(answer, likely.tolist(), strict=True) if token not in places]
    return float(np.exp(np.mean(words))), float(np.exp(np.mean(lost)))


if __name__ == "__main__":
    main()
