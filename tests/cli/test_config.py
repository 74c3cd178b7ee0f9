"""`edgemed config show`: every setting, its value and where it comes from."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from edgemed import config
from edgemed.cli import main, verbs

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verbs.VERBS, "config", "The settings of this machine.")
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EDGEMED_CONFIG", raising=False)
    monkeypatch.setattr(config, "system_file", lambda: tmp_path / "etc.toml")


def test_shown_settings_are_a_file_that_sets_the_same(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "etc.toml").write_text("[bundles]\nrequire_signature = true\ntrusted_keys = 'k'\n")
    assert main(["config", "show"]) == 0
    shown = capsys.readouterr().out
    assert tomllib.loads(shown)["bundles"]["trusted_keys"] == str(tmp_path / "k")
    (tmp_path / "again.toml").write_text(shown)
    monkeypatch.setenv("EDGEMED_CONFIG", str(tmp_path / "again.toml"))
    assert main(["config", "show"]) == 0
    assert capsys.readouterr().out == shown


def test_origin_is_told(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etc.toml").write_text("[bundles]\nrequire_signature = true\n")
    monkeypatch.setenv("EDGEMED_BUNDLES_REQUIRED_ROLES", "site")
    assert main(["config", "show", "--origin"]) == 0
    out = capsys.readouterr().out
    assert f"From: file {tmp_path / 'etc.toml'};" in out
    assert "From: environment EDGEMED_BUNDLES_REQUIRED_ROLES;" in out
    assert main(["config", "show", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == str(tmp_path / "etc.toml")
    assert told["settings"]["bundles.root_keys"] == {"value": [], "origin": "default"}


def test_unknown_key_ends_with_code_1_and_one_line(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "etc.toml").write_text("[bundles]\nsurprise = true\n")
    assert main(["config", "show"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "'bundles.surprise', which is no setting" in told.err
    assert told.err.count("\n") == 1
