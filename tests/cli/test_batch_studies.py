"""`edgemed batch FOLDER|QUERY`: options, exit codes, the embedded model asked about a study in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

import edgemed.serve.worker
from edgemed.cli import main
from edgemed.errors import InvalidInput
from edgemed.serve.settings import NodeSettings, Rule

_HELPER = Path(__file__).resolve().parents[1] / "helpers" / "made_series.py"
_SPEC = importlib.util.spec_from_file_location("made_series", _HELPER)
assert _SPEC is not None and _SPEC.loader is not None
made = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(made)

Captured = pytest.CaptureFixture[str]


class Stand:
    """In place of a process with a model: writes what it was asked, refuses studies with more than two instances."""

    def __init__(self, settings: NodeSettings) -> None:
        self.settings = settings

    def __call__(self, rule: Rule, study: Path, out: Path, stopping: Callable[[], bool]) -> Sequence[Path]:
        if len(list(study.iterdir())) > 2:
            raise InvalidInput("too many")
        file = out / "asked.json"
        file.write_text(json.dumps([rule.prompt, rule.kinds, rule.select, rule.slices, rule.language]))
        return [file]

    def close(self) -> None:
        pass


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[NodeSettings]:
    """The settings that workers were opened for."""
    seen: list[NodeSettings] = []

    def open_workers(settings: NodeSettings) -> list[Stand]:
        seen.append(settings)
        return [Stand(settings)]

    monkeypatch.setattr(edgemed.serve.worker, "open_workers", open_workers)
    return seen


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    for study in ("1.2.1", "1.2.2"):
        made.write_series(
            tmp_path / "studies" / study, 2, StudyInstanceUID=study, SeriesInstanceUID=f"{study}.1", series=None
        )
    return tmp_path / "studies"


def batch(folder: object, out: Path, *more: str) -> int:
    return main(["batch", str(folder), "-o", str(out), "--prompt", "Where is the liver?", *more])


def test_each_study_is_asked_and_a_second_call_asks_none(
    studies: Path, opened: list[NodeSettings], tmp_path: Path, capsys: Captured
) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text('{"selections": [{"name": "ct", "conditions": {"Modality": "CT"}}]}')
    more = ("--to", "sr,seg", "--select", str(rules), "--slices", "all", "--workers", "2", "--device", "cpu")
    out = tmp_path / "out"
    assert batch(studies, out, *more) == 0
    assert capsys.readouterr() == ("", f"wrote {out}: 2 studies, 2 results\n")
    select = {"name": "ct", "conditions": {"Modality": "CT"}}
    asked = ["Where is the liver?", ["seg", "sr"], select, "all", "auto"]
    assert [json.loads((out / uid / "asked.json").read_text()) for uid in ("1.2.1", "1.2.2")] == [asked] * 2
    assert opened[0].workers == ("cpu", "cpu")
    assert batch(studies, out, *more) == 0
    assert capsys.readouterr().err == f"wrote {out}: 2 studies (2 before), 2 results\n"
    assert batch(studies, out, *more, "--lang", "zh") == 22
    assert "another question" in capsys.readouterr().err


def test_results_below_the_folder_are_no_studies_and_a_zip_is_known_again(
    studies: Path, opened: list[NodeSettings], tmp_path: Path, capsys: Captured
) -> None:
    archive = shutil.make_archive(str(tmp_path / "studies"), "zip", studies)
    assert batch(archive, studies / "out") == 0
    shutil.copy(studies / "1.2.1" / "s0001.dcm", studies / "out" / "1.2.1" / "copy.dcm")
    assert batch(archive, studies / "out") == 0
    assert batch(studies, studies / "out") == 0
    assert capsys.readouterr().err.count("2 studies (2 before), 2 results") == 2


def test_a_study_that_fails_and_a_file_that_cannot_be_read_end_in_87(
    studies: Path, opened: list[NodeSettings], tmp_path: Path, capsys: Captured
) -> None:
    made.write_series(studies / "large", 3, StudyInstanceUID="1.2.3", SeriesInstanceUID="1.2.3.1", series=None)
    whole = (studies / "1.2.1" / "s0001.dcm").read_bytes()
    (studies / "torn.dcm").write_bytes(whole[:200])
    assert batch(studies, tmp_path / "out") == 87
    told = capsys.readouterr().err.splitlines()
    assert any(line.startswith(f"edgemed: {studies / 'torn.dcm'}: ") for line in told)
    assert "edgemed: study 1.2.3: InvalidInput: too many" in told
    assert told[-1] == (
        "edgemed: 1 of 3 studies failed and 1 files could not be read; the same command tries them again"
    )
    assert "Planted" not in str(told)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["{folder}", "--prompt", "?", "--temperature", "1"], 1, "--temperature was given with studies"),
        (["{folder}"], 1, "--prompt is missing"),
        (["{file}", "--prompt", "?"], 1, "--prompt was given with a file of questions"),
        (["pacs:PatientID=1", "--prompt", "?"], 1, "--config is missing"),
        (["{folder}", "--prompt", "?", "--send", "pacs"], 1, "--config is missing"),
        (["pacs:PatientID=1", "--prompt", "?", "--config", "{config}"], 22, "no [[target]] 'pacs'"),
        (["{folder}", "--prompt", "?", "--config", "{config}", "--send", "pacs"], 22, "names target 'pacs'"),
        (["{folder}", "--prompt", "?", "--bundle", "no-such-bundle"], 80, "no-such-bundle"),
        (["{folder}", "--prompt", "?", "--select", "{config}"], 22, "holds no JSON"),
        (["{empty}", "--prompt", "?"], 21, "no files"),
        (["no-such-file", "--prompt", "?"], 1, "--prompt was given with a file of questions"),
    ],
)
def test_mistakes_end_in_one_line_and_their_code(
    studies: Path,
    opened: list[NodeSettings],
    tmp_path: Path,
    capsys: Captured,
    arguments: list[str],
    code: int,
    told: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "q.jsonl").write_text("{}")
    (tmp_path / "node.toml").write_text('folder = "node"\n')
    places = {
        "{folder}": studies,
        "{file}": tmp_path / "q.jsonl",
        "{config}": tmp_path / "node.toml",
        "{empty}": tmp_path / "empty",
    }
    given = [str(places.get(a, a)) for a in arguments]
    assert main(["batch", *given, "-o", str(tmp_path / "out")]) == code
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_the_embedded_model_answers_a_study_in_a_process_of_its_own(sample_scan: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    ds = dcmread(sample_scan)  # its publisher emptied the UIDs
    ds.SOPClassUID, ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3", "1.2.3.1"
    (tmp_path / "scans").mkdir()
    ds.save_as(tmp_path / "scans" / "ct.dcm", enforce_file_format=True)
    out = tmp_path / "out"
    assert batch(tmp_path / "scans", out, "--to", "seg,sr", "-q") == 0
    found: list[Any] = [dcmread(file) for file in (out / "1.2.3").iterdir()]
    assert {ds.Modality for ds in found} == {"SEG", "SR"}
    assert {ds.StudyInstanceUID for ds in found} == {"1.2.3"}
