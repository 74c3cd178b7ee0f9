"""Settings come from one file, then the environment, then options; what is not known is an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgemed import config
from edgemed.config import SETTINGS, Kind, Value, kinds_of, read_secret, read_section, read_settings
from edgemed.errors import CannotRead, EdgemedError

ROLES = "bundles.required_roles"
FLAG = "bundles.require_signature"


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EDGEMED_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(config, "system_file", lambda: tmp_path / "etc.toml")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def test_every_setting_has_a_default_and_a_variable_of_its_own() -> None:
    found = read_settings()
    assert set(found) == {setting.name for setting in SETTINGS}
    assert {value.origin for value in found.values()} == {"default"}
    assert found[FLAG].value is False
    assert len({setting.variable for setting in SETTINGS}) == len(SETTINGS)


def test_options_go_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(
        tmp_path / "home" / "config.toml", "[bundles]\nrequire_signature = true\nrequired_roles = ['vendor']\n"
    )
    assert read_settings()[FLAG] == config.Value(True, f"file {file}")
    monkeypatch.setenv("EDGEMED_BUNDLES_REQUIRE_SIGNATURE", "off")
    monkeypatch.setenv("EDGEMED_BUNDLES_REQUIRED_ROLES", "vendor, site")
    found = read_settings({FLAG: None, ROLES: ("site",)})
    assert found[FLAG] == config.Value(False, "environment EDGEMED_BUNDLES_REQUIRE_SIGNATURE")
    assert found[ROLES] == config.Value(("site",), "option")
    assert read_settings()[ROLES].value == ("vendor", "site")


def test_system_file_goes_before_the_users_and_the_named_one_before_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "home" / "config.toml", "[bundles]\nrequire_signature = false\nroot_keys = ['a']\n")
    write(tmp_path / "etc.toml", "[bundles]\nrequire_signature = true\n")
    found = read_settings()
    assert found[FLAG].value is True
    assert found["bundles.root_keys"].value == ()
    monkeypatch.setenv("EDGEMED_CONFIG", str(write(tmp_path / "x.toml", "")))
    assert read_settings()[FLAG].origin == "default"
    monkeypatch.setenv("EDGEMED_CONFIG", str(tmp_path / "nowhere.toml"))
    with pytest.raises(CannotRead, match="EDGEMED_CONFIG names"):
        read_settings()


def test_a_place_that_this_user_may_not_look_at_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(type(tmp_path)):  # type: ignore[misc]
        def is_file(self) -> bool:
            raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(config, "system_file", lambda: Closed(tmp_path / "etc.toml"))
    with pytest.raises(CannotRead, match=r"etc\.toml: Permission denied; .*chmod 755"):
        read_settings()


def test_path_is_relative_to_the_file_that_holds_it(tmp_path: Path) -> None:
    write(tmp_path / "etc.toml", '[bundles]\ntrusted_keys = "keys/site.json"\n')
    assert read_settings()["bundles.trusted_keys"].value == tmp_path / "keys" / "site.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[bundles]\nrequre_signature = true", "'bundles.requre_signature', which is no setting"),
        ("[bundle]\nrequire_signature = true", "'bundle.require_signature', which is no setting"),
        ("require_signature = true", "outside of a section"),
        ("[bundles]\nrequire_signature = 1", "is not true or false"),
        ("[bundles]\nrequire_signature = 'true'", "is not true or false"),
        ("[bundles]\nrequired_roles = 'vendor'", "is not a list of texts"),
        ("[bundles]\nrequired_roles = [1]", "is not a list of texts"),
        ("[bundles]\nrequired_roles = ['root']", "one of vendor, site expected"),
        ("[bundles]\ntrusted_keys = ''", "is not the path of a file"),
        ("[bundles]\ntrusted_keys = ['x']", "is not the path of a file"),
        ("[bundles.deep]\nx = 1", "'bundles.deep', which is no setting"),
        ("[bundles]\nrequire_signature = true\nrequire_signature = false", "is no TOML file"),
        ("[bundles", "is no TOML file"),
        ("x = " + "[" * 100_000, "is no TOML file"),
    ],
)
def test_file_that_says_something_else_is_an_error_of_usage(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "etc.toml", text)
    with pytest.raises(EdgemedError, match=message) as caught:
        read_settings()
    assert caught.value.exit_code == 1


def test_a_new_section_is_a_row_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        config.Setting("node.port", "number", 104, "Where it listens."),
        config.Setting("node.level", "text", "low", "How much it tells.", ("low", "high")),
    )
    monkeypatch.setattr(config, "SETTINGS", (*SETTINGS, *rows))
    file = write(tmp_path / "etc.toml", "[node]\nport = 11112\n")
    monkeypatch.setenv("EDGEMED_NODE_LEVEL", "high")
    found = read_settings()
    assert (found["node.port"].value, found["node.level"].value) == (11112, "high")
    for variable, text in (("EDGEMED_NODE_PORT", "-1"), ("EDGEMED_NODE_PORT", "x"), ("EDGEMED_NODE_LEVEL", "deep")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, text)
            with pytest.raises(EdgemedError):
                read_settings()
    for text in ("port = -1", "port = true", "port = 1.5", "port = '1'", "level = 1", "level = 'deep'"):
        write(file, f"[node]\n{text}\n")
        monkeypatch.delenv("EDGEMED_NODE_LEVEL", raising=False)
        with pytest.raises(EdgemedError):
            read_settings()


KINDS: dict[str, Kind] = {"port": "number", "quiet_seconds": "decimal", "storage": "texts", "folder": "path"}


def test_section_of_a_part_has_its_own_keys_and_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "[serve]\nport = 1\nfolder = 'f'\nquiet_seconds = 2\nstrange = true\n[[serve.sender]]\naet = 'CT1'\n"
    file = write(tmp_path / "etc.toml", text)
    assert "serve.port" not in read_settings()
    found = read_section("serve", KINDS)
    assert found["port"] == Value(1, f"file {file}")
    assert found["folder"].value == str(tmp_path / "f")
    assert found["quiet_seconds"].value == 2.0
    assert found["sender"].value == [{"aet": "CT1"}]
    assert found["strange"].value is True
    monkeypatch.setenv("EDGEMED_SERVE_PORT", "2")
    monkeypatch.setenv("EDGEMED_SERVE_STORAGE", "a,b")
    monkeypatch.setenv("EDGEMED_SERVE_QUIET_SECONDS", "0.5")
    found = read_section("serve", KINDS, {"folder": "/x", "port": None})
    assert {key: found[key].value for key in KINDS} == {
        "port": 2,
        "storage": ["a", "b"],
        "quiet_seconds": 0.5,
        "folder": "/x",
    }
    assert found["port"].origin == "environment EDGEMED_SERVE_PORT"
    own = write(tmp_path / "node.toml", "port = 9\nquiet_seconds = 3\n")
    assert read_section("serve", KINDS, None, own)["port"].value == 2
    for name, wrong in (("EDGEMED_SERVE_QUIET_SECONDS", "soon"), ("EDGEMED_SERVE_PRT", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, wrong)
            with pytest.raises(EdgemedError, match=r"EDGEMED_SERVE|serve\.quiet"):
                read_section("serve", KINDS)


def test_kinds_are_those_of_the_plain_fields() -> None:
    from edgemed.serve.settings import NodeSettings

    kinds = kinds_of(NodeSettings)
    assert (kinds["folder"], kinds["port"], kinds["keep_hours"]) == ("path", "number", "decimal")
    assert not {"senders", "targets", "rules", "tls"} & set(kinds)


def test_secrets_are_files_by_their_name() -> None:
    assert {s.name for s in SETTINGS if s.kind == "secret"} == {s.name for s in SETTINGS if s.name.endswith("_file")}
    with pytest.raises(AssertionError):
        config.Setting("x.key", "secret", None, "")


def test_unknown_variable_of_a_section_is_an_error_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEMED_TEST_DATA", "x")
    read_settings()
    monkeypatch.setenv("EDGEMED_BUNDLES_REQUIRE_SIGNATURES", "1")
    with pytest.raises(EdgemedError, match="EDGEMED_BUNDLES_REQUIRE_SIGNATURES, which is no setting"):
        read_settings()


def test_variable_that_is_no_flag_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEMED_BUNDLES_REQUIRE_SIGNATURE", "maybe")
    with pytest.raises(EdgemedError, match="is not true or false"):
        read_settings()


def test_file_that_is_too_large_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "etc.toml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(CannotRead, match="more than 1 MiB"):
        read_settings()
    (tmp_path / "etc.toml").write_bytes(b"\xff")
    with pytest.raises(EdgemedError, match="UTF-8"):
        read_settings()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
def test_file_that_everyone_may_write_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "etc.toml", "").chmod(0o666)
    with pytest.raises(CannotRead, match="may be written by every user"):
        read_settings()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
def test_secret_is_read_from_a_file_of_its_owner_only(tmp_path: Path) -> None:
    secret = tmp_path / "s"
    secret.write_bytes(b"open sesame")
    for mode in (0o644, 0o660, 0o601):
        secret.chmod(mode)
        with pytest.raises(CannotRead, match="chmod 600") as caught:
            read_secret(secret)
        assert "sesame" not in str(caught.value)
    secret.chmod(0o600)
    assert read_secret(secret) == b"open sesame"
    (tmp_path / "link").symlink_to(secret)
    for other in (tmp_path / "link", tmp_path, tmp_path / "none"):
        with pytest.raises(CannotRead):
            read_secret(other)
    with pytest.raises(CannotRead, match="at most 5 bytes"):
        read_secret(secret, 5)
