"""What must stay cheap stays cheap: the help needs no library but click, answering needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "triton", "onnx", "onnxscript", "transformers", "matplotlib", "nibabel", "accelerate"}
RUNTIME = {"numpy", "onnxruntime", "pydicom", "highdicom", "imagecodecs", "PIL", "tokenizers"}


def loaded(code: str) -> set[str]:
    """Return the top-level modules that a fresh Python has loaded after `code`."""
    told = "\nimport sys, json; sys.stderr.write('LOADED' + json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + told], capture_output=True, text=True, check=True)
    names: list[str] = json.loads(done.stderr.split("LOADED")[1])
    return set(names)


def command(*arguments: str) -> str:
    return f"from edgemed.cli import main\nmain({list(arguments)!r})"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("infer", "--help"),
        ("train", "--help"),
        ("export", "--help"),
        ("quantize", "--help"),
        ("bundle", "--help"),
        ("config", "--help"),
        ("compile", "--help"),
        ("doctor", "--help"),
        ("models", "--help"),
        ("index", "--help"),
        ("batch", "--help"),
    ],
    ids=" ".join,
)
def test_help_loads_no_library_but_click(arguments: tuple[str, ...]) -> None:
    assert not loaded(command(*arguments)) & (HEAVY | RUNTIME)


def test_listing_bundles_loads_no_engine() -> None:
    assert not loaded(command("models", "list")) & (HEAVY | RUNTIME - {"numpy"})


def test_a_wrong_option_loads_no_library() -> None:
    assert not loaded(command("infer", "--no-such-option")) & (HEAVY | RUNTIME)


@pytest.mark.parametrize("module", ["edgemed.infer", "edgemed.evaluation", "edgemed.dicom", "edgemed.report"])
def test_runtime_modules_import_no_library_but_numpy(module: str) -> None:
    assert not loaded(f"import {module}") & (HEAVY | RUNTIME - {"numpy"})


def test_answering_loads_no_torch(sample_scan: str) -> None:
    assert not loaded(command("infer", sample_scan, "--prompt", "Where is the liver?", "--quiet")) & HEAVY
