"""The switches of libraries are set before a library is loaded, and are those that the installed versions read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from edgemed import offline


def test_they_are_set_in_this_process() -> None:
    assert {name: os.environ.get(name) for name in offline.SWITCHES} == offline.SWITCHES


@pytest.mark.parametrize("module", ["edgemed", "edgemed.cli", "edgemed.infer", "edgemed.serve", "edgemed.dicom.worker"])
def test_whatever_is_imported_first_sets_them_over_what_the_environment_says(module: str) -> None:
    told = f"import json, os, {module}; print(json.dumps(dict(os.environ)))"
    contrary = {**os.environ, **dict.fromkeys(offline.SWITCHES, "0")}
    done = subprocess.run([sys.executable, "-c", told], env=contrary, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout).items() >= offline.SWITCHES.items()


def test_onnxruntime_reads_its_switch() -> None:
    pytest.importorskip("onnxruntime")
    files = metadata.distribution("onnxruntime").files or []
    native = [Path(str(file.locate())) for file in files if "onnxruntime_pybind11_state" in file.name]
    assert native
    assert b"ORT_DISABLE_TELEMETRY" in native[0].read_bytes()


def test_the_hub_library_that_tokenizers_brings_is_switched_off() -> None:
    pytest.importorskip("huggingface_hub")
    told = (
        "import edgemed, huggingface_hub.constants as c\n"
        "assert c.HF_HUB_OFFLINE and c.HF_HUB_DISABLE_TELEMETRY and c.HF_HUB_DISABLE_UPDATE_CHECK"
    )
    subprocess.run([sys.executable, "-c", told], check=True)
