"""The modules of this folder that are programs, too, as fixtures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _module(name: str) -> ModuleType:
    known = f"edgemed_tests_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, Path(__file__).resolve().parent / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


@pytest.fixture(scope="session")
def harness() -> ModuleType:
    return _module("harness")


@pytest.fixture(scope="session")
def loops() -> ModuleType:
    return _module("loops")


@pytest.fixture(scope="session")
def bombs() -> ModuleType:
    return _module("bombs")
