"""What several test folders share: the sample scan, the real files that packaging/test_data.py fetches."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import edgemed  # noqa: F401 - before NumPy, whose threads then sleep between products (`edgemed.blas`)

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def tiny_native() -> ModuleType:
    """The module tests/helpers/tiny_native.py: makes native bundles of hand-made graphs that give a fixed answer."""
    return _module("tiny_native", HERE / "helpers" / "tiny_native.py")


@pytest.fixture(scope="session", params=["compact", "full"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`reference("medrega-tiny")`: what the published code answers at a tiny size; see tests/reference_data.py."""
    module = _module("reference_data", HERE / "reference_data.py")
    return module.References(tmp_path_factory.mktemp("reference"), whole=request.param == "full")


@pytest.fixture(scope="session")
def sample_scan() -> str:
    """The sample CT of the repository: upper abdomen with liver, spleen, stomach and aorta."""
    return str(HERE / "files" / "sample_ct.dcm")


@pytest.fixture(scope="session")
def segmentator_files() -> Path:
    """The folder `tests/reference_files` of the TotalSegmentator sdist."""
    return _folder("EDGEMED_TEST_DATA") / "tests" / "reference_files"


@pytest.fixture(scope="session")
def dicom_files() -> Path:
    """The folder that holds `octave-dicom` and `deid-data-0.0.20`, as far as they could be fetched."""
    return _folder("EDGEMED_TEST_FILES")


def _module(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _folder(variable: str) -> Path:
    value = os.environ.get(variable, "")
    if not value or not Path(value).is_dir():
        pytest.skip(f"{variable} names no folder; run packaging/check.py, which fetches the files")
    return Path(value)
