"""Bundles: a folder with a manifest, four graphs and what a family needs beside them; opened only if every byte fits.

    bundle.json   the manifest: canonical JSON, so that its bytes can be hashed and signed
    bundle.sig    may be there
    graphs/       ROLE.onnx (and ROLE.onnx.data)
    ...           tokenizer/, reports/, NOTICE: every file is named in the manifest with its SHA-256

Covers reading, checking, finding, installing and writing bundles. Does not cover the signature, what a family finds in
its files, or running a graph. No file's content is used before all of them have been hashed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from edgemed.errors import BundleError, CannotRead, CannotWrite, EdgemedError
from edgemed.files import sha256_of
from edgemed.graphs import ROLES, GraphSpec, from_json, to_json

FORMAT = 1
"""The bundle format this version reads and writes."""

MANIFEST, SIGNATURE = "bundle.json", "bundle.sig"

_MAX_MANIFEST_BYTES = 8 << 20
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_EMBEDDED = Path(__file__).with_name("bundles")


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    graphs: role -> GraphSpec; files: POSIX path inside the bundle -> SHA-256 in hex; precision: role -> name ("fp32",
    "int8" ...); settings: what the family needs to know, plain JSON values; licences: part -> licence.
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
        if not _NAME.fullmatch(self.name):
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
        if len({name.casefold() for name in self.files}) != len(self.files):
            raise BundleError("the manifest has file names that differ in upper and lower case only")


def bundle_name(folder: Path) -> str:
    """Return a name for a bundle, made from a folder's.

    >>> bundle_name(Path("MedPLIB 7b-2e"))
    'medplib-7b-2e'
    """
    return re.sub(r"[^a-z0-9._-]+", "-", folder.name.lower()).strip("-._")[:64] or "checkpoint"


def is_checkpoint(folder: str | Path) -> bool:
    """Return whether a folder holds the checkpoint of a model (it has a config.json) and no bundle."""
    return (Path(folder) / "config.json").is_file() and not (Path(folder) / MANIFEST).is_file()


def graph_file(role: str) -> str:
    """Return the file name, inside a bundle, of the graph with this role."""
    return f"graphs/{role}.onnx"


def check_file_name(name: str) -> None:
    """Raise BundleError unless `name` is a plain relative POSIX path that stays inside the bundle."""
    parts = name.split("/")
    bad = any(p in ("", ".", "..") or p != p.strip() or p.endswith(".") for p in parts)
    if bad or name in (MANIFEST, SIGNATURE) or any(c in '\\:*?"<>|' or ord(c) < 32 for c in name):
        raise BundleError(f"the manifest names the file {name!r}; a plain path inside the bundle was expected")


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


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, its manifest, and the SHA-256 of bundle.json, which stands for all its bytes."""

    path: Path
    manifest: Manifest
    digest: str

    def has(self, role: str) -> bool:
        """Return whether the bundle has a graph with this role."""
        return role in self.manifest.graphs

    def spec(self, role: str) -> GraphSpec:
        """Return the GraphSpec of a role. Raises BundleError if the bundle has no such graph."""
        if role not in self.manifest.graphs:
            raise BundleError(f"bundle {self.manifest.name} has no {role}; it has {', '.join(self.manifest.graphs)}")
        return self.manifest.graphs[role]

    def graph_path(self, role: str) -> Path:
        """Return the path of a role's ONNX file. Raises BundleError if the bundle has no such graph."""
        self.spec(role)
        return self.file(graph_file(role))

    def file(self, name: str) -> Path:
        """Return the path of a file by its name in the manifest. Raises BundleError if it is not there."""
        if name not in self.manifest.files:
            raise BundleError(f"bundle {self.manifest.name} has no file {name}")
        return self.path.joinpath(*PurePosixPath(name).parts)


def read_manifest(folder: str | Path) -> Manifest:
    """Return the manifest in `folder` without looking at the other files: what `models list` shows.

    Raises BundleError if it is missing or damaged.
    """
    return from_bytes(_manifest_bytes(Path(folder)))


def open_bundle(name_or_folder: str | Path) -> Bundle:
    """Return the bundle in a folder, or the installed one of this name, after checking every file against the manifest.

    Raises BundleError if there is no such bundle, a file is missing, changed, unknown or a link, or the
    format is another.
    """
    folder = find_bundle(name_or_folder)
    data = _manifest_bytes(folder)
    manifest = from_bytes(data)
    sizes = dict(_files(folder))
    if unknown := sorted(set(sizes) - set(manifest.files) - {MANIFEST, SIGNATURE}):
        raise BundleError(
            f"{unknown[0]} is not in the manifest of bundle {manifest.name}; remove it, or get the bundle anew"
        )
    if missing := sorted(set(manifest.files) - set(sizes)):
        raise BundleError(f"{missing[0]} of bundle {manifest.name} is missing; get the bundle anew")
    bundle = Bundle(folder, manifest, hashlib.sha256(data).hexdigest())
    # Largest first over a few threads: hashing releases the interpreter (60 MB: 45 ms on two cores).
    names = sorted(manifest.files, key=lambda name: -sizes[name])
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        found = dict(zip(names, pool.map(lambda name: _digest(bundle.file(name)), names), strict=True))
    for name, expected in manifest.files.items():
        if found[name] != expected:
            raise BundleError(
                f"{name} has sha256 {found[name][:8]}..., the manifest says {expected[:8]}...; "
                "the file was changed after the bundle was made: get the bundle anew"
            )
    return bundle


def _digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except CannotRead as error:
        raise BundleError(str(error)) from error


def _manifest_bytes(folder: Path) -> bytes:
    path = folder / MANIFEST
    try:
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > _MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is not a plain file of at most {_MAX_MANIFEST_BYTES >> 20} MiB")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BundleError(f"{folder} has no {MANIFEST}; a bundle folder was expected") from error
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or 'refused'}") from error


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield (POSIX path, size) of every file under `folder`. Raises BundleError at a link or a special file."""

    def refuse(error: OSError) -> None:
        raise BundleError(f"cannot read {error.filename}: {error.strerror or 'refused'}") from error

    for root, folders, files in os.walk(folder, followlinks=False, onerror=refuse):
        for name in (*folders, *files):
            path = Path(root) / name
            info = path.lstat()
            inside = path.relative_to(folder).as_posix()
            if stat.S_ISREG(info.st_mode):
                yield inside, info.st_size
            elif not stat.S_ISDIR(info.st_mode):
                raise BundleError(f"{inside} is a link or a special file; a bundle holds plain files only")


def user_folder() -> Path:
    """Return the folder of installed bundles: $EDGEMED_HOME/bundles, else the platform's place for user data."""
    if home := os.environ.get("EDGEMED_HOME"):
        return Path(home) / "bundles"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "edgemed" / "bundles"


def find_bundle(name_or_folder: str | Path) -> Path:
    """Return the folder of a bundle: the folder that was given, else the embedded or installed one of this name.

    Raises BundleError if there is none.
    """
    given = Path(name_or_folder)
    if (given / MANIFEST).is_file():
        return given
    name = str(name_or_folder)
    if _NAME.fullmatch(name):
        for place in (_EMBEDDED, user_folder()):
            if (place / name / MANIFEST).is_file():
                return place / name
    if is_checkpoint(given):
        raise BundleError(
            f"{given} is a checkpoint, not a bundle: export it first with `edgemed export FOLDER -o BUNDLE`, or use "
            "--backend torch"
        )
    if given.is_dir():
        raise BundleError(f"{given} has no {MANIFEST}; a bundle folder was expected")
    known = ", ".join(b.name for b in list_bundles()) or "none"
    raise BundleError(f"there is no bundle {name!r}; installed: {known}; or pass the bundle's folder")


@dataclass(frozen=True)
class Listed:
    """One line of the list of bundles: its name and folder, and its manifest or what is wrong with it."""

    name: str
    path: Path
    embedded: bool
    manifest: Manifest | None
    problem: str | None = None


def list_bundles() -> tuple[Listed, ...]:
    """Return the embedded and installed bundles, by name; only their manifests are read. The first of a name counts."""
    found: dict[str, Listed] = {}
    for place, embedded in ((_EMBEDDED, True), (user_folder(), False)):
        for folder in sorted(place.iterdir()) if place.is_dir() else ():
            if folder.name in found or not (folder / MANIFEST).is_file():
                continue
            try:
                found[folder.name] = Listed(folder.name, folder, embedded, read_manifest(folder))
            except BundleError as error:
                found[folder.name] = Listed(folder.name, folder, embedded, None, str(error))
    return tuple(found[name] for name in sorted(found))


def install_bundle(source: str | Path, name: str | None = None, *, replace: bool = False) -> Bundle:
    """Return the bundle copied into the user folder under `name` (default: its own), after checking every file.

    Raises BundleError if the source does not hold, CannotWrite if the name is taken (then `replace` is needed) or the
    disk refuses.
    """
    bundle = open_bundle(source)
    name = name or bundle.manifest.name
    if not _NAME.fullmatch(name):
        raise BundleError(f"the bundle's name is {name!r}; lower-case letters, digits, '.', '_', '-' were expected")
    if (_EMBEDDED / name).exists():
        raise BundleError(f"{name} is the name of an embedded bundle; pass another name")
    files = [*bundle.manifest.files, MANIFEST]
    if (bundle.path / SIGNATURE).is_file():
        files.append(SIGNATURE)
    with _new_folder(user_folder() / name, replace) as folder:
        for file in files:
            _put(folder / file, bundle.path / file)
    return open_bundle(user_folder() / name)


def remove_bundle(name: str) -> None:
    """Remove an installed bundle. Raises BundleError if there is none of this name or it is embedded."""
    folder = user_folder() / name
    if not _NAME.fullmatch(name) or not (folder / MANIFEST).is_file():
        embedded = _NAME.fullmatch(name) and (_EMBEDDED / name).is_dir()
        raise BundleError(f"{name} is embedded and cannot be removed" if embedded else f"there is no bundle {name!r}")
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise CannotWrite(f"cannot remove {folder}: {error.strerror or 'refused'}") from error


def write_bundle(
    folder: str | Path,
    *,
    name: str,
    family: str,
    graphs: Mapping[str, GraphSpec],
    files: Mapping[str, bytes | Path],
    precision: Mapping[str, str],
    calibration_digest: str | None = None,
    versions: Mapping[str, str] | None = None,
    licences: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    replace: bool = False,
    move: bool = False,
) -> Bundle:
    """Return the bundle written to `folder`: all of it or nothing.

    files: name inside the bundle -> its bytes, or the file to copy; every graph ROLE needs graphs/ROLE.onnx.
    move: files are not copied but moved, which a bundle larger than the rest of the disk needs.
    replace: an older bundle in `folder` is replaced; without it, a folder that holds anything is an error.

    Raises BundleError if the parts do not make a bundle, CannotWrite if the disk refuses.
    """
    for file in files:
        check_file_name(file)
    with _new_folder(Path(folder), replace) as new:
        for file, content in files.items():
            _put(new / file, content, move=move)
        manifest = Manifest(
            name=name,
            family=family,
            graphs=graphs,
            files={file: sha256_of(new / file) for file in files},
            precision=precision,
            calibration_digest=calibration_digest,
            versions=versions or {},
            licences=licences or {},
            settings=settings or {},
        )
        _put(new / MANIFEST, to_bytes(manifest))
    return open_bundle(folder)


def _put(target: Path, content: bytes | Path, *, move: bool = False) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        target.write_bytes(content)
    elif move:
        shutil.move(content, target)
    else:
        shutil.copyfile(content, target)


@contextlib.contextmanager
def _new_folder(target: Path, replace: bool) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its name at the end; on an error nothing is left of it."""
    target = Path(os.path.abspath(target))
    taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if taken and not (replace and (target / MANIFEST).is_file()):
        hint = "it holds something that is not a bundle" if replace else "it exists already"
        raise CannotWrite(f"cannot write a bundle to {target}: {hint}; choose another folder")
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(new, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
    except OSError as error:
        raise CannotWrite(f"cannot write the bundle {target}: {error.strerror or 'refused'}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
