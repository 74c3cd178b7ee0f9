"""`--to` of `edgemed infer`: answers as the files that hospitals keep. `edgemed.report.results` writes them.

Covers what can be told before a model is asked, how files are called, and which slices of a series a file is about. The
kind json is not written here: it is NAME.answer.json of an image and NAME.series.jsonl of a series.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.errors import EdgemedError, InvalidInput

if TYPE_CHECKING:
    from edgemed.cli.infer import Request
    from edgemed.cli.series import Opened
    from edgemed.core import Answer, Prompt, Scan
    from edgemed.dicom.geometry_verdict import Place
    from edgemed.report.dicom_source import Group, Plane
    from edgemed.report.results import ResultOptions
    from edgemed.volume import SliceRun

_KEPT_FRAMES = 8
"""Of the frames that were read for one kind of picture; a longer series is read once for each kind."""


def default_kinds() -> tuple[str, ...]:
    """Return what `results.to` of the configuration names, in the order of KINDS; nothing where it is not set."""
    from edgemed.config import read_settings
    from edgemed.report.results import KINDS

    value = read_settings().get("results.to")
    return tuple(kind for kind in KINDS if value is not None and kind in value.value)


def check_results(request: Request) -> None:
    """Raise EdgemedError (usage) if the options do not fit each other, BackendUnavailable if a library is missing."""
    for option, given, kind in (
        ("--labelmap", request.labelmap, "seg"),
        ("--seg-full-frames", request.seg_full_frames, "seg"),
        ("--nrrd", request.nrrd, "nifti"),
    ):
        if given and kind not in request.to:
            raise EdgemedError(f"{option} was given without --to {kind}")
    if not request.to:
        return
    if request.folder is None:
        raise EdgemedError("--to was given without -o FOLDER, which is where the files go")
    beside = [kind for kind in request.to if kind != "json"]
    if beside and not request.inputs:
        raise EdgemedError(f"--to {','.join(beside)} was given without an image; an INPUT was expected")
    if beside and request.together:
        raise EdgemedError(
            f"--to {','.join(beside)} was given with --together; such files are about one image or series"
        )
    from edgemed.cli.extras import need
    from edgemed.report.results import LIBRARIES

    for kind in beside:
        need(tuple(name.split(".")[0] for name in LIBRARIES.get(kind, ())), "results", f"infer --to {kind}")


def check_source(path: str, kinds: Sequence[str], *, volume: bool = False) -> None:
    """Raise InvalidInput if one of `kinds` must refer to DICOM images and the input, a volume file or not, is none."""
    from edgemed.report.results import NEED_DICOM

    refused = [kind for kind in kinds if kind in NEED_DICOM]
    if not refused:
        return
    from edgemed.dicom.sniff import sniff

    if volume or sniff(path) == "picture":
        raise InvalidInput(
            f"{path} is a {'volume' if volume else 'picture'}, and {', '.join(refused)} must refer to DICOM images; "
            "pass those, or --to json, nifti or png"
        )


class ResultFiles:
    """Writes the files of --to, but for json. stem_of: path -> the start of a file name that no other input has."""

    def __init__(self, request: Request, stem_of: Callable[[str], str]) -> None:
        self._request, self._stem_of = request, stem_of
        self._kinds = tuple(kind for kind in request.to if kind != "json")
        self._folder = Path(request.folder or ".")

    def of_image(
        self, answer: Answer, scan: Scan, prompt: Prompt, path: str, stem: str, notice: str
    ) -> dict[str, Path]:
        """Write the files about one image and return what each is ("seg.dcm" ...) -> its path."""
        if not self._kinds:
            return {}
        from edgemed.report.results import Analysed, write_results

        names = _Names(self._stem_of, stem, path)
        written = write_results(
            [Analysed(Path(path), prompt.frame, answer)],
            self._folder,
            self._kinds,
            language=prompt.language,
            options=self._options(prompt, notice, lambda file, frame: scan),
            name_of=names,
        )
        return {names.kind(file): file for file in written}

    def of_series(self, run: SliceRun, opened: Opened, prompt: Prompt, stem: str, notice: str) -> list[Path]:
        """Write the files about a series and return their paths.

        They are about the slices that were asked. A label volume has the others too, empty, where what was asked covers
        the series and its slices are an even stack; else it has those that were asked, or is one file for each.
        """
        if not self._kinds:
            return []
        from edgemed.cli.series import VolumeSlices
        from edgemed.report.packed import packed
        from edgemed.report.results import Analysed, write_groups, write_results
        from edgemed.volume import to_answer

        slices, path = opened.slices, opened.facts["path"]
        answers = {index: packed(to_answer(record)) for index, record in run.answers()}
        frames = [(Path(slices.file(k)), slices.frame(k)) for k in range(len(slices.places))]
        index_of = {place: index for index, place in enumerate(frames)}

        @lru_cache(maxsize=_KEPT_FRAMES)
        def read(file: Path, frame: int) -> Scan:
            return slices.read(index_of[file, frame])

        names = _Names(self._stem_of, stem, path)
        settings: dict[str, Any] = {
            "language": prompt.language,
            # The regions of a question are on one slice and not on those that they were carried to.
            "options": self._options(replace(prompt, regions=()), notice, read),
            "name_of": names,
        }
        even = self._resampled(answers, run, opened)
        self._tell_of(run, opened, resampled=even is not None)
        written: list[Path] = []
        left = [kind for kind in self._kinds if even is None or kind not in ("seg", "nifti")]
        if even is not None:
            written += write_groups([even], self._folder, [k for k in self._kinds if k not in left], **settings)
        for kinds, shown in (
            ([kind for kind in left if kind != "nifti"], answers),
            ([kind for kind in left if kind == "nifti"], _filled(answers, run, opened)),
        ):
            if not kinds:
                continue
            if isinstance(slices, VolumeSlices):
                written += write_groups([_group(shown, opened)], self._folder, kinds, **settings)
                continue
            analysed = [Analysed(*frames[index], answer) for index, answer in shown.items()]
            try:
                written += write_results(analysed, self._folder, kinds, **settings)
            except EdgemedError as error:
                raise type(error)(_shown(str(error), opened)) from error
        if names.count > 1:
            self._request.tell(
                f"the slices are {names.count} stacks (size, orientation, place), each with its own files"
            )
        return written

    def _resampled(self, answers: dict[int, Answer], run: SliceRun, opened: Opened) -> Group | None:
        """Return the masks of an uneven stack on even distances, where --resample asks for it and it can be done."""
        request, verdict = self._request, opened.verdict
        if not request.resample or verdict.is_volume or not {"seg", "nifti"} & set(self._kinds):
            return None
        from edgemed.cli.series import VolumeSlices
        from edgemed.report.dicom_source import read_groups
        from edgemed.report.results import Analysed
        from edgemed.volume.resample import evenly

        slices = opened.slices
        if not run.covers_all or run.failed or verdict.kind not in ("tilt", "gaps", "irregular", "duplicates"):
            request.tell("--resample: SEG and label volume are not resampled; a slice has no place or no answer")
            return None
        empty = _empty(answers)
        whole = {index: answers.get(index, empty) for index in range(len(slices.places))}
        if isinstance(slices, VolumeSlices):
            return evenly(_group(whole, opened))
        frames = [Analysed(Path(slices.file(k)), slices.frame(k), answer) for k, answer in whole.items()]
        groups, _ = read_groups(frames)
        even = evenly(groups[0]) if len(groups) == 1 else None
        if even is None:
            request.tell("--resample: SEG and label volume are not resampled; the slices are not one stack")
        elif {"sr", "fhir"} & set(self._kinds):
            request.tell("the resampled SEG is on planes of its own; other results refer to the images, not to it")
        return even

    def _options(self, prompt: Prompt, notice: str, read: Callable[[Path, int], Scan]) -> ResultOptions:
        from edgemed.report.results import ResultOptions

        request = self._request
        return ResultOptions(
            prompt=prompt,
            notice=notice,
            read=read,
            labelmap=request.labelmap,
            seg_full_frames=request.seg_full_frames,
            nrrd=request.nrrd,
            tell=lru_cache(maxsize=None)(request.tell),  # once each: a series may be gone through twice
        )

    def _tell_of(self, run: SliceRun, opened: Opened, *, resampled: bool) -> None:
        """Tell what a reader of a SEG or label volume would take for granted and is not so."""
        if not {"seg", "nifti"} & set(self._kinds):
            return
        verdict, tell = opened.verdict, self._request.tell
        if resampled:
            tell("SEG and label volume are resampled: masks on even distances, interpolated between the slices")
        elif not verdict.is_volume:
            why = "; ".join(verdict.reasons) or verdict.kind
            tell(f"the slices are no volume; masks are those of each slice, and nothing is resampled: {why}")
        if not run.covers_all:
            tell(
                f"{len(run.asked)} of {opened.facts['slices']} slices were asked; SEG and label volume tell of no other"
            )
        if run.failed:
            tell(f"slices that failed have no mask: {', '.join(map(str, sorted(run.failed)))}")


class _Names:
    """The stems of the stacks of one input: `first`, and for each further one what `stem_of` gives for `path`."""

    def __init__(self, stem_of: Callable[[str], str], first: str, path: str) -> None:
        self._stem_of, self._path, self._stems = stem_of, path, [first]

    def __call__(self, number: int) -> str:
        while number >= len(self._stems):
            self._stems.append(self._stem_of(self._path))
        return self._stems[number]

    @property
    def count(self) -> int:
        return len(self._stems)

    def kind(self, file: Path) -> str:
        """Return the end of a file's name, without what it has of the input's."""
        number, stem = max(
            ((n, s) for n, s in enumerate(self._stems) if file.name.startswith(f"{s}.")), key=lambda pair: len(pair[1])
        )
        end = file.name.removeprefix(f"{stem}.")
        return end if number == 0 else f"{number + 1}.{end}"


def wrote(files: Sequence[Path]) -> str:
    """Return what is printed of the files of --to: a line each, after an empty one."""
    return "".join(["\n", *(f"wrote {file}\n" for file in files)]) if files else ""


def _filled(answers: dict[int, Answer], run: SliceRun, opened: Opened) -> dict[int, Answer]:
    """Return the answers, with an empty one for each slice that was passed over because nothing is there."""
    if not run.covers_all or opened.verdict.affine is None:
        return answers
    empty = _empty(answers)
    return {index: answers.get(index, empty) for index in range(len(opened.slices.places))}


def _empty(answers: dict[int, Answer]) -> Answer:
    """Return what stands for a slice on which nothing is."""
    some = next(iter(answers.values()))
    return replace(some, text="", tagged_text="", regions=(), labels=(), findings=(), notes=())


def _group(answers: dict[int, Answer], opened: Opened) -> Group:
    """Return slices of a volume file, which has no DICOM header, as a series."""
    from edgemed.report.dicom_source import Group, Image

    between = (opened.verdict.spacing_mm or (None,))[0]
    images = []
    for index, answer in answers.items():
        p = opened.slices.places[index]
        file = Path(opened.slices.file(index))
        images.append(Image(file, index, (answer,), None, p.rows, p.columns, p.spacing_mm, _plane(p), between))
    return Group(tuple(images))


def _plane(place: Place) -> Plane | None:
    import numpy as np

    from edgemed.report.dicom_source import Plane

    if place.position is None or place.orientation is None:
        return None
    return Plane(np.array(place.position), np.array(place.orientation[:3]), np.array(place.orientation[3:]))


def _shown(text: str, opened: Opened) -> str:
    """Return a message with files of an unpacked archive called as everywhere else."""
    slices = opened.slices
    for index in range(len(slices.places)):
        text = text.replace(slices.file(index), slices.path(index))
    return text
