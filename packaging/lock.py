"""Write the hash-locked requirements of every lane: packaging/locks/LANE.txt, what an offline installer is made of.

What the index has as source alone (`Lane.sources`) goes to LANE.sources.txt; build.sh makes wheels of it.

    python packaging/lock.py                 all lanes
    python packaging/lock.py cpu windows     some
    python packaging/lock.py --download FOLDER cpu   fetch what the lane's lock names, by hash, and write no lock

A lane is edgemed with certain extras, for one system and one Python. pip resolves it for that system (wheels only, so
nothing is compiled or run on the target), without downloading what it need not read. Markers are then read again for
the target: pip takes those of the machine it runs on. Does not cover edgemed's own wheel, whose hash build.sh adds.

Needs pip 23.1 or newer and `packaging`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCKS = Path(__file__).resolve().parent / "locks"
PYTHON = "3.11"
"""Debian 12's; a lane has wheels for this one alone."""

PIP_COMMAND = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq")

PIP = "pip==26.3"
"""Installs the others, run from its wheel: Debian's own Python has no pip, and the installed environment needs none."""

SERVED = ("serve", "results")
"""Extras of every lane beside the engine's: the node on the PACS network, PDF and FHIR."""

LINUX = (*(f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)), "manylinux2014_x86_64")
"""glibc 2.28 and older: Debian 10, RHEL 8, Ubuntu 20.04 and what came later."""


@dataclass(frozen=True)
class Lane:
    """What is installed: edgemed's extras and further requirements, for the platforms that pip calls so.

    sources: requirements that have no wheel, pure Python all of them; what they need is in `more`.
    """

    extras: tuple[str, ...]
    more: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    platforms: tuple[str, ...] = LINUX

    @property
    def environment(self) -> dict[str, str]:
        """The marker environment of the target."""
        windows = self.platforms[0].startswith("win")
        return {
            **{key: str(value) for key, value in default_environment().items()},
            "implementation_name": "cpython",
            "implementation_version": f"{PYTHON}.0",
            "os_name": "nt" if windows else "posix",
            "platform_machine": "AMD64" if windows else "x86_64",
            "platform_python_implementation": "CPython",
            "platform_system": "Windows" if windows else "Linux",
            "python_full_version": f"{PYTHON}.0",
            "python_version": PYTHON,
            "sys_platform": "win32" if windows else "linux",
        }


RTX = "1.7.1.116"

LANES = {
    "cpu": Lane(("cpu", *SERVED)),
    "gpu-cu13": Lane(
        ("gpu", *SERVED),
        (f"tensorrt-rtx-cu13-libs=={RTX}", f"tensorrt-rtx-cu13-bindings=={RTX}"),
        (f"tensorrt-rtx=={RTX}", f"tensorrt-rtx-cu13=={RTX}"),
    ),
    # The gpu extra is CUDA 13's. TensorRT-RTX is there for CUDA 12, too; onnxruntime's CUDA provider is not: its last
    # wheel for CUDA 12 is 1.26, and 1.31.1 is what the graphs were measured with.
    "gpu-cu12": Lane(
        ("cpu", *SERVED),
        (
            f"tensorrt-rtx-cu12-libs=={RTX}",
            f"tensorrt-rtx-cu12-bindings=={RTX}",
            "cuda-core==1.2.2",
            "cuda-bindings==12.9.10",
        ),
        (f"tensorrt-rtx-cu12=={RTX}",),
    ),
    "gpu-ort-cu13": Lane(("gpu-ort", *SERVED)),
    "windows": Lane(("cpu", *SERVED), platforms=("win_amd64",)),
}

TOOLS = ("build==1.6.1", "setuptools==84.2.1", "click==8.5.1")
"""What build.sh runs: other versions of them may write other bytes."""


def main() -> None:
    """Write the locks of the lanes that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("lanes", nargs="*", choices=[*LANES, []], help="default: all")
    parser.add_argument("--download", metavar="FOLDER")
    given = parser.parse_args()
    for name in given.lanes or LANES:
        lane = LANES[name]
        if given.download:
            options = ["--no-deps", "--require-hashes", "--dest", given.download, *_target(lane)]
            subprocess.run([*PIP_COMMAND, "download", *options, "-r", str(LOCKS / f"{name}.txt")], check=True)
            continue
        write(f"{name}.txt", lane, resolve(lane))
        if lane.sources:
            write(f"{name}.sources.txt", lane, _report(lane.sources, "--no-binary=:all:", "--no-deps"))
    if not given.download:
        write("tools.txt", Lane(()), _report(TOOLS, *_target(Lane(()))))


def requirements(lane: Lane) -> list[str]:
    """Return what pyproject.toml asks for in this lane, pip first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *lane.more]
    for extra in lane.extras:
        wanted += project["optional-dependencies"][extra]
    return [PIP, *(requirement for requirement in wanted if requirement not in lane.sources)]


def resolve(lane: Lane) -> list[dict[str, Any]]:
    """Return pip's report of every wheel that the lane needs, those that only other systems need left out."""
    asked, extra = requirements(lane), set[str]()
    while True:
        found = {
            str(canonicalize_name(row["metadata"]["name"])): row
            for row in _report([*asked, *sorted(extra)], *_target(lane))
        }
        needed = _closure([Requirement(text) for text in asked], found, lane.environment)
        missing = {str(requirement) for name, requirement in needed.items() if name not in found}
        if not missing - extra:
            return [found[name] for name in sorted(needed)]
        extra |= missing


def _target(lane: Lane) -> list[str]:
    """Return pip's options for wheels alone, of the lane's Python and platforms."""
    platforms = [f"--platform={platform}" for platform in lane.platforms]
    return ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *platforms]


def _report(wanted: Sequence[str], *options: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        where = ["--dry-run", "--ignore-installed", "--target", folder, "--report", str(report)]
        subprocess.run([*PIP_COMMAND, "install", *where, *options, *wanted], check=True)
        rows: list[dict[str, Any]] = json.loads(report.read_bytes())["install"]
        return rows


def _closure(wanted: list[Requirement], found: Mapping[str, Any], target: Mapping[str, str]) -> dict[str, Requirement]:
    """Return name -> a requirement without its marker, of all that is needed on the target; some may not be found."""
    needed: dict[str, Requirement] = {}
    seen = set[tuple[str, str]]()
    todo = [(requirement, "") for requirement in wanted]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({**target, "extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name not in needed:
            needed[name] = Requirement(str(requirement).partition(";")[0])
        for own in ("", *requirement.extras):
            if name in found and (name, own) not in seen:
                seen.add((name, own))
                todo += [(Requirement(text), own) for text in found[name]["metadata"].get("requires_dist", [])]
    return needed


def write(file: str, lane: Lane, rows: Sequence[dict[str, Any]]) -> None:
    """Write a lock: a comment, then a line for each wheel or source."""
    of = f"edgemed[{','.join(lane.extras)}]" if lane.extras else "what build.sh runs"
    lines = [f"# {of}, CPython {PYTHON}; made by packaging/lock.py, not by hand."]
    for row in rows:
        metadata, sha256 = row["metadata"], row["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{canonicalize_name(metadata['name'])}=={metadata['version']} --hash=sha256:{sha256}")
    LOCKS.mkdir(exist_ok=True)
    (LOCKS / file).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    print(f"{file}: {len(rows)}", file=sys.stderr)


if __name__ == "__main__":
    main()
