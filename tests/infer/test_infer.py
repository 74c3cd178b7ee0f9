"""A session: graphs run in order, an image is encoded once, and the answer says what ran."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgemed import __version__
from edgemed import infer as module
from edgemed.backends import Outputs, Runner
from edgemed.bundle import Bundle
from edgemed.core import SCAN_WARNINGS, Example, Prompt, PromptRegion, Scan, Window
from edgemed.errors import BackendUnavailable, BundleError, InvalidInput
from edgemed.geometry import box_of
from edgemed.graphs import Feeds, GraphSpec
from edgemed.infer import InferOptions, Session, open_session

pytest.importorskip("onnxruntime")

ANSWER = "The <ref>liver</ref><box><c100><c200><c500><c600></box><seg> is here."


@pytest.fixture(scope="module")
def bundle(tiny_native: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made: Bundle = tiny_native.make(tmp_path_factory.mktemp("infer") / "b", ANSWER)
    return made


@pytest.fixture
def session(bundle: Bundle) -> Session:
    return open_session(bundle.path, threads=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The roles of all graph runs, in order; must be asked for before `session`."""
    seen: list[str] = []
    real = module.open_runner

    class Counting:
        def __init__(self, runner: Runner, role: str) -> None:
            self.runner, self.role = runner, role
            self.backend, self.device = runner.backend, runner.device

        def run(self, feeds: Feeds) -> Outputs:
            seen.append(self.role)
            return self.runner.run(feeds)

        def reset(self) -> None:
            self.runner.reset()

        def close(self) -> None:
            seen.append(f"close {self.role}")
            self.runner.close()

    def counting(backend: str, artifact: Path, spec: GraphSpec, **how: Any) -> Counting:
        return Counting(real(backend, artifact, spec, **how), spec.role)

    monkeypatch.setattr(module, "open_runner", counting)
    return seen


def scan(value: float = 80.0) -> Scan:
    pixels = np.full((1, 200, 400), -1000, np.float32)
    pixels[:, 50:150, 50:350] = value
    return Scan(pixels, "DX", Window(40, 400), (1.0, 1.0))


def test_answer_is_in_scan_pixels_and_says_what_ran(session: Session, bundle: Bundle) -> None:
    answer = session.ask(scan(), Prompt("Where is the liver?"))
    assert answer.text == "The liver is here."
    assert answer.tagged_text == ANSWER
    (region,) = answer.regions
    assert region.box == pytest.approx((40, 80, 200, 200))  # 0.64 scale; the scan ends at row 200
    assert region.mask is not None
    assert region.mask.shape == (200, 400)
    assert box_of(region.mask) == pytest.approx((40, 80, 200, 200), abs=1)
    p = answer.provenance
    assert (p.edgemed, p.family, p.bundle, p.bundle_sha256) == (__version__, "native", "tiny", bundle.digest)
    assert (p.backend, p.device, p.decode) == ("onnxruntime", "CPU", "auto")
    assert p.precision == bundle.manifest.precision
    assert (p.tokens["prompt"], p.tokens["generated"]) == (len(answer.prompt_ids), len(answer.generated_ids))
    assert p.tokens["decoder_calls"] < p.tokens["generated"]
    assert 0 < p.tokens["accepted"] <= p.tokens["drafted"]
    plain = session.ask(scan(), Prompt("Where is the liver?"), InferOptions(decode="plain"))
    assert plain.generated_ids == answer.generated_ids
    assert plain.provenance.tokens["decoder_calls"] == len(answer.generated_ids) + 1
    assert {"prepare", "vision_encoder", "projector", "decoder", "mask_decoder", "total"} <= set(p.timings_ms)
    assert p.versions["onnxruntime"]


def test_second_question_on_an_image_skips_its_encoder(calls: list[str], session: Session) -> None:
    first = session.ask(scan(), Prompt("Where is the liver?"))
    assert calls[:2] == ["vision_encoder", "projector"]
    assert calls[-1] == "mask_decoder"
    calls.clear()
    second = session.ask(scan(), Prompt("Segment the liver."))
    assert "vision_encoder" not in calls
    assert "projector" not in calls
    assert second.provenance.timings_ms["vision_encoder"] == 0
    assert second.regions[0].box == first.regions[0].box
    calls.clear()
    session.ask(scan(), Prompt("What is this?", (PromptRegion("point", point=(100, 100)),)))
    assert "vision_encoder" not in calls
    assert calls[0] == "projector"
    calls.clear()
    session.ask(scan(20.0), Prompt("Where is the liver?"))
    assert calls[0] == "vision_encoder"


def test_features_of_four_images_are_kept(calls: list[str], session: Session) -> None:
    for value in (10, 20, 30, 40, 50):
        session.ask(scan(value), Prompt("x"))
    calls.clear()
    session.ask(scan(50), Prompt("x"))
    session.ask(scan(20), Prompt("x"))
    assert "vision_encoder" not in calls
    session.ask(scan(10), Prompt("x"))
    assert calls.count("vision_encoder") == 1


def test_examples_are_refused_by_a_family_that_takes_none(calls: list[str], session: Session) -> None:
    example = Example(scan(20), np.ones((200, 400), bool))
    with pytest.raises(InvalidInput, match="the family native takes no examples"):
        session.ask(scan(), Prompt("Where is the liver?", examples=(example,)))
    assert calls == []


def test_another_window_is_another_image(calls: list[str], session: Session) -> None:
    session.ask(scan(), Prompt("x"))
    calls.clear()
    session.ask(Scan(np.array(scan().pixels), "DX", Window(0, 900), (1.0, 1.0)), Prompt("x"))
    assert calls[0] == "vision_encoder"


def test_closed_session_answers_no_more(calls: list[str], bundle: Bundle) -> None:
    with open_session(bundle.path) as session:
        session.wait()
    assert sorted(calls) == ["close decoder", "close mask_decoder", "close projector", "close vision_encoder"]
    with pytest.raises(InvalidInput, match="session was closed"):
        session.ask(scan(), Prompt("x"))


def test_answer_stops_at_the_token_limit_with_a_note(session: Session) -> None:
    answer = session.ask(scan(), Prompt("x"), InferOptions(max_new_tokens=3))
    assert answer.text == "The"
    assert answer.notes == ("the answer was cut at the token limit",)


def test_plain_decoding_without_grammar_is_recorded(session: Session) -> None:
    answer = session.ask(scan(), Prompt("x"), InferOptions(decode="plain", grammar=False))
    assert answer.provenance.decode == "plain"
    assert answer.tagged_text == ANSWER


def test_options_that_make_no_sense_are_refused(session: Session) -> None:
    with pytest.raises(InvalidInput, match="decode is 'fast'"):
        InferOptions(decode="fast")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="temperature"):
        session.ask(scan(), Prompt("x"), InferOptions(temperature=-1))


def test_gpu_that_is_not_there_is_an_error_unless_the_cpu_is_allowed(bundle: Bundle) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has a GPU provider")
    with pytest.raises(BackendUnavailable):
        open_session(bundle.path, device="gpu").ask(scan(), Prompt("x"))
    answer = open_session(bundle.path, device="gpu", allow_cpu=True).ask(scan(), Prompt("x"))
    assert answer.provenance.device == "CPU"


def test_back_end_that_is_not_in_the_table_is_an_error(bundle: Bundle) -> None:
    with pytest.raises(BackendUnavailable):
        open_session(bundle.path, backend="abacus", allow_cpu=True).wait()


def test_changed_graph_is_refused_before_it_is_opened(tiny_native: ModuleType, tmp_path: Path) -> None:
    made = tiny_native.make(tmp_path / "b", ANSWER)
    path = made.graph_path("decoder")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(BundleError, match=r"decoder\.onnx has sha256"):
        open_session(made.path)


def test_prompt_too_long_for_the_cache_is_refused(session: Session) -> None:
    with pytest.raises(InvalidInput, match="tokens"):
        session.ask(scan(), Prompt("x" * 3000))


def test_notice_comes_from_the_family(session: Session) -> None:
    assert session.notice("en")
    assert session.notice("zh")


def test_what_may_mislead_about_the_pixels_is_said_with_every_answer(session: Session) -> None:
    misleading = replace(scan(), warnings=("overlay", "burned in"))
    answer = session.ask(misleading, Prompt("Where is the liver?"))
    assert answer.notes[:2] == (SCAN_WARNINGS["overlay"], SCAN_WARNINGS["burned in"])
    assert session.ask(scan(), Prompt("Where is the liver?")).notes == answer.notes[2:]
