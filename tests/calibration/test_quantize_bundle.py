"""Bundle in, smaller bundle out: what it is, what it is refused for, and that nothing half-written is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from edgemed.bundle import Bundle, list_bundles, open_bundle, write_bundle
from edgemed.calibration import quantize_bundle as quantize_bundle_module
from edgemed.calibration.gates import Gates
from edgemed.calibration.plan import QuantPlan, plan_from_toml
from edgemed.calibration.quantize_bundle import PLAN, REPORT, TABLE, QuantizeOptions, quantize_bundle
from edgemed.calibration.slices import read_slices
from edgemed.core import Prompt
from edgemed.errors import BundleError, InvalidInput
from edgemed.infer import InferOptions, open_session

LOOSE = Gates(cosine=0.99, box_iou=0, mask_dice=0.5)
"""What random weights pass: their masks are noise around zero, and each layer amplifies rounding."""
FEW = QuantizeOptions(calibrate=2, held_out=1, gates=LOOSE, max_new_tokens=4, threads=1)
Published = Callable[[str], Bundle]


def quantized(bundle: Bundle, folder: Path, precision: Any, **options: Any) -> Bundle:
    return quantize_bundle(bundle.path, folder / "small", precision, replace(FEW, **options))


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize("family", ["medrega-tiny", "medplib-tiny"])
@pytest.mark.parametrize("precision", ["int8", "fp8", "int4"])
def test_every_precision_of_a_published_family_runs_and_passes(
    tmp_path: Path, published_bundle: Published, family: str, precision: str
) -> None:
    source = published_bundle(family)
    made = quantized(source, tmp_path, precision)
    expected = {"int8": ("int8", "int8"), "fp8": ("fp8", "fp8"), "int4": ("int8", "int4")}[precision]
    assert (made.manifest.precision["vision_encoder"], made.manifest.precision["decoder"]) == expected
    assert made.graph_path("decoder").stat().st_size < 0.75 * (
        source.graph_path("decoder").stat().st_size + source.path.joinpath("graphs/decoder.onnx.data").stat().st_size
    )
    report = json.loads(made.file(REPORT).read_text())
    assert {row["graph"] for row in report["graphs"]} == {"vision_encoder", "decoder"}
    assert made.manifest.precision["projector"] == "fp32"
    sharp = [row for row in report["graphs"] if row["precision"] in ("int8", "fp8")]
    assert all(row["passed"] for row in report["graphs"])
    assert min(row["cosine"] for row in sharp) >= LOOSE.cosine
    assert report["reference"]["sha256"] == source.digest
    assert report["answers"]["prompts"] >= 2
    scan = read_slices(None, 1).scans[0]
    with open_session(made.path, device="cpu", threads=1) as session:
        answer = session.ask(scan, Prompt("Which organ is this?"), InferOptions(max_new_tokens=2))
    assert answer.provenance.precision["decoder"] == expected[1]


def test_the_bundle_says_what_it_was_made_with_and_nothing_about_the_files(
    tmp_path: Path, published_bundle: Published
) -> None:
    slices = tmp_path / "WANG^XIAOMING-19530412"
    slices.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)).save(slices / f"patient{i}.png")
    told: list[str] = []
    plan = QuantPlan({"decoder": "int4-weights"})
    made = quantized(
        published_bundle("medrega-tiny"), tmp_path, plan, slices=slices, name="small", tell=told.append
    )  # fmt: skip
    assert made.manifest.name == "small"
    assert made.manifest.calibration_digest == read_slices(slices, 3).split(1)[0].digest
    assert made.manifest.settings == published_bundle("medrega-tiny").manifest.settings
    assert plan_from_toml(made.file(PLAN).read_text()) == plan
    assert any("no slice of modality CT" in line for line in told)
    for path in made.path.rglob("*"):
        if path.is_file():
            assert b"WANG" not in path.read_bytes()
            assert b"patient1" not in path.read_bytes()


def test_what_is_not_quantized_keeps_its_bytes(tmp_path: Path, published_bundle: Published) -> None:
    source = published_bundle("medplib-tiny")
    made = quantized(source, tmp_path, QuantPlan({"projector": "int8-weights"}))
    for name, digest in source.manifest.files.items():
        if "projector" not in name:
            assert made.manifest.files[name] == digest
    assert made.manifest.precision == {**source.manifest.precision, "projector": "int8"}


def test_a_missed_gate_names_the_layers_and_leaves_nothing(tmp_path: Path, published_bundle: Published) -> None:
    plan = QuantPlan({"projector": "fp8"})
    with pytest.raises(BundleError, match=r"projector in fp8: cosine of .* layers that cost most: .* nothing was writ"):
        quantized(published_bundle("medplib-tiny"), tmp_path, plan, gates=Gates(cosine=0.999999))
    assert left_in(tmp_path) == []


def test_a_named_precision_leaves_out_what_misses_the_cosine(tmp_path: Path, published_bundle: Published) -> None:
    source = published_bundle("medrega-tiny")
    told: list[str] = []
    strict = replace(LOOSE, cosine=0.9996)
    made = quantized(source, tmp_path, "int8", gates=strict, tell=told.append)
    assert any("keep their precision" in line for line in told)
    plan = plan_from_toml(made.file(PLAN).read_text())
    assert any("alone in int8" in reason for found in plan.excluded.values() for reason in found.values())
    assert min(row["cosine"] for row in json.loads(made.file(REPORT).read_text())["graphs"]) >= strict.cosine


def test_answers_that_differ_too_much_cost_precision_where_they_are_made(
    tmp_path: Path, published_bundle: Published
) -> None:
    told: list[str] = []
    made = quantized(
        published_bundle("medrega-tiny"), tmp_path, "auto", gates=replace(LOOSE, same_text=0.75), tell=told.append,
        max_new_tokens=8,
    )  # fmt: skip
    assert any("same text" in line and ("get 8" in line or "keep their precision" in line) for line in told)
    assert json.loads(made.file(REPORT).read_text())["answers"]["same_text"] >= 0.75
    assert "layers.0.qkv.output" in made.file(TABLE).read_text()


def test_auto_keeps_the_precision_of_a_graph_that_nothing_mends(
    tmp_path: Path, published_bundle: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = iter([["same text in 0.1, at least 0.9 was expected"], []])
    monkeypatch.setattr(quantize_bundle_module, "missed", lambda *rest: next(verdicts))
    monkeypatch.setattr(quantize_bundle_module, "_RELAXED", 0)
    monkeypatch.setattr(quantize_bundle_module._Work, "blamed", lambda *rest: "vision_encoder")
    told: list[str] = []
    source = published_bundle("medrega-tiny")
    made = quantized(source, tmp_path, "auto", tell=told.append)
    assert any(line.endswith("the vision_encoder keeps its precision") for line in told)
    assert (made.manifest.precision["vision_encoder"], made.manifest.precision["decoder"]) == ("fp32", "int4")
    for name, digest in source.manifest.files.items():
        if "vision_encoder" in name:
            assert made.manifest.files[name] == digest
    assert {row["graph"] for row in json.loads(made.file(REPORT).read_text())["graphs"]} == {"decoder"}


def test_a_plan_that_does_not_fit_is_refused(tmp_path: Path, published_bundle: Published) -> None:
    source = published_bundle("medrega-tiny")
    for plan, message in (
        (QuantPlan({"mask_decoder": "int8"}), "names the mask_decoder; the bundle has none"),
        (QuantPlan({"decoder": "int8"}, excluded={"decoder": {"no such node": "a test"}}), "names no such node"),
        (QuantPlan(), "quantizes nothing"),
    ):
        with pytest.raises(InvalidInput, match=message):
            quantized(source, tmp_path, plan)
    assert left_in(tmp_path) == []


COMMAND = [sys.executable, "-m", "edgemed", "quantize", "--calibrate", "2", "--held-out", "1", "--threads", "1"]


def run(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, **more)


def test_wrong_use_ends_in_one_line_and_its_code(tmp_path: Path, published_bundle: Published) -> None:
    source = str(published_bundle("medrega-tiny").path)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "readme.txt").write_text("nothing to see")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in Path(source).rglob("*"):
        if path.is_file():
            target = damaged / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes()[: 10 if path.name == "projector.onnx" else None])
    out = str(tmp_path / "small")
    for arguments, code, message in (
        ([source, "-o", out, "--slices", str(empty)], 21, "no image among"),
        ([source, "-o", out, "--slices", str(tmp_path / "none")], 20, "is not a folder"),
        ([source, "-o", out, "--precision", "int2"], 22, "int8, fp8, int4, auto"),
        ([source, "-o", out, "--precision", str(tmp_path / "no.toml")], 20, "a plan in TOML"),
        ([str(damaged), "-o", out], 80, "projector.onnx"),
        ([source, "-o", str(empty)], 40, "exists already"),
    ):
        done = run(*arguments)
        assert done.returncode == code, done.stderr
        assert message in done.stderr.splitlines()[-1]
        assert not Path(out).exists()


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path: Path, published_bundle: Published) -> None:
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 200; exec "$@"', "bash", *COMMAND, str(published_bundle("medrega-tiny").path),
         "-o", str(tmp_path / "small"), "--precision", "int8", "--min-cosine", "0.5", "--max-new-tokens", "2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 40, done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1]
    assert left_in(tmp_path) == []


def test_a_killed_quantization_leaves_no_bundle(
    tmp_path: Path, published_bundle: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "bundles"
    home.mkdir(parents=True)
    started = subprocess.Popen(
        [*COMMAND, str(published_bundle("medrega-tiny").path), "-o", str(home / "small"), "--precision", "int8"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while started.poll() is None and not list(home.glob(".small.*.part")):
            os.sched_yield()
    finally:
        started.send_signal(signal.SIGKILL)
        started.wait()
    assert list(home.glob(".small.*.part"))  # it was at work
    assert not (home / "small").exists()
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path / "home"))
    assert [listed.name for listed in list_bundles()] == ["nano"]


def test_the_head_of_the_old_decoder_is_left_out(tmp_path: Path, published_bundle: Published) -> None:
    source, told = published_bundle("medplib-tiny"), []
    manifest = source.manifest
    files = {name: source.file(name) for name in manifest.files} | {"kernels/head.fp16.values.npy": b"old"}
    compiled = write_bundle(
        tmp_path / "compiled", name="compiled", family=manifest.family, graphs=manifest.graphs, files=files,
        precision=manifest.precision, settings=manifest.settings,
    )  # fmt: skip
    made = quantized(compiled, tmp_path, QuantPlan({"projector": "int8-weights"}), tell=told.append)
    assert not any(name.startswith("kernels/") for name in made.manifest.files)
    assert "the kernels are left out: run edgemed compile --backend triton on the new bundle" in told


def test_graphs_that_the_manifest_describes_are_what_is_written(tmp_path: Path, published_bundle: Published) -> None:
    made = quantized(published_bundle("medplib-tiny"), tmp_path, "int8")
    again = open_bundle(made.path)
    assert again.digest == made.digest
    for role, spec in again.manifest.graphs.items():
        model = onnx.load(again.graph_path(role))
        assert {t.name for t in model.graph.input} == {t.name for t in spec.inputs}
        assert {t.name for t in model.graph.output} == {t.name for t in spec.outputs}
