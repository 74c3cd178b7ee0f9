"""The clone's own Python environment: made once in .venv, reused while pyproject.toml stays as it is.

Covers what the two README commands share: a Python that is new enough, a virtual environment, the install. Standard
library only, and nothing of edgemed: it runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
SCRIPTS = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = SCRIPTS / ("python.exe" if os.name == "nt" else "python")


def say(line: str) -> None:
    """Print one line of progress on stderr."""
    print(f"edgemed set-up: {line}", file=sys.stderr, flush=True)


def run(command: Sequence[str | Path], extra_environment: Mapping[str, str] | None = None) -> int:
    """Return the exit code of `command`, run in the root of the clone with its output shown."""
    environment = {**os.environ, **(extra_environment or {})}
    return subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, check=False).returncode


def pip(*arguments: str) -> None:
    """Run pip of the environment; ends the script with pip's own message if it fails."""
    code = run([PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments])
    if code:
        sys.exit(f"edgemed set-up: 'pip {' '.join(arguments)}' failed with code {code}; its message is above.")


def ensure(extra: str) -> Path:
    """Return the Python of an environment where edgemed[extra] is installed, editable; made or completed if needed.

    extra: "cpu" (what answering needs) or "dev" (what the checks need; holds "cpu").
    """
    if sys.version_info < (3, 11):
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"edgemed set-up: this is Python {found}; 3.11 or newer is needed. Call this script with a newer one.")
    if not _works():
        say(f"making {VENV.name} with Python {sys.version_info.major}.{sys.version_info.minor}")
        code = run([sys.executable, "-m", "venv", "--clear", VENV])
        if code:
            sys.exit("edgemed set-up: 'python -m venv' failed; on Debian and Ubuntu install the package python3-venv.")
    wanted = _fingerprint()
    if not any(_stamp(name).exists() and _stamp(name).read_text() == wanted for name in {extra, "dev"}):
        say(f"installing edgemed[{extra}] into {VENV.name}; the first time takes some minutes")
        pip("install", "-qq", "--upgrade", "pip")
        if extra == "dev":
            # Asked for alone and first: the exact pin then also finds a local CPU build, and nothing later moves it.
            pip("install", "-qq", _pin("train", "torch"))
        pip("install", "-qq", "--editable", f".[{extra}]")
        _stamp(extra).write_text(wanted)
    return PYTHON


def _works() -> bool:
    """Tell whether the environment's Python starts: a moved clone or a removed system Python breaks it."""
    if not PYTHON.exists():
        return False
    return subprocess.run([str(PYTHON), "-c", "import pip"], capture_output=True, check=False).returncode == 0


def _stamp(extra: str) -> Path:
    return VENV / f"edgemed-{extra}.sha256"


def _fingerprint() -> str:
    """Return a hash of what decides the install: pyproject.toml and where the clone lies."""
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + str(ROOT).encode()).hexdigest()


def _pin(extra: str, package: str) -> str:
    """Return the requirement of `package` as the extra in pyproject.toml states it."""
    import tomllib  # Python 3.11: imported after the check in `ensure`

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements: list[str] = project["optional-dependencies"][extra]
    return next(r for r in requirements if r.startswith(f"{package}=="))
