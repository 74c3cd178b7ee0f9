"""The locks: whole, hashed, true to pyproject.toml, and free of what is not shipped. No network."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted(path.stem for path in (ROOT / "packaging" / "locks").glob("*.txt"))
LANES = [name for name in LOCKS if name != "tools" and not name.endswith(".sources")]
LINE = re.compile(r"([a-z0-9-]+)==([0-9a-z.+]+) --hash=sha256:[0-9a-f]{64}")


@pytest.fixture(scope="module")
def lock() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lock", ROOT / "packaging" / "lock.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["lock"] = importlib.util.module_from_spec(spec)  # its dataclass looks it up
    spec.loader.exec_module(module)
    return module


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "packaging" / "locks" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    found = [LINE.fullmatch(line) for line in lines if not line.startswith("#")]
    assert all(found), f"{name}.txt has a line that is no pin with a hash"
    return {match[1]: match[2] for match in found if match}


def test_every_lane_has_its_lock_and_no_lock_is_left_over(lock: ModuleType) -> None:
    assert sorted(lock.LANES) == LANES


@pytest.mark.parametrize("lane", LANES)
def test_lock_has_what_pyproject_asks_for_in_a_version_that_fits(lock: ModuleType, lane: str) -> None:
    found = pins(lane)
    sources = pins(f"{lane}.sources") if f"{lane}.sources" in LOCKS else {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"]]
    for extra in lock.LANES[lane].extras:
        wanted += project["optional-dependencies"][extra]
    for requirement in map(Requirement, [*wanted, *lock.LANES[lane].more, *lock.LANES[lane].sources]):
        version = {**found, **sources}.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not locked: run packaging/lock.py {lane}"
        assert requirement.specifier.contains(version), f"{requirement}: {version} is locked; run packaging/lock.py"


@pytest.mark.parametrize("lane", LANES)
def test_no_lane_ships_torch_or_a_package_under_the_gpl(lane: str) -> None:
    found = pins(lane)
    assert not {"torch", "triton", "onnx", "pylibjpeg-libjpeg"} & set(found)
    for name in found:
        try:
            told = metadata.metadata(name)
        except metadata.PackageNotFoundError:
            continue  # another system's; its licence is in what it installs
        licences = [told.get("License-Expression") or "", *(told.get_all("Classifier") or ())]
        assert not [text for text in licences if re.search(r"(?<!L)GPL|GNU General Public", text)], name


def test_windows_has_what_only_windows_needs_and_linux_has_not() -> None:
    assert "colorama" in pins("windows")
    assert "colorama" not in pins("cpu")
