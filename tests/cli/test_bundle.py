"""`edgemed bundle`: a hospital's day, from keys to an unpacked bundle, and what is refused on the way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edgemed import config
from edgemed.bundle import write_bundle
from edgemed.cli import main, verbs
from edgemed.graphs import GraphSpec, TensorSpec

Captured = pytest.CaptureFixture[str]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the rights of key files are those of POSIX")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a bundle `tiny`, which is the current one; nothing is configured."""
    monkeypatch.setitem(verbs.VERBS, "bundle", "Sign, verify, pack and unpack bundles.")
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EDGEMED_CONFIG", raising=False)
    monkeypatch.setattr(config, "system_file", lambda: tmp_path / "etc.toml")
    monkeypatch.chdir(tmp_path)
    image = (TensorSpec("image", "float32", (1, 3, 4, 4)),)
    write_bundle(
        tmp_path / "tiny",
        name="tiny",
        family="native",
        graphs={"vision_encoder": GraphSpec("vision_encoder", image, (TensorSpec("features", "float32", (1, 2)),))},
        files={"graphs/vision_encoder.onnx": b"\x08\x0a", "NOTICE": b"terms" * 500},
        precision={"vision_encoder": "fp32"},
        versions={"bundle": "1.0"},
    )
    return tmp_path


def ran(capsys: Captured, *arguments: str, code: int = 0) -> str:
    """Return what a command wrote to stdout, or its one line of error."""
    assert main(["bundle", *arguments]) == code
    told = capsys.readouterr()
    if code:
        assert told.out == ""
        assert told.err.count("\n") == 1
        return told.err
    return told.out


@pytest.fixture
def site(place: Path, capsys: Captured) -> dict[str, str]:
    """Key ids by name; the bundle is signed by the vendor, and the site's configuration asks for it."""
    ids = {name: ran(capsys, "keygen", name).strip() for name in ("root", "vendor", "site")}
    ran(capsys, "keys", "edit", "new.json", "--key", "root.key.pem", "--trust", "vendor=vendor.pub.pem",
        "--trust", "site=site.pub.pem", "--until", "2999-01-01")  # fmt: skip
    ran(capsys, "sign", "tiny", "--key", "vendor.key.pem", "--role", "vendor")
    (place / "etc.toml").write_text(
        f"[bundles]\nrequire_signature = true\ntrusted_keys = 'keys.json'\nroot_keys = ['{ids['root']}']\n"
    )
    ran(capsys, "keys", "install", "new.json")
    return ids


def test_signed_bundle_is_verified_packed_and_unpacked(site: dict[str, str], place: Path, capsys: Captured) -> None:
    told = json.loads(ran(capsys, "verify", "tiny", "--json"))
    assert told["trusted_signatures"] == [site["vendor"]]
    assert told["version"] == "1.0"
    index = ran(capsys, "pack", "tiny", "-o", "stick", "--part-size", "2K").strip()
    assert all(part.stat().st_size <= 2000 for part in (place / "stick").glob("tiny.tar.*"))
    assert "unpacked tiny" in ran(capsys, "unpack", index, "-o", "here", "-q")
    assert site["vendor"] in ran(capsys, "verify", "here")


def test_what_is_not_signed_as_asked_ends_with_81(site: dict[str, str], place: Path, capsys: Captured) -> None:
    assert "1 site signature" in ran(capsys, "verify", "tiny", "--require-role", "site", code=81)
    ran(capsys, "sign", "tiny", "--key", "site.key.pem", "--role", "site")
    ran(capsys, "verify", "tiny", "--require-role", "site", "--require-role", "vendor")
    (place / "tiny" / "bundle.sig").unlink()
    ran(capsys, "verify", "tiny", code=81)
    index = ran(capsys, "pack", "tiny", "-o", "stick").strip()
    ran(capsys, "unpack", index, "-o", "here", "-q", code=81)
    assert not (place / "here").exists()


def test_changed_file_ends_with_80(site: dict[str, str], place: Path, capsys: Captured) -> None:
    (place / "tiny" / "NOTICE").write_bytes(b"other")
    assert "NOTICE has sha256" in ran(capsys, "verify", "tiny", code=80)


def test_revoked_key_ends_with_81_after_the_next_list_is_installed(site: dict[str, str], capsys: Captured) -> None:
    ran(capsys, "keys", "edit", "new.json", "--key", "root.key.pem", "--revoke", f"{site['vendor']}=stolen")
    ran(capsys, "verify", "tiny")
    assert "revoked" in ran(capsys, "keys", "install", "new.json")
    assert "(stolen)" in ran(capsys, "verify", "tiny", code=81)
    assert "sequence number 2" in ran(capsys, "keys", "install", "new.json", code=81)
    assert f"{site['vendor']} revoked on" in ran(capsys, "keys", "show")


def test_older_version_than_the_installed_ends_with_80(site: dict[str, str], place: Path, capsys: Captured) -> None:
    assert main(["models", "import", "tiny"]) == 0
    capsys.readouterr()
    write_bundle("old", name="tiny", family="native", graphs={}, files={"NOTICE": b""}, precision={})
    ran(capsys, "sign", "old", "--key", "vendor.key.pem", "--role", "vendor")
    assert "pass --force" in ran(capsys, "verify", "old", code=80)
    ran(capsys, "verify", "old", "--force")


def test_embedded_bundle_holds_where_signatures_are_required(site: dict[str, str], capsys: Captured) -> None:
    ran(capsys, "verify", "nano")
    ran(capsys, "verify", "nano", "--require-signature", code=81)


def test_locked_key_needs_its_pass_phrase_from_a_file_of_ones_own(place: Path, capsys: Captured) -> None:
    phrase = place / "phrase"
    phrase.write_text("correct horse\nand more")
    ran(capsys, "keygen", "k", "--passphrase-file", "phrase", code=20)
    phrase.chmod(0o600)
    ran(capsys, "keygen", "k", "--passphrase-file", "phrase")
    sign = ("sign", "tiny", "--key", "k.key.pem", "--role", "site")
    assert "no pass phrase" in ran(capsys, *sign, code=1)
    ran(capsys, *sign, "--passphrase-file", "phrase")
    ran(capsys, "keygen", "k", code=40)
    phrase.write_text("\n")
    ran(capsys, *sign, "--passphrase-file", "phrase", code=1)


@pytest.mark.parametrize("size", ["", "x", "-1", "1.5G", "100", "5T", "G", "１Ｇ"])
def test_size_of_a_part_that_is_none_is_an_error_of_usage(capsys: Captured, size: str) -> None:
    ran(capsys, "pack", "tiny", "-o", "stick", "--part-size", size, code=1)


@pytest.mark.parametrize(
    "options",
    [("--trust", "vendor"), ("--revoke", "abc=lost"), ("--revoke", "0" * 64)],
)
def test_wrong_forms_of_key_options_are_errors_of_usage(capsys: Captured, options: tuple[str, str]) -> None:
    ran(capsys, "keygen", "root")
    ran(capsys, "keys", "edit", "l.json", "--key", "root.key.pem", *options, code=1)


def test_no_private_key_is_ever_printed(site: dict[str, str], place: Path, capsys: Captured) -> None:
    secret = (place / "vendor.key.pem").read_text().splitlines()[1]
    (place / "vendor.key.pem").chmod(0o644)
    assert secret not in ran(capsys, "sign", "tiny", "--key", "vendor.key.pem", "--role", "vendor", code=20)
    (place / "vendor.key.pem").chmod(0o600)
    (place / "vendor.key.pem").write_text(f"-----BEGIN PRIVATE KEY-----\n{secret[:-9]}\n-----END PRIVATE KEY-----\n")
    assert secret[:20] not in ran(capsys, "sign", "tiny", "--key", "vendor.key.pem", "--role", "vendor", code=81)


def test_no_list_configured_is_told(capsys: Captured) -> None:
    assert "bundles.trusted_keys is not set" in ran(capsys, "keys", "show", code=1)
