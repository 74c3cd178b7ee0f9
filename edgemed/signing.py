"""Signatures of a bundle: who has to have signed the bytes of bundle.json, and whether they did.

bundle.sig is canonical JSON with one entry per signature: key id, role, algorithm, and the Ed25519 signature of the
bytes of bundle.json as they are, so that any tool for Ed25519 can check it. The manifest has the hash of every file, so
a signature stands for all of them. Covers the policy and the check. Does not cover keys (edgemed.keys) or files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.config import read_settings
from edgemed.errors import SignatureError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_MAX_SIGNATURES = 16
_HEX_128 = re.compile(r"[0-9a-f]{128}")


@dataclass(frozen=True)
class Policy:
    """What is asked of a bundle's signatures.

    required_roles: a signature by another key for each of them; empty: any one trusted key. trusted_keys: the signed
    list. root_keys: ids of the keys that may sign it. Where no signature is required, an unsigned bundle is taken, and
    one that is signed is checked if there are trusted keys.
    """

    require_signature: bool = False
    trusted_keys: Path | None = None
    root_keys: tuple[str, ...] = ()
    required_roles: tuple[str, ...] = ()


NO_POLICY = Policy()
"""Nothing is asked, no signature is looked at: for a bundle that was just made here."""


def read_policy(options: Mapping[str, Any] | None = None) -> Policy:
    """Return the policy that options, environment and configuration file set. Raises what `read_settings` raises."""
    found = read_settings({f"bundles.{name}": value for name, value in (options or {}).items()})
    return Policy(**{field.name: found[f"bundles.{field.name}"].value for field in fields(Policy)})


def refuse_unsigned(what: str) -> None:
    """Raise SignatureError where a signature is required and `what`, such as a checkpoint, can have none."""
    if read_policy().require_signature:
        raise SignatureError(
            f"{what} has no signature, and one is required here; export it, sign the bundle and use that"
        )


@dataclass(frozen=True, order=True)
class Signature:
    """One signature: the id and the role of the key, 64 hexadecimal digits and "vendor" or "site", and its 64 bytes."""

    key: str
    role: str
    value: bytes


def sign(manifest: bytes, key: Ed25519PrivateKey, role: str) -> Signature:
    """Return the signature of a manifest's bytes."""
    from edgemed.keys import key_id, public_bytes

    return Signature(key_id(public_bytes(key)), role, key.sign(manifest))


def to_bytes(signatures: Iterable[Signature]) -> bytes:
    """Return the content of bundle.sig."""
    from edgemed.keys import ALGORITHM, canonical

    rows = [
        {"algorithm": ALGORITHM, "key": s.key, "role": s.role, "signature": s.value.hex()} for s in sorted(signatures)
    ]
    return canonical({"format": 1, "signatures": rows})


def from_bytes(data: bytes) -> tuple[Signature, ...]:
    """Return the signatures in bundle.sig. Raises SignatureError unless it is exactly what `to_bytes` writes."""
    from edgemed.keys import ALGORITHM, KEY_ID, ROLES, from_canonical

    values = from_canonical(data, "bundle.sig")
    rows = values.get("signatures")
    if set(values) != {"format", "signatures"} or values["format"] != 1 or not isinstance(rows, list):
        raise SignatureError("bundle.sig is of a form that this version of edgemed does not read")
    if not 0 < len(rows) <= _MAX_SIGNATURES:
        raise SignatureError(f"bundle.sig has {len(rows)} signatures; 1 to {_MAX_SIGNATURES} were expected")
    found = []
    for row in rows:
        if not isinstance(row, dict) or set(row) != {"algorithm", "key", "role", "signature"}:
            raise SignatureError("bundle.sig has a signature of an unknown form")
        if not all(isinstance(value, str) for value in row.values()) or row["algorithm"] != ALGORITHM:
            raise SignatureError("bundle.sig has a signature of an unknown algorithm; ed25519 was expected")
        if row["role"] not in ROLES or not KEY_ID.fullmatch(row["key"]) or not _HEX_128.fullmatch(row["signature"]):
            raise SignatureError("bundle.sig has a signature with a damaged role, key id or value")
        found.append(Signature(row["key"], row["role"], bytes.fromhex(row["signature"])))
    if len({s.key for s in found}) != len(found) or to_bytes(found) != data:
        raise SignatureError("bundle.sig is not in canonical form, or has two signatures of one key")
    return tuple(found)


def check_signatures(manifest: bytes, signatures: bytes | None, policy: Policy, today: str = "") -> tuple[str, ...]:
    """Return the ids of the keys whose signatures of a manifest's bytes count, after applying the policy.

    signatures: the content of bundle.sig, or None where there is none. today: ISO date (default: the clock's, in UTC);
    the day on which the list of keys was issued counts where it is later.

    Raises SignatureError if the policy is not met; if a trusted key's signature does not fit the bytes; or if revoked
    keys alone have signed, even where no signature is required.
    """
    if signatures is None or policy.trusted_keys is None:
        if policy.require_signature:
            missing = "the bundle has no bundle.sig" if signatures is None else "bundles.trusted_keys is not set"
            raise SignatureError(f"a signature is required here, and {missing}; see 'edgemed config show --origin'")
        return ()
    from edgemed.keys import read_key_list, verifies

    found = from_bytes(signatures)
    listed = read_key_list(policy.trusted_keys, policy.root_keys)
    day = listed.day(today)
    good: dict[str, str] = {}
    problems, revoked = [], False
    for signature in found:
        short = f"key {signature.key[:16]}"
        trusted = listed.keys.get(signature.key)
        if trusted is not None and (
            trusted.role != signature.role or not verifies(trusted.public, signature.value, manifest)
        ):
            raise SignatureError(f"the {signature.role} signature by {short} does not fit bundle.json; get both anew")
        if signature.key in listed.revoked:
            since, reason = listed.revoked[signature.key]
            problems.append(f"{short} was revoked on {since} ({reason})")
            revoked = True
        elif trusted is None:
            problems.append(f"{short} is not in the list of trusted keys")
        elif problem := trusted.problem(day):
            problems.append(f"{short} {problem}")
        else:
            good[signature.key] = trusted.role
    lacking = Counter(policy.required_roles) - Counter(good.values())
    if policy.require_signature and (lacking or not good):
        wanted = ", ".join(f"{n} {role}" for role, n in lacking.items()) or "1"
        raise SignatureError(
            f"{wanted} signature(s) of the bundle are missing: {'; '.join(problems) or 'the others hold'}"
        )
    if revoked and not good:
        raise SignatureError(f"the bundle is signed, and by no key that counts: {'; '.join(problems)}")
    return tuple(sorted(good))
