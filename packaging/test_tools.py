"""Programs that only tests need, from the system's own package source into .tools: nothing on the system is changed.

    orthanc, orthanc-dicomweb   the archive of tests/serve/test_orthanc.py
    dicom3tools, dcmtk          dciodvfy and dsrdump, which check every DICOM result

python3 packaging/test_tools.py     prints the environment variables; exit code 0 also where nothing can be had

apt-get downloads what this system lacks, dependencies included; dpkg-deb unpacks it beside the checkout. dcmqi comes
with the `dev` extra. Where there is no apt-get, or it gets nothing, one line says so, and those tests skip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from environment import ROOT, SCRIPTS, say

TOOLS = ROOT / ".tools"
PACKAGES = ("orthanc", "orthanc-dicomweb", "dicom3tools", "dcmtk")
PROGRAMS = ("usr/bin/dciodvfy", "usr/bin/dsrdump", "usr/sbin/Orthanc")
LIMIT_S = 25.0
"""For each call of apt-get; two or three of them take 5 s where the package source answers."""


def fetch() -> dict[str, str]:
    """Return the environment variables that tell the tests where the programs are; fetches them if they are missing.

    EDGEMED_TEST_TOOLS: folders with dciodvfy, dsrdump and dcmqi's programs. EDGEMED_TEST_ORTHANC: Orthanc.
    """
    problem = None if _complete() else _get()
    if problem is not None:
        say(f"{', '.join(PACKAGES)}: {problem}; tests that need them will skip")
        return {"EDGEMED_TEST_TOOLS": str(SCRIPTS)}
    return {
        "EDGEMED_TEST_TOOLS": os.pathsep.join((str(TOOLS / "bin"), str(SCRIPTS))),
        "EDGEMED_TEST_ORTHANC": str(_root() / "usr" / "sbin" / "orthanc-of-the-tests"),
    }


def _root() -> Path:
    return TOOLS / "root"


def _stamp() -> Path:
    return TOOLS / "complete"


def _complete() -> bool:
    """Tell whether what lies there was fetched for this list and this place."""
    return _stamp().is_file() and _stamp().read_text() == _wanted()


def _wanted() -> str:
    return "\n".join((*PACKAGES, str(ROOT)))


def _get() -> str | None:
    """Fetch and unpack everything anew; return what went wrong."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return "there is no apt-get here"
    began = time.monotonic()
    try:
        shutil.rmtree(TOOLS, ignore_errors=True)
        debs = TOOLS / "debs"
        (debs / "partial").mkdir(parents=True)
        (TOOLS / ".gitignore").write_text("*\n")
        if not _downloaded(debs):
            return "apt-get cannot download them"
        for package in sorted(debs.glob("*.deb")):
            if not _ran(["dpkg-deb", "-x", str(package), str(_root())]):
                return f"{package.name} cannot be unpacked"
        if missing := [name for name in PROGRAMS if not (_root() / name).is_file()]:
            return f"they have no {', '.join(missing)}; are they installed already?"
        shutil.rmtree(debs)
        _wrap()
        _stamp().write_text(_wanted())
    except OSError as error:
        return f"they cannot be kept in {TOOLS.name} ({error.strerror or 'refused'})"
    say(f"{', '.join(PACKAGES)} are in {TOOLS.name} after {time.monotonic() - began:.0f} s")
    return None


def _downloaded(debs: Path) -> bool:
    """Tell whether apt-get has put the packages, and what they need that is not installed, into `debs`."""
    lists = TOOLS / "lists"
    options = [f"Dir::Cache::archives={debs}", "Debug::NoLocking=1", "APT::Sandbox::User=root"]
    install = ["install", "--yes", "--download-only", "--reinstall", "--no-install-recommends", *PACKAGES]
    if _ran(_apt(options, install)):
        return True
    # The system's lists are missing or old: new ones of our own, for which nobody has to be root.
    (lists / "partial").mkdir(parents=True)
    options.append(f"Dir::State::lists={lists}")
    got = _ran(_apt(options, ["update"])) and _ran(_apt(options, install))
    shutil.rmtree(lists)
    return got


def _apt(options: list[str], command: list[str]) -> list[str]:
    return ["apt-get", "-qq", *(part for option in options for part in ("-o", option)), *command]


def _ran(command: list[str]) -> bool:
    """Tell whether a command succeeded in time."""
    try:
        return subprocess.run(command, capture_output=True, check=False, timeout=LIMIT_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _wrap() -> None:
    """Write a script for each program, which tells it where its libraries and its data are."""
    libraries = sorted({str(file.parent) for file in _root().rglob("*.so*")} - {str(_plugins())})
    (dictionary,) = [*_root().glob("usr/share/libdcmtk*/dicom.dic")] or [Path("/usr/share/libdcmtk17/dicom.dic")]
    told = f'LD_LIBRARY_PATH="{os.pathsep.join(libraries)}" DCMDICTPATH="{dictionary}"'
    (TOOLS / "bin").mkdir()
    for name in PROGRAMS:
        program = _root() / name
        # Orthanc's stays where it is: the test finds its plug-ins from there.
        script = TOOLS / "bin" / program.name if program.name != "Orthanc" else program.parent / "orthanc-of-the-tests"
        script.write_text(f'#!/bin/sh\n{told} exec "{program}" "$@"\n')
        script.chmod(0o755)


def _plugins() -> Path:
    return _root() / "usr" / "share" / "orthanc" / "plugins"


if __name__ == "__main__":
    for key, value in fetch().items():
        print(f"{key}={value}")
