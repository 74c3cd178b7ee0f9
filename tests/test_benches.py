"""Benchmarks run by hand; here each is loaded, so that a change elsewhere that breaks one is seen."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHES = sorted((Path(__file__).parent / "bench").glob("bench_*.py"))


@pytest.mark.parametrize("path", BENCHES, ids=[path.stem for path in BENCHES])
def test_what_a_benchmark_imports_is_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(path.parent)  # as Python does where it is started by hand
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        if error.name != "gguf":  # what bench_smollm2 alone reads its weights with
            raise
        pytest.skip("gguf is not installed")
    assert callable(module.main)
