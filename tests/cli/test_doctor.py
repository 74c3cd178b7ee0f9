"""`edgemed doctor`: a good machine is ready, and what is broken is named with its code."""

from __future__ import annotations

import json
import sys

import pytest

from edgemed.cli import doctor, main

Captured = pytest.CaptureFixture[str]


def test_this_machine_is_ready(capsys: Captured) -> None:
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == "edgemed.doctor/1"
    assert told["ready"] is True
    names = [check["name"] for check in told["checks"]]
    assert names == ["system", "memory", "packages", "decoders", "onnxruntime", "font", "bundle nano"]


def test_a_missing_onnxruntime_is_code_82_and_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["doctor"]) == 82
    assert "edgemed[cpu]" in capsys.readouterr().out


def test_too_little_memory_is_code_4(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(doctor, "free_memory_mib", lambda: 100)
    assert main(["doctor"]) == 4
    assert "FAIL  memory" in capsys.readouterr().out


def test_a_check_that_breaks_is_a_finding_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def break_down() -> doctor.Check:
        raise RuntimeError("broken library")

    monkeypatch.setitem(doctor.CHECKS, "font", break_down)
    assert main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "FAIL  font" in told
    assert "ok    decoders" in told
