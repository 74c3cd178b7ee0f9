"""Series runs of `edgemed infer`: a folder, DICOMDIR, zip archive or volume file in, answers and one summary out.

Covers what the options mean for a series, the choice that is told on stderr, progress, and where results go;
`edgemed.dicom.series` finds series and `edgemed.volume` asks their slices.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from edgemed.cli.results import ResultFiles, check_source, wrote
from edgemed.errors import BatchPartlyFailed, EdgemedError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from edgemed.cli.infer import Request
    from edgemed.core import Answer, Example, Prompt, Scan
    from edgemed.dicom import Reader
    from edgemed.dicom.geometry_verdict import Place, Verdict
    from edgemed.dicom.slices import DicomSlices
    from edgemed.dicom.volume_file import Volume
    from edgemed.infer import Session
    from edgemed.volume import SliceRun

WORDS = {
    "en": ("structure", "slices", "volume", "nothing was found"),
    "zh": ("结构", "层面", "体积", "未发现结构"),
}
_OTHERS_TOLD = 20


def is_series(path: str, request: Request) -> bool:
    """Tell whether an input is asked about slice by slice."""
    from edgemed.dicom.series import is_source
    from edgemed.dicom.volume_file import is_volume_file

    wanted = request.slices is not None or request.series is not None or request.select is not None
    return wanted or is_volume_file(path) or is_source(path)


class VolumeSlices:
    """The slices of a volume file; see `edgemed.volume.Slices`."""

    def __init__(self, volume: Volume, window: str | None) -> None:
        from edgemed.files import sha256_of

        self.places: Sequence[Place] = volume.places
        self._volume, self._window = volume, window
        self._digest = "+".join(sha256_of(file) for file in dict.fromkeys((volume.path, volume.data_path)))

    def read(self, index: int) -> Scan:
        return self._volume.read(index, self._window)

    def path(self, index: int) -> str:
        return self._volume.path

    def file(self, index: int) -> str:
        return self._volume.path

    def frame(self, index: int) -> int:
        return index

    def digest(self, index: int) -> str:
        return f"{self._digest}#{index}"


@dataclass(frozen=True, eq=False)
class Opened:
    """The slices that were chosen, with what the summary tells of them; passed on to writers of results."""

    slices: DicomSlices | VolumeSlices
    verdict: Verdict
    facts: dict[str, Any]
    unreadable: int = 0
    study: str = ""


def run_series(
    path: str,
    request: Request,
    reader: Reader,
    opening: Future[Session],
    examples: tuple[Example, ...],
    outputs: SeriesOutputs,
) -> None:
    """Ask every prompt about the slices of one input and write the results.

    Raises BatchPartlyFailed if some files could not be read or some slices not be answered.
    """
    from edgemed.core import Prompt

    for option, given in (("--together", request.together), ("--chat", request.chat), ("--router", request.router)):
        if given:
            raise EdgemedError(f"{option} was given with a series; it takes single images")
    if request.examples_from is not None:
        raise EdgemedError("--examples-from was given with a series; it takes single images")
    if request.frame and not request.regions:
        raise EdgemedError("--frame was given with a series; it tells which slice a --region is on, --slices asks some")
    failed = 0
    with _opened(path, request, reader) as opened:
        from edgemed import audit

        audit.record(audit.accessed([opened.study], "infer", instances=opened.facts["slices"]))
        if isinstance(opened.slices, VolumeSlices):
            check_source(path, request.to, volume=True)
        for text in request.prompts:
            prompt = Prompt(
                text,
                _regions(opened, request, reader),
                request.language(text),
                request.frame,
                settings=request.family_settings(),
                examples=examples,
            )
            failed += _run(path, opened, prompt, request, opening.result(), outputs)
        if failed or opened.unreadable:
            told = [
                f"{count} {what}"
                for count, what in ((opened.unreadable, "files could not be read"), (failed, "slices failed"))
                if count
            ]
            raise BatchPartlyFailed(f"{path}: {' and '.join(told)}; the summary and stderr tell which")


def _regions(opened: Opened, request: Request, reader: Reader) -> tuple[Any, ...]:
    if not request.regions:
        return ()
    from edgemed.cli.regions import read_region

    scan = opened.slices.read(request.frame)
    return tuple(read_region(text, scan, reader.read) for text in request.regions)


@contextmanager
def _opened(path: str, request: Request, reader: Reader) -> Iterator[Opened]:
    from edgemed.audit import named
    from edgemed.dicom.volume_file import is_volume_file, open_volume

    if is_volume_file(path):
        with open_volume(path) as volume:
            _say(request, volume.notes)
            facts = {
                "path": path,
                "series_instance_uid": None,
                "modality": volume.modality,
                "plane": volume.plane,
                "slices": volume.count,
            }
            yield Opened(VolumeSlices(volume, request.window), volume.verdict, facts, study=named(None, path))
        return
    from edgemed.dicom.geometry_verdict import plane_of
    from edgemed.dicom.select import choose, keywords_of, read_rules
    from edgemed.dicom.series import find_series, open_source
    from edgemed.dicom.slices import DicomSlices

    rules = read_rules(request.select) if request.select is not None else ()
    with open_source(path) as source:
        with _bar(request, len(source.paths), "headers") as step:
            found = find_series(source.paths, keywords=keywords_of(rules), progress=step)
        series, others = choose(found.series, rules, request.series)
        if others:
            _say(request, [f"series {series.summary}"])
            _say(request, [f"other series {s.summary}" for s in others[:_OTHERS_TOLD]])
            if len(others) > _OTHERS_TOLD:
                _say(request, [f"and {len(others) - _OTHERS_TOLD} more series"])
        for file, error in found.failed:
            print(f"edgemed: {str(error).replace(file, source.shown(file))}", file=sys.stderr)
        placed = series.slices[0].place.orientation is not None
        facts = {
            "path": path,
            "series_instance_uid": series.uid,
            "series": series.name,
            "modality": series.modality,
            "plane": plane_of(series.slices[0].place) if placed else None,
            "slices": len(series.slices),
        }
        slices = DicomSlices(series, reader, request.window, source.shown)
        yield Opened(slices, series.verdict, facts, len(found.failed), named(series.study_uid, path))


def _run(path: str, opened: Opened, prompt: Prompt, request: Request, session: Session, outputs: SeriesOutputs) -> int:
    """Return how many slices failed, after the results of one prompt are written."""
    from edgemed.volume import Journal, SliceRun, question_key, series_to_json

    options = request.infer_options()

    def ask(scan: Scan, asked: Prompt) -> Answer:
        return session.ask((scan,), asked, options)

    more = {
        "bundle": session.bundle.digest,
        "window": request.window,
        "series": opened.facts.get("series"),
        "examples": list(request.examples),
        "tokens": request.tokens,
    }
    stem = outputs.stem_of(path)
    kept = None if outputs.folder is None else outputs.folder / f"{stem}.slices.jsonl"
    with (
        Journal(kept, question_key(prompt, options, more)) as journal,
        SliceRun(opened.slices, ask, prompt, journal, tokens=request.tokens) as run,
    ):
        with _bar(request, 0, "slices") as step:
            run.ask_slices(request.slices or "auto", step)
        summary = series_to_json(run, opened.verdict, prompt, resample=request.resample, **opened.facts)
        outputs.write(run, opened, prompt, summary, stem, session.notice(prompt.language))
        return len(run.failed)


class SeriesOutputs:
    """Where the results of series go: stdout, files of -o, --to, --overlay and --panels, entries of --report."""

    def __init__(self, request: Request, stem_of: Callable[[str], str], entries: list[dict[str, Any]]) -> None:
        self._request, self.stem_of, self._entries = request, stem_of, entries
        self._results = ResultFiles(request, stem_of)
        self.folder = None if request.folder is None else Path(request.folder)

    def write(
        self, run: SliceRun, opened: Opened, prompt: Prompt, summary: dict[str, Any], stem: str, notice: str
    ) -> None:
        """Print the answers and the summary and write the files that were asked for.

        Raises CannotWrite, and what writing the files of --to raises.
        """
        request = self._request
        written: list[Path] = []
        keeps_json = self.folder is not None and (not request.to or "json" in request.to)
        for index, record in run.answers():
            if request.json:
                sys.stdout.write(_line(record))
            if request.overlay or request.panels or request.report is not None:
                written += self._draw(index, record, opened, prompt, stem, notice)
        results: list[Path] = []
        if keeps_json and request.to:
            results.append(self._keep(stem, run, summary))
        results += self._results.of_series(run, opened, prompt, stem, notice)
        told = {**summary, "results": [str(file) for file in results]} if request.to else summary
        sys.stdout.write(_line(told) if request.json else to_table(summary, prompt, notice) + wrote(results))
        sys.stdout.flush()
        if keeps_json and not request.to:
            written.append(self._keep(stem, run, summary))
        if written or results:
            from edgemed import audit

            kinds = request.to or [*("json",) * keeps_json, *("png",) * (request.overlay or request.panels)]
            audit.record(audit.exported([opened.study], "infer", kinds))
        _say(request, summary["notes"])
        if not request.quiet:
            for file in written:
                print(f"wrote {file}", file=sys.stderr)

    def _keep(self, stem: str, run: SliceRun, summary: dict[str, Any]) -> Path:
        from edgemed.files import write_atomically

        assert self.folder is not None
        file = self.folder / f"{stem}.series.jsonl"

        def write(stream: IO[bytes]) -> None:
            for _, record in run.answers():
                stream.write(_line(record).encode())
            stream.write(_line(summary).encode())

        write_atomically(file, write)
        return file

    def _draw(
        self, index: int, record: dict[str, Any], opened: Opened, prompt: Prompt, stem: str, notice: str
    ) -> list[Path]:
        from edgemed import report
        from edgemed.volume import to_answer

        request = self._request
        scan, answer = opened.slices.read(index), to_answer(record)
        asked = replace(prompt, frame=scan.first_frame, regions=())
        written: dict[str, Path] = {}
        for kind, wanted, draw in (
            ("overlay", request.overlay, report.write_overlay),
            ("panels", request.panels, report.write_panels),
        ):
            if wanted and answer.regions:
                written[kind] = (self.folder or Path(".")) / f"{stem}.{index:04d}.{kind}.png"
                draw(answer, scan, asked, written[kind], notice=notice)
        if request.report is not None:
            source = opened.slices.file(index)
            self._entries.append(report.to_run_report(answer, scan, asked, source=source, outputs=written))
        return list(written.values())


def to_table(summary: dict[str, Any], prompt: Prompt, notice: str) -> str:
    """Return the summary as text: one line about the series, one for each structure, the notice."""
    from edgemed.report.words import cells, printable

    structure, slices, volume, nothing = WORDS[prompt.language]
    spacing = (summary["verdict"]["spacing_mm"] or [None])[0]
    apart = "" if spacing is None else f", {spacing:.2f} mm"
    plane = f" {summary['plane']}" if summary["plane"] else ""
    asked = f"{len(summary['asked'])}/{summary['slices']}"
    head = f"{summary['modality']}{plane}{apart}, {summary['verdict']['kind']}, {slices} {asked}"
    rows = [(structure, slices, volume)] + [
        (
            " ".join(printable(s["label"]).split()),
            _ranges(s["slices"]),
            "-" if s["volume_ml"] is None else f"{s['volume_ml']:.1f} ml",
        )
        for s in summary["structures"]
    ]
    widths = [max(cells(row[i]) for row in rows) for i in range(3)]
    table = ["  ".join(t + " " * (w - cells(t)) for t, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    body = "\n".join(table) if summary["structures"] else nothing
    blocks = [head, body, " ".join(printable(notice).split())]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers with runs shortened.

    >>> _ranges([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"


def _say(request: Request, notes: Sequence[str]) -> None:
    if not request.quiet:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)


@contextmanager
def _bar(request: Request, total: int, label: str) -> Iterator[Callable[..., None]]:
    """Give a function (steps) or (done, total) that moves a bar with the time that is left; on terminals only."""
    hidden = request.quiet or not sys.stderr.isatty()
    with click.progressbar(length=max(total, 1), label=label, file=sys.stderr, hidden=hidden) as bar:

        def step(done: int, expected: int | None = None) -> None:
            if expected is None:
                bar.update(done)
            else:
                bar.length = max(expected, 1)
                bar.update(max(done - bar.pos, 0))

        yield step
