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


def test_section_of_a_part_is_shown_and_can_be_read_again(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "[serve]\nport = 7\n[[serve.sender]]\naet = 'CT1'\naddresses = ['10.0.0.1']\n"
    (tmp_path / "etc.toml").write_text(text)
    monkeypatch.setenv("EDGEMED_SERVE_AET", "NODE")
    assert main(["config", "show", "--origin"]) == 0
    out = capsys.readouterr().out
    assert tomllib.loads(out)["serve"] == {
        "port": 7,
        "aet": "NODE",
        "sender": [{"aet": "CT1", "addresses": ["10.0.0.1"]}],
    }
    assert "environment EDGEMED_SERVE_AET" in out
    monkeypatch.setenv("EDGEMED_SERVE_AEt", "NODE")
    assert main(["config", "show"]) == 1


def test_check_looks_at_secrets_too(tmp_path: Path, capsys: Captured) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    (tmp_path / "etc.toml").write_text(f"[audit]\nfolder = 'a'\npseudonym_file = '{key}'\n")
    key.chmod(0o644)
    assert main(["config", "check"]) == 20
    assert "chmod 600" in capsys.readouterr().err
    key.chmod(0o600)
    assert main(["config", "check"]) == 0
    assert "the settings hold" in capsys.readouterr().out
    (tmp_path / "etc.toml").write_text("[audit]\nserver = 'siem:6514'\n")
    assert main(["config", "check"]) == 1
    (tmp_path / "etc.toml").write_text(f"[serve.tls]\ncertificate = 'c'\nkey = '{key}'\nauthorities = 'a'\n")
    assert main(["config", "check"]) == 0
    key.chmod(0o640)
    assert main(["config", "check"]) == 20


@pytest.mark.parametrize("form", [[], ["--markdown"], ["--man"]])
def test_every_key_is_told_with_its_meaning(form: list[str], capsys: Captured) -> None:
    assert main(["config", "keys", *form]) == 0
    out = capsys.readouterr().out
    for setting in config.SETTINGS:
        assert setting.name in out
        assert setting.meaning in out
    assert "serve.quiet_seconds" in out
