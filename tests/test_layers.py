"""Imports point down only, and each layer knows only its own outside libraries (ARCHITECTURE.md, Layers)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "edgemed": ROOT / "edgemed",
    "edgemed.calibration": ROOT / "calibration",
    "edgemed.export": ROOT / "export",
    "edgemed.triton_kernels": ROOT / "triton_kernels",
}

LAYERS = {
    "__main__": 8,
    "cli": 7,
    "serve": 6,
    "infer": 5,
    "batch": 5,
    "evaluation": 5,
    "box_evaluation": 5,
    "retrieval": 5,
    "volume": 5,
    "calibration": 5,
    "decoding": 4,
    "beam_search": 4,
    "training": 4,
    "export": 4,
    "families": 3,
    "models": 2,
    "memory": 2,
    "dicom": 1,
    "report": 1,
    "bundle": 1,
    "bundle_folder": 0,
    "bundle_places": 0,
    "user_folders": 0,
    "backends": 1,
    "triton_kernels": 1,
    "box_confidence": 1,
    "box_grammar": 1,
    "text_box_grammar": 1,
    "drafts": 1,
    "decoder_calls": 2,
    "token_choice": 2,
    "kernel_head": 3,
    "checkpoints": 1,
    "audit": 0,
    "offline": 0,
    "blas": 0,
    "blocks": 0,
    "nvidia": 0,
    "archive": 2,
    "config": 0,
    "graph_check": 0,
    "keys": 0,
    "manifest": 0,
    "signing": 0,
    "terminology": 0,
    "core": 0,
    "files": 0,
    "graphs": 0,
    "geometry": 0,
    "language": 0,
    "questions": 0,
    "errors": 0,
}

TORCH = {"torch", "safetensors"}
OUTSIDE = {
    "cli": {"click", "numpy", "pydicom", "onnxruntime"},  # the last two only in `doctor`, inside its functions
    "serve": {"pydicom", "pynetdicom", "dicomweb_client", "requests"},
    "infer": {"numpy"},
    "batch": set[str](),
    "retrieval": {"numpy"},
    "volume": {"numpy"},
    "evaluation": {"numpy", "nibabel", "pydicom"},  # the last two inside functions
    "calibration": {"numpy", "onnx", "onnxruntime", "pydicom"},
    "box_evaluation": {"numpy", "matplotlib"},
    "box_confidence": {"numpy"},
    "audit": set[str](),
    "offline": set[str](),
    "blas": set[str](),
    "decoder_calls": {"numpy"},
    "token_choice": {"numpy"},
    "kernel_head": {"numpy"},
    "decoding": {"numpy"},
    "beam_search": {"numpy"},
    "training": {"numpy", "accelerate", "matplotlib", "nibabel", "PIL", "pydicom", "tokenizers", *TORCH},
    "export": {"numpy", "pydicom", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "ml_dtypes", *TORCH},
    "families": {"numpy", "tokenizers", "PIL"},
    "models": {"numpy", *TORCH},
    "dicom": {"numpy", "pydicom", "highdicom", "imagecodecs", "PIL", "nibabel", "nrrd"},
    "report": {"numpy", "PIL", "pydicom", "highdicom", "reportlab", "fontTools"},
    "bundle": set[str](),
    "bundle_folder": set[str](),
    "bundle_places": set[str](),
    "user_folders": set[str](),
    "backends": {"numpy", "onnxruntime", "torch", "cuda"},
    "triton_kernels": {"numpy", "triton", "torch", "cuda"},
    "box_grammar": {"numpy"},
    "text_box_grammar": {"numpy"},
    "drafts": set[str](),
    "checkpoints": {"numpy", "torch"},
    "blocks": {"numpy"},
    "memory": {"onnxruntime"},
    "nvidia": set[str](),
    "archive": set[str](),
    "config": set[str](),
    "graph_check": set[str](),
    "keys": {"cryptography"},
    "manifest": set[str](),
    "signing": set[str](),
    "terminology": set[str](),
    "core": {"numpy"},
    "files": set[str](),
    "graphs": {"numpy"},
    "geometry": {"numpy"},
    "language": set[str](),
    "questions": set[str](),
    "errors": set[str](),
}
"""Part -> the libraries its files may import. Build halves of families (`*_torch`) may import torch, too."""


def modules() -> Iterator[tuple[str, str, Path]]:
    """Yield (module, part, file) of every file of the package; the part is its name below edgemed."""
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            inner = file.relative_to(folder).with_suffix("").parts
            module = ".".join((package, *inner)).removesuffix(".__init__")
            if module != "edgemed":
                yield module, module.split(".")[1], file


def imports(file: Path, module: str) -> Iterator[str]:
    """Yield every module that `file` imports anywhere, in functions too; not those for the type checker alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import; say the whole name"
            assert node.module is not None
            if node.module == "edgemed":
                yield from (f"edgemed.{alias.name}" for alias in node.names)
            else:
                yield node.module


MODULES = list(modules())


@pytest.mark.parametrize(("module", "part", "file"), MODULES, ids=[m for m, _, _ in MODULES])
def test_imports_point_down_and_libraries_are_the_parts_own(module: str, part: str, file: Path) -> None:
    assert part in LAYERS, f"{module} has no layer; give it one here and in ARCHITECTURE.md"
    for imported in imports(file, module):
        top = imported.split(".")[0]
        if top == "edgemed":
            target = imported.split(".")[1] if "." in imported else ""
            if target in LAYERS and target != part:
                assert LAYERS[target] < LAYERS[part] or _siblings(part, target), f"{module} imports {imported}"
        elif top not in sys.stdlib_module_names:
            allowed = OUTSIDE[part] | (TORCH if module.endswith("_torch") else set())
            assert top in allowed, f"{module} imports {top}, which is not a library of '{part}'"


def _siblings(part: str, target: str) -> bool:
    """Tell whether both are in layer 0, which is one group, something asks a session, or beam search
    makes calls."""
    same = {
        ("evaluation", "infer"), ("box_evaluation", "evaluation"), ("batch", "infer"), ("calibration", "infer"),
        ("beam_search", "decoding"),
    }  # fmt: skip
    return LAYERS[part] == LAYERS[target] == 0 or (part, target) in same


def test_runtime_half_of_the_families_knows_no_models() -> None:
    for module, part, file in MODULES:
        if part == "families" and not module.endswith("_torch"):
            assert not any(name.startswith("edgemed.models") for name in imports(file, module)), module


def test_every_part_of_the_table_exists() -> None:
    assert {part for _, part, _ in MODULES} >= set(LAYERS) - {"calibration"}


def test_no_family_is_named_outside_families() -> None:
    for module, part, file in MODULES:
        if part in ("families", "training", "export"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node)
                assert not ("family" in text and "'native'" in text), f"{module}: {text}"
