"""Real files for the tests, from package registries into .cache; a test whose file is not there skips with a reason.

    TotalSegmentator 2.18.0 sdist (Apache-2.0)   20-slice abdominal CT series with labels, volumes
    deid-data 0.0.20 sdist (MIT)                 ultrasound, zips, photos in DICOM
    octave-dicom .deb (GPL-3+, test files only)  palette colour, burned-in text; only where apt-get is

pydicom-data comes with the `dev` extra. Nothing of these is part of the product.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

from environment import ROOT, say

CACHE = ROOT / ".cache"
SDISTS = {
    "totalsegmentator-2.18.0": (
        "TotalSegmentator==2.18.0",
        "5d4223ef93973bc36d710869d11e7742ead2c154c72f7f9edcaaadd5b6c4bd03",
    ),
    "deid-data-0.0.20": (
        "deid-data==0.0.20",
        "33d455f13c82f76a39e8eb52d2808a35d7cde29c120819e246c863432281b8ed",
    ),
}
DEBIAN = "octave-dicom"


def fetch(python: Path) -> dict[str, str]:
    """Return the environment variables that tell the tests where the files lie; fetches what is missing.

    EDGEMED_TEST_DATA: the unpacked TotalSegmentator sdist.
    EDGEMED_TEST_FILES: a folder with `octave-dicom` and `deid-data-0.0.20`, as far as they could be had.
    """
    files = CACHE / "test-files"
    data = CACHE / "test-data"
    for folder in (files, data):
        folder.mkdir(parents=True, exist_ok=True)
    segmentator = _sdist(python, "totalsegmentator-2.18.0", data)
    _sdist(python, "deid-data-0.0.20", files)
    _debian(files)
    variables = {"EDGEMED_TEST_FILES": str(files)}
    if segmentator is not None:
        variables["EDGEMED_TEST_DATA"] = str(segmentator)
    return variables


def _sdist(python: Path, name: str, parent: Path) -> Path | None:
    """Return parent/name, fetched through pip and unpacked, or None with a note if that fails."""
    target = parent / name
    if target.is_dir():
        return target
    requirement, sha256 = SDISTS[name]
    say(f"fetching {requirement} for the tests")
    download = CACHE / "download"
    command = [str(python), "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--no-binary", ":all:", "--dest", str(download), requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    archive = download / f"{name}.tar.gz"
    if done.returncode or not archive.is_file():
        say(f"{requirement} could not be fetched; its tests will skip")
        return None
    if hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
        say(f"{archive.name} is not the file that was expected; its tests will skip")
        return None
    half = parent / f"{name}.part"
    shutil.rmtree(half, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(half, filter="data")
    (half / name).rename(target)
    shutil.rmtree(half)
    archive.unlink()
    return target


def _debian(parent: Path) -> None:
    """Unpack the Debian package `DEBIAN` into parent/DEBIAN; a note if this is no Debian or it cannot be had."""
    target = parent / DEBIAN
    if target.is_dir():
        return
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        say(f"{DEBIAN} needs apt-get; its tests will skip")
        return
    download = CACHE / "download"
    download.mkdir(parents=True, exist_ok=True)
    for attempt in ("download", "update"):
        if attempt == "update":  # lists of packages may be missing or old
            _quiet(["apt-get", "update"], download)
        if _quiet(["apt-get", "download", DEBIAN], download):
            break
    packages = sorted(download.glob(f"{DEBIAN}_*.deb"))
    half = parent / f"{DEBIAN}.part"
    shutil.rmtree(half, ignore_errors=True)
    if packages and _quiet(["dpkg-deb", "-x", str(packages[-1]), str(half)], download):
        half.rename(target)
    else:
        say(f"{DEBIAN} could not be fetched; its tests will skip")


def _quiet(command: list[str], folder: Path) -> bool:
    """Tell whether `command`, run in `folder` without output, succeeded."""
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0
