"""A policy is met by the right keys only, and what is not signed by them is told apart by code 81."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgemed import keys, signing
from edgemed.bundle import install_bundle, open_bundle, sign_bundle, signers_of
from edgemed.errors import BundleError, CannotRead, CannotWrite, EdgemedError, SignatureError
from edgemed.signing import NO_POLICY, Policy


def test_a_bundle_signed_by_vendor_and_site_opens_and_tells_its_signers(hospital: Any) -> None:
    bundle = open_bundle(hospital.template, hospital.policy)
    assert signers_of(bundle, hospital.policy) == tuple(sorted((hospital.id("vendor"), hospital.id("site"))))


def test_signature_is_plain_ed25519_of_the_manifest(hospital: Any) -> None:
    data = (hospital.template / "bundle.json").read_bytes()
    for signature in signing.from_bytes((hospital.template / "bundle.sig").read_bytes()):
        hospital.private[signature.role].public_key().verify(signature.value, data)


def test_signing_adds_to_the_signatures_and_replaces_ones_own(hospital: Any, tmp_path: Path) -> None:
    made = hospital.make(tmp_path / "b")
    for name in ("vendor", "site", "vendor"):
        sign_bundle(made.path, hospital.private[name], name)
    assert len(signing.from_bytes((made.path / "bundle.sig").read_bytes())) == 2
    open_bundle(made.path, hospital.policy)


def test_a_damaged_bundle_is_not_signed(hospital: Any, tmp_path: Path) -> None:
    made = hospital.make(tmp_path / "b")
    made.file("NOTICE").write_bytes(b"other")
    with pytest.raises(BundleError, match="NOTICE has sha256"):
        sign_bundle(made.path, hospital.private["vendor"], "vendor")
    assert not (made.path / "bundle.sig").exists()


@pytest.mark.parametrize(
    ("signers", "roles", "message"),
    [
        ((), ("vendor",), "no bundle.sig"),
        (("vendor",), ("vendor", "site"), "1 site signature"),
        (("site",), ("vendor",), "1 vendor signature"),
        (("vendor", "site"), ("vendor", "vendor"), "1 vendor signature"),
        (("stranger",), (), "is not in the list of trusted keys"),
        (("vendor-lost",), (), "was revoked on .* .laptop stolen"),
        (("vendor-old",), (), "was valid until 2001-12-31"),
        (("vendor-new",), (), "is valid from 2998-01-01"),
        (("root",), (), "is not in the list of trusted keys"),
    ],
)
def test_policy_that_is_not_met_is_refused(
    hospital: Any, tmp_path: Path, signers: tuple[str, ...], roles: tuple[str, ...], message: str
) -> None:
    made = hospital.make(tmp_path / "b")
    if signers:
        hospital.sign(made.path, *signers)
    with pytest.raises(SignatureError, match=message):
        open_bundle(made.path, dataclasses.replace(hospital.policy, required_roles=roles))


@pytest.mark.parametrize(
    ("signers", "roles"),
    [
        (("vendor", "vendor-2"), ("vendor", "vendor")),
        (("vendor", "vendor-lost"), ("vendor",)),
        (("vendor", "stranger"), ("vendor",)),
        (("site",), ()),
    ],
)
def test_signatures_beyond_the_needed_ones_do_no_harm(
    hospital: Any, tmp_path: Path, signers: tuple[str, ...], roles: tuple[str, ...]
) -> None:
    made = hospital.make(tmp_path / "b")
    hospital.sign(made.path, *signers)
    open_bundle(made.path, dataclasses.replace(hospital.policy, required_roles=roles))


def test_role_is_the_one_in_the_list_not_the_one_claimed(hospital: Any, tmp_path: Path) -> None:
    made = hospital.make(tmp_path / "b")
    hospital.sign(made.path, "vendor", "vendor-2", roles={"vendor-2": "site"})
    with pytest.raises(SignatureError, match="does not fit"):
        open_bundle(made.path, hospital.policy)


def test_where_none_is_required_unsigned_and_unknown_pass_and_revoked_and_wrong_do_not(
    hospital: Any, tmp_path: Path
) -> None:
    relaxed = dataclasses.replace(hospital.policy, require_signature=False)
    made = hospital.make(tmp_path / "b")
    open_bundle(made.path, relaxed)
    hospital.sign(made.path, "stranger")
    open_bundle(made.path, relaxed)
    hospital.sign(made.path, "vendor-lost")
    with pytest.raises(SignatureError, match="revoked"):
        open_bundle(made.path, relaxed)
    hospital.sign(made.path, "vendor")
    (made.path / "bundle.json").write_bytes((made.path / "bundle.json").read_bytes() + b" ")
    with pytest.raises(SignatureError, match="does not fit"):
        open_bundle(made.path, relaxed)


def test_required_without_a_list_of_keys_is_refused(hospital: Any) -> None:
    with pytest.raises(SignatureError, match=r"bundles\.trusted_keys is not set"):
        open_bundle(hospital.template, Policy(require_signature=True))


def test_configuration_sets_the_policy_and_embedded_bundles_need_no_signature(
    hospital: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f'''[bundles]
require_signature = true
trusted_keys = "{hospital.policy.trusted_keys}"
root_keys = ["{hospital.id("root")}"]
required_roles = ["vendor"]
''')
    monkeypatch.setenv("EDGEMED_CONFIG", str(file))
    open_bundle(hospital.template)
    open_bundle("nano")
    with pytest.raises(SignatureError, match="a checkpoint has no signature"):
        signing.refuse_unsigned("a checkpoint")
    made = hospital.make(tmp_path / "b")
    with pytest.raises(SignatureError):
        open_bundle(made.path)
    with pytest.raises(SignatureError):
        install_bundle(made.path)
    assert not (tmp_path / "home" / "bundles").exists()
    copied = hospital.copy(tmp_path / "nano")
    (copied / "bundle.sig").unlink()
    with pytest.raises(SignatureError):  # the exception is the program's folder, not a name
        open_bundle(copied)


def test_older_version_is_installed_only_when_forced(hospital: Any, tmp_path: Path) -> None:
    for version in ("1.9", "1.10"):
        install_bundle(hospital.make(tmp_path / version, versions={"bundle": version}).path, replace=True)
    for version in ({"bundle": "1.9.9"}, {"edgemed": "9"}):
        old = hospital.make(tmp_path / "old", versions=version, replace=True)
        with pytest.raises(BundleError, match="the installed tiny has 1.10; pass --force"):
            install_bundle(old.path, replace=True)
    install_bundle(old.path, replace=True, force=True)
    assert open_bundle("tiny").manifest.version == (0,)


@pytest.mark.parametrize("version", ["", "1.", "v1", "1.2.3.4.5", "1e9", "-1", "１"])
def test_version_that_is_none_is_refused(hospital: Any, tmp_path: Path, version: str) -> None:
    with pytest.raises(BundleError, match="one such as 1.4.2"):
        hospital.make(tmp_path / "b", versions={"bundle": version})


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights")
def test_private_keys_are_for_their_owner_only(tmp_path: Path) -> None:
    keys.write_key_pair(tmp_path / "k")
    key = tmp_path / "k.key.pem"
    assert key.stat().st_mode & 0o777 == 0o600
    with pytest.raises(CannotWrite, match="keys are never overwritten"):
        keys.write_key_pair(tmp_path / "k")
    for mode in (0o640, 0o604, 0o610):
        key.chmod(mode)
        with pytest.raises(CannotRead, match="others have rights"):
            keys.read_private_key(key)
    key.chmod(0o600)
    (tmp_path / "link").symlink_to(key)
    with pytest.raises(CannotRead):
        keys.read_private_key(tmp_path / "link")


def test_pass_phrase_locks_a_key_and_no_error_tells_it(tmp_path: Path) -> None:
    made = keys.write_key_pair(tmp_path / "k", b"correct horse")
    assert keys.key_id(keys.public_bytes(keys.read_private_key(tmp_path / "k.key.pem", b"correct horse"))) == made
    assert keys.key_id(keys.read_public_key(tmp_path / "k.pub.pem")) == made
    for wrong, kind in ((b"battery staple", SignatureError), (None, EdgemedError)):
        with pytest.raises(kind) as caught:
            keys.read_private_key(tmp_path / "k.key.pem", wrong)
        assert "battery" not in str(caught.value)


def test_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    path = tmp_path / "k.pem"
    path.write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    path.chmod(0o600)
    with pytest.raises(SignatureError, match="another kind of key"):
        keys.read_private_key(path)
    path.write_bytes(key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(SignatureError, match="another kind of key"):
        keys.read_public_key(path)
    path.write_bytes(b"-----BEGIN NOTHING-----")
    with pytest.raises(SignatureError):
        keys.read_private_key(path)


def test_rotation_goes_forward_only(hospital: Any, tmp_path: Path) -> None:
    root, target = hospital.private["root"], tmp_path / "installed.json"
    usual = keys.read_key_list(hospital.policy.trusted_keys, hospital.policy.root_keys)
    later = usual.changed(revoke={hospital.id("vendor"): "lost"})
    (tmp_path / "old").write_bytes(keys.key_list_bytes(usual, root))
    (tmp_path / "new").write_bytes(keys.key_list_bytes(later, root))
    (tmp_path / "forged").write_bytes(keys.key_list_bytes(later.changed(), hospital.private["root-2"]))
    keys.install_key_list(tmp_path / "old", target, hospital.policy.root_keys)
    assert keys.install_key_list(tmp_path / "new", target, hospital.policy.root_keys) == later
    for name in ("old", "new", "forged"):
        with pytest.raises(SignatureError):
            keys.install_key_list(tmp_path / name, target, hospital.policy.root_keys)
    with pytest.raises(SignatureError, match="was revoked"):
        open_bundle(hospital.template, dataclasses.replace(hospital.policy, trusted_keys=target))
    with pytest.raises(SignatureError, match="cannot be trusted again"):
        later.changed([later.keys[hospital.id("vendor")]])


# --- cost -------------------------------------------------------------------------------------------------------------


def test_nothing_configured_costs_little_and_loads_no_cryptography(hospital: Any) -> None:
    code = f"from edgemed.bundle import open_bundle; open_bundle({str(hospital.template)!r})"
    told = "; import sys; print('cryptography' in sys.modules, 'tomllib' in sys.modules, 'edgemed.keys' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code + told], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] * 3
    assert signing.read_policy() == NO_POLICY
    signing.refuse_unsigned("a checkpoint")
    spent = []
    for _ in range(20):
        start = time.perf_counter()
        signing.read_policy()
        spent.append(time.perf_counter() - start)
    assert min(spent) < 0.002


# --- attacks on the list of keys --------------------------------------------------------------------------------------


def lines(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Callable[[Any, bytes], bytes]:
    """Return the attack that changes the two lines of a list, in canonical form, without the root key."""

    def attack(hospital: Any, data: bytes) -> bytes:
        said, signed = (json.loads(line) for line in data.splitlines())
        change(said, signed)
        return keys.canonical(said) + keys.canonical(signed)

    return attack


def resigned(change: Callable[[dict[str, Any]], object], root: str = "root") -> Callable[[Any, bytes], bytes]:
    """Return the attack that changes the first line and has a root key sign it."""

    def attack(hospital: Any, data: bytes) -> bytes:
        said, signed = (json.loads(line) for line in data.splitlines())
        change(said)
        key = hospital.private[root]
        signed["public"] = keys.public_bytes(key).hex()
        return keys.canonical(said) + keys.canonical({**signed, "signature": key.sign(keys.canonical(said)).hex()})

    return attack


def first(entries: dict[str, Any]) -> Any:
    return next(iter(entries.values()))


LISTS: dict[str, Callable[[Any, bytes], bytes]] = {
    "empty": lambda h, d: b"",
    "one line": lambda h, d: d.splitlines(keepends=True)[0],
    "signature alone": lambda h, d: d.splitlines(keepends=True)[1],
    "lines swapped": lambda h, d: b"".join(reversed(d.splitlines(keepends=True))),
    "more after it": lambda h, d: d + b"\n",
    "space after the keys": lambda h, d: d.replace(b"}\n", b"} \n", 1),
    "space in the signature": lambda h, d: d.replace(b'"algorithm":', b'"algorithm": '),
    "huge": lambda h, d: d + bytes(1 << 20),
    "not in UTF-8": lambda h, d: b"\xff" + d,
    "revocation taken away": lines(lambda said, signed: said["revoked"].clear()),
    "key added": lines(lambda said, signed: said["keys"].update({"0" * 64: first(said["keys"])})),
    "role changed": lines(lambda said, signed: [key.update(role="site") for key in said["keys"].values()]),
    "longer validity": lines(lambda said, signed: [key.update(not_after="") for key in said["keys"].values()]),
    "capital digits": lambda h, d: d[: d.index(b"\n")] + d[d.index(b"\n") :].upper().replace(b"PUBLIC", b"public"),
    "sequence changed": lines(lambda said, signed: said.update(sequence=99)),
    "other algorithm": lines(lambda said, signed: signed.update(algorithm="none")),
    "no signature": lines(lambda said, signed: signed.update(signature="")),
    "zero signature": lines(lambda said, signed: signed.update(signature="0" * 128)),
    "zero key": lines(lambda said, signed: signed.update(public="0" * 64)),
    "short key": lines(lambda said, signed: signed.update(public=signed["public"][:62])),
    "key of another kind": lines(lambda said, signed: signed.update(public=7)),
    "more about the signature": lines(lambda said, signed: signed.update(note="x")),
    "signed by another root": resigned(lambda said: None, "root-2"),
    "signed by a bundle key": resigned(lambda said: None, "vendor"),
    "signed by a stranger": resigned(lambda said: None, "stranger"),
    # What the right root signed and is still no list.
    "of another kind": resigned(lambda said: said.update(kind="x")),
    "of another format": resigned(lambda said: said.update(format=2)),
    "sequence as text": resigned(lambda said: said.update(sequence="3")),
    "sequence true": resigned(lambda said: said.update(sequence=True)),
    "unknown key of the list": resigned(lambda said: said.update(more=1)),
    "without revocations": resigned(lambda said: said.pop("revoked")),
    "revocations as a list": resigned(lambda said: said.update(revoked=[])),
    "revocation without a reason": resigned(lambda said: first(said["revoked"]).pop("reason")),
    "id of another key": resigned(lambda said: said["keys"].update({"0" * 64: first(said["keys"])})),
    "role root": resigned(lambda said: first(said["keys"]).update(role="root")),
    "date that is none": resigned(lambda said: first(said["keys"]).update(not_after="2026-02-30")),
    "date with a time": resigned(lambda said: first(said["keys"]).update(not_after="20261122")),
    "key with more": resigned(lambda said: first(said["keys"]).update(more=1)),
    "keys as a list": resigned(lambda said: said.update(keys=[])),
}


@pytest.mark.parametrize("name", LISTS)
def test_tampered_list_of_keys_is_refused(hospital: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(LISTS[name](hospital, hospital.policy.trusted_keys.read_bytes()))
    with pytest.raises(SignatureError) as caught:
        open_bundle(hospital.template, dataclasses.replace(hospital.policy, trusted_keys=path))
    assert caught.value.exit_code == 81


def test_list_that_is_not_there_or_without_a_root_is_refused(hospital: Any, tmp_path: Path) -> None:
    for changes in ({"trusted_keys": tmp_path / "none"}, {"root_keys": ()}, {"root_keys": (hospital.id("root-2"),)}):
        with pytest.raises(SignatureError):
            open_bundle(hospital.template, dataclasses.replace(hospital.policy, **changes))


def test_every_flipped_bit_of_the_list_is_refused(hospital: Any) -> None:
    data = hospital.policy.trusted_keys.read_bytes()
    for bit in range(0, len(data) * 8, 7):  # each 7th: every position within a byte comes up
        flipped = data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]
        with pytest.raises(SignatureError):
            keys.key_list_from_bytes(flipped, hospital.policy.root_keys)
