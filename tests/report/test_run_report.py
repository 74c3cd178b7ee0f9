"""The run manifest."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgemed import __version__
from edgemed.core import Answer, Prompt, Scan
from edgemed.errors import CannotRead, CannotWrite
from edgemed.report import to_run_report, write_run_report

MakeScan = Callable[..., Scan]


def test_manifest_ties_input_answer_and_outputs_by_digest(
    tmp_path: Path, answer: Answer, make_scan: MakeScan, english_prompt: Prompt
) -> None:
    source, overlay = tmp_path / "Smith_John.dcm", tmp_path / "Smith_John.png"
    source.write_bytes(b"dicom")
    overlay.write_bytes(b"png")
    entry = to_run_report(answer, make_scan(), english_prompt, source=source, outputs={"overlay": overlay})
    write_run_report(tmp_path / "run.json", [entry])
    text = (tmp_path / "run.json").read_text("utf-8")
    report = json.loads(text)
    (run,) = report["runs"]
    assert report["schema"] == "edgemed.run/1"
    assert run["input"]["sha256"] == hashlib.sha256(b"dicom").hexdigest()
    assert run["outputs"] == {"overlay": hashlib.sha256(b"png").hexdigest()}
    assert run["prompt"]["text"] == "Where is the liver?"
    assert run["answer"] == {"regions": 2, "masks": 1}
    assert run["provenance"]["bundle_sha256"] == "ab" * 32
    assert run["provenance"]["precision"] == {"vision_encoder": "fp32", "decoder": "int8"}
    assert report["versions"]["edgemed"] == __version__
    assert report["versions"]["python"] == platform.python_version()
    assert report["versions"]["numpy"] == np.__version__
    assert "Smith" not in text
    assert "1.2.826" not in text


def test_input_that_is_gone_is_cannot_read(
    tmp_path: Path, answer: Answer, make_scan: MakeScan, english_prompt: Prompt
) -> None:
    with pytest.raises(CannotRead):
        to_run_report(answer, make_scan(), english_prompt, source=tmp_path / "none", outputs={})


def test_failure_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(CannotWrite):
        write_run_report(tmp_path / "none" / "run.json", [])
    assert list(tmp_path.iterdir()) == []
