"""Archives, volumes, pictures and DICOMDIRs that ask for gigabytes end in exit 86, fast and in little memory.

All are read in one fresh process, so that its peak memory and that of its children are theirs alone. CPU time is
asserted, not wall time: a busy machine must not fail the test. tests/dicom/test_limits.py has those in DICOM files.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgemed.errors import NoInput, ResourceLimit

pytest.importorskip("resource", reason="memory and CPU limits need a POSIX system")


@pytest.fixture(scope="module")
def result(bombs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bombs")
    paths = [str(path) for path in bombs.write(folder)]
    done = subprocess.run(
        [sys.executable, str(bombs.__file__), *paths], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    found = {str(Path(path).relative_to(folder)): end for path, end in told["found"].items()}
    return {"peak_mib": told["peak_mib"], **found}


def test_bombs_end_in_a_resource_limit_within_two_seconds(bombs: ModuleType, result: dict[str, Any]) -> None:
    for name in bombs.BOMBS:
        end = result[name]
        print(f"{name}: {end['text'][-80:]} cpu {end['cpu_s']:.2f} s, wall {end['wall_s']:.2f} s")
        assert end["code"] == ResourceLimit.exit_code == 86, (name, end["text"])
        assert end["cpu_s"] < 2, name


def test_no_bomb_takes_300_mib(result: dict[str, Any]) -> None:
    print(f"peak {result['peak_mib']:.0f} MiB")
    assert result["peak_mib"] < 300


def test_archives_in_an_archive_are_not_unpacked(bombs: ModuleType, result: dict[str, Any]) -> None:
    for name in bombs.HARMLESS:
        assert result[name]["code"] == NoInput.exit_code
        assert result[name]["cpu_s"] < 2
