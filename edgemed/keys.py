"""Keys that sign: Ed25519 key files, and the list of keys a site trusts, signed by a root key.

    NAME.key.pem  private, PKCS#8 PEM, readable by its owner alone; a pass phrase may lock it
    NAME.pub.pem  public, PEM
    key list      two lines of canonical JSON: what the list says, and who signed that line (its bytes with the newline)

A key's id is the SHA-256 of its 32 raw public bytes. Rotation and revocation work offline: a new list with a higher
sequence number is carried to the site. `cryptography` is imported only where a key or a signature is touched.
Does not cover which signatures a bundle needs: edgemed.signing does.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgemed.config import read_secret
from edgemed.errors import BackendUnavailable, CannotRead, CannotWrite, EdgemedError, SignatureError
from edgemed.files import write_atomically

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ALGORITHM = "ed25519"
ROLES = ("vendor", "site")
"""Who signs a bundle: its maker, and the hospital that approved it."""

KEY_ID = re.compile(r"[0-9a-f]{64}")
_KIND = "edgemed-keys"
_MAX_LIST_BYTES = 1 << 20


def canonical(value: Any) -> bytes:
    """Return JSON with sorted keys and no spaces, in UTF-8, with one newline at the end.

    >>> canonical({"b": 1, "a": [2]})
    b'{"a":[2],"b":1}\\n'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def from_canonical(data: bytes, what: str) -> dict[str, Any]:
    """Return the object that `canonical` wrote. Raises SignatureError if it is not JSON or not its canonical form."""
    try:
        value = json.loads(data.decode("utf-8"))
        same = canonical(value) == data  # a key that is there twice is lost in `value`, so this refuses it, too
    except (ValueError, RecursionError) as error:
        raise SignatureError(f"{what} is not JSON in UTF-8 ({type(error).__name__}); get it anew") from error
    if not same or not isinstance(value, dict):
        raise SignatureError(f"{what} is not in canonical form; it was changed after it was written: get it anew")
    return value


def key_id(public: bytes) -> str:
    """Return the id of a raw public key of 32 bytes: its SHA-256 in hex."""
    return hashlib.sha256(public).hexdigest()


# --- key files --------------------------------------------------------------------------------------------------------


def write_key_pair(stem: str | Path, passphrase: bytes | None = None) -> str:
    """Return the id of a new key pair, written to STEM.key.pem (owner only) and STEM.pub.pem.

    Raises CannotWrite if one of them is there already or the disk refuses.
    """
    serialization, ed25519 = _cryptography()
    key = ed25519.Ed25519PrivateKey.generate()
    lock = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    encoding = serialization.Encoding.PEM
    secret = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, lock)
    shown = key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
    private = Path(f"{stem}.key.pem")
    _write_new(private, secret, 0o600)
    try:
        _write_new(Path(f"{stem}.pub.pem"), shown, 0o644)
    except CannotWrite:
        private.unlink()
        raise
    return key_id(public_bytes(key))


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            path.unlink()  # a part of a key is none, and would stand in the way
            raise
    except FileExistsError as error:
        raise CannotWrite(f"{path} is there already; keys are never overwritten: choose another name") from error
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror or 'refused'}") from error


def read_private_key(path: str | Path, passphrase: bytes | None = None) -> Ed25519PrivateKey:
    """Return the private key of a PEM file that only its owner may read.

    Raises CannotRead as `read_secret` does, EdgemedError (usage) if a pass phrase is missing or not needed,
    SignatureError if it is no Ed25519 key or the pass phrase is wrong.
    """
    serialization, ed25519 = _cryptography()
    try:
        key = serialization.load_pem_private_key(read_secret(path), passphrase)
    except TypeError as error:  # of cryptography: a pass phrase where none is needed, or none where one is
        told = "is locked and no pass phrase was given" if passphrase is None else "is not locked by a pass phrase"
        raise EdgemedError(f"the key in {path} {told}; see --passphrase-file") from error
    except (ValueError, _unsupported()) as error:
        raise SignatureError(f"{path} holds no private key in PEM, or the pass phrase is wrong") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise SignatureError(f"{path} holds another kind of key; an Ed25519 key was expected (edgemed bundle keygen)")
    return cast("Ed25519PrivateKey", key)


def read_public_key(path: str | Path) -> bytes:
    """Return the 32 raw bytes of a public key in PEM. Raises CannotRead, or SignatureError if it is no Ed25519 key."""
    serialization, ed25519 = _cryptography()
    try:
        with open(path, "rb") as stream:
            key = serialization.load_pem_public_key(stream.read(64 << 10))
    except OSError as error:
        raise CannotRead(f"cannot read {path}: {error.strerror or 'refused'}") from error
    except (ValueError, _unsupported()) as error:
        raise SignatureError(f"{path} holds no public key in PEM") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise SignatureError(f"{path} holds another kind of key; an Ed25519 key was expected (edgemed bundle keygen)")
    return bytes(key.public_bytes_raw())


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """Return the 32 raw bytes of a private key's public half."""
    return key.public_key().public_bytes_raw()


def verifies(public: bytes, signature: bytes, data: bytes) -> bool:
    """Return whether `signature` is that of `data` by this key."""
    from cryptography.exceptions import InvalidSignature

    _, ed25519 = _cryptography()
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise BackendUnavailable("signatures need the 'cryptography' package; pip install cryptography") from error
    return serialization, ed25519


def _unsupported() -> type[Exception]:
    from cryptography.exceptions import UnsupportedAlgorithm

    return UnsupportedAlgorithm


# --- the list of trusted keys -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrustedKey:
    """A key whose signatures count: its raw public bytes, its role, its first and last day (ISO; "" for no limit)."""

    public: bytes
    role: str
    not_before: str = ""
    not_after: str = ""

    def __post_init__(self) -> None:
        if len(self.public) != 32 or self.role not in ROLES:
            raise SignatureError(f"a trusted key has role {self.role[:20]!r}; {' or '.join(ROLES)} was expected")
        for day in (self.not_before, self.not_after):
            if day:
                check_day(day)

    def problem(self, today: str) -> str | None:
        """Return why the key does not count on this day (ISO date), or None."""
        if self.not_before and today < self.not_before:
            return f"is valid from {self.not_before} on, and the clock says {today}"
        if self.not_after and today > self.not_after:
            return f"was valid until {self.not_after}, and the clock says {today}"
        return None


@dataclass(frozen=True)
class KeyList:
    """Trusted and revoked keys by id, these with day and reason. A list with a lower `sequence` never replaces it."""

    sequence: int
    issued: str
    keys: Mapping[str, TrustedKey] = field(default_factory=dict)
    revoked: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def day(self, today: str = "") -> str:
        """Return the day that keys are judged by (ISO date): today's, or that of the list where it is later.

        A clock that is behind the list is wrong, and no key lives on by it.
        """
        return max(today or today_iso(), self.issued)

    def changed(
        self, trust: Iterable[TrustedKey] = (), revoke: Mapping[str, str] | None = None, today: str = ""
    ) -> KeyList:
        """Return the next list: more trusted keys, and keys revoked today for a reason each."""
        today = today or today_iso()
        keys = {**self.keys, **{key_id(key.public): key for key in trust}}
        revoked = {**{key: (today, reason) for key, reason in (revoke or {}).items()}, **self.revoked}
        if again := sorted({key_id(key.public) for key in trust} & set(revoked)):
            raise SignatureError(f"key {again[0][:16]} is revoked and cannot be trusted again; make a new one")
        return replace(self, sequence=self.sequence + 1, issued=today, keys=keys, revoked=revoked)


def today_iso() -> str:
    """Return today's date in UTC, as 2026-11-22."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def check_day(day: Any) -> None:
    """Raise SignatureError unless `day` is a date such as 2026-11-22."""
    try:
        if datetime.date.fromisoformat(day).isoformat() == day:
            return
    except (TypeError, ValueError):
        pass
    raise SignatureError(f"{str(day)[:30]!r} is no date; one such as 2026-11-22 was expected")


def key_list_bytes(listed: KeyList, root: Ed25519PrivateKey) -> bytes:
    """Return the list, signed by a root key."""
    said = canonical(
        {
            "format": 1,
            "kind": _KIND,
            "sequence": listed.sequence,
            "issued": listed.issued,
            "keys": {
                key: {"public": k.public.hex(), "role": k.role, "not_before": k.not_before, "not_after": k.not_after}
                for key, k in listed.keys.items()
            },
            "revoked": {key: {"date": day, "reason": reason} for key, (day, reason) in listed.revoked.items()},
        }
    )
    public = public_bytes(root)
    return said + canonical({"algorithm": ALGORITHM, "public": public.hex(), "signature": root.sign(said).hex()})


def key_list_from_bytes(data: bytes, root_keys: Collection[str]) -> KeyList:
    """Return the list, after checking that one of `root_keys` (ids) signed it.

    Raises SignatureError if none did, or the list is not of the form that `key_list_bytes` writes.
    """
    said, newline, signed = data.partition(b"\n")
    said += newline
    if len(data) > _MAX_LIST_BYTES or not signed:
        raise SignatureError("the list of trusted keys is not a line of keys and a line with its signature")
    values = from_canonical(signed, "the signature of the list of trusted keys")
    try:
        if set(values) != {"algorithm", "public", "signature"} or values["algorithm"] != ALGORITHM:
            raise SignatureError("the signature of the list of trusted keys is of an unknown form")
        public, signature = _bytes(values["public"]), _bytes(values["signature"])
    except (TypeError, ValueError) as error:
        raise SignatureError("the signature of the list of trusted keys is of an unknown form") from error
    root = key_id(public)
    if root not in root_keys:
        raise SignatureError(
            f"the list of trusted keys is signed by {root[:16]}, which is none of bundles.root_keys "
            f"({', '.join(key[:16] for key in root_keys) or 'none is set'})"
        )
    if not verifies(public, signature, said):
        raise SignatureError(f"the list of trusted keys was changed after key {root[:16]} signed it; get it anew")
    return _key_list(from_canonical(said, "the list of trusted keys"))


def _key_list(values: Mapping[str, Any]) -> KeyList:
    """Return the list that a signed line holds; what is not of its form is refused even though a root key signed it."""
    try:
        if set(values) != {"format", "kind", "sequence", "issued", "keys", "revoked"}:
            raise SignatureError(f"the list of trusted keys has the keys {sorted(values)}; another form was expected")
        if values["format"] != 1 or values["kind"] != _KIND or type(values["sequence"]) is not int:
            raise SignatureError("the list of trusted keys is of another format than this version of edgemed reads")
        keys = {
            key: TrustedKey(**{**entry, "public": _bytes(entry["public"])}) for key, entry in values["keys"].items()
        }
        revoked = {key: (str(entry["date"]), str(entry["reason"])) for key, entry in values["revoked"].items()}
        if any(key_id(trusted.public) != key for key, trusted in keys.items()):
            raise SignatureError("the list of trusted keys names a key by an id that is not its own")
        check_day(values["issued"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SignatureError(f"the list of trusted keys is of an unknown form ({type(error).__name__})") from error
    return KeyList(values["sequence"], str(values["issued"]), keys, revoked)


def _bytes(text: str) -> bytes:
    """Return the bytes of hexadecimal digits in the one form that `hex` writes. Raises ValueError or TypeError."""
    data = bytes.fromhex(text)
    if data.hex() != text:
        raise ValueError("not in the form that hex writes")
    return data


def read_key_list(path: str | Path, root_keys: Collection[str]) -> KeyList:
    """Return the list in a file, after checking its signature. Raises SignatureError if there is none that holds."""
    return key_list_from_bytes(_list_bytes(path), root_keys)


def _list_bytes(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read(_MAX_LIST_BYTES + 1)
    except OSError as error:
        raise SignatureError(f"cannot read the list of trusted keys {path}: {error.strerror or 'refused'}") from error


def install_key_list(source: str | Path, target: str | Path, root_keys: Collection[str]) -> KeyList:
    """Return the list, copied over the one in `target`.

    Raises SignatureError if its signature does not hold, or its sequence number is not higher than the installed one's:
    an older list would bring revoked keys back.
    """
    data = _list_bytes(source)
    new = key_list_from_bytes(data, root_keys)
    if Path(target).exists():
        old = read_key_list(target, root_keys)
        if new.sequence <= old.sequence:
            raise SignatureError(
                f"the list of trusted keys has sequence number {new.sequence}, the installed one {old.sequence}; "
                "a later one was expected"
            )
    write_atomically(target, data)
    return new
