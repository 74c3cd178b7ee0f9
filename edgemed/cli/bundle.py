"""`edgemed bundle`: sign, check and carry bundles. Imports no engine, `cryptography` only where a key is touched."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgemed.cli.verbs import debug_option
from edgemed.errors import EdgemedError

if TYPE_CHECKING:
    from edgemed.keys import KeyList
    from edgemed.signing import Policy

C = TypeVar("C", bound=Callable[..., Any])

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


@click.group("bundle", short_help="Sign, verify, pack and unpack bundles.")
def command() -> None:
    """Sign, verify, pack and unpack bundles; make and keep the keys for it."""


def _passphrase_option(function: C) -> C:
    option = click.option(
        "--passphrase-file", metavar="FILE", help="Its first line locks the private key; only its owner may read it."
    )
    return option(function)


def _passphrase(file: str | None) -> bytes | None:
    """Return the first line of a file that only its owner may read."""
    from edgemed.config import read_secret

    if file is None:
        return None
    line = read_secret(file).split(b"\n")[0].rstrip(b"\r")
    if not line:
        raise EdgemedError(f"{file} has an empty first line; a pass phrase was expected")
    return line


# --- keygen, sign -----------------------------------------------------------------------------------------------------


@command.command("keygen")
@click.argument("stem", metavar="STEM")
@_passphrase_option
@debug_option
def keygen(stem: str, passphrase_file: str | None) -> None:
    """Make a key pair: STEM.key.pem, which stays where it is safe, and STEM.pub.pem, which others get.

    Prints the key's id, which a list of trusted keys or bundles.root_keys then names.
    """
    from edgemed.keys import write_key_pair

    print(write_key_pair(stem, _passphrase(passphrase_file)))


@command.command("sign")
@click.argument("bundle", metavar="NAME|FOLDER")
@click.option("--key", required=True, metavar="FILE", help="The private key (STEM.key.pem).")
@click.option("--role", required=True, type=click.Choice(["vendor", "site"]), help="As whom the key signs.")
@_passphrase_option
@debug_option
def sign(bundle: str, key: str, role: str, passphrase_file: str | None) -> None:
    """Add a signature to a bundle after checking all of it; signatures by other keys stay."""
    from edgemed import audit
    from edgemed.bundle import sign_bundle
    from edgemed.keys import key_id, public_bytes, read_private_key

    private = read_private_key(key, _passphrase(passphrase_file))
    signed = sign_bundle(bundle, private, role)
    audit.record(audit.configured(f"signed as {role}", signed.manifest.name, signed.digest))
    audit.drain()
    print(f"{signed.manifest.name}: signed as {role} by key {key_id(public_bytes(private))}, sha256 {signed.digest}")


# --- verify -----------------------------------------------------------------------------------------------------------


def _policy_options(function: C) -> C:
    for option in (
        click.option("--require-role", "roles", multiple=True, metavar="ROLE", help="A role that must have signed."),
        click.option("--root-key", "roots", multiple=True, metavar="ID", help="Key that may sign the list of keys."),
        click.option("--keys", metavar="FILE", help="The list of trusted keys (default: the configured one)."),
        click.option("--require-signature", is_flag=True, default=None, help="Refuse a bundle without signatures."),
    ):
        function = option(function)
    return function


def _policy(
    require_signature: bool | None, keys: str | None, roots: tuple[str, ...], roles: tuple[str, ...]
) -> Policy | None:
    """Return the configured policy as the options change it, or None if they do not."""
    from edgemed.signing import read_policy

    options: dict[str, Any] = {
        "require_signature": True if roles else require_signature,
        "trusted_keys": keys,
        "root_keys": roots or None,
        "required_roles": roles or None,
    }
    return read_policy(options) if any(value is not None for value in options.values()) else None


@command.command("verify")
@click.argument("bundle", metavar="NAME|FOLDER")
@_policy_options
@click.option("--force", is_flag=True, help="Take an older version than the installed bundle of this name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def verify(bundle: str, force: bool, as_json: bool, **policy: Any) -> None:
    """Check signatures, every file, what the graphs ask for, and that the installed bundle is not newer.

    Exit code 81 if the signatures are not what is asked, 80 if something else does not hold. 'edgemed models verify'
    lists every changed file instead of stopping at the first.
    """
    from edgemed.bundle import open_bundle, refuse_downgrade, signers_of

    asked = _policy(**policy)
    opened = open_bundle(bundle, asked)
    if not force:
        refuse_downgrade(opened.manifest)
    signers = signers_of(opened, asked)
    if as_json:
        told: dict[str, Any] = {"schema": "edgemed.bundle/1", "name": opened.manifest.name, "sha256": opened.digest}
        told |= {"version": opened.manifest.versions.get("bundle", "0"), "files": len(opened.manifest.files)}
        print(json.dumps({**told, "trusted_signatures": list(signers)}, ensure_ascii=False))
        return
    by = ", ".join(signers) or "nobody who is trusted here"
    print(f"{opened.manifest.name}: {len(opened.manifest.files)} files hold, sha256 {opened.digest}, signed by {by}")


# --- pack, unpack -----------------------------------------------------------------------------------------------------


@command.command("pack")
@click.argument("bundle", metavar="NAME|FOLDER")
@click.option("-o", "--output", required=True, metavar="FOLDER", help="Where the parts and their index are written.")
@click.option("--part-size", metavar="BYTES", help="Largest size of a part, such as 700M (default: just under 4G).")
@debug_option
def pack(bundle: str, output: str, part_size: str | None) -> None:
    """Write a bundle as numbered parts for a medium, with an index of their hashes; prints the index."""
    from edgemed import archive

    size = archive.DEFAULT_PART_BYTES if part_size is None else _bytes(part_size)
    print(archive.pack(bundle, output, size))


def _bytes(text: str) -> int:
    """Return "700M" as a number of bytes, rounded down to the blocks of an archive."""
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].lower() in ("k", "m", "g") else (text, "")
    if not (number.isascii() and number.isdecimal() and len(number) < 16 and int(number) * _UNITS[unit] >= 512):
        raise EdgemedError(f"--part-size {text!r} is no size; a number of bytes such as 700M was expected")
    return int(number) * _UNITS[unit] // 512 * 512


@command.command("unpack")
@click.argument("index", metavar="INDEX")
@click.option("-o", "--output", required=True, metavar="FOLDER", help="The new folder of the bundle.")
@_policy_options
@click.option("--force", is_flag=True, help="Take an older version than the installed bundle of this name.")
@click.option("-q", "--quiet", is_flag=True, help="Tell no progress.")
@debug_option
def unpack(index: str, output: str, force: bool, quiet: bool, **policy: Any) -> None:
    """Check and unpack the parts that lie beside INDEX (NAME.index.json) into a new folder.

    If a part is missing or broken, it is named; copy it again and repeat the command, which goes on from there.
    """
    from edgemed import archive, audit

    def tell(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr)

    bundle = archive.unpack(index, output, _policy(**policy), tell, force=force)
    audit.record(audit.configured("unpacked", bundle.manifest.name, bundle.digest))
    audit.drain()
    print(f"unpacked {bundle.manifest.name} to {bundle.path}, sha256 {bundle.digest}")


# --- keys -------------------------------------------------------------------------------------------------------------


@command.group("keys")
def keys() -> None:
    """Show, change and install the list of trusted keys."""


@keys.command("show")
@click.argument("file", required=False, metavar="[FILE]")
@click.option("--root-key", "roots", multiple=True, metavar="ID", help="Key that may sign the list of keys.")
@debug_option
def keys_show(file: str | None, roots: tuple[str, ...]) -> None:
    """Show the list of trusted keys after checking its signature (default: the configured one)."""
    from edgemed.keys import read_key_list

    place, root_keys = _list_and_roots(file, roots)
    _print_list(read_key_list(place, root_keys))


@keys.command("edit")
@click.argument("file", metavar="FILE")
@click.option("--key", required=True, metavar="ROOT", help="The private root key that signs the list.")
@click.option("--trust", multiple=True, metavar="ROLE=PUB", help="Trust a public key: vendor=FILE or site=FILE.")
@click.option("--from", "not_before", default="", metavar="DATE", help="First day of the keys of --trust.")
@click.option("--until", "not_after", default="", metavar="DATE", help="Last day of the keys of --trust.")
@click.option("--revoke", multiple=True, metavar="ID=REASON", help="Revoke a key from today on.")
@_passphrase_option
@debug_option
def keys_edit(
    file: str,
    key: str,
    trust: tuple[str, ...],
    not_before: str,
    not_after: str,
    revoke: tuple[str, ...],
    passphrase_file: str | None,
) -> None:
    """Make a list of trusted keys, or the next one from the list in FILE: its sequence number grows by one."""
    from edgemed.files import write_atomically
    from edgemed.keys import (
        KEY_ID,
        KeyList,
        TrustedKey,
        key_id,
        key_list_bytes,
        public_bytes,
        read_key_list,
        read_private_key,
        read_public_key,
    )  # fmt: skip

    root = read_private_key(key, _passphrase(passphrase_file))
    old = read_key_list(file, {key_id(public_bytes(root))}) if Path(file).exists() else KeyList(0, "")
    trusted = []
    for text in trust:
        role, equals, public = text.partition("=")
        if not equals:
            raise EdgemedError(f"--trust {text!r} has another form than ROLE=FILE")
        trusted.append(TrustedKey(read_public_key(public), role, not_before, not_after))
    revoked = dict(text.partition("=")[::2] for text in revoke)
    if wrong := [name for name, reason in revoked.items() if not KEY_ID.fullmatch(name) or not reason]:
        raise EdgemedError(f"--revoke {wrong[0][:70]!r} has another form than ID=REASON, an id being 64 hex digits")
    new = old.changed(trusted, revoked)
    write_atomically(file, key_list_bytes(new, root))
    _print_list(new)


@keys.command("install")
@click.argument("file", metavar="FILE")
@click.option("--root-key", "roots", multiple=True, metavar="ID", help="Key that may sign the list of keys.")
@debug_option
def keys_install(file: str, roots: tuple[str, ...]) -> None:
    """Put a newer list where bundles.trusted_keys says; one that is older or signed by another key is refused."""
    from edgemed import audit
    from edgemed.keys import install_key_list

    place, root_keys = _list_and_roots(None, roots)
    installed = install_key_list(file, place, root_keys)
    audit.record(audit.configured(f"list of trusted keys {installed.sequence} installed", "keys"))
    audit.drain()
    _print_list(installed)


def _list_and_roots(file: str | None, roots: tuple[str, ...]) -> tuple[Path, tuple[str, ...]]:
    """Return the list to look at and the keys that may have signed it. Raises EdgemedError if no list is configured."""
    from edgemed.signing import read_policy

    policy = read_policy({"trusted_keys": file, "root_keys": roots or None})
    if policy.trusted_keys is None:
        raise EdgemedError("bundles.trusted_keys is not set; name it in the configuration, see 'edgemed config show'")
    return policy.trusted_keys, policy.root_keys


def _print_list(listed: KeyList) -> None:
    print(f"list {listed.sequence} of {listed.issued}")
    for name, key in sorted(listed.keys.items()):
        days = f" from {key.not_before}" if key.not_before else ""
        days += f" until {key.not_after}" if key.not_after else ""
        print(f"{name} {key.role}{days}{' (revoked)' if name in listed.revoked else ''}")
    for name, (day, reason) in sorted(listed.revoked.items()):
        print(f"{name} revoked on {day}: {reason}")
