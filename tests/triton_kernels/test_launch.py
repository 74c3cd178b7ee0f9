"""What of launching can be checked without a GPU: the driver check, the choice of a folder, hashes, arguments."""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgemed.errors import BackendUnavailable, BundleError
from edgemed.triton_kernels import launch
from edgemed.triton_kernels.accept_draft import variants
from edgemed.triton_kernels.aot import variants_for
from edgemed.triton_kernels.variants import TARGETS

if TYPE_CHECKING:
    from conftest import Built

(ACCEPT,) = variants()


def has_driver() -> bool:
    try:
        launch.check_driver()
    except BackendUnavailable:
        return False
    return True


def test_without_a_driver_launching_is_refused_at_once(tmp_path: Path) -> None:
    if has_driver():
        pytest.skip("this machine has an NVIDIA GPU")
    with pytest.raises(BackendUnavailable, match="NVIDIA driver"):
        launch.CubinLauncher(tmp_path)


@pytest.mark.parametrize(("code", "message"), [(100, "sees no GPU"), (999, "error 999")])
def test_a_driver_that_does_not_start_is_named(monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    class Driver:
        def __init__(self, name: str) -> None:
            assert "cuda" in name

        def cuInit(self, flags: int) -> int:  # noqa: N802
            return code

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    with pytest.raises(BackendUnavailable, match=message):
        launch.check_driver()


def test_without_cuda_core_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "check_driver", lambda: None)
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(BackendUnavailable, match=r"edgemed\[gpu\]"):
        launch.CubinLauncher(tmp_path)


@pytest.mark.parametrize(
    ("capability", "target"), [(80, 80), (86, 86), (87, 86), (89, 89), (90, 90), (100, 100), (120, 120)]
)
def test_a_gpu_takes_its_own_kernels_or_those_below_it(capability: int, target: int) -> None:
    assert launch.target_for(capability, TARGETS) == target


@pytest.mark.parametrize("capability", [75, 103, 121])
def test_a_gpu_without_kernels_is_refused(capability: int) -> None:
    with pytest.raises(BackendUnavailable, match=f"compute capability {capability / 10}"):
        launch.target_for(capability, TARGETS)


def test_every_kernel_of_a_folder_is_read_and_fits_its_variant(built: Built) -> None:
    entries = launch.read_kernels(built.folder, 90)
    for variant in variants_for(90):
        assert launch.read_cubin(built.folder, entries[variant.name], variant).startswith(b"\x7fELF")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one kernel, described as `aot` does it."""
    code = b"\x7fELF machine code"
    entry = {
        "name": ACCEPT.name,
        "target": 80,
        "sha256": "2f1a3b72bd18cb0a3bbbb1eb7a9e7f30be0e3fb4ef9ef5d6a1ab6b4dd0a4a4a4",
        "arguments": dict(ACCEPT.arguments),
        "constants": dict(ACCEPT.constants),
        "num_warps": ACCEPT.warps,
        "extra_pointers": 2,
        "scratch_bytes": 0,
    }
    (tmp_path / "sm_80").mkdir()
    (tmp_path / "sm_80" / "accept_draft.cubin").write_bytes(code)
    (tmp_path / "sm_80" / "kernels.json").write_text(json.dumps({"target": 80, "kernels": [entry]}), encoding="utf-8")
    return tmp_path


def test_a_changed_file_is_refused(folder: Path) -> None:
    with pytest.raises(BundleError, match="was changed"):
        launch.read_cubin(folder, launch.read_kernels(folder, 80)["accept_draft"], ACCEPT)


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "sm_80" / "accept_draft.cubin").unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        launch.read_cubin(folder, launch.read_kernels(folder, 80)["accept_draft"], ACCEPT)


@pytest.mark.parametrize("change", [{"constants": {"longest": 16}}, {"num_warps": 4}, {"scratch_bytes": 64}])
def test_a_kernel_of_another_version_is_refused(folder: Path, change: dict[str, object]) -> None:
    entry = {**launch.read_kernels(folder, 80)["accept_draft"], **change}
    with pytest.raises(BundleError, match="another version"):
        launch.read_cubin(folder, entry, ACCEPT)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"kernels": [1]}'])
def test_a_description_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "sm_80" / "kernels.json").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=r"kernels\.json cannot be read"):
        launch.read_kernels(folder, 80)


def test_a_folder_without_the_target_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "sm_80")
    with pytest.raises(BundleError, match=r"kernels\.json cannot be read"):
        launch.read_kernels(folder, 80)


def test_arguments_go_in_order_with_their_types_and_nothing_for_scratch(folder: Path) -> None:
    arrays = {name: launch.DeviceArray(object(), (3,), np.dtype(np.int32)) for name in ("draft", "best", "result")}
    entry = launch.read_kernels(folder, 80)["accept_draft"]
    typed = launch.typed_arguments(ACCEPT, entry, {**arrays, "length": 3})
    assert typed[:3] == [array.buffer for array in arrays.values()]
    assert [(type(value), int(value)) for value in typed[3:]] == [(np.int32, 3), (np.uint64, 0), (np.uint64, 0)]
