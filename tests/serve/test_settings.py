"""The node's TOML file: what it may hold, and what every mistake in it ends in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from edgemed.errors import CannotRead, EdgemedError, InvalidInput
from edgemed.serve.settings import NodeSettings, Sender, read_settings, to_settings

GOOD = """
folder = "/var/lib/edgemed"
port = 104
quiet_seconds = 45
[[sender]]
aet = "CT1"
addresses = ["10.1.0.0/24", "::1"]
[[target]]
name = "pacs"
aet = "ORTHANC"
host = "10.1.0.2"
[[target]]
name = "web"
url = "https://pacs.example/dicom-web"
[[rule]]
name = "liver"
prompt = "Segment the liver."
kinds = ["seg", "sr"]
targets = ["pacs", "web"]
senders = ["CT1"]
select = {conditions = {Modality = "CT"}}
"""


def test_a_file_fills_the_settings(tmp_path: Path) -> None:
    (tmp_path / "node.toml").write_text(GOOD)
    settings = read_settings(tmp_path / "node.toml", port=11113, aet=None)
    assert settings.port == 11113
    assert settings.quiet_seconds == 45.0
    assert settings.rules[0].targets == ("pacs", "web")
    assert settings.target("web") is not None
    assert settings.bind == "127.0.0.1"


def test_without_a_file_the_section_of_the_configuration_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = GOOD.replace("[[", "[[serve.").replace('\nfolder = "/var/lib/edgemed"', '[serve]\nfolder = "store"', 1)
    (tmp_path / "config.toml").write_text(section)
    monkeypatch.setenv("EDGEMED_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("EDGEMED_SERVE_PORT", "11114")
    settings = read_settings(quiet_seconds=3)
    assert settings.folder == tmp_path / "store"
    assert (settings.port, settings.quiet_seconds) == (11114, 3.0)
    assert settings.rules[0].targets == ("pacs", "web")
    (tmp_path / "config.toml").write_text('[serve]\nfolder = "store"\nprot = 1\n')
    with pytest.raises(InvalidInput, match="unknown key 'prot'"):
        read_settings()
    monkeypatch.delenv("EDGEMED_SERVE_PORT")
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(EdgemedError, match="--config is missing"):
        read_settings()


def test_a_missing_file_and_one_that_is_no_toml(tmp_path: Path) -> None:
    with pytest.raises(CannotRead):
        read_settings(tmp_path / "node.toml")
    (tmp_path / "node.toml").write_text("folder = ")
    with pytest.raises(InvalidInput, match="no TOML"):
        read_settings(tmp_path / "node.toml")


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({}, "folder is missing"),
        ({"folder": "x", "prot": 1}, "unknown key 'prot'"),
        ({"folder": "x", "port": "104"}, "int was expected"),
        ({"folder": "x", "port": True}, "int was expected"),
        ({"folder": "x", "port": 70000}, "port"),
        ({"folder": "x", "bind": "0.0.0.0"}, "beyond_loopback"),
        ({"folder": "x", "bind": "::"}, "beyond_loopback"),
        ({"folder": "x", "aet": "back\\slash"}, "AE title"),
        ({"folder": "x", "aet": "seventeen-letters"}, "AE title"),
        ({"folder": "x", "max_associations": 0}, "max_associations"),
        ({"folder": "x", "sender": {"aet": "A"}}, r"\[\[sender\]\] was expected"),
        ({"folder": "x", "sender": [{"aet": "A"}]}, "lacks a key"),
        ({"folder": "x", "sender": [{"aet": "A", "addresses": []}]}, "no addresses"),
        ({"folder": "x", "sender": [{"aet": "A", "addresses": ["ct.local"]}]}, "no network"),
        ({"folder": "x", "sender": [{"aet": "A", "addresses": ["::1"]}] * 2}, "two of sender"),
        ({"folder": "x", "target": [{"name": "a"}]}, "AE title"),
        ({"folder": "x", "target": [{"name": "a", "aet": "A", "host": "h", "tls": True}]}, "tls"),
        ({"folder": "x", "target": [{"name": "a", "url": "https://user:word@host/"}]}, "credentials"),
        ({"folder": "x", "rule": [{"name": "a", "prompt": "?", "kinds": ["sr"], "targets": ["b"]}]}, "'b', which"),
        ({"folder": "x", "rule": [{"name": "../a", "prompt": "?", "kinds": ["sr"]}]}, "rule name"),
        ({"folder": "x", "rule": [{"name": "a", "prompt": " ", "kinds": ["sr"]}]}, "prompt"),
        ({"folder": "x", "tls": {"certificate": "c"}}, "lacks a key"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_told(table: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        to_settings(table)


@pytest.mark.skipif(os.name != "posix", reason="the mode of a file has no such rights")
def test_a_tls_key_that_others_have_rights_to_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "node.key"
    key.touch()
    text = f"{GOOD}[tls]\ncertificate = 'c'\nkey = '{key}'\nauthorities = 'a'\n"
    (tmp_path / "node.toml").write_text(text)
    for mode in (0o644, 0o640, 0o620, 0o601):
        key.chmod(mode)
        with pytest.raises(CannotRead, match=r"node\.key holds a secret and others have rights to it; chmod 600 it"):
            read_settings(tmp_path / "node.toml")
    key.chmod(0o600)
    assert read_settings(tmp_path / "node.toml").tls is not None
    key.unlink()  # as for one who asks for the status and may not look into the folder of keys
    assert read_settings(tmp_path / "node.toml").tls is not None


def test_beyond_loopback_needs_to_be_said() -> None:
    assert NodeSettings(folder=Path("x"), bind="0.0.0.0", beyond_loopback=True).bind == "0.0.0.0"
    assert NodeSettings(folder=Path("x"), bind="127.0.0.2").bind == "127.0.0.2"


@pytest.mark.parametrize(
    ("host", "may"),
    [("10.1.0.7", True), ("::ffff:10.1.0.7", True), ("10.1.1.7", False), ("fe80::1%eth0", False), ("x", False)],
)
def test_where_a_sender_may_come_from(host: str, may: bool) -> None:
    assert Sender("CT1", ("10.1.0.0/24",)).may_come_from(host) is may
