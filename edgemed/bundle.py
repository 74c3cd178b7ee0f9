"""Bundles: a folder with a manifest, four graphs and what a family needs beside them; opened only if every byte fits.

    bundle.json   the manifest: canonical JSON, so that its bytes can be hashed and signed
    bundle.sig    may be there
    graphs/       ROLE.onnx (and ROLE.onnx.data)
    ...           tokenizer/, reports/, NOTICE: every file is named in the manifest with its SHA-256

Covers checking, finding, installing, signing and writing bundles. Does not cover the manifest's text
(edgemed.manifest), what a signature has to be (edgemed.signing), what a family finds in its files, or running a graph.
Checked in this order: the signatures of bundle.json, its text, the names of the files, every hash, and then what the
graphs ask for. No file's content is used before all of them have been hashed. Not covered: someone who may write to the
folder and changes a file after the check.

Where a name is looked up: the embedded bundles, the machine's (bundles.shared, written by who looks after it), a folder
of this name here, the user's own. The machine's go before, whatever the policy: a signature says who made a bundle, not
that it is the one which the site chose, so an older one with good signatures in a user's folder must not answer under
the name of the newer one. To try another bundle, a user gives it another name.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from edgemed import signing
from edgemed.bundle_folder import new_folder
from edgemed.bundle_places import (
    EMBEDDED,
    folder_of,
    is_shared,
    made_shared,
    refuse_writable,
    same_folder,
    shared_folder,
    shared_target,
    user_folder,
)
from edgemed.errors import BundleError, CannotRead, CannotWrite, SignatureError
from edgemed.files import sha256_of, write_atomically
from edgemed.graph_check import external_files
from edgemed.graphs import GraphSpec
from edgemed.manifest import (
    BUNDLE_NAME,
    FORMAT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_SIGNATURE_BYTES,
    SIGNATURE,
    Manifest,
    check_file_name,
    from_bytes,
    graph_file,
    to_bytes,
)
from edgemed.signing import NO_POLICY, Policy, read_policy

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = [
    "FORMAT",
    "MANIFEST",
    "SIGNATURE",
    "Bundle",
    "Listed",
    "Manifest",
    "bundle_name",
    "check_file_name",
    "find_bundle",
    "from_bytes",
    "graph_file",
    "install_bundle",
    "is_checkpoint",
    "list_bundles",
    "open_bundle",
    "read_manifest",
    "refuse_downgrade",
    "remove_bundle",
    "shared_folder",
    "shared_target",
    "sign_bundle",
    "signers_of",
    "to_bytes",
    "user_folder",
    "write_bundle",
]


def bundle_name(folder: Path) -> str:
    """Return a name for a bundle, made from a folder's.

    >>> bundle_name(Path("MedPLIB 7b-2e"))
    'medplib-7b-2e'
    """
    return re.sub(r"[^a-z0-9._-]+", "-", folder.name.lower()).strip("-._")[:64] or "checkpoint"


def is_checkpoint(folder: str | Path) -> bool:
    """Return whether a folder holds the checkpoint of a model (it has a config.json) and no bundle."""
    return (Path(folder) / "config.json").is_file() and not (Path(folder) / MANIFEST).is_file()


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


def open_bundle(name_or_folder: str | Path, policy: Policy | None = None) -> Bundle:
    """Return the bundle in a folder, or the installed one of this name, after checking every file against the manifest.

    policy: what is asked of its signatures (default: what is configured; an embedded bundle needs none, since it came
    with the program).

    Raises SignatureError if the policy is not met; BundleError if there is no such bundle, a file is missing, changed,
    unknown or a link, a graph needs an operator or a file from elsewhere, or the format is another; CannotRead if it is
    of the machine and others than its owner may change it.
    """
    folder = find_bundle(name_or_folder)
    data = _manifest_bytes(folder)
    _check_signatures(folder, data, policy)
    manifest = from_bytes(data)
    of_machine = is_shared(folder)
    if of_machine:
        shared_folder()
        refuse_writable(folder, folder.stat())
    sizes = dict(_files(folder, of_machine))
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
    _check_graphs(bundle)
    return bundle


def _check_signatures(folder: Path, manifest: bytes, policy: Policy | None) -> tuple[str, ...]:
    if policy is None:
        policy = read_policy()
        if policy.require_signature and same_folder(Path(os.path.realpath(folder)).parent, EMBEDDED):
            policy = NO_POLICY
    if policy == NO_POLICY:
        return ()
    there = os.path.lexists(folder / SIGNATURE)
    signatures = _small_file(folder / SIGNATURE, MAX_SIGNATURE_BYTES, SignatureError) if there else None
    return signing.check_signatures(manifest, signatures, policy)


def _check_graphs(bundle: Bundle) -> None:
    """Raise BundleError if an ONNX file needs an operator or weights that did not come in the bundle.

    At each opening, since it costs little: 10 ms for the four graphs of nano (65 MB) on one core of a server.
    """
    for name in bundle.manifest.files:
        if name.endswith(".onnx"):
            folder = PurePosixPath(name).parent
            for file in external_files(bundle.file(name)):
                if str(folder / file) not in bundle.manifest.files:
                    raise BundleError(f"{name} takes weights from {file[:80]!r}, which is no file of the bundle")


def _digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except CannotRead as error:
        raise BundleError(str(error)) from error


def _manifest_bytes(folder: Path) -> bytes:
    if not os.path.lexists(folder / MANIFEST):
        raise BundleError(f"{folder} has no {MANIFEST}; a bundle folder was expected")
    return _small_file(folder / MANIFEST, MAX_MANIFEST_BYTES)


def _small_file(path: Path, limit: int, refusal: type[BundleError] = BundleError) -> bytes:
    try:
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > limit:
            raise refusal(f"{path} is not a plain file of at most {limit >> 10} KiB")
        return path.read_bytes()
    except OSError as error:
        raise refusal(f"cannot read {path}: {error.strerror or 'refused'}") from error


def _files(folder: Path, closed: bool) -> Iterator[tuple[str, int]]:
    """Yield (POSIX path, size) of every file under `folder`.

    Raises BundleError at a link or a special file; CannotRead, where it is to be `closed`, at what others may change.
    """

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
            if closed:
                refuse_writable(path, info)


def find_bundle(name_or_folder: str | Path) -> Path:
    """Return the folder of a bundle, looked up in the order that the module tells; `./NAME` is a folder for certain.

    Raises BundleError if there is none, CannotRead as `shared_folder` does.
    """
    given, name = Path(name_or_folder), str(name_or_folder)
    named = BUNDLE_NAME.fullmatch(name) is not None
    if named and (folder := folder_of(name, EMBEDDED) or folder_of(name, shared_folder())):
        return folder
    if (given / MANIFEST).is_file():
        return given
    if named and (folder := folder_of(name, user_folder())):
        return folder
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
    """One line of the list of bundles: its name and folder, and its manifest or what is wrong with it.

    place: "embedded", "shared" (of the machine) or "user". hides: the other bundle of this name, which is not used.
    """

    name: str
    path: Path
    place: str
    manifest: Manifest | None
    problem: str | None = None
    hides: Path | None = None

    @property
    def embedded(self) -> bool:
        """Whether it came with the program."""
        return self.place == "embedded"


def list_bundles() -> tuple[Listed, ...]:
    """Return the embedded, the machine's and the user's bundles, by name; only their manifests are read.

    The first of a name counts. Raises CannotRead as `shared_folder` does.
    """
    found: dict[str, Listed] = {}
    for place, parent in (("embedded", EMBEDDED), ("shared", shared_folder()), ("user", user_folder())):
        for folder in sorted(parent.iterdir()) if parent is not None and parent.is_dir() else ():
            if not os.path.isfile(folder / MANIFEST):
                continue
            if folder.name in found:
                found[folder.name] = replace(found[folder.name], hides=folder)
                continue
            try:
                found[folder.name] = Listed(folder.name, folder, place, read_manifest(folder))
            except BundleError as error:
                found[folder.name] = Listed(folder.name, folder, place, None, str(error))
    return tuple(found[name] for name in sorted(found))


def install_bundle(
    source: str | Path, name: str | None = None, *, replace: bool = False, force: bool = False, shared: bool = False
) -> Bundle:
    """Return the bundle copied into the user folder under `name` (default: its own), after checking every file.

    force: an older version than the installed one is taken. shared: it goes to the machine's bundles, for all to read
    (0755, 0644) and for the owner of that folder to change.

    Raises SignatureError or BundleError if the source does not hold, is older, or has a name that is not free for it;
    CannotWrite if it is installed (then `replace` is needed) or the disk refuses; CannotRead as `shared_folder` does.
    """
    bundle = open_bundle(source)
    name = name or bundle.manifest.name
    if not BUNDLE_NAME.fullmatch(name):
        raise BundleError(f"the bundle's name is {name!r}; lower-case letters, digits, '.', '_', '-' were expected")
    if (EMBEDDED / name).exists():
        raise BundleError(f"{name} is the name of an embedded bundle; pass another name")
    if not shared and folder_of(name, shared_folder()):
        raise BundleError(f"{name} is the name of a bundle of the machine, which goes before; pass another name")
    if (replace or shared) and not force:
        refuse_downgrade(bundle.manifest, name)
    files = [*bundle.manifest.files, MANIFEST]
    if (bundle.path / SIGNATURE).is_file():
        files.append(SIGNATURE)
    target = (made_shared() if shared else user_folder()) / name
    with new_folder(target, replace) as folder:
        for file in files:
            _put(folder / file, bundle.path / file)
        if shared:
            _open_to_readers(folder)
        copied = open_bundle(folder)  # what was copied, not what was there when the source was checked
    return Bundle(target, copied.manifest, copied.digest)


def _open_to_readers(folder: Path) -> None:
    """Let all read a folder and what is in it, and its owner alone write."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def signers_of(bundle: Bundle, policy: Policy | None = None) -> tuple[str, ...]:
    """Return the ids of the trusted keys that signed the bundle. Raises SignatureError as `open_bundle` does."""
    return _check_signatures(bundle.path, _manifest_bytes(bundle.path), policy)


def refuse_downgrade(manifest: Manifest, name: str | None = None) -> None:
    """Raise BundleError if a bundle installed as `name` (default: the manifest's) has a later version than this one.

    The machine's and the user's are looked at. One whose manifest is damaged has no version, and may be replaced.
    """
    name = name or manifest.name
    for there in (place / name for place in (shared_folder(), user_folder()) if place is not None):
        try:
            installed = read_manifest(there)
        except BundleError:
            continue
        if installed.version > manifest.version:
            new, old = (m.versions.get("bundle", "0") for m in (manifest, installed))
            raise BundleError(
                f"bundle {manifest.name} has version {new}, the installed {name} has {old}; pass --force to go back"
            )


def sign_bundle(name_or_folder: str | Path, key: Ed25519PrivateKey, role: str) -> Bundle:
    """Return the bundle with one more signature in bundle.sig, after checking all of it.

    A signature by the same key is replaced, others stay.

    Raises BundleError if the bundle does not hold, SignatureError if its bundle.sig is damaged, CannotWrite.
    """
    bundle = open_bundle(name_or_folder, NO_POLICY)
    path = bundle.path / SIGNATURE
    old = signing.from_bytes(_small_file(path, MAX_SIGNATURE_BYTES, SignatureError)) if os.path.lexists(path) else ()
    data = _manifest_bytes(bundle.path)
    if hashlib.sha256(data).hexdigest() != bundle.digest:
        raise BundleError(f"{MANIFEST} of bundle {bundle.manifest.name} changed while it was checked")
    new = signing.sign(data, key, role)
    # Not through the bundle's own folder: what a killed process left there would be a file that no manifest names.
    write_atomically(
        path, signing.to_bytes([new, *(s for s in old if s.key != new.key)]), through=bundle.path.resolve().parent
    )
    if is_shared(bundle.path):
        path.chmod(0o644)
    return bundle


def remove_bundle(name: str, *, shared: bool = False) -> None:
    """Remove an installed bundle of the user, or of the machine.

    Raises BundleError if there is none of this name or it is embedded, CannotWrite if the system refuses.
    """
    named = BUNDLE_NAME.fullmatch(name) is not None
    of_machine = folder_of(name, shared_folder()) if named else None
    folder = of_machine if shared else folder_of(name, user_folder()) if named else None
    if folder is None:
        if named and (EMBEDDED / name).is_dir():
            raise BundleError(f"{name} is embedded and cannot be removed")
        hint = "; there is one of the machine, which --shared removes" if of_machine else ""
        raise BundleError(f"there is no bundle {name!r}{' of the machine' if shared else hint}")
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
    with new_folder(Path(folder), replace) as new:
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
        written = open_bundle(new, NO_POLICY)
    return Bundle(Path(folder), manifest, written.digest)


def _put(target: Path, content: bytes | Path, *, move: bool = False) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        target.write_bytes(content)
    elif move:
        shutil.move(content, target)
    else:
        shutil.copyfile(content, target)
