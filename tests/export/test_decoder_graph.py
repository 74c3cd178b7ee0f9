"""The decoder graph against the torch module it is written from: prefill, steps, chunks on a cache, roll-back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from edgemed.backends import Runner, open_runner
from edgemed.box_grammar import BoxGrammar, BoxTokens
from edgemed.calibration.weight_only import quantize_weights
from edgemed.decoding import DecodeOptions, decode
from edgemed.errors import InvalidInput
from edgemed.export.decoder_graph import build_decoder_graph
from edgemed.export.graph_writer import GraphWriter, MatrixFormat, WeightFile
from edgemed.families.specs import decoder_spec
from edgemed.graphs import DimRange, from_json, to_json
from edgemed.models.llama import Llama, LlamaConfig
from edgemed.models.moe import MoeLlama, TopOneExperts

CONFIG = LlamaConfig(
    vocabulary=130,
    first_coordinate=11,
    width=64,
    layers=3,
    heads=6,
    kv_heads=2,
    head_dim=16,
    inner=96,
    bins=100,
    draft_rank=8,
)
CACHE, ROWS = 64, 7


def make(config: LlamaConfig, seed: int = 0) -> Llama:
    """A model whose weights are large enough for attention and the MLP to matter."""
    torch.manual_seed(seed)
    model = Llama(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0) if p.ndim == 2 else p.add_(torch.randn_like(p) * 0.1)
    return model


def tensors(model: Llama) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in model.state_dict().items()}


def open_graph(model: Llama, folder: Path, quantize: bool = False, **options) -> Runner:
    spec = decoder_spec(model.config, image_rows=DimRange(1, ROWS, ROWS), cache=CACHE)
    graph = build_decoder_graph(model.config, tensors(model), spec, **options)
    if quantize:
        graph, _ = quantize_weights(graph)
    onnx.save(graph, folder / "decoder.onnx")
    return open_runner("onnxruntime", folder / "decoder.onnx", spec, threads=1)


IMAGE = np.random.default_rng(1).normal(0, 0.3, (ROWS, CONFIG.width)).astype(np.float32)
IDS = [1, *range(CONFIG.vocabulary, CONFIG.vocabulary + ROWS), *np.random.default_rng(2).integers(0, 130, 40).tolist()]


def feed(ids: list[int], past: int, logits_from: int) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.array([ids], np.int64),
        "image_tokens": IMAGE,
        "past_length": np.array([past], np.int64),
        "logits_from": np.array([logits_from], np.int64),
    }


def by_torch(model: Llama, ids: list[int]) -> dict[str, np.ndarray]:
    v = model.config.vocabulary
    rows = [model.embed(torch.tensor(i)) if i < v else torch.tensor(IMAGE[i - v]) for i in ids]
    with torch.no_grad():
        hidden = model(torch.stack(rows)[None], torch.arange(len(ids))[None])
        draft = model.box_draft_logits(hidden).argmax(-1)
        return {"hidden": hidden.numpy(), "logits": model.logits(hidden).numpy(), "box_draft": draft.numpy()}


def assert_equal(
    out: dict[str, np.ndarray], expected: dict[str, np.ndarray], first: int, end: int, atol: float
) -> None:
    assert set(out) == {"logits", "hidden", "box_draft"}
    for name in ("logits", "hidden"):
        np.testing.assert_allclose(out[name], expected[name][:, first:end], atol=atol, err_msg=name)
    assert np.array_equal(out["box_draft"], expected["box_draft"][:, first:end])


@pytest.mark.parametrize("tied", [True, False])
def test_prefill_steps_and_chunks_on_a_cache_equal_torch(tmp_path: Path, tied: bool) -> None:
    model = make(dataclasses.replace(CONFIG, tied=tied))
    expected = by_torch(model, IDS)
    runner = open_graph(model, tmp_path, embedding_dtype="float32")
    prompt = 20
    assert_equal(runner.run(feed(IDS[:prompt], 0, prompt - 1)), expected, prompt - 1, prompt, 1e-4)
    at = prompt
    for size in (1, 1, 5, 1, 9, 1, 2):  # several tokens on top of a cache: causal inside the chunk too
        assert_equal(runner.run(feed(IDS[at : at + size], at, 0)), expected, at, at + size, 1e-4)
        at += size
    assert_equal(runner.run(feed(IDS[25:35], 25, 3)), expected, 28, 35, 1e-4)  # rolled back
    assert_equal(runner.run(feed(IDS, 0, 0)), expected, 0, len(IDS), 1e-4)  # another prompt, no reset needed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_decoding_loop_over_the_graph_equals_recomputing_everything_with_torch(
    tmp_path: Path, temperature: float
) -> None:
    """Also: the hidden state that comes with <box> is the one torch gives at that token."""
    box, box_end, ref, ref_end, seg, eos = range(2, 8)
    never = (0, 1, *range(113, CONFIG.vocabulary))  # little text, so that there are many tags
    tokens = BoxTokens(box, box_end, ref, ref_end, seg, eos, CONFIG.first_coordinate, CONFIG.bins, never)
    grammar = BoxGrammar(tokens, CONFIG.vocabulary)
    model = make(dataclasses.replace(CONFIG, tied=False), seed=1)  # tied, it would say one token again and again
    with torch.no_grad():  # a model that does not end at once
        model.head.weight[eos] = 0
    prompt = IDS[:12]
    runner = open_graph(model, tmp_path, embedding_dtype="float32")
    options = DecodeOptions(
        eos_id=eos, max_new_tokens=50, temperature=temperature, seed=3, keep_hidden=frozenset({seg, box}), cache=CACHE
    )
    decoded = decode(runner, prompt, {"image_tokens": IMAGE}, grammar, options)
    assert box in decoded.ids
    state, rng = grammar.start(), np.random.default_rng(3)
    for i, token in enumerate(decoded.ids):
        seen = [*prompt, *decoded.ids[:i]]
        logits = by_torch(model, seen)["logits"][0, -1].astype(np.float64)
        logits[~grammar.allowed(state)] = -np.inf
        log_probs = logits - np.logaddexp.reduce(logits)
        assert decoded.log_probs[i] == pytest.approx(log_probs[token], abs=1e-3)
        if temperature == 0 or grammar.allowed(state).sum() == 1:  # nothing is drawn where there is no choice
            assert token == log_probs.argmax()
        else:
            assert token == np.searchsorted(np.cumsum(np.exp(log_probs)), rng.random(), side="right")
        state = grammar.advance(state, token)
    hidden = by_torch(model, [*prompt, *decoded.ids])["hidden"][0]
    assert [i for i, _ in decoded.hidden] == [i for i, token in enumerate(decoded.ids) if token in (seg, box)]
    for i, row in decoded.hidden:
        np.testing.assert_allclose(row, hidden[len(prompt) + i], atol=1e-4)


def test_a_fp16_embedding_table_moves_the_logits_by_rounding_only(tmp_path: Path) -> None:
    model = make(CONFIG)
    expected = by_torch(model, IDS)
    out = open_graph(model, tmp_path).run(feed(IDS, 0, 0))
    np.testing.assert_allclose(out["logits"], expected["logits"], atol=5e-3)


def test_int8_weights_keep_the_direction_of_the_logits(tmp_path: Path) -> None:
    model = make(CONFIG)
    expected = by_torch(model, IDS)["logits"][0]
    out = open_graph(model, tmp_path, quantize=True).run(feed(IDS, 0, 0))["logits"][0]
    cosine = (out * expected).sum(-1) / np.linalg.norm(out, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosine.min() > 0.999


def test_the_cache_can_be_filled_to_its_end_and_not_beyond(tmp_path: Path) -> None:
    model = make(CONFIG)
    ids = (IDS * 2)[:CACHE]
    runner = open_graph(model, tmp_path, embedding_dtype="float32")
    runner.run(feed(ids[:-1], 0, CACHE - 2))
    assert_equal(runner.run(feed(ids[-1:], CACHE - 1, 0)), by_torch(model, ids), CACHE - 1, CACHE, 1e-4)
    with pytest.raises(InvalidInput, match="decoder"):
        runner.run(feed(ids[:2], CACHE - 1, 0))


def test_an_id_past_the_image_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="decoder"):
        open_graph(make(CONFIG), tmp_path).run(feed([CONFIG.vocabulary + ROWS], 0, 0))


def test_the_spec_survives_the_manifest() -> None:
    spec = decoder_spec(CONFIG, image_rows=DimRange(1, ROWS, ROWS), cache=CACHE)
    assert from_json(to_json(spec)) == spec
    assert [t.name for t in spec.fed_inputs] == ["input_ids", "image_tokens", "past_length", "logits_from"]
    assert [t.name for t in spec.returned_outputs] == ["logits", "hidden", "box_draft"]


@pytest.mark.parametrize(("change", "message"), [(None, "no tensor norm.weight"), (np.ones(3), r"is \[3\]")])
def test_weights_that_do_not_fit_are_named(change: np.ndarray | None, message: str) -> None:
    weights = tensors(make(CONFIG))
    del weights["norm.weight"]
    if change is not None:
        weights["norm.weight"] = change
    with pytest.raises(InvalidInput, match=message):
        build_decoder_graph(CONFIG, weights, decoder_spec(CONFIG, image_rows=DimRange(1, 1, 1)))


# --- experts ----------------------------------------------------------------------------------------------------------

MIXED = LlamaConfig(
    vocabulary=130, width=64, layers=3, heads=4, kv_heads=4, head_dim=16, inner=96, tied=False, bins=0
)  # fmt: skip
EXPERTS = (2, 1, 2), (1, 3, 1), (2, 2, 2), (3, 1, 3)


def make_moe(experts: tuple[int, ...], seed: int = 0) -> MoeLlama:
    """As `make`, with routers that are sure of some tokens and not of others."""
    torch.manual_seed(seed)
    model = MoeLlama(MIXED, experts).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(40.0 if "router" in name else 4.0) if p.ndim == 2 else p.add_(torch.randn_like(p) * 0.1)
    return model


def open_moe(model: MoeLlama, folder: Path, experts: tuple[int, ...], form: MatrixFormat | None = None) -> Runner:
    spec = decoder_spec(
        model.config, image_rows=DimRange(1, ROWS, ROWS), cache=CACHE, draft=False, experts=experts
    )  # fmt: skip
    weights = WeightFile(folder / "decoder.onnx.data")
    graph = build_decoder_graph(
        model.config, tensors(model), spec, embedding_dtype="exact", experts=experts, writer=GraphWriter(form, weights)
    )
    weights.finish()
    onnx.save(graph, folder / "decoder.onnx")
    return open_runner("onnxruntime", folder / "decoder.onnx", spec, threads=1)


def routed_by_torch(model: MoeLlama, ids: list[int], image: np.ndarray = IMAGE) -> dict[str, np.ndarray]:
    with torch.no_grad():
        embeddings = model.embed_mixed(torch.tensor([ids]), torch.from_numpy(image))
        hidden, routed = model.forward_routed(embeddings, torch.arange(len(ids))[None])
        router = torch.stack(routed, dim=2)  # [1, tokens, layers with experts, experts]
        return {"hidden": hidden.numpy(), "logits": model.logits(hidden).numpy(), "router": router.numpy()}


def assert_routed_equal(out: dict[str, np.ndarray], expected: dict[str, np.ndarray], first: int, end: int) -> None:
    assert set(out) == {"logits", "hidden", "router"}
    for name, values in expected.items():
        np.testing.assert_allclose(out[name], values[:, first:end], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("experts", EXPERTS)
def test_a_decoder_with_experts_equals_torch_in_prefill_steps_and_chunks(
    tmp_path: Path, experts: tuple[int, ...]
) -> None:
    model = make_moe(experts)
    expected = routed_by_torch(model, IDS)
    chosen = expected["router"][0].argmax(-1)  # [tokens, layers with experts]
    assert all(len(np.unique(layer)) == max(experts) for layer in chosen.T)  # every expert has tokens
    runner = open_moe(model, tmp_path, experts)
    prompt = 20
    assert_routed_equal(runner.run(feed(IDS[:prompt], 0, prompt - 1)), expected, prompt - 1, prompt)
    at = prompt
    for size in (1, 1, 5, 1, 9):
        assert_routed_equal(runner.run(feed(IDS[at : at + size], at, 0)), expected, at, at + size)
        at += size
    assert_routed_equal(runner.run(feed(IDS[25:35], 25, 3)), expected, 28, 35)  # rolled back
    assert_routed_equal(runner.run(feed(IDS, 0, 0)), expected, 0, len(IDS))
    assert_routed_equal(runner.run(feed(IDS, 0, len(IDS) - 1)), expected, len(IDS) - 1, len(IDS))


@pytest.mark.parametrize("sole", [0, 1, 2])
def test_when_all_tokens_go_to_one_expert_the_others_have_none(tmp_path: Path, sole: int) -> None:
    experts = (3, 3, 3)
    model = make_moe(experts)
    with torch.no_grad():
        for block in model.layers:
            assert isinstance(block.mlp, TopOneExperts)
            block.mlp.router.weight.zero_()[sole, 0] = 5.0
        model.embedding.weight[:, 0] = 50.0
    image = IMAGE.copy()
    image[:, 0] = 50.0
    expected = routed_by_torch(model, IDS, image)
    assert (expected["router"].argmax(-1) == sole).all()
    runner = open_moe(model, tmp_path, experts)
    assert_routed_equal(runner.run({**feed(IDS, 0, 0), "image_tokens": image}), expected, 0, len(IDS))
    assert_routed_equal(runner.run({**feed(IDS[-1:], len(IDS) - 1, 0), "image_tokens": image}), expected,
                        len(IDS) - 1, len(IDS))  # fmt: skip


def test_equal_probabilities_go_to_the_first_expert(tmp_path: Path) -> None:
    experts = (2, 2, 2)
    model = make_moe(experts)
    with torch.no_grad():
        for block in model.layers:
            block.mlp.router.weight.zero_()
    out = open_moe(model, tmp_path, experts).run(feed(IDS, 0, 0))
    assert (out["router"] == 0.5).all()
    assert_routed_equal(out, routed_by_torch(model, IDS), 0, len(IDS))


@pytest.mark.parametrize(("precision", "cosine"), [("int8", 0.999), ("int4", 0.9)])
def test_packed_experts_keep_the_direction_and_the_router_is_never_rounded(
    tmp_path: Path, precision: str, cosine: float
) -> None:
    experts = (2, 1, 2)
    model = make_moe(experts)
    out = open_moe(model, tmp_path, experts, MatrixFormat(precision)).run(feed(IDS, 0, 0))  # type: ignore[arg-type]
    logits, expected = out["logits"][0], routed_by_torch(model, IDS)["logits"][0]
    found = (logits * expected).sum(-1) / np.linalg.norm(logits, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(found) > cosine
    graph = onnx.load(tmp_path / "decoder.onnx").graph
    stored = {t.name: t for t in graph.initializer}
    assert np.array_equal(
        onnx.numpy_helper.to_array(stored["layers.0.mlp.router.weight"]),
        model.layers[0].mlp.router.weight.detach().numpy().T,
    )
    for name in ("layers.0.mlp.experts.1.gate_up", "layers.2.mlp.experts.0.down", "layers.1.gate_up", "head"):
        assert stored[f"{name}.weight.{precision}"].data_type == onnx.TensorProto.UINT8


def test_an_exact_embedding_table_that_bfloat16_holds_takes_half(tmp_path: Path) -> None:
    model = make_moe((2, 1, 2))
    with torch.no_grad():
        model.embedding.weight.copy_(model.embedding.weight.bfloat16())
    out = open_moe(model, tmp_path, (2, 1, 2)).run(feed(IDS, 0, 0))
    assert_routed_equal(out, routed_by_torch(model, IDS), 0, len(IDS))
    stored = {t.name: t for t in onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph.initializer}
    assert stored["embedding.weight"].data_type == onnx.TensorProto.BFLOAT16
