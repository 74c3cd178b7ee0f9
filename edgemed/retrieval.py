"""Which images of a collection are most like this one: an index of embeddings that lies in a folder, and its search.

    embeddings.npy   float32 [items, width], each row of length 1
    metadata.json    schema, bundle and family that made the rows, and for each row an `Item`

Two images are compared by the cosine of what `Session.embed` makes of them. An index holds no pixels, nothing of a
header, and no path but those below the indexed folder. It is made whole or not at all, and never changed.

Covers building, opening and searching. Does not cover finding and reading the images.

Source of pooling, file names and the three nearest: github ShawnHuang497/MedPLIB at 5ab54bc, image_rag.py. There, the
image itself is not left out, and a stand-alone CLIP with its own preprocessing takes the place of the bundle's tower.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PureWindowsPath
from types import NoneType
from typing import TYPE_CHECKING, Any
from unicodedata import category

import numpy as np
import numpy.typing as npt

from edgemed.bundle import Bundle
from edgemed.errors import CannotRead, CannotWrite, InvalidInput, NoInput

if TYPE_CHECKING:
    from edgemed.core import Scan
    from edgemed.infer import Session

SCHEMA = "edgemed.index/1"
EMBEDDINGS, METADATA = "embeddings.npy", "metadata.json"
NEAREST = 3
"""How many images are retrieved where nobody says otherwise, as published."""

Vector = npt.NDArray[np.float32]

_MAX_METADATA_BYTES = 256 << 20
_ROWS = 8192  # read at a time; 32 MiB at a width of 1024
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEYS = {"schema", "bundle", "bundle_sha256", "family", "items"}
_ITEM = {"path": (str,), "sha256": (str,), "frame": (int,), "mask": (str, NoneType), "text": (str, NoneType)}
_LENGTH_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Item:
    """One image of an index.

    path, mask: relative, "/" between the parts, inside the indexed folder. sha256: of the image's file, by which an
    image is known again wherever it lies. text: what the owner says of it.

    Raises InvalidInput if a path leaves the folder or sha256 is no digest.
    """

    path: str
    sha256: str
    frame: int = 0
    mask: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        for path in (self.path, self.mask):
            if path is not None and not _is_inside(path):
                raise InvalidInput(f"an image of an index has the path {path!r}; one inside the folder was expected")
        if not _SHA256.fullmatch(self.sha256) or self.frame < 0:
            raise InvalidInput(f"an image of an index has sha256 {self.sha256[:70]!r} and frame {self.frame}")


@dataclass(frozen=True)
class Match:
    """An image that was found, and the cosine of its embedding and the query's, -1..1."""

    item: Item
    similarity: float


@dataclass(frozen=True, eq=False)
class Index:
    """An opened index; the rows of `embeddings` are mapped from the file, not read.

    bundle, bundle_sha256, family: name, digest and family of what made it.
    """

    bundle: str
    bundle_sha256: str
    family: str
    items: tuple[Item, ...]
    embeddings: Vector = field(repr=False)

    def check_bundle(self, bundle: Bundle) -> None:
        """Raise InvalidInput unless `bundle` made this index: what another one makes cannot be compared."""
        if bundle.digest != self.bundle_sha256:
            raise InvalidInput(
                f"the index was made with the bundle {self.bundle!r}, sha256 {self.bundle_sha256[:12]}..., asked with "
                f"{bundle.manifest.name!r}, {bundle.digest[:12]}...; pass the same one, or build the index anew"
            )

    def find(
        self,
        session: Session,
        scan: Scan,
        frame: int = 0,
        top: int = NEAREST,
        exclude: Collection[str] = (),
        masked: bool = False,
    ) -> tuple[Match, ...]:
        """Return the images most like a frame, as `search` does; the index must be made with the session's bundle."""
        self.check_bundle(session.bundle)
        return self.search(session.embed(scan, frame), top, exclude, masked)

    def search(
        self, vector: Vector, top: int = NEAREST, exclude: Collection[str] = (), masked: bool = False
    ) -> tuple[Match, ...]:
        """Return the at most `top` images most like `vector`, best first; of equal ones, those that were first.

        vector: [width], of length 1, by the bundle of this index. exclude: SHA-256 of files that are not wanted, such
        as the query's own. masked: only images that have a mask.

        Raises InvalidInput if the vector does not fit, or the index holds rows that are not of length 1.
        """
        if vector.dtype != np.float32 or vector.shape != self.embeddings.shape[1:]:
            wanted = f"float32 {list(self.embeddings.shape[1:])}"
            raise InvalidInput(f"the embedding asked with is {vector.dtype} {list(vector.shape)}, expected {wanted}")
        if not abs(float(np.linalg.norm(vector)) - 1) <= _LENGTH_TOLERANCE:
            raise InvalidInput("the embedding asked with is not of length 1; ask with what Session.embed gives")
        similarity = np.concatenate(
            [_cosines(self.embeddings[i : i + _ROWS], vector) for i in range(0, len(self.items), _ROWS)]
        )
        order = np.argsort(-similarity, kind="stable")
        found: list[Match] = []
        for i in order.tolist():
            if len(found) == top:
                break
            item = self.items[i]
            if item.sha256 not in exclude and (item.mask is not None or not masked):
                found.append(Match(item, float(similarity[i])))
        return tuple(found)


def build_index(bundle: Bundle, images: Iterable[tuple[Item, Vector]], folder: str | Path) -> Index:
    """Return the index written to `folder`, which must be new or empty; images: each with its embedding by `bundle`.

    Raises NoInput if there are no images, InvalidInput if embeddings differ in width, CannotWrite if the folder holds
    something or the disk refuses.
    """
    target = Path(os.path.abspath(folder))
    temporary = _beside(target)  # before hours of embedding: it tells whether there is a place to write to
    try:
        items: list[Item] = []
        rows = bytearray()  # np.stack would hold all rows twice
        for item, vector in images:
            rows += np.asarray(vector, np.float32).tobytes()
            items.append(item)
            if len(rows) != len(items) * vector.size * 4:
                raise InvalidInput(f"the embedding of image {len(items)} has another width than those before it")
        if not items:
            raise NoInput("there is no image to make an index of")
        metadata = {
            "schema": SCHEMA,
            "bundle": bundle.manifest.name,
            "bundle_sha256": bundle.digest,
            "family": bundle.manifest.family,
            "items": [asdict(item) for item in items],
        }
        new = temporary / "new"
        try:
            new.mkdir()
            np.save(new / EMBEDDINGS, np.frombuffer(rows, np.float32).reshape(len(items), -1), allow_pickle=False)
            (new / METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="ascii")
            if target.exists():
                target.rmdir()
            os.replace(new, target)
        except OSError as error:
            raise CannotWrite(f"cannot write the index {folder}: {error.strerror or 'refused'}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_index(target)


def _beside(target: Path) -> Path:
    """Return a new folder beside `target`. Raises CannotWrite if `target` holds something or there is no place."""
    try:
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise CannotWrite(f"cannot write an index to {target}: it exists already; choose another folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise CannotWrite(f"cannot write the index {target}: {error.strerror or 'refused'}") from error


def open_index(folder: str | Path) -> Index:
    """Return the index in `folder`.

    Raises CannotRead if a file is missing or cannot be read, InvalidInput if one is not what `build_index` writes.
    """
    path = Path(folder)
    metadata = _metadata(path / METADATA)
    items = tuple(_item(item) for item in metadata["items"])
    embeddings = _embeddings(path / EMBEDDINGS)
    if embeddings.ndim != 2 or len(embeddings) != len(items) or embeddings.dtype != np.float32:
        raise InvalidInput(
            f"{path / EMBEDDINGS} holds {embeddings.dtype} {list(embeddings.shape)}, expected float32 "
            f"[{len(items)}, width] as {METADATA} says"
        )
    return Index(metadata["bundle"], metadata["bundle_sha256"], metadata["family"], items, embeddings)


def _metadata(path: Path) -> dict[str, Any]:
    """Return what metadata.json says, its keys and their kinds checked, but for the items."""
    _check_file(path)
    if path.stat().st_size > _MAX_METADATA_BYTES:
        raise InvalidInput(f"{path} is larger than {_MAX_METADATA_BYTES >> 20} MiB; an index was expected")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is not JSON ({type(error).__name__}); the index is damaged") from error
    except OSError as error:
        raise CannotRead(f"cannot read {path}: {error.strerror or 'refused'}") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise InvalidInput(f"{path} is of another kind than {SCHEMA}; build the index with 'edgemed index build'")
    texts = all(isinstance(data.get(key), str) for key in _KEYS - {"items"})
    if set(data) != _KEYS or not texts or not isinstance(data["items"], list) or not data["items"]:
        raise InvalidInput(f"{path} has keys missing, unknown or of the wrong kind; the index is damaged")
    return data


def _item(data: Any) -> Item:
    """Return an item as it was written. Raises InvalidInput if a key is missing, unknown or of the wrong kind."""
    if not isinstance(data, dict) or set(data) != set(_ITEM) or any(type(data[k]) not in _ITEM[k] for k in _ITEM):
        raise InvalidInput(f"{METADATA} has an item with another form than {', '.join(_ITEM)}; the index is damaged")
    return Item(**data)


def _embeddings(path: Path) -> npt.NDArray[Any]:
    """Return the array mapped from a .npy file; one that would have to be unpickled is refused."""
    _check_file(path)
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise InvalidInput(f"{path} is no .npy file of numbers, or it is cut off; the index is damaged") from error
    except OSError as error:
        raise CannotRead(f"cannot read {path}: {error.strerror or 'refused'}") from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise CannotRead(f"cannot read {path}: there is no such file; the folder of an index was expected")


def _is_inside(path: str) -> bool:
    """Return whether a relative path with "/" stays in its folder, on every system.

    >>> [_is_inside(path) for path in ("a/x.png", "../x.png", "/x.png", "C:x.png", "a\\\\..\\\\x.png", "")]
    [True, False, False, False, False, False]
    """
    pure = PureWindowsPath(path)  # takes both separators, and drives
    return (
        bool(pure.parts) and not pure.anchor and ".." not in pure.parts and not any(category(c) == "Cc" for c in path)
    )


def _cosines(rows: npt.NDArray[Any], vector: Vector) -> Vector:
    """Return the cosines of rows [n, width] of length 1 and `vector`, [n]."""
    here = np.asarray(rows)
    if not (np.abs(np.linalg.norm(here, axis=1) - 1) <= _LENGTH_TOLERANCE).all():
        raise InvalidInput(f"{EMBEDDINGS} has rows that are not of length 1; build the index anew")
    return np.clip(here @ vector, -1, 1)
