"""`edgemed index`: which images of a folder are most like another one, and questions that show them as examples.

Covers finding images and their masks in folders, the questions of a MedPLIB file, and what is printed. The index is
made and searched by `edgemed.retrieval`; only the vision encoder of the bundle is loaded.

Source of the questions' form: github ShawnHuang497/MedPLIB at 5ab54bc, image_rag.py.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgemed.cli.options import keep_libraries_quiet, model_options
from edgemed.cli.verbs import debug_option, describe
from edgemed.errors import (
    BackendUnavailable,
    BatchPartlyFailed,
    BundleError,
    CannotRead,
    EdgemedError,
    InvalidInput,
    NoInput,
)

if TYPE_CHECKING:
    from edgemed.dicom import Reader
    from edgemed.infer import Session
    from edgemed.retrieval import Index, Item, Match, Vector

C = TypeVar("C", bound=Callable[..., Any])

SEARCH_SCHEMA = "edgemed.search/1"

_ENDINGS = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")
_MASK_IN_TEXT = re.compile(r"<mask>(.*?)</mask>", re.DOTALL)
_NUMBERED = re.compile(r"image(\d+)")


def search_options(function: C) -> C:
    """Add the options of a search."""
    for option in (
        debug_option,
        click.option("-q", "--quiet", is_flag=True, help="No notes on stderr; errors stay."),
        model_options,
        click.option("--with-self", is_flag=True, help="Do not leave out the image itself, as published."),
        click.option("--top", type=click.IntRange(min=1), default=3, show_default=True, help="How many to find."),
    ):
        function = option(function)
    return function


@click.group("index", short_help="Find similar images.")
def command() -> None:
    """Find the images of a collection that are most like another, and add them to questions as examples.

    Two images are compared by the features of a bundle's vision encoder. An index holds no pixels and no header.
    """


@command.command("build")
@click.argument("folder", metavar="FOLDER")
@click.option("-o", "output", required=True, metavar="INDEX", help="The folder to make; it must not hold anything.")
@click.option(
    "--masks",
    metavar="FOLDER|SUFFIX",
    help="Where the mask of a/x.png is: in that folder, as a/x.png, or beside it, with the suffix: _mask: a/x_mask.png",
)
@model_options
@click.option("-q", "--quiet", is_flag=True, help="No notes on stderr; errors stay.")
@debug_option
def build(folder: str, output: str, masks: str | None, quiet: bool, **model: Any) -> None:
    """Make an index of the DICOM files, PNGs and JPEGs in FOLDER and below it; of a file's frames the first.

    A file that cannot be read is told and left out; the command then ends with exit code 87.
    """
    from edgemed.dicom import Reader
    from edgemed.retrieval import build_index

    collection = find_images(folder, masks)
    with Reader() as reader:
        reader.start()
        with _open(**model) as session:
            embedding = Embedding(session, reader, collection, quiet=quiet)
            index = build_index(session.bundle, embedding.rows(), output)
    with_mask = sum(item.mask is not None for item in index.items)
    if not quiet:
        if collection.passed_over:
            _note(f"{collection.passed_over} files that are no images were passed over")
        if masks is not None and not with_mask:
            _note(f"no image has a mask in, or with, {masks}")
        _note(f"the paths in the index are relative to {collection.root}")
    click.echo(f"{len(index.items)} images, {with_mask} with a mask: {output}")
    if embedding.failed:
        raise BatchPartlyFailed(f"{embedding.failed} of {len(collection.images)} images failed; each is told above")


@command.command("search")
@click.argument("folder", metavar="INDEX")
@click.argument("path", metavar="INPUT")
@click.option("--frame", type=click.IntRange(min=0), default=0, show_default=True, help="Frame of a multi-frame file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@search_options
def search(
    folder: str, path: str, frame: int, as_json: bool, top: int, with_self: bool, quiet: bool, **model: Any
) -> None:
    """Find the images of INDEX that are most like INPUT, which itself is left out.

    The first column is the cosine of the two images' features: 1 at most.
    """
    from edgemed.dicom import Reader
    from edgemed.retrieval import open_index

    index = open_index(folder)
    with Reader() as reader:
        reader.start()
        with _open(**model) as session:
            found = _nearest(index, session, reader, path, frame=frame, top=top, with_self=with_self)
    if as_json:
        matches = [{**asdict(match.item), "similarity": match.similarity} for match in found]
        about = {"schema": SEARCH_SCHEMA, "bundle_sha256": index.bundle_sha256, "input": path, "frame": frame}
        click.echo(json.dumps({**about, "matches": matches}))
        return
    for match in found:
        mask = "" if match.item.mask is None else f"  mask {_shown(match.item.mask)}"
        click.echo(f"{match.similarity:.4f}  {_shown(match.item.path)}{mask}")
    if not found and not quiet:
        _note("the index has no other image")


@command.command("augment")
@click.argument("folder", metavar="INDEX")
@click.argument("questions", metavar="QUESTIONS.json")
@click.option("-o", "output", required=True, metavar="OUT.json", help="The questions with their examples.")
@click.option("--images", metavar="FOLDER", help="Where the questions' images are; default: beside QUESTIONS.json.")
@search_options
def augment(
    folder: str, questions: str, output: str, images: str | None, top: int, with_self: bool, quiet: bool, **model: Any
) -> None:
    """Add to each question the images of INDEX most like its own, with their masks, as icl_examples.

    QUESTIONS.json is a list of {image, conversations, ...} as MedPLIB has it. The paths of the examples are those in
    the index. A question whose image cannot be read stays as it is and is told; the exit code is then 87.
    """
    from edgemed.dicom import Reader
    from edgemed.files import write_atomically
    from edgemed.retrieval import open_index

    index = open_index(folder)
    without = sum(item.mask is None for item in index.items)
    if without == len(index.items):
        raise NoInput(f"no image of the index {folder} has a mask; build it with --masks")
    items = read_questions(questions)
    root = Path(images) if images is not None else Path(questions).parent
    failed: set[str] = set()
    known: dict[str, list[dict[str, str | None]]] = {}
    with Reader() as reader:
        reader.start()
        with _open(**model) as session:
            index.check_bundle(session.bundle)
            for image in dict.fromkeys(filter(None, map(image_of, items))):  # MedPLIB asks several times about one
                path = str(root / image)
                try:
                    found = _nearest(index, session, reader, path, top=top, with_self=with_self, masked=True)
                except (BundleError, BackendUnavailable):
                    raise
                except (EdgemedError, MemoryError) as error:
                    failed.add(image)
                    _tell(error, path)
                else:
                    known[image] = [{"image": match.item.path, "mask": match.item.mask} for match in found]
    write_atomically(output, (json.dumps([_augmented(item, known) for item in items], indent=2) + "\n").encode())
    if without and not quiet:
        _note(f"{without} of {len(index.items)} images of the index have no mask and are left out")
    click.echo(f"{sum(image_of(item) in known for item in items)} of {len(items)} questions have examples: {output}")
    if failed:
        raise BatchPartlyFailed(f"{len(failed)} images of questions failed; each is told above")


@dataclass(frozen=True)
class Collection:
    """The images in a folder: paths below `root`, with "/" between the parts, and the mask of each or None."""

    root: Path
    images: Mapping[str, str | None]
    passed_over: int


def find_images(folder: str, masks: str | None = None) -> Collection:
    """Return the images in `folder` and below it, by name; what is hidden, a mask, or no image is passed over.

    masks: a folder in `folder` or beside it, whose files have the names of the images (or end in .png), or else what
    the names of masks have at their end. `root` is `folder`, or what holds both folders.

    Raises CannotRead if there is no such folder, EdgemedError if that of the masks lies elsewhere.
    """
    top = Path(os.path.abspath(folder))
    if not top.is_dir():
        raise CannotRead(f"cannot read {folder}: there is no such folder")
    apart = Path(os.path.abspath(masks)) if masks is not None and os.path.isdir(masks) else None
    suffix = masks if apart is None else None
    if suffix is not None and Path(suffix).name != suffix:
        raise CannotRead(f"cannot read {suffix}: there is no such folder; --masks takes a folder or a suffix")
    root = top if apart is None or apart.is_relative_to(top) else top.parent
    if apart is not None and not apart.is_relative_to(root):
        raise EdgemedError(f"the folder of masks {masks} lies elsewhere; one in {folder} or beside it was expected")
    images: dict[str, str | None] = {}
    passed_over = 0
    for file in _files(top, apart):
        if suffix is not None and _split(file.name)[0].endswith(_split(suffix)[0]):
            continue
        if not _is_image(file):
            passed_over += 1
            continue
        stem, ending = _split(file.name)
        if suffix is not None:
            candidates = [file.with_name(stem + suffix + end) for end in ("", ".png", ending)]
        elif apart is not None:
            there = apart / file.relative_to(top)
            candidates = [there, there.with_name(stem + ".png")]
        else:
            candidates = []
        mask = next((candidate for candidate in candidates if candidate.is_file()), None)
        images[file.relative_to(root).as_posix()] = None if mask is None else mask.relative_to(root).as_posix()
    return Collection(root, images, passed_over)


def _files(top: Path, masks: Path | None) -> Iterator[Path]:
    """Yield the files in and below a folder, by name, none that is hidden or lies in the folder of masks."""
    for place, folders, files in os.walk(top):
        here = Path(place)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and here / f != masks)
        yield from (here / file for file in sorted(files) if not file.startswith("."))


def _is_image(file: Path) -> bool:
    """Return whether a file says it is an image, by its name or, without one that does, by its first bytes."""
    from edgemed.dicom.sniff import sniff

    if _split(file.name)[1]:
        return True
    try:
        sniff(str(file))
    except EdgemedError:
        return False
    return True


def _split(name: str) -> tuple[str, str]:
    """Return (stem, ending) of a file name; the numbers after the dots of a UID are no ending.

    >>> _split("x.PNG"), _split("1.2.840.7")
    (('x', '.PNG'), ('1.2.840.7', ''))
    """
    stem, ending = os.path.splitext(name)
    return (stem, ending) if ending.lower() in _ENDINGS else (name, "")


class Embedding:
    """The images of a collection on their way into an index; counts those that failed."""

    def __init__(self, session: Session, reader: Reader, collection: Collection, *, quiet: bool) -> None:
        self._session = session
        self._reader = reader
        self._collection = collection
        self._progress = not quiet and sys.stderr.isatty()
        self.failed = 0

    def rows(self) -> Iterator[tuple[Item, Vector]]:
        """Yield each image with its embedding; one that cannot be read is told on stderr and left out."""
        from edgemed.files import sha256_of
        from edgemed.retrieval import Item

        images = self._collection.images
        for done, (name, mask) in enumerate(images.items(), 1):
            path = self._collection.root / name
            try:
                scan = self._reader.read(path)
                row = Item(name, sha256_of(path), mask=mask), self._session.embed(scan)
            except (BundleError, BackendUnavailable):
                raise  # the next image would end in the same
            except (EdgemedError, MemoryError) as error:
                self.failed += 1
                _tell(error, str(path))
            else:
                yield row
            if self._progress:
                print(
                    f"\r{done} of {len(images)}", end="\n" if done == len(images) else "", file=sys.stderr, flush=True
                )


def _nearest(
    index: Index,
    session: Session,
    reader: Reader,
    path: str,
    *,
    top: int,
    with_self: bool,
    frame: int = 0,
    masked: bool = False,
) -> tuple[Match, ...]:
    """Return the images of the index most like the one at `path`, without that one unless `with_self`."""
    from edgemed.files import sha256_of

    index.check_bundle(session.bundle)
    scan = reader.read(path, frame=frame)
    exclude = () if with_self else (sha256_of(path),)
    return index.find(session, scan, frame, top, exclude, masked)


def read_questions(path: str) -> list[dict[str, Any]]:
    """Return the items of a MedPLIB file. Raises CannotRead, or InvalidInput if it is no list of JSON objects."""
    try:
        items = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise CannotRead(f"cannot read {path}: {error.strerror or 'refused'}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is not JSON ({type(error).__name__})") from error
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InvalidInput(f"{path} holds something else than a list of questions: [{{image, conversations}}, ...]")
    return items


def image_of(item: Mapping[str, Any]) -> str | None:
    """Return the image that is asked about, or None: `image`, or the last of image1, image2 ..., as published.

    >>> image_of({"image2": "b.png", "image10": "c.png", "mask1": "m.png"})
    'c.png'
    """
    if item.get("image") is not None:
        return str(item["image"])
    numbers = [int(match[1]) for key in item if (match := _NUMBERED.fullmatch(key))]
    return str(item[f"image{max(numbers)}"]) if numbers else None


def target_mask_of(item: Mapping[str, Any]) -> str | None:
    """Return the mask that is the right answer, where a question has one: by key, or in a turn's text, as published.

    >>> target_mask_of({"conversations": [{"from": "gpt", "value": "It is <SEG>.<mask>m/1.png</mask>"}]})
    'm/1.png'
    """
    for key in ("target_mask", "mask", "mask3"):
        if item.get(key) is not None:
            return str(item[key])
    turns = item.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        found = _MASK_IN_TEXT.search(str(turn.get("value", ""))) if isinstance(turn, dict) else None
        if found:
            return found[1]
    return None


def _augmented(item: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return a question with `image`, `target_mask` and `icl_examples`; as it was, if its image has no examples."""
    image, mask = image_of(item), target_mask_of(item)
    if image is None or image not in known:
        return item
    return {**item, "image": image, **({"target_mask": mask} if mask else {}), "icl_examples": known[image]}


def _open(**model: Any) -> Session:
    from edgemed.infer import open_session

    keep_libraries_quiet()
    return open_session(**model, roles=("vision_encoder",))


def _tell(error: BaseException, path: str) -> None:
    line, code = describe(error)
    print(f"edgemed: {'' if path in line else f'{path}: '}{line} (code {code})", file=sys.stderr)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _shown(path: str) -> str:
    """Return a path that any terminal takes: a file name need not be text."""
    return path.encode("utf-8", "backslashreplace").decode()
