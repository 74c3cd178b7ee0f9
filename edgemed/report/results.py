"""Answers about images in the forms that hospitals keep: JSON, DICOM, PDF, NIfTI or NRRD, FHIR, PNG.

One set of files for each series. A repeated run writes objects with the same UIDs under the same names, so that it
replaces itself. Every file is written whole or not at all.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from edgemed.core import Language
from edgemed.errors import CannotWrite, InvalidInput
from edgemed.files import Write, write_atomically
from edgemed.report.dicom_object import Made, ResultOptions, library, write_dicom
from edgemed.report.dicom_source import Analysed, Group, read_groups
from edgemed.report.findings import Finding, findings_of

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["KINDS", "Analysed", "ResultOptions", "write_groups", "write_results"]

KINDS = ("json", "seg", "sr", "gsps", "sc", "pdf", "nifti", "fhir", "png")
NEED_DICOM = frozenset({"seg", "sr", "gsps", "sc", "pdf", "fhir"})
NEED_PIXELS = frozenset({"json", "sc", "png"})
Put = Callable[[str, Write], None]
"""Takes the end of a file's name, and what writes it."""
LIBRARIES = {"nifti": ("nibabel",), "fhir": ("fhir.resources",), "pdf": ("reportlab", "fontTools")}


def write_results(
    analysed: Sequence[Analysed],
    folder: Path,
    kinds: Collection[str],
    *,
    language: Language,
    options: ResultOptions,
    name_of: Callable[[int], str] | None = None,
) -> tuple[Path, ...]:
    """Write each of `kinds` for each series into `folder`, made if missing, and return the paths that were written.

    What is missing in the headers, and what could not be shown, is told to `options.tell`. A SEG is left out where
    nothing has a mask; the other kinds tell that nothing was found. name_of: how the file names of the n-th series
    (from 0) begin; None: as the name of its first file.

    Raises NoInput without an image, InvalidInput for an unknown kind, for pictures among what DICOM or FHIR is to refer
    to, and for text that cannot be written without loss; BackendUnavailable if a library is missing; CannotWrite.
    """
    wanted = _checked(kinds, options)
    groups, notes = read_groups(analysed)
    for note in notes:
        options.tell(note)
    return write_groups(groups, folder, wanted, language=language, options=options, name_of=name_of)


def write_groups(
    groups: Sequence[Group],
    folder: Path,
    kinds: Collection[str],
    *,
    language: Language,
    options: ResultOptions,
    name_of: Callable[[int], str] | None = None,
) -> tuple[Path, ...]:
    """Do what `write_results` does for series whose headers were read already, or that are volumes without any."""
    wanted = _checked(kinds, options)
    if NEED_DICOM & set(wanted):
        for image in (image for group in groups for image in group.images):
            _ = image.dicom
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(f"cannot make the folder {folder}: {error.strerror or 'refused'}") from error
    written: list[Path] = []
    stems: set[str] = set()
    for number, group in enumerate(groups):
        stem = _unused(group.first.file, stems) if name_of is None else name_of(number)

        def put(name: str, write: Write, stem: str = stem) -> None:
            path = folder / f"{stem}.{name}"
            write_atomically(path, write)
            written.append(path)

        _put_files(group, wanted, language, options, put)
    return tuple(written)


def _checked(kinds: Collection[str], options: ResultOptions) -> tuple[str, ...]:
    """Return the kinds in the order of KINDS, once it is certain that none will fail for want of a library."""
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise InvalidInput(f"result kind {', '.join(unknown) or '(none)'} is not known; {', '.join(KINDS)} are")
    if NEED_PIXELS & set(kinds) and options.read is None:
        raise InvalidInput("json, sc and png results need the pixels; set ResultOptions.read")
    for kind in kinds:
        for name in ("nrrd",) if kind == "nifti" and options.nrrd else LIBRARIES.get(kind, ()):
            library(name)
    return tuple(kind for kind in KINDS if kind in kinds)


def _put_files(group: Group, kinds: Sequence[str], language: Language, options: ResultOptions, put: Put) -> None:
    """Put every result of a group, one at a time."""
    from edgemed.report.nifti import affine_of, to_volumes

    findings = findings_of(group)
    segs: list[Made] = []
    for kind in kinds:
        if kind == "json":
            answers = sum(len(image.answers) for image in group.images)
            put(
                "answer.json" if answers == 1 else "answers.jsonl",
                lambda stream: stream.writelines(_answers(group, language, options)),
            )
        elif kind == "nifti":
            if group.first.rows == 0:
                options.tell("no label volume was written: nothing on this picture has a mask")
            elif len(group.images) > 1 and affine_of(group.images) is None:
                options.tell("the images are no even stack: each has a label volume of its own, at its own place")
            for name, write in to_volumes(group, findings, options):
                put(name, write)
        elif kind == "fhir":
            from edgemed.report.fhir import to_fhir

            for release in options.fhir:
                bundle = to_fhir(group, findings, segs, release, language, options)
                put(f"fhir-{release.lower()}.json", partial(_write_json, bundle))
        elif kind == "png":
            for name, data in _pictures(group, language, options):
                put(name, partial(_write_bytes, data))
        else:
            try:
                for made in _objects(kind, group, findings, segs, language, options):
                    put(f"{made.stem}.dcm", partial(write_dicom, made.ds))
                    if kind == "seg":
                        segs.append(replace(made, ds=_named(made.ds)))
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                # highdicom's own checks; its texts may quote the header.
                raise InvalidInput(
                    f"no {kind} can be made of {group.first.file}: its header is not what such an object needs "
                    f"({type(error).__name__}); ask for json, png or nifti"
                ) from error


def _write_bytes(data: bytes, stream: IO[bytes]) -> None:
    stream.write(data)


def _write_json(value: object, stream: IO[bytes]) -> None:
    for piece in json.JSONEncoder(ensure_ascii=False, indent=1).iterencode(value):
        stream.write(piece.encode())
    stream.write(b"\n")


def _named(ds: Dataset) -> Dataset:
    """Return what other results refer to a data set by, without its pixels and frames: those are the largest here."""
    from pydicom.dataset import Dataset

    return Dataset({element.tag: element for element in ds if element.VR != "SQ" and element.keyword != "PixelData"})


def _objects(
    kind: str,
    group: Group,
    findings: Sequence[Finding],
    segs: Sequence[Made],
    language: Language,
    options: ResultOptions,
) -> Iterator[Made]:
    if kind == "seg":
        from edgemed.report.dicom_seg import to_segs

        made = to_segs(group, findings, language, options)
        if not made:
            options.tell("no SEG was written: nothing on these images has a mask")
        yield from made
    elif kind == "sr":
        from edgemed.report.dicom_sr import to_sr

        yield Made("sr", to_sr(group, findings, segs, language, options))
    elif kind == "gsps":
        from edgemed.report.dicom_gsps import to_gsps

        yield from to_gsps(group, findings, language, options)
    elif kind == "sc":
        from edgemed.report.dicom_sc import to_scs

        yield from to_scs(group, language, options)
    else:
        from edgemed.report.dicom_pdf import to_encapsulated_pdf

        yield Made("pdf", to_encapsulated_pdf(group, findings, language, options))


def _answers(group: Group, language: Language, options: ResultOptions) -> Iterator[bytes]:
    """Yield the answers in the form of `edgemed infer --json`, a line each: JSON Lines where there are several."""
    from edgemed.report.answer_json import to_json

    assert options.read is not None
    for image in group.images:
        scan = options.read(image.file, image.frame)
        prompt = replace(options.prompt, frame=image.frame, language=language)
        for answer in image.answers:
            found = to_json(answer, scan, prompt, path=image.file.name)  # where it lies is gone after the job
            yield json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _pictures(group: Group, language: Language, options: ResultOptions) -> Iterator[tuple[str, bytes]]:
    from PIL import Image

    from edgemed.report.dicom_sc import rendered, shown_images

    images = shown_images(group)
    for number, image in enumerate(images, 1):
        stream = io.BytesIO()
        Image.fromarray(rendered(image, language, options)).save(stream, format="PNG")
        yield "overlay.png" if len(images) == 1 else f"overlay-{number}.png", stream.getvalue()


def _unused(file: Path, used: set[str]) -> str:
    """Return the file's name without an ending that tells a format (a UID has dots, too), numbered if it is taken."""
    known = (".dcm", ".dicom", ".png", ".jpg", ".jpeg", ".tif", ".tiff")
    stem = file.stem if file.suffix.lower() in known else file.name
    name, number = stem, 1
    while name in used:
        number += 1
        name = f"{stem}-{number}"
    used.add(name)
    return name
