"""The decoder of standard operators against the fused graph and torch: prefill, steps, chunks, roll-back, experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from edgemed.backends import Runner, open_runner
from edgemed.box_grammar import BoxGrammar, BoxTokens
from edgemed.decoding import DecodeOptions, decode
from edgemed.errors import InvalidInput
from edgemed.export.decoder_graph import build_decoder_graph
from edgemed.export.graph_writer import GraphWriter, MatrixFormat, WeightFile
from edgemed.export.portable_decoder import bf16_in_fp32, build_portable_decoder, portable_spec
from edgemed.families.specs import TEXT, decoder_spec
from edgemed.graphs import DimRange, GraphSpec, TensorSpec
from edgemed.models.llama import Llama, LlamaConfig
from edgemed.models.moe import MoeLlama

CACHE, ROWS, VOCABULARY, WIDTH = 64, 7, 130, 64
SIZES: dict[str, Any] = {"vocabulary": VOCABULARY, "width": WIDTH, "layers": 3, "inner": 96}
CASES = {
    "native": (LlamaConfig(**SIZES, first_coordinate=11, heads=6, kv_heads=2, head_dim=16, bins=100, draft_rank=8), ()),
    "grouped": (LlamaConfig(**SIZES, heads=14, kv_heads=2, head_dim=16, rope_theta=5e6, tied=False, bins=0), ()),
    "two experts": (LlamaConfig(**SIZES, heads=4, kv_heads=4, head_dim=16, tied=False, bins=0), (2, 1, 2)),
    "three experts": (LlamaConfig(**SIZES, heads=4, kv_heads=4, head_dim=16, tied=False, bins=0), (1, 3, 1)),
}
every_case = pytest.mark.parametrize("case", CASES)

IMAGE = np.random.default_rng(1).normal(0, 0.3, (ROWS, WIDTH)).astype(np.float32)
IDS = [1, *range(VOCABULARY, VOCABULARY + ROWS), *np.random.default_rng(2).integers(0, VOCABULARY, 40).tolist()]


def make(case: str) -> Llama:
    """A model whose weights are large enough for attention, MLP and routers to matter."""
    config, experts = CASES[case]
    torch.manual_seed(0)
    model = (MoeLlama(config, experts) if experts else Llama(config)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(40.0 if "router" in name else 4.0) if p.ndim == 2 else p.add_(torch.randn_like(p) * 0.1)
    return model


def spec_of(case: str) -> GraphSpec:
    config, experts = CASES[case]
    return decoder_spec(
        config, image_rows=DimRange(1, ROWS, ROWS), cache=CACHE, draft=config.bins > 0, experts=experts
    )  # fmt: skip


def weights(model: Llama) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in model.state_dict().items()}


def portable(case: str, model: Llama, dtype: str = "fp32", **options: Any) -> onnx.ModelProto:
    return build_portable_decoder(
        model.config, weights(model), spec_of(case), dtype=dtype, experts=CASES[case][1], **options
    )  # fmt: skip


def open_graph(graph: onnx.ModelProto, spec: GraphSpec, path: Path) -> Runner:
    onnx.save(graph, path)
    return open_runner("onnxruntime", path, spec, device="cpu", threads=1)


def open_portable(case: str, model: Llama, folder: Path, dtype: str = "fp32") -> Runner:
    return open_graph(portable(case, model, dtype), portable_spec(spec_of(case), dtype), folder / f"{dtype}.onnx")


def open_fused(case: str, model: Llama, folder: Path) -> Runner:
    graph = build_decoder_graph(
        model.config, weights(model), spec_of(case), embedding_dtype="float32", experts=CASES[case][1]
    )
    return open_graph(graph, spec_of(case), folder / "fused.onnx")


def feed(ids: list[int], past: int, logits_from: int, *, portable: bool = True) -> dict[str, np.ndarray]:
    """Feeds that ask for all logits of the positions from `logits_from` on."""
    asked = {"text_at": np.arange(len(ids) - logits_from)} if portable else {}
    return {
        **asked,
        "input_ids": np.array([ids], np.int64),
        "image_tokens": IMAGE,
        "past_length": np.array([past], np.int64),
        "logits_from": np.array([logits_from], np.int64),
    }


def by_torch(model: Llama, ids: list[int]) -> dict[str, np.ndarray]:
    rows = [model.embed(torch.tensor(i)) if i < VOCABULARY else torch.tensor(IMAGE[i - VOCABULARY]) for i in ids]
    with torch.no_grad():
        positions = torch.arange(len(ids))[None]
        if isinstance(model, MoeLlama):
            hidden, routed = model.forward_routed(torch.stack(rows)[None], positions)
            more = {"router": torch.stack(routed, dim=2).numpy()}
        else:
            hidden, more = model(torch.stack(rows)[None], positions), {}
        if model.config.bins:
            more["box_draft"] = model.box_draft_logits(hidden).argmax(-1).numpy()
        return {"hidden": hidden.numpy(), "logits": model.logits(hidden).numpy(), **more}


@every_case
def test_prefill_steps_chunks_and_roll_back_equal_torch_and_the_fused_graph(tmp_path: Path, case: str) -> None:
    model = make(case)
    expected = by_torch(model, IDS)
    if "router" in expected:
        chosen = expected["router"][0].argmax(-1)  # [tokens, layers with experts]
        assert all(len(np.unique(layer)) == max(CASES[case][1]) for layer in chosen.T)  # every expert has tokens
    runner, fused = open_portable(case, model, tmp_path), open_fused(case, model, tmp_path)
    calls = [(0, 20, 19), (20, 21, 0), (21, 22, 0), (22, 27, 0), (27, 28, 0), (28, 37, 0)]
    calls += [(25, 35, 3), (35, 36, 0)]  # rolled back
    calls += [(0, 48, 0), (0, 48, 47)]  # another prompt, no reset needed
    for start, end, kept in calls:
        ours = runner.run(feed(IDS[start:end], start, kept))
        theirs = fused.run(feed(IDS[start:end], start, kept, portable=False))
        assert set(ours) == set(theirs) == set(expected)
        for name, values in expected.items():
            wanted = values[:, start + kept : end]
            np.testing.assert_allclose(ours[name], wanted, atol=1e-4, err_msg=f"{name} at {start}")
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, err_msg=f"{name} at {start}")


@every_case
@pytest.mark.parametrize(("dtype", "kind"), [("fp16", "FLOAT16"), ("bf16", "BFLOAT16"), ("fp32", "FLOAT")])
def test_all_operators_are_standard_and_every_type_fits(case: str, dtype: str, kind: str) -> None:
    graph = portable(case, make(case), dtype)
    onnx.checker.check_model(graph, full_check=True)
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 24)]
    assert not any(n.domain for n in graph.graph.node)
    tensors = graph.graph.initializer
    large = {t.name: t.data_type for t in tensors if len(t.dims) == 2 and not t.name.startswith("rope")}
    routers = {large.pop(name) for name in list(large) if "router" in name}
    assert routers <= {onnx.TensorProto.FLOAT}
    assert set(large.values()) == {getattr(onnx.TensorProto, kind)}


@every_case
def test_fp16_moves_the_logits_by_rounding_only(tmp_path: Path, case: str) -> None:
    model = make(case)
    expected = by_torch(model, IDS)["logits"][0]
    runner = open_portable(case, model, tmp_path, "fp16")
    runner.run(feed(IDS[:20], 0, 0))
    out = runner.run(feed(IDS[20:], 20, 0))["logits"][0]
    assert out.dtype == np.float32
    wanted = expected[20:]
    cosine = (out * wanted).sum(-1) / np.linalg.norm(out, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert np.median(cosine) > 0.9999  # a token may go to another expert where both are as likely


def test_one_decoding_loop_gives_the_same_ids_over_both_graphs(tmp_path: Path) -> None:
    model = make("native")
    tokens = BoxTokens(2, 3, 4, 5, 6, 7, 11, 100, (0, 1, *range(113, VOCABULARY)))
    grammar = BoxGrammar(tokens, VOCABULARY)
    options = DecodeOptions(eos_id=7, max_new_tokens=40, temperature=1.0, seed=3, cache=CACHE)
    runners = [open_(model=model, case="native", folder=tmp_path) for open_ in (open_portable, open_fused)]
    both = [
        decode(runner, IDS[:12], {"image_tokens": IMAGE}, grammar, replace(options, split_head=split))
        for runner, split in zip(runners, (True, False), strict=True)
    ]
    assert len(both[0].ids) > 10
    assert both[0].ids == both[1].ids


def test_the_cache_can_be_filled_to_its_end_and_not_beyond(tmp_path: Path) -> None:
    model = make("native")
    ids = (IDS * 2)[:CACHE]
    runner = open_portable("native", model, tmp_path)
    runner.run(feed(ids[:-1], 0, CACHE - 2))
    out = runner.run(feed(ids[-1:], CACHE - 1, 0))
    np.testing.assert_allclose(out["logits"][0, -1], by_torch(model, ids)["logits"][0, -1], atol=1e-4)
    with pytest.raises(InvalidInput, match="decoder"):
        runner.run(feed(ids[:2], CACHE - 1, 0))


def test_an_id_past_the_image_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="decoder"):
        open_portable("native", make("native"), tmp_path).run(feed([VOCABULARY + ROWS], 0, 0))


def test_weights_in_a_file_compute_the_same(tmp_path: Path) -> None:
    model = make("two experts")
    file = WeightFile(tmp_path / "decoder.onnx.data")
    graph = portable("two experts", model, writer=GraphWriter(weights=file))
    file.finish()
    spec = portable_spec(spec_of("two experts"), "fp32")
    outs = [open_graph(graph, spec, tmp_path / "decoder.onnx").run(feed(IDS, 0, 0)),
            open_portable("two experts", model, tmp_path).run(feed(IDS, 0, 0))]  # fmt: skip
    assert (tmp_path / "decoder.onnx").stat().st_size < (tmp_path / "decoder.onnx.data").stat().st_size
    assert all(np.array_equal(outs[0][name], outs[1][name]) for name in outs[0])


def test_only_the_cache_changes_its_type_and_the_head_is_split() -> None:
    fused, ours = spec_of("native"), portable_spec(spec_of("native"), "fp16")
    assert ours.fed_inputs == (*fused.fed_inputs, TensorSpec("text_at", "int64", (TEXT,)))
    logits, *others = ours.returned_outputs
    assert (logits.shape, others) == ((1, TEXT, VOCABULARY), list(fused.returned_outputs[1:]))
    assert (ours.dims, ours.state) == ({**fused.dims, TEXT: DimRange(0, 1, CACHE)}, fused.state)
    assert {t.dtype for t in ours.inputs if t.name.startswith("past_k")} == {"float16"}
    assert portable_spec(ours, "fp16") == ours


def test_it_ends_in_the_hidden_state_where_no_logits_are_asked_for(tmp_path: Path) -> None:
    model = make("grouped")
    runner = open_portable("grouped", model, tmp_path)
    expected = by_torch(model, IDS)
    for places in ([], [3], [0, 5, 7]):
        out = runner.run({**feed(IDS[:20], 0, 12), "text_at": np.array(places, np.int64)})
        np.testing.assert_allclose(out["hidden"], expected["hidden"][:, 12:20], atol=1e-4)
        np.testing.assert_allclose(out["logits"], expected["logits"][:, 12:20][:, places], atol=1e-4)


def test_a_weight_that_fp16_does_not_hold_is_refused() -> None:
    model = make("native")
    with torch.no_grad():
        model.layers[1].qkv.weight[0, 0] = 1e5
    with pytest.raises(InvalidInput, match=r"layers\.1\.qkv\.weight has a value that fp16 does not hold"):
        portable("native", model, "fp16")


def test_an_embedding_that_fp16_does_not_hold_is_refused_and_bf16_takes_it() -> None:
    model = make("native")
    with torch.no_grad():
        model.embedding.weight[3, 2] = -1e5
    with pytest.raises(InvalidInput, match=r"embedding\.weight has a value that fp16 does not hold; choose bf16"):
        portable("native", model, "fp16")
    portable("native", model, "bf16")


@every_case
@pytest.mark.parametrize(("precision", "least"), [("int8", 0.999), ("int4", 0.9)])
def test_integers_behind_a_dequantization_move_the_logits_by_rounding_only(
    tmp_path: Path, case: str, precision: Any, least: float
) -> None:
    model = make(case)
    graph = portable(case, model, "fp16", writer=GraphWriter(MatrixFormat(precision, 16, standard=True)))
    onnx.checker.check_model(graph, full_check=True)
    runner = open_graph(graph, portable_spec(spec_of(case)), tmp_path / "g.onnx")
    out, expected = runner.run(feed(IDS, 0, 0)), by_torch(model, IDS)
    cosine = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
              for a, b in zip(out["logits"][0], expected["logits"][0], strict=True)]  # fmt: skip
    assert np.median(cosine) > least  # a token may go to another expert where both are as likely
    kinds = {t.data_type for t in graph.graph.initializer if t.name.endswith(f".{precision}")}
    assert kinds == {getattr(onnx.TensorProto, precision.upper())}


def test_an_expert_is_dequantized_within_its_branch_only() -> None:
    form = MatrixFormat("int8", standard=True)
    graph = portable("two experts", make("two experts"), "fp16", writer=GraphWriter(form)).graph
    outside = {n.input[0] for n in graph.node if n.op_type == "DequantizeLinear"}
    branches = [a.g for n in graph.node if n.op_type == "If" for a in n.attribute if a.name == "then_branch"]
    inside = {n.input[0] for g in branches for n in g.node if n.op_type == "DequantizeLinear"}
    assert inside
    assert all("experts" in name for name in inside)
    assert not any("experts" in name for name in outside)


@every_case
def test_bf16_computed_in_fp32_is_near_torch(tmp_path: Path, case: str) -> None:
    model = make(case)
    graph = bf16_in_fp32(portable(case, model, "bf16"))
    onnx.checker.check_model(graph, full_check=True)
    runner = open_graph(graph, portable_spec(spec_of(case), "fp32"), tmp_path / "g.onnx")
    out, expected = runner.run(feed(IDS, 0, 0))["logits"][0], by_torch(model, IDS)["logits"][0]
    cosine = (out * expected).sum(-1) / np.linalg.norm(out, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert 0.99 < np.median(cosine) < 0.99999999


@pytest.mark.parametrize(
    ("form", "dtype"), [(MatrixFormat("int8"), "fp16"), (MatrixFormat("int8", standard=True), "bf16")]
)
def test_packed_matrices_of_another_kind_are_refused(form: MatrixFormat, dtype: str) -> None:
    with pytest.raises(InvalidInput, match="takes int8 in standard operators beside fp16"):
        portable("native", make("native"), dtype, writer=GraphWriter(form))
