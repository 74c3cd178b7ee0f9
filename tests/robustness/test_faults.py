"""Whatever open, write, fsync or rename fails, or wherever the process is killed: nothing is lost, a repeat succeeds.

The short form looks at some n of each loop; EDGEMED_NIGHTLY=1 at every one.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgemed import bundle_folder
from edgemed.bundle import open_bundle
from edgemed.errors import CannotWrite

pytest.importorskip("pynetdicom", reason="pynetdicom is not installed (extra: edgemed[serve])")

LOOPS = (
    "models import", "models import --replace", "bundle pack", "bundle unpack", "write_bundle, replacing",
    "write_bundle, moving", "bundle sign", "bundle keygen", "engine cache", "result writers", "journal and store",
    "audit trail",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows(loops: ModuleType) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="edgemed-faults-", dir=loops.memory()) as folder:
        if loops.build(Path(folder)) is None:
            pytest.skip("faults.c needs Linux and a C compiler")
        found: list[Any] = loops.run([], not os.environ.get("EDGEMED_NIGHTLY"), Path(folder))
    print(loops.table(found))
    return found


@pytest.mark.parametrize("name", LOOPS)
def test_nothing_is_lost_and_a_repeat_succeeds(loops: ModuleType, rows: list[Any], name: str) -> None:
    mine = [row for row in rows if row.loop == name]
    assert [row.mode for row in mine] == list(loops.MODES)[: len(mine)] and len(mine) >= 2
    for row in mine:
        assert row.losses == []
        assert row.injected > 0


@pytest.mark.parametrize("name", LOOPS)
def test_what_failed_leaves_no_hidden_files(rows: list[Any], name: str) -> None:
    # One where the last call is that of the clean-up itself, after all was done; the next run removes it.
    assert max(row.stray for row in rows if row.loop == name and row.mode != "SIGKILL") <= name.count("replac")


def test_a_killed_import_leaves_nothing_after_the_next(rows: list[Any]) -> None:
    assert [row.stray for row in rows if row.loop == "models import"] == [0, 0, 0]


def test_every_loop_is_looked_at(loops: ModuleType) -> None:
    assert tuple(loop.name for loop in loops.LOOPS) == LOOPS


def test_where_names_cannot_be_exchanged_the_old_bundle_gets_its_name_back(
    loops: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops.write_tiny(tmp_path / "tiny", "1")
    others = tmp_path / ".tiny.v2.abcdefgh.part" / "old"  # of a bundle with a longer name
    others.mkdir(parents=True)
    real, calls = os.replace, []

    def only_once(*names: Any) -> None:
        calls.append(names)
        if len(calls) > 1:
            raise OSError(5, "Input/output error")
        real(*names)

    monkeypatch.setattr(bundle_folder, "_exchanged", lambda one, other: False)
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", only_once)
        with pytest.raises(CannotWrite, match="Input/output error"):
            loops.write_tiny(tmp_path / "tiny", "2", replace=True)
    assert len(calls) == 3 and not (tmp_path / "tiny").exists()
    with pytest.raises(CannotWrite, match="exists already"):  # the next run finds it
        loops.write_tiny(tmp_path / "tiny", "3")
    assert open_bundle(tmp_path / "tiny").manifest.version == (1,)
    loops.write_tiny(tmp_path / "tiny", "2", replace=True)
    assert open_bundle(tmp_path / "tiny").manifest.version == (2,)
    assert sorted(os.listdir(tmp_path)) == [".tiny.v2.abcdefgh.part", "tiny"] and others.exists()
