"""A checkpoint folder asked in torch answers as the authors' code does, or as the bundle made from it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgemed import backends
from edgemed.bundle import open_bundle, write_bundle
from edgemed.cli import main
from edgemed.core import Answer, Prompt, PromptRegion, Scan, Window
from edgemed.errors import BackendUnavailable, BundleError
from edgemed.infer import InferOptions, open_session


@pytest.fixture(scope="module")
def native(tiny_native: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tiny_native.checkpoint(tmp_path_factory.mktemp("torch-session") / "tiny")
    return made


def scan() -> Scan:
    pixels = np.random.default_rng(0).normal(40, 200, (1, 200, 300)).astype(np.float32)
    return Scan(pixels, "CT", Window(40, 400), (1.0, 1.0))


def published(tiny: Any, image: str | None, question: str, settings: dict[str, str], limit: int) -> Answer:
    """The answer about one of the reference's pictures, by the torch back end."""
    scans = () if image is None else (Scan(np.array(tiny.input(f"image_{image}"))[None], "OT"),)
    with open_session(tiny.folder, "torch", "cpu", threads=1) as session:
        options = InferOptions(max_new_tokens=limit, grammar=False)  # the published code has none
        return session.ask(scans, Prompt(question, settings=settings), options)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("vqa_en", "square"),
        ("vqa_zh", "square"),
        ("r2t_en", "four_three"),
        ("t2r_zh", "two_one"),
        ("text_only_en", None),
    ],
)
def test_medrega_answers_as_the_authors_code(reference: Any, name: str, image: str | None) -> None:
    tiny = reference("medrega-tiny")
    end = int(tiny.prompts["ids"]["<|im_end|>"])
    answer = published(tiny, image, tiny.prompts[name]["question"], {"task": "none"}, 24)
    expected = tiny.expected(f"gen_{name}")[0].tolist()
    assert [*answer.generated_ids, end][: len(expected)] == expected
    assert answer.provenance.backend == "torch"


@pytest.mark.parametrize(
    ("name", "image", "compat"),
    [
        ("vqa_v1", "square", "release-cli"),
        ("vqa_demo", "square", "reference"),
        ("ground_four_three_v1", "four_three", "release-cli"),
        ("ground_two_one_demo", "two_one", "reference"),
    ],
)
def test_medplib_answers_as_the_authors_code(reference: Any, name: str, image: str, compat: str) -> None:
    tiny = reference("medplib-tiny")
    question = tiny.prompts[name]["prompt"].split("<im_end>\n")[1].split(" ASSISTANT:")[0]
    expected = tiny.expected(f"gen_{name}")[0].tolist()
    answer = published(tiny, image, question, {"compat": compat}, len(expected))
    assert [*answer.generated_ids, tiny.prompts["ids"]["</s>"]][: len(expected)] == expected
    outlined = [region for region in answer.regions if region.mask is not None]
    assert bool(outlined) == (tiny.prompts["ids"]["<SEG>"] in expected)


def test_the_answer_says_what_ran(native: Path) -> None:
    with open_session(native, "torch", threads=1) as session:
        provenance = session.ask(scan(), Prompt("Where is the liver?"), InferOptions(max_new_tokens=8)).provenance
        assert (provenance.backend, provenance.bundle, provenance.family) == ("torch", "tiny", "native")
        assert provenance.bundle_sha256 == session.bundle.digest
        assert set(provenance.precision.values()) == {"fp32"}
        assert provenance.versions["torch"]


def test_a_gpu_that_is_not_there_is_an_error_unless_the_cpu_is_allowed(native: Path) -> None:
    with open_session(native, "torch", "gpu:99") as session, pytest.raises(BackendUnavailable, match="gpu:99"):
        session.wait()
    with open_session(native, "torch", "gpu:99", threads=1, allow_cpu=True) as session:
        answer = session.ask(scan(), Prompt("Where is the liver?"), InferOptions(max_new_tokens=4))
    assert answer.provenance.device == "CPU"


@pytest.mark.slow
def test_a_native_checkpoint_answers_as_its_bundle_does(native: Path, tmp_path: Path) -> None:
    from edgemed.export.native import native_graphs
    from edgemed.families.native_torch import load, native_specs

    model = load(native)
    specs = native_specs(model)
    graphs = {f"graphs/{role}.onnx": graph.SerializeToString() for role, graph in native_graphs(model, specs).items()}
    files: dict[str, bytes | Path] = {**graphs, "tokenizer/tokenizer.json": native / "tokenizer.json"}
    precision = dict.fromkeys(specs, "fp32")
    write_bundle(tmp_path / "b", name="tiny", family="native", graphs=specs, files=files, precision=precision)
    region = PromptRegion("box", box=(40.0, 50.0, 120.0, 130.0))
    prompts = (Prompt("Where is the liver?"), Prompt("这是什么？", (region,), "zh"), Prompt("Segment it.", (region,)))
    with open_session(tmp_path / "b", "onnxruntime", "cpu", 1) as graph, open_session(native, "torch", "cpu", 1) as own:
        outlined = 0
        for prompt in prompts:
            expected, answer = (s.ask(scan(), prompt, InferOptions(max_new_tokens=64)) for s in (graph, own))
            assert answer.generated_ids == expected.generated_ids
            assert answer.text == expected.text
            assert [r.box for r in answer.regions] == [r.box for r in expected.regions]
            for mine, theirs in zip(answer.regions, expected.regions, strict=True):
                assert (mine.mask is None) == (theirs.mask is None)
                if mine.mask is not None:
                    outlined += 1
                    assert np.mean(mine.mask != theirs.mask) < 1e-3  # pixels whose logit is about 0
        assert outlined


# -- folders that do not fit the back end ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
def test_a_checkpoint_with_another_back_end_says_how_to_go_on(native: Path, backend: str) -> None:
    with pytest.raises(BundleError, match="export it first with `edgemed export FOLDER -o BUNDLE`, or use --backend t"):
        open_session(native, backend)


def test_a_bundle_with_torch_says_what_to_pass(tiny_native: ModuleType, tmp_path: Path) -> None:
    bundle = tiny_native.make(tmp_path / "b", "The liver.")
    for given in (bundle.path, "nano"):
        with pytest.raises(BackendUnavailable, match="is a bundle of ONNX graphs: pass the folder of the checkpoint"):
            open_session(given, "torch")
    (bundle.path / "config.json").write_text("{}")  # a bundle wins
    with pytest.raises(BundleError, match=r"config\.json is not in the manifest"):
        open_bundle(bundle.path)
    with pytest.raises(BackendUnavailable, match="is a bundle of ONNX graphs"):
        open_session(bundle.path, "torch")


def test_torch_that_is_not_installed_names_the_extra(native: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = backends.Backend("nowhere:Nothing", "no_such_library", "export")
    monkeypatch.setitem(backends.BACKENDS, "torch", row)  # type: ignore[arg-type]
    with pytest.raises(BackendUnavailable, match=r"needs the 'no_such_library' package; .*edgemed\[export\]"):
        open_session(native, "torch")


def test_the_command_answers_from_a_checkpoint(
    native: Path, sample_scan: str, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "infer",
        sample_scan,
        "--bundle",
        str(native),
        "--prompt",
        "Where is the liver?",
        "--max-new-tokens",
        "9",
    ]
    assert main([*arguments, "--backend", "torch", "--device", "cpu", "--json"]) == 0
    assert '"backend":"torch"' in capfd.readouterr().out
    assert main(arguments) == BundleError.exit_code
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert "--backend torch" in told
