"""The manifest of a bundle: what bundle.json says, as a value, and its canonical bytes.

Covers reading, writing and checking the text alone. Does not look at any file: edgemed.bundle does.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgemed.errors import BundleError, EdgemedError
from edgemed.graphs import ROLES, GraphSpec, from_json, to_json

FORMAT = 1
"""The bundle format this version reads and writes."""

MANIFEST, SIGNATURE = "bundle.json", "bundle.sig"
MAX_MANIFEST_BYTES, MAX_SIGNATURE_BYTES = 8 << 20, 64 << 10

BUNDLE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"\d{1,9}(\.\d{1,9}){0,3}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REFUSED = (
    ".pkl", ".pickle", ".pt", ".pth", ".joblib", ".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe", ".engine",
)  # fmt: skip
"""Ends of file names that no bundle has: what runs when it is loaded."""


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    graphs: role -> GraphSpec; files: POSIX path inside the bundle -> SHA-256 in hex; precision: role -> name ("fp32",
    "int8" ...); settings: what the family needs to know, plain JSON values; licences: part -> licence; versions: what
    made it -> version, and under "bundle" the bundle's own version such as "1.4.2" ("0" where it has none).
    """

    name: str
    family: str
    graphs: Mapping[str, GraphSpec]
    files: Mapping[str, str]
    precision: Mapping[str, str]
    calibration_digest: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    licences: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise BundleError(f"the bundle has format {self.format!r}, this version of edgemed reads format {FORMAT}")
        if not BUNDLE_NAME.fullmatch(self.name):
            raise BundleError(
                f"the bundle's name is {self.name!r}; lower-case letters, digits, '.', '_', '-' were expected"
            )
        for role, spec in self.graphs.items():
            if role != spec.role or role not in ROLES:
                raise BundleError(
                    f"the manifest has graph {role!r} with role {spec.role!r}; one of {', '.join(ROLES)} expected"
                )
        if set(self.precision) != set(self.graphs):
            raise BundleError(
                f"the manifest has precisions of {sorted(self.precision)}, graphs are {sorted(self.graphs)}"
            )
        for name, digest in self.files.items():
            check_file_name(name)
            if not _SHA256.fullmatch(digest):
                raise BundleError(
                    f"the manifest's sha256 of {name} is {digest[:70]!r}, 64 hexadecimal digits were expected"
                )
        if len({unicodedata.normalize("NFC", name).casefold() for name in self.files}) != len(self.files):
            raise BundleError("the manifest has file names that differ in upper and lower case only")
        if not _VERSION.fullmatch(self.versions.get("bundle", "0")):
            raise BundleError(
                f"the bundle's version is {self.versions['bundle'][:40]!r}; one such as 1.4.2 was expected"
            )

    @property
    def version(self) -> tuple[int, ...]:
        """The bundle's own version as numbers that compare; (0,) where the manifest has none.

        >>> Manifest("a", "native", {}, {}, {}, versions={"bundle": "1.10.0"}).version
        (1, 10)
        """
        numbers = [int(part) for part in self.versions.get("bundle", "0").split(".")]
        while len(numbers) > 1 and numbers[-1] == 0:
            numbers.pop()
        return tuple(numbers)


def graph_file(role: str) -> str:
    """Return the file name, inside a bundle, of the graph with this role."""
    return f"graphs/{role}.onnx"


def check_file_name(name: str) -> None:
    """Raise BundleError unless `name` is a plain relative POSIX path that stays inside the bundle."""
    parts = name.split("/")
    bad = any(p in ("", ".", "..") or p != p.strip() or p.endswith(".") for p in parts)
    if bad or name in (MANIFEST, SIGNATURE) or any(c in '\\:*?"<>|' or ord(c) < 32 for c in name):
        raise BundleError(f"the manifest names the file {name!r}; a plain path inside the bundle was expected")
    if name.lower().endswith(_REFUSED):
        raise BundleError(f"the manifest names the file {name!r}; a bundle holds nothing that runs when it is loaded")


def to_bytes(manifest: Manifest) -> bytes:
    """Return the manifest as canonical JSON: keys sorted, no spaces, UTF-8, one newline at the end.

    Raises BundleError if a graph has no file.
    """
    _check_graph_files(manifest.graphs, manifest.files)
    data = {
        "format": manifest.format,
        "name": manifest.name,
        "family": manifest.family,
        "graphs": {role: to_json(spec) for role, spec in manifest.graphs.items()},
        "files": dict(manifest.files),
        "precision": dict(manifest.precision),
        "calibration_digest": manifest.calibration_digest,
        "versions": dict(manifest.versions),
        "licences": dict(manifest.licences),
        "settings": dict(manifest.settings),
    }
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def from_bytes(data: bytes) -> Manifest:
    """Return the manifest that `to_bytes` wrote.

    Raises BundleError naming the key that is missing, unknown or of the wrong kind.
    """
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
        json.dumps(values, ensure_ascii=False, allow_nan=False).encode("utf-8")  # no half characters, no NaN
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST} is not JSON in UTF-8 ({type(error).__name__}); the bundle is damaged") from error
    if not isinstance(values, dict):
        raise BundleError(f"{MANIFEST} holds a {type(values).__name__}, an object was expected")
    if values.get("format") != FORMAT or isinstance(values["format"], bool):
        raise BundleError(
            f"the bundle has format {values.get('format')!r}, this version of edgemed reads format {FORMAT}"
        )
    if set(values) != set(_KINDS):
        missing, unknown = sorted(set(_KINDS) - set(values)), sorted(set(values) - set(_KINDS))
        raise BundleError(f"{MANIFEST}: keys missing: {missing}; keys unknown: {unknown}")
    for key, kind in _KINDS.items():
        if not isinstance(values[key], kind):
            raise BundleError(f"{MANIFEST}: {key} is a {type(values[key]).__name__}")
    for key in ("files", "precision", "versions", "licences"):
        for name, value in values[key].items():
            if not isinstance(value, str):
                raise BundleError(f"{MANIFEST}: {key}, {name!r} is a {type(value).__name__}, a text was expected")
    _check_graph_files(values["graphs"], values["files"])
    return Manifest(**{**values, "graphs": {role: _graph(role, spec) for role, spec in values["graphs"].items()}})


def _check_graph_files(graphs: Iterable[str], files: Container[str]) -> None:
    """Raise BundleError if a graph has no file; only what was opened from a checkpoint has none, and is not written."""
    for role in graphs:
        if graph_file(role) not in files:
            raise BundleError(f"the manifest has a graph {role} and no file {graph_file(role)}")


_KINDS: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "name": str,
    "family": str,
    "graphs": dict,
    "files": dict,
    "precision": dict,
    "calibration_digest": (str, type(None)),
    "versions": dict,
    "licences": dict,
    "settings": dict,
}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _graph(role: str, data: Any) -> GraphSpec:
    try:
        return from_json(data)
    except (EdgemedError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{MANIFEST}: graph {role!r} is not a graph specification ({error})") from error
