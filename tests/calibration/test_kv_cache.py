"""A decoder with its cache in int8 beside the same decoder in float32: steps, roll-back, size, whole answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from edgemed.backends import open_runner
from edgemed.bundle import Bundle
from edgemed.calibration.gates import Gates
from edgemed.calibration.graph_run import GraphRun
from edgemed.calibration.kv_cache import cache_scales, with_int8_cache
from edgemed.calibration.plan import QuantPlan, plan_from_toml, plan_to_toml
from edgemed.calibration.quantize_bundle import PLAN, REPORT, QuantizeOptions, quantize_bundle
from edgemed.calibration.slices import read_slices
from edgemed.core import Prompt
from edgemed.errors import BundleError, InvalidInput, NoInput
from edgemed.export.decoder_graph import build_decoder_graph
from edgemed.export.portable_decoder import build_portable_decoder, portable_spec
from edgemed.families.specs import decoder_spec
from edgemed.graphs import DimRange, Feeds, GraphSpec, from_json, to_json
from edgemed.infer import InferOptions, open_session
from edgemed.memory import cache_bytes, plan_memory
from edgemed.models.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocabulary=130, width=64, layers=3, heads=6, kv_heads=2, head_dim=16, inner=96, bins=0
)  # fmt: skip
CACHE, ROWS = 64, 7
IMAGE = np.random.default_rng(1).normal(0, 0.3, (ROWS, CONFIG.width)).astype(np.float32)
Published = Callable[[str], Bundle]


def feed(ids: list[int], past: int = 0) -> Feeds:
    return {
        "input_ids": np.array([ids], np.int64),
        "image_tokens": IMAGE,
        "past_length": np.array([past], np.int64),
        "logits_from": np.array([0], np.int64),
    }


def text(seed: int) -> list[int]:
    return [1, *range(130, 130 + ROWS), *np.random.default_rng(seed).integers(0, 130, 40).tolist()]


IDS = text(2)
CALLS = [[feed(text(seed))] for seed in (3, 4, 5)]


def weights() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    model = Llama(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0) if p.ndim == 2 else p.add_(torch.randn_like(p) * 0.1)
    return {k: v.numpy() for k, v in model.state_dict().items()}


@pytest.fixture(scope="module")
def exact() -> tuple[onnx.ModelProto, GraphSpec]:
    spec = decoder_spec(CONFIG, image_rows=DimRange(1, ROWS, ROWS), cache=CACHE, draft=False)
    return build_decoder_graph(CONFIG, weights(), spec, embedding_dtype="float32"), spec


@pytest.fixture(scope="module")
def small(exact: tuple[onnx.ModelProto, GraphSpec]) -> tuple[onnx.ModelProto, GraphSpec]:
    return with_int8_cache(*exact, cache_scales(*exact, CALLS, threads=1))


def cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return (found * expected).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(expected, axis=-1)


def test_prefill_steps_chunks_and_roll_back_stay_close_to_a_float_cache(
    tmp_path: Path, exact: tuple[onnx.ModelProto, GraphSpec], small: tuple[onnx.ModelProto, GraphSpec]
) -> None:
    """Six heads read two heads of keys: the scale of a query's head is that of its group."""
    whole = GraphRun(*exact, threads=1).run(feed(IDS))["logits"][0]
    onnx.save(small[0], tmp_path / "decoder.onnx")
    runner = open_runner("onnxruntime", tmp_path / "decoder.onnx", small[1], device="cpu", threads=1)
    at, parts = 0, []
    for size in (20, 1, 1, 5, 1, 9, 1, 10):
        parts.append(runner.run(feed(IDS[at : at + size], at))["logits"][0])
        at += size
    assert at == len(IDS)
    once = np.concatenate(parts)
    assert cosines(once, whole).min() > 0.999
    rolled_back = runner.run(feed(IDS[25:35], 25))["logits"][0]
    np.testing.assert_allclose(rolled_back, once[25:35], atol=1e-4)
    runner.reset()
    np.testing.assert_allclose(runner.run(feed(IDS[:20]))["logits"][0], once[:20], atol=1e-4)


def test_each_channel_has_its_own_scale_and_no_position_clips_a_key(
    exact: tuple[onnx.ModelProto, GraphSpec],
) -> None:
    """At the cache's end a token's keys are turned further than any that was calibrated on, and as long as those."""
    scales = cache_scales(*exact, [[feed(IDS[:12])]], threads=1)
    key, value = scales["past_key_1"], scales["past_value_1"]
    assert key.shape == value.shape == (1, CONFIG.kv_heads, 1, CONFIG.head_dim)
    assert len(np.unique(value)) == value.size
    np.testing.assert_array_equal(*np.split(key, 2, axis=-1))
    run = GraphRun(*exact, threads=1)
    first = scales["past_key_0"] * 127  # a layer's keys depend on their own token alone only in the first
    run.run(feed(IDS[:12], CACHE - 12))
    stored = run._state["past_key_0"].numpy()
    assert (np.abs(stored) <= first * 1.0001).all()
    assert (np.abs(stored).max(axis=2) > 0).all()


def test_the_cache_takes_a_quarter_and_the_manifest_says_so(
    exact: tuple[onnx.ModelProto, GraphSpec], small: tuple[onnx.ModelProto, GraphSpec]
) -> None:
    assert cache_bytes(small[1]) * 4 == cache_bytes(exact[1])
    assert from_json(to_json(small[1])) == small[1]
    assert small[1].fed_inputs == exact[1].fed_inputs
    assert small[1].returned_outputs == exact[1].returned_outputs
    assert exact[0].graph.node[-1] == small[0].graph.node[-1]
    assert all(len(n.input) < 13 for n in exact[0].graph.node)  # what was given is not changed


def test_what_has_no_such_cache_is_refused(exact: tuple[onnx.ModelProto, GraphSpec]) -> None:
    model, spec = exact
    portable = build_portable_decoder(CONFIG, weights(), spec, dtype="fp32"), portable_spec(spec, "fp32")
    with pytest.raises(InvalidInput, match="GroupQueryAttention, and this decoder has none: TensorRT"):
        cache_scales(*portable, CALLS)
    scales = cache_scales(model, spec, CALLS, threads=1)
    with pytest.raises(InvalidInput, match="TensorRT"):
        with_int8_cache(*portable, scales)
    with pytest.raises(InvalidInput, match="cache of the decoder is int8; float32 was expected"):
        with_int8_cache(*with_int8_cache(model, spec, scales), scales)
    with pytest.raises(InvalidInput, match="no scale of past_value_2"):
        with_int8_cache(model, spec, {n: s for n, s in scales.items() if n != "past_value_2"})
    with pytest.raises(NoInput, match="no feeds"):
        cache_scales(model, spec, [])


LOOSE = Gates(cosine=0.99, box_iou=0, mask_dice=0.5, same_text=0)
FEW = QuantizeOptions(calibrate=2, held_out=1, gates=LOOSE, max_new_tokens=4, threads=1)


def test_a_bundle_with_an_int8_cache_answers_and_keeps_what_its_weights_are(
    tmp_path: Path, published_bundle: Published
) -> None:
    source = published_bundle("medrega-tiny")
    made = quantize_bundle(source.path, tmp_path / "small", QuantPlan(cache="int8"), FEW)
    assert made.manifest.precision == source.manifest.precision
    assert plan_memory(made).cache * 4 == plan_memory(source).cache
    assert plan_from_toml(made.file(PLAN).read_text()).cache == "int8"
    report = json.loads(made.file(REPORT).read_text())
    assert report["cache"] == "int8"
    assert {row["graph"] for row in report["graphs"]} == {"decoder"}
    assert all(row["passed"] and row["cosine"] >= LOOSE.cosine for row in report["graphs"])
    for name, digest in source.manifest.files.items():
        if "decoder" not in name or "mask" in name:
            assert made.manifest.files[name] == digest
    scan = read_slices(None, 1).scans[0]
    with open_session(made.path, device="cpu", threads=1) as session:
        answer = session.ask(scan, Prompt("Which organ is this?"), InferOptions(max_new_tokens=2))
    assert len(answer.generated_ids) == 2


def test_packed_weights_stay_packed_under_an_int8_cache(tmp_path: Path, published_bundle: Published) -> None:
    """First both at once, as a plan's precision; then a cache for a bundle that was quantized before."""
    source = published_bundle("medrega-tiny")
    both = quantize_bundle(
        source.path, tmp_path / "both", QuantPlan({"decoder": "int8-weights"}), replace(FEW, cache="int8")
    )  # fmt: skip
    assert both.manifest.precision["decoder"] == "int8"
    packed = quantize_bundle(source.path, tmp_path / "packed", QuantPlan({"decoder": "int8-weights"}), FEW)
    later = quantize_bundle(packed.path, tmp_path / "later", QuantPlan(cache="int8"), FEW)
    assert later.manifest.precision["decoder"] == "int8"
    kinds = [{n.op_type for n in onnx.load(b.graph_path("decoder")).graph.node} for b in (both, later)]
    assert "MatMulNBits" in kinds[0]
    assert kinds[0] == kinds[1]
    assert both.spec("decoder") == later.spec("decoder")


def test_a_cache_that_loses_too_much_is_told_by_itself(tmp_path: Path, published_bundle: Published) -> None:
    strict = replace(FEW, gates=replace(LOOSE, cosine=1.0), cache="int8")
    with pytest.raises(BundleError, match="decoder with an int8 cache and nothing else: cosine of .* nothing was writ"):
        quantize_bundle(published_bundle("medrega-tiny").path, tmp_path / "small", "int8", strict)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_from_before_keeps_the_cache() -> None:
    assert plan_from_toml('method = "minmax"\nblock = 32\n[precision]\n"decoder" = "int8-weights"\n').cache == "fp32"
    plan = QuantPlan(cache="int8")
    assert plan_from_toml(plan_to_toml(plan)) == plan
    with pytest.raises(InvalidInput, match="cache is 'fp8'; one of fp32, int8"):
        plan_from_toml('cache = "fp8"')
