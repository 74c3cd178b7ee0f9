"""The verbs tell the audit trail what they do, and do nothing that it cannot take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgemed import config
from edgemed.cli import main

Captured = pytest.CaptureFixture[str]
Told = Callable[[], list[tuple[Any, ...]]]
ASK = ("--prompt", "Where is the liver?", "-q")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Captured) -> Told:
    """What was recorded since: (event, type, outcome, number of studies)."""
    monkeypatch.setattr(config, "system_file", lambda: tmp_path / "no.toml")
    monkeypatch.delenv("EDGEMED_CONFIG", raising=False)
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EDGEMED_AUDIT_FOLDER", str(tmp_path / "audit"))

    def read() -> list[tuple[Any, ...]]:
        capsys.readouterr()
        assert main(["audit", "show", "--json"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return [(r["event"], *r["type"], r["outcome"], len(r["studies"])) for r in rows[:-1]]

    return read


START = ("Application Activity", "Application Start", "0", 0)


def test_infer_tells_start_access_export_and_stop(told: Told, sample_scan: str, tmp_path: Path) -> None:
    assert main(["infer", sample_scan, *ASK, "-o", str(tmp_path / "out")]) == 0
    assert told() == [
        START,
        ("DICOM Instances Accessed", "0", 1),
        ("Export", "0", 1),
        ("Application Activity", "Application Stop", "0", 0),
    ]


def test_inputs_that_are_refused_are_told(told: Told, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.dcm").write_text("no scan")
    assert main(["infer", str(tmp_path / "a.dcm"), *ASK]) == 22
    assert main(["infer", str(tmp_path / "a.dcm"), str(tmp_path / "b.dcm"), *ASK]) == 87
    refused = ("Security Alert", "Use of Restricted Function", "8", 0)
    stops = [("Application Activity", "Application Stop", outcome, 0) for outcome in "84"]
    assert told() == [START, stops[0], refused, START, refused, refused, stops[1]]


def test_bundles_that_come_go_or_are_refused_are_told(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    nano = str(Path(config.__file__).with_name("bundles") / "nano")
    assert main(["models", "import", nano, "--name", "copy"]) == 0
    assert main(["models", "rm", "copy"]) == 0
    assert main(["bundle", "verify", nano, "--require-signature"]) == 81
    alert = ("Security Alert", "Software Configuration")
    assert told() == [(*alert, "0", 0), (*alert, "0", 0), (*alert, "8", 0)]


def test_what_cannot_be_recorded_is_not_answered(
    told: Told, sample_scan: str, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "audit").write_text("a file where the folder should be")
    assert main(["infer", sample_scan, *ASK]) == 40
    read = capsys.readouterr()
    assert read.out == ""
    assert "audit trail" in read.err
