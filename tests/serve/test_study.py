"""The real answer to a study: its series selected, asked slice by slice, SEG and SR written; the model a stand-in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread

import edgemed.infer
from edgemed.core import Answer, Language, Prompt, Provenance, Region, Scan
from edgemed.errors import NoInput
from edgemed.geometry import box_of
from edgemed.infer import InferOptions
from edgemed.serve.settings import Rule
from edgemed.serve.study import StudyProcess
from edgemed.serve.work import Stopped

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

_HELPER = Path(__file__).resolve().parents[1] / "helpers" / "made_series.py"
_SPEC = importlib.util.spec_from_file_location("made_series", _HELPER)
assert _SPEC is not None and _SPEC.loader is not None
made = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(made)

CT = {"conditions": {"Modality": "CT"}}


class FakeSession:
    """Finds what is bright."""

    def __init__(self) -> None:
        self.asked = 0
        self.bundle = SimpleNamespace(digest="0" * 64)

    def ask(self, scans: Sequence[Scan], prompt: Prompt, options: InferOptions) -> Answer:
        (scan,) = scans
        self.asked += 1
        mask = scan.pixels[0] >= 200
        box = box_of(mask)
        regions = () if box is None else (Region("liver", box, scan.first_frame, mask, 0.9, 0.8),)
        tokens = {"prompt": 3, "generated": 2, "decoder_calls": 2}
        used = Provenance("0", "fake", "fake", "0" * 64, "fake", "CPU", {}, "auto", tokens, {"total": 2.0})
        return Answer("liver", "<ref>liver</ref>", regions, used)

    def notice(self, language: Language) -> str:
        return "not for diagnosis"

    def close(self) -> None:
        pass


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    fake = FakeSession()
    monkeypatch.setattr(edgemed.infer, "open_session", lambda **options: fake)
    return fake


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Five slices, of which three show something; headers as a scanner writes them."""
    pictures = [np.full((16, 16), 10, np.uint16) for _ in range(5)]
    for index in (1, 2, 3):
        pictures[index][4:10, 5:12] = 500
    written = made.write_series(
        tmp_path / "study",
        5,
        pixels=pictures,
        PatientBirthDate="",
        PatientSex="O",
        StudyDate="20200101",
        StudyTime="120000",
        StudyID="1",
        AccessionNumber="",
        ReferringPhysicianName="",
        SeriesNumber=1,
        RescaleSlope=1,
        RescaleIntercept=0,
        ImageType=["ORIGINAL", "PRIMARY", "AXIAL"],
        SliceThickness=2,
        PositionReferenceIndicator="",
        Manufacturer="made",
    )
    assert len(written) == 5
    return tmp_path / "study"


def answered(rule: Rule, study: Path, out: Path, stopping: Callable[[], bool] = lambda: False) -> Sequence[Path]:
    out.mkdir()
    process = StudyProcess()
    try:
        return process(rule, study, out, stopping)
    finally:
        process.close()


def test_a_ct_is_answered_with_seg_and_sr_that_repeat_their_uids(
    session: FakeSession, study: Path, tmp_path: Path
) -> None:
    rule = Rule("liver", "Segment the liver.", ("seg", "sr"), select=CT, slices="all")
    first, second = (answered(rule, study, tmp_path / name) for name in ("a", "b"))
    assert [f.name for f in first] == [f.name for f in second]
    assert {dcmread(f).Modality for f in first} == {"SEG", "SR"}
    assert [dcmread(f).SOPInstanceUID for f in first] == [dcmread(f).SOPInstanceUID for f in second]
    assert {dcmread(f).StudyInstanceUID for f in first} == {f"{made.SERIES}.1"}
    assert session.asked == 10


def test_a_rule_that_fits_no_series_opens_no_session(session: FakeSession, study: Path, tmp_path: Path) -> None:
    rule = Rule("brain", "?", ("sr",), select={"conditions": {"Modality": "MR"}})
    with pytest.raises(NoInput):
        answered(rule, study, tmp_path / "out")
    assert session.asked == 0


def test_a_stop_ends_the_run_between_two_slices(session: FakeSession, study: Path, tmp_path: Path) -> None:
    rule = Rule("liver", "Segment the liver.", ("seg",), slices="all")
    with pytest.raises(Stopped):
        answered(rule, study, tmp_path / "out", lambda: session.asked >= 2)
    assert session.asked == 2


def test_the_node_answers_a_sent_study_with_seg_and_sr(
    session: FakeSession,
    serve: Callable[..., Any],
    helper: ModuleType,
    study: Path,
    clock: Any,
    log: list[dict[str, Any]],
) -> None:
    import threading

    rule = Rule("liver", "Segment the liver.", ("seg", "sr"), select=CT, slices="all")
    with serve(now=clock, quiet_seconds=1.0, rules=(rule,), process=StudyProcess()) as node:
        files = sorted(study.iterdir())
        assert helper.send(node.address[1], files) == [0x0000] * len(files)
        clock.seconds += 2
        for _ in range(3000):
            if node.journal.counts()["jobs"]["done"] or node.journal.counts()["jobs"]["failed"]:
                break
            threading.Event().wait(0.02)
        assert node.journal.counts()["results"] == {"stored": 2}, log
    assert "Planted" not in str(log)
