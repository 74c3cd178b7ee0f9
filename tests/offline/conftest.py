"""A guard on every socket of this process."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


def load(name: str, file: Path) -> ModuleType:
    """Return the module in a file that is in no package; the same one every time."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def guard() -> Iterator[Any]:
    """Refuse what is not loopback while the test runs; `guard.attempts` lists it, and the test fails for it."""
    module = load("edgemed_tests_socket_guard", HERE / "socket_guard.py")
    with module.guarded() as attempts:
        yield attempts
    assert not attempts, f"something asked for the network: {attempts}"


@pytest.fixture(scope="session")
def dicom_node() -> ModuleType:
    """Senders and targets on loopback, of tests/serve."""
    pytest.importorskip("pynetdicom", reason="pynetdicom is not installed (extra: edgemed[serve])")
    return load("edgemed_tests_dicom_node", HERE.parent / "serve" / "dicom_node.py")
