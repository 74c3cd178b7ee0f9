"""README command 2: set up .venv in this clone, then run every check: format, ruff, mypy --strict, pytest.

python3 packaging/check.py                      everything; exit code 0 only if all of it passes
python3 packaging/check.py tests/cli -k infer   the same with arguments for pytest
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import environment
import test_data
import test_tools

TYPED = environment.ROOT / ".typecheck"


def main() -> int:
    """Return 0 if every check passed, else 1; pytest comes last, so its closing line is the last line."""
    python = environment.ensure("dev")
    extra_environment = test_data.fetch(python) | test_tools.fetch()
    failed = [name for name, check in (("ruff", ruff), ("mypy", mypy)) if not check(python)]
    environment.say("pytest")
    if environment.run([python, "-m", "pytest", *sys.argv[1:]], extra_environment):
        failed.append("pytest")
    if failed:
        environment.say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def ruff(python: Path) -> bool:
    """Tell whether ruff finds nothing and would format nothing."""
    environment.say("ruff")
    found = environment.run([python, "-m", "ruff", "check", "--quiet", "."])
    return not environment.run([python, "-m", "ruff", "format", "--check", "--quiet", "."]) and not found


def mypy(python: Path) -> bool:
    """Tell whether mypy --strict accepts the package as it installs, and these scripts.

    The package is installed into .typecheck first: mypy cannot see through an editable install, and three folders of
    this repository install under another name.
    """
    environment.say("mypy --strict")
    for leftover in (TYPED, environment.ROOT / "build"):  # setuptools would take deleted modules from there
        shutil.rmtree(leftover, ignore_errors=True)
    environment.pip("install", "-qq", "--no-deps", "--no-build-isolation", "--target", str(TYPED), ".")
    shutil.rmtree(environment.ROOT / "build", ignore_errors=True)
    installed = environment.run([python, "-m", "mypy", "--no-error-summary", str(TYPED / "edgemed")])
    scripts = [str(path) for path in sorted((environment.ROOT / "packaging").glob("*.py"))]
    return not environment.run([python, "-m", "mypy", "--no-error-summary", *scripts]) and not installed


if __name__ == "__main__":
    sys.exit(main())
