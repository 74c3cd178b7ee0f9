"""The compact references hold what the full folders hold, to the extent tests/reference/README.md says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

FAMILIES = ("medrega-tiny", "medplib-tiny")
ROOT = Path(__file__).resolve().parent.parent
MAX_BYTES = 6_000_000


def test_references_together_stay_small() -> None:
    files = [file for file in (ROOT / "tests" / "reference").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES


@pytest.mark.parametrize(("family", "bits_kept"), [("medrega-tiny", 20), ("medplib-tiny", 17)])
def test_rows_that_were_kept_are_those_of_the_full_arrays(family: str, bits_kept: int, reference: Any) -> None:
    tiny, full = reference(family), ROOT.parent / "shared" / "reference" / family
    if not full.is_dir():
        pytest.skip(f"no full folder {full}")
    with np.load(full / "expected.npz") as arrays:
        assert set(tiny.names) == set(arrays)
        for name in arrays:
            np.testing.assert_array_equal(tiny.rows(name, arrays[name]), tiny.expected(name), strict=True)
    with np.load(full / "inputs.npz") as arrays:
        for name in arrays:
            np.testing.assert_array_equal(tiny.input(name), arrays[name], strict=True)
    exact, rounded = load_file(full / "model.safetensors"), load_file(tiny.folder / "model.safetensors")
    assert set(exact) == set(rounded)
    for name, tensor in exact.items():
        assert (np.abs(rounded[name] - tensor) <= np.abs(tensor) * 2.0 ** -(bits_kept + 1)).all(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_are_whole(family: str, reference: Any) -> None:
    tiny = reference(family)
    shapes = {name: tiny.expected(name).shape for name in tiny.names if name.startswith("pixel_") and "_sh" not in name}
    assert shapes
    assert all(len(shape) == 4 and shape[2] == shape[3] for shape in shapes.values())


def test_file_that_was_left_out_comes_from_the_full_folder_or_skips(reference: Any) -> None:
    assert (reference("medrega-tiny") / "config.json").is_file()
    assert (reference("medrega-tiny") / "sharded").is_dir()
