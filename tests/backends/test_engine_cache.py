"""Engine files: whole or not at all, their owner's only, and refused where they are stale, changed or not trusted."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from edgemed.backends.engine_cache import MAGIC, EngineKey, engines_folder, load_cached, write_cached
from edgemed.errors import BundleError, CannotRead, CannotWrite

KEY = EngineKey("decoder", "g" * 64, "tensorrt_rtx 1.7.1", "sm_89", "fp16", "p" * 64)
ENGINE = bytes(range(256)) * 8


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_cached(tmp_path / "engines", KEY, ENGINE)


def test_an_engine_comes_back_and_is_its_owners_only(file: Path) -> None:
    assert load_cached(file.parent, KEY) == ENGINE
    assert file.name == "decoder.fp16.sm_89.gggggggggggg.engine"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("place", [len(MAGIC) - 2, len(MAGIC) + 12, -1, -len(ENGINE)])
def test_a_changed_byte_is_noticed(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)
    with pytest.raises(BundleError, match=file.name):
        load_cached(file.parent, KEY)


@pytest.mark.parametrize("left", [0, 5, len(MAGIC), len(MAGIC) + 20, -1])
def test_a_file_that_is_cut_short_is_noticed(file: Path, left: int) -> None:
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(BundleError, match=file.name):
        load_cached(file.parent, KEY)


def test_bytes_behind_the_engine_are_noticed(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(BundleError, match="was changed"):
        load_cached(file.parent, KEY)


@pytest.mark.parametrize(
    "change", [{"graph": KEY.graph[:12] + "h" * 52}, {"library": "tensorrt_rtx 1.8"}, {"profile": "q" * 64}]
)
def test_an_engine_of_something_else_is_stale_and_says_what_differs(file: Path, change: dict[str, str]) -> None:
    with pytest.raises(BundleError, match=f"is stale: it was built for {next(iter(change))}"):
        load_cached(file.parent, dataclasses.replace(KEY, **change))


@pytest.mark.parametrize(
    "change", [{"role": "projector"}, {"target": "sm_86"}, {"precision": "bf16"}, {"graph": "h" * 64}]
)
def test_another_role_target_precision_or_graph_is_another_file(file: Path, change: dict[str, str]) -> None:
    with pytest.raises(CannotRead, match="there is no engine"):
        load_cached(file.parent, dataclasses.replace(KEY, **change))


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="this system has no user ids")
@pytest.mark.parametrize("mode", [0o644, 0o620, 0o602])
def test_a_file_that_others_can_open_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(BundleError, match="by other users"):
        load_cached(file.parent, KEY)


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="this system follows links")
def test_a_link_is_refused(file: Path, tmp_path: Path) -> None:
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CannotRead, match="cannot read"):
        load_cached(file.parent, KEY)


def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CannotWrite, match="cannot write"):
        write_cached(tmp_path / "taken", KEY, ENGINE)
    assert os.listdir(tmp_path) == ["taken"]


def test_the_users_folder_is_where_edgemed_home_says_else_the_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEMED_HOME", "/site")
    assert engines_folder() == Path("/site/engines")
    monkeypatch.delenv("EDGEMED_HOME")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cached")
    assert engines_folder() == Path("/cached/edgemed/engines")
