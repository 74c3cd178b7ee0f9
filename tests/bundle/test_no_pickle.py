"""Nothing that we ship runs when it is loaded: no pickle in the source that reads one, none in the embedded bundles."""

from __future__ import annotations

import ast
import pickletools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("edgemed", "calibration", "export", "triton_kernels")
LOADERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SOURCES = [file for folder in SHIPPED for file in sorted((ROOT / folder).rglob("*.py"))]
BUNDLED = [file for file in sorted((ROOT / "edgemed" / "bundles").rglob("*")) if file.is_file()]
NAMED_ONLY = {"edgemed/checkpoints.py": {"UnpicklingError"}}
"""A file that may import pickle, and what it may take from it: the name of an error that torch raises."""


@pytest.mark.parametrize("file", SOURCES, ids=[str(file.relative_to(ROOT)) for file in SOURCES])
def test_source_loads_no_pickle(file: Path) -> None:
    tree = ast.parse(file.read_text("utf-8"))
    allowed = NAMED_ONLY.get(file.relative_to(ROOT).as_posix(), set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = LOADERS & {alias.name.split(".")[0] for alias in node.names}
            assert not found or (found == {"pickle"} and allowed), f"line {node.lineno} imports {found}"
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in LOADERS, f"line {node.lineno}"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in LOADERS:
            assert node.attr in allowed, f"line {node.lineno} uses {node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call):
            told = {k.arg: ast.unparse(k.value) for k in node.keywords}
            name = ast.unparse(node.func)
            assert told.get("allow_pickle", "False") == "False", f"line {node.lineno}"
            assert name != "torch.load" or told.get("weights_only") == "True", f"line {node.lineno}"
            assert name not in ("eval", "exec", "__import__"), f"line {node.lineno} calls {name}"


@pytest.mark.parametrize("file", BUNDLED, ids=[file.name for file in BUNDLED])
def test_bundled_file_is_no_pickle(file: Path) -> None:
    data = file.read_bytes()
    assert not data.startswith((b"PK\x03\x04", b"\x1f\x8b", b"\x7fELF", b"MZ")), "an archive or a program"
    with pytest.raises(ValueError):  # noqa: PT011 (whatever pickletools stumbles over)
        list(pickletools.genops(data[: 1 << 16] + b"."))


def test_the_embedded_bundles_are_looked_at() -> None:
    assert {"bundle.json", "decoder.onnx"} <= {file.name for file in BUNDLED}
