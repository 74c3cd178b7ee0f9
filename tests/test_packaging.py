"""What a user installs: the wheel, built from the sdist, holds every module and data file, no torch, nothing loose."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPED = {"calibration": "edgemed/calibration", "export": "edgemed/export", "triton_kernels": "edgemed/triton_kernels"}
MEBIBYTE = 1 << 20
LIMIT_MIB = 80


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from an sdist that was built from a copy of the repository."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "answers", "tests", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def listed(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def expected() -> set[str]:
    """Return the files the wheel must hold: all that lie in the package folders."""
    found = set()
    for folder, target in {"edgemed": "edgemed", **MAPPED}.items():
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith("."):
                found.add(str(PurePosixPath(target) / file.relative_to(ROOT / folder).as_posix()))
    return found


def test_wheel_holds_every_file_of_the_package_folders_and_no_other(listed: set[str]) -> None:
    inside = {name for name in listed if ".dist-info/" not in name}
    assert inside == expected()


def test_mapped_folders_are_flat() -> None:
    for folder in MAPPED:
        assert not [p for p in (ROOT / folder).iterdir() if p.is_dir() and p.name != "__pycache__"], folder


def test_wheel_is_small_and_holds_no_executable_weights(wheel: Path, listed: set[str]) -> None:
    assert wheel.stat().st_size <= LIMIT_MIB * MEBIBYTE
    assert not [name for name in listed if name.endswith((".pkl", ".pickle", ".pt", ".pth", ".bin", ".engine", ".so"))]


def test_licence_and_notice_travel_with_the_wheel(listed: set[str]) -> None:
    names = {name.rsplit("/", 1)[-1] for name in listed if ".dist-info/" in name}
    assert names >= {"LICENSE", "NOTICE"}


def test_base_install_and_runtime_extras_have_no_torch(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    for requirement in metadata.get_all("Requires-Dist", []):
        if requirement.startswith(("torch", "triton", "onnx=", "onnx>")):
            assert any(f'extra == "{extra}"' in requirement for extra in ("export", "train", "dev")), requirement
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


def test_no_requirement_is_a_gpl_decoder() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    assert not [r for requirements in lists for r in requirements if r.startswith("pylibjpeg-libjpeg")]


def test_packaging_folder_is_no_package() -> None:
    assert not (ROOT / "packaging" / "__init__.py").exists(), "it would shadow the library `packaging`"


def test_notice_names_every_work_of_others_in_the_repository() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    for work in ("sample_ct.dcm", "TotalSegmentator", "LiteMedSAM", "Noto"):
        assert work in notice
