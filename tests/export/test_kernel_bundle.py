"""A bundle whose decoder ends in the hidden state: the head that kernels read, and sessions that choose by them.

What stands for the GPU is the host: the graphs run in onnxruntime, the kernels are their NumPy references.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from reference_launcher import ReferenceLauncher

from edgemed import infer, kernel_head
from edgemed.backends import Outputs, Runner, open_runner
from edgemed.backends.cuda_device import Gpu
from edgemed.bundle import Bundle, open_bundle
from edgemed.calibration.dense import without_blocks
from edgemed.core import Answer, Prompt, Scan
from edgemed.errors import BundleError
from edgemed.export.engine import with_kernels
from edgemed.export.head_matrix import head_matrix, packed_head
from edgemed.families.specs import every_logit, has_split_head
from edgemed.graphs import Feeds
from edgemed.infer import InferOptions, Session
from edgemed.memory import plan_memory
from edgemed.triton_kernels import aot
from edgemed.triton_kernels.head_file import KERNELS, is_head, read_head, write_head
from edgemed.triton_kernels.weights import pack

Made = Callable[..., Bundle]

compact = pytest.mark.parametrize("reference", ["compact"], indirect=True)
both = pytest.mark.parametrize("family", ["medrega-tiny", "medplib-tiny"])


def logits_and_hidden(bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    """What the decoder says after each of four tokens."""
    spec = bundle.spec("decoder")
    width = next(t.shape[-1] for t in spec.outputs if t.name == "hidden")
    feeds = {
        "input_ids": np.array([[5, 9, 17, 40]]), "image_tokens": np.zeros((spec.dims["rows"].opt, width), np.float32),
        "past_length": np.array([0]), "logits_from": np.array([0]), **every_logit(spec, 4),
    }  # fmt: skip
    out = open_runner("onnxruntime", bundle.graph_path("decoder"), spec, device="cpu", threads=1).run(feeds)
    return out["logits"][0], out["hidden"][0]


# --- the matrix -------------------------------------------------------------------------------------------------------


@compact
@both
@pytest.mark.parametrize("decoder", ["fp32", "auto", "int8", "int4"])
def test_hidden_times_the_head_are_the_logits(made: Made, family: str, decoder: str) -> None:
    bundle = made(family, decoder)
    logits, hidden = logits_and_hidden(bundle)
    matrix = head_matrix(bundle.graph_path("decoder"))
    assert matrix.shape == (logits.shape[1], hidden.shape[1])
    # The graph rounds hidden states and products to float16; onnxruntime those of integers to 8 bits.
    tolerance = {"fp32": 1e-5, "auto": 0.02}.get(decoder, 0.15)
    np.testing.assert_allclose(hidden @ matrix.T, logits, atol=tolerance)
    expected = "int8" if decoder in ("int8", "int4") else "fp16"
    assert packed_head(bundle.graph_path("decoder")).format == expected


@pytest.mark.parametrize("name", ["nano"])
def test_blocks_of_integers_become_rows(name: str) -> None:
    graph = open_bundle(name).graph_path("decoder")
    dense = without_blocks(onnx.load(graph))
    product = next(node for node in dense.graph.node if "logits" in node.output)
    stored = next(t for t in dense.graph.initializer if t.name == product.input[1])
    np.testing.assert_allclose(head_matrix(graph), onnx.numpy_helper.to_array(stored).T, atol=1e-7)


@compact
def test_logits_made_in_another_way_are_refused(made: Made, tmp_path: Path) -> None:
    model = onnx.load(made("medrega-tiny", "fp32").graph_path("decoder"))
    product = next(node for node in model.graph.node if "logits" in node.output)
    before = list(product.input)
    product.output[0] = "raw"
    model.graph.node.append(onnx.helper.make_node("Tanh", ["raw"], ["logits"]))
    onnx.save(model, tmp_path / "tanh.onnx")
    with pytest.raises(BundleError, match=r"tanh.onnx has no head .*: logits do not come from a product"):
        head_matrix(tmp_path / "tanh.onnx")
    model.graph.node.pop()
    product.output[0] = "logits"
    model.graph.node.insert(0, onnx.helper.make_node("Tanh", [before[0]], ["turned"]))
    product.input[0] = "turned"
    onnx.save(model, tmp_path / "turned.onnx")
    with pytest.raises(BundleError, match="what is multiplied is not the output `hidden`"):
        head_matrix(tmp_path / "turned.onnx")


@compact
@pytest.mark.parametrize(("decoder", "form"), [("auto", "fp16"), ("int4", "int8")])
def test_compiling_puts_the_head_beside_the_kernels(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: str, form: str
) -> None:
    monkeypatch.setattr(aot, "build_kernels", lambda *_: [SimpleNamespace(entry={"triton": "3.6.0"})])
    bundle, told = made("medrega-tiny", decoder), []
    with_kernels(bundle, tmp_path / "copy", tell=told.append)
    copy = open_bundle(tmp_path / "copy")
    found = read_head(copy.path / KERNELS)
    assert found is not None
    assert told == [f"the head for the kernels is {form}, {found.rows} x {found.width}"]
    np.testing.assert_array_equal(
        found.to_float32(), pack(head_matrix(bundle.graph_path("decoder")), form).to_float32()
    )
    assert sum(map(is_head, copy.manifest.files)) == 2
    again = with_kernels(copy, tmp_path / "again")  # in place of what it had
    assert again.manifest.files == copy.manifest.files


def test_a_decoder_that_computes_its_logits_keeps_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "build_kernels", lambda *_: [SimpleNamespace(entry={"triton": "3.6.0"})])
    told: list[str] = []
    nano = open_bundle("nano")
    if has_split_head(nano.spec("decoder")):
        pytest.skip("the embedded decoder has a split head")
    made = with_kernels(nano, tmp_path / "copy", tell=told.append)
    assert "no session will use the kernels: export the checkpoint again with --target tensorrt" in told[0]
    assert not any(map(is_head, made.manifest.files))


@compact
@pytest.mark.parametrize("rounded", [True, False])
def test_a_head_that_quantization_kept_is_not_rounded(made: Made, tmp_path: Path, rounded: bool) -> None:
    """Pairs of fp8 around the head's weights, or around those of another product alone."""
    model = onnx.load(made("medrega-tiny").graph_path("decoder"))
    products = {node.output[0]: node for node in model.graph.node if node.op_type == "MatMul"}
    head = next(product for name, product in products.items() if name.startswith("logits"))
    site = head if rounded else next(product for product in products.values() if product is not head)
    weight = next(t for t in model.graph.initializer if t.name == site.input[1])
    values = onnx.numpy_helper.to_array(weight)
    scale = (np.abs(values).max() / 448).astype(np.float16)
    fp8 = onnx.numpy_helper.from_array((values / scale).astype(ml_dtypes.float8_e4m3fn), "rounded")
    model.graph.initializer.extend([fp8, onnx.numpy_helper.from_array(scale, "scale")])
    model.graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", ["rounded", "scale"], ["dequantized"]))
    site.input[1] = "dequantized"
    onnx.save(model, tmp_path / "d.onnx")
    packed = packed_head(tmp_path / "d.onnx")
    assert packed.format == ("fp8" if rounded else "fp16")
    before = head_matrix(made("medrega-tiny").graph_path("decoder"))
    np.testing.assert_allclose(packed.to_float32(), before, atol=0.1 if rounded else 1e-3)


# --- sessions ---------------------------------------------------------------------------------------------------------


class OnGpu:
    """A Runner that says it is on a GPU; logits: how many rows of logits the decoder was asked for, in all."""

    backend, device = "tensorrt", "GPU 0"
    logits = 0

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def run(self, feeds: Feeds) -> Outputs:
        OnGpu.logits += sum(len(feeds[name]) for name in ("text_at", "box_at") if name in feeds)
        return self._runner.run(feeds)

    def reset(self) -> None:
        self._runner.reset()

    def close(self) -> None:
        self._runner.close()


@pytest.fixture
def launchers(monkeypatch: pytest.MonkeyPatch) -> list[ReferenceLauncher]:
    """Makes every session one on a GPU, and collects the launchers of their heads."""
    opened: list[ReferenceLauncher] = []

    def launcher(folder: Path, index: int) -> ReferenceLauncher:
        assert index == 0
        opened.append(ReferenceLauncher())
        return opened[-1]

    def on_gpu(backend: str, artifact: Any, spec: Any, **how: Any) -> OnGpu:
        return OnGpu(open_runner("onnxruntime", artifact, spec, device="cpu", threads=1))

    monkeypatch.setattr(infer, "open_runner", on_gpu)
    monkeypatch.setattr(kernel_head, "CubinLauncher", launcher)
    monkeypatch.setattr(kernel_head, "find_gpu", lambda index: Gpu(index, "GPU", 89))
    OnGpu.logits = 0
    return opened


def with_head(bundle: Bundle, folder: Path, form: str) -> Bundle:
    """A copy of a bundle with a head beside it."""
    shutil.copytree(bundle.path, folder)
    (folder / KERNELS / "sm_89").mkdir(parents=True)
    write_head(folder / KERNELS, pack(head_matrix(bundle.graph_path("decoder")), form))
    return replace(bundle, path=folder)


def ask(bundle: Bundle, scan: Scan, prompt: Prompt, **how: Any) -> Answer:
    with Session(bundle, "onnxruntime", "cpu", threads=1) as session:
        return session.ask(scan, prompt, InferOptions(max_new_tokens=24, **how))


@compact
def test_kernels_write_the_authors_ids(
    made: Made,
    reference: Any,
    tmp_path: Path,
    launchers: list[ReferenceLauncher],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel_head, "FEW", 16)  # the vocabulary has 727
    tiny = reference("medrega-tiny")
    scan = Scan(np.array(tiny.input("image_square"))[None], "OT")
    prompt = Prompt(tiny.prompts["vqa_en"]["question"], settings={"task": "none"})
    expected = tiny.expected("gen_vqa_en")[0].tolist()
    bundle = with_head(made("medrega-tiny", "fp32", "fp32"), tmp_path / "b", "fp16")
    for decode in ("plain", "auto"):
        answer = ask(bundle, scan, prompt, grammar=False, decode=decode)
        assert [*answer.generated_ids, tiny.prompts["ids"]["<|im_end|>"]][: len(expected)] == expected
        assert answer.provenance.precision["head"] == "fp16"
        assert answer.provenance.backend == "tensorrt, triton"
    assert OnGpu.logits == 0
    assert {name for launcher in launchers for name, _, _ in launcher.launched} == {"masked_argmax.fp16"}


@compact
@both
@pytest.mark.parametrize("form", ["fp16", "int8", "fp8"])
def test_drafts_change_nothing_under_a_grammar(
    made: Made, tmp_path: Path, sample: Scan, launchers: list[ReferenceLauncher], family: str, form: str
) -> None:
    bundle = with_head(made(family), tmp_path / "b", form)
    texts = ("Where is the liver?", "肝脏在哪里？", "Describe the picture.", "Segment the <p>spleen</p>.")
    settings = {"task": "text2region"} if family == "medrega-tiny" else {}
    for text in texts:
        plain, auto = (
            ask(bundle, sample, Prompt(text, settings=settings), decode=decode) for decode in ("plain", "auto")
        )
        assert auto.generated_ids == plain.generated_ids, text
        assert auto.provenance.tokens["decoder_calls"] <= plain.provenance.tokens["decoder_calls"]
        assert [r.box for r in auto.regions] == [r.box for r in plain.regions]
    assert OnGpu.logits == 0
    if family == "medrega-tiny":  # digits and separators alone, inside a box
        assert any(name == f"box_head.{form}" for launcher in launchers for name, _, _ in launcher.launched)


@compact
def test_draws_and_beams_take_the_engine_s_logits(
    made: Made, tmp_path: Path, sample: Scan, launchers: list[ReferenceLauncher]
) -> None:
    bundle, without = with_head(made("medrega-tiny"), tmp_path / "b", "int8"), made("medrega-tiny")
    for how in ({"temperature": 0.7, "seed": 3}, {"beams": 2}):
        with_kernels, alone = (ask(b, sample, Prompt("Is this normal?"), **how) for b in (bundle, without))
        assert with_kernels.generated_ids == alone.generated_ids
        assert "head" not in with_kernels.provenance.precision
        assert with_kernels.provenance.backend == "tensorrt"
    assert OnGpu.logits > 0
    assert not any(launcher.launched for launcher in launchers)


@compact
def test_memory_for_the_second_head_is_planned_on_a_gpu(made: Made, tmp_path: Path) -> None:
    bundle = made("medrega-tiny")
    copy = with_head(bundle, tmp_path / "b", "int8")
    names = [f"{KERNELS}/head.int8.{part}.npy" for part in ("values", "scales")]
    listed = replace(
        copy, manifest=replace(copy.manifest, files={**copy.manifest.files, **dict.fromkeys(names, "0" * 64)})
    )
    more = plan_memory(listed, kind="gpu").total - plan_memory(bundle, kind="gpu").total
    assert more == sum((copy.path / name).stat().st_size for name in names)
    assert plan_memory(listed).total == plan_memory(bundle).total


@pytest.fixture(scope="module")
def sample(sample_scan: str) -> Scan:
    from edgemed.dicom import read_scan

    return read_scan(sample_scan)
