"""Every example in a docstring runs and shows what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"edgemed": "edgemed", "calibration": "edgemed.calibration", "export": "edgemed.export"}
FOLDERS["triton_kernels"] = "edgemed.triton_kernels"


def with_examples() -> list[str]:
    """Return the modules whose text holds a doctest prompt."""
    found = []
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in file.read_text(encoding="utf-8"):
                inner = file.relative_to(ROOT / folder).with_suffix("").parts
                found.append(".".join((package, *inner)).removesuffix(".__init__"))
    return found


@pytest.mark.parametrize("name", with_examples())
def test_examples_of(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
