"""`edgemed infer`: scans and questions in, answers out.

Covers options, the order of work, and where results go. The scan is read by a child process while this one opens the
bundle, so the two waits overlap. Several inputs or questions share one session: an image is encoded once.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemed.cli.options import (
    Asking,
    family_options,
    keep_libraries_quiet,
    model_options,
    result_options,
    series_options,
    shown_options,
    writing_options,
)
from edgemed.cli.results import ResultFiles, check_results, check_source, wrote
from edgemed.cli.series import SeriesOutputs, is_series, run_series
from edgemed.cli.verbs import debug_option, describe
from edgemed.errors import BackendUnavailable, BatchPartlyFailed, BundleError, CannotWrite, EdgemedError, InvalidInput

if TYPE_CHECKING:
    from concurrent.futures import Future

    from edgemed.core import Answer, Example, Prompt, PromptRegion, Scan, Turn
    from edgemed.dicom import Reader
    from edgemed.infer import Session


@dataclass(frozen=True, kw_only=True)
class Request(Asking):
    """The options of `edgemed infer`, under the names they have on the command line."""

    inputs: tuple[str, ...]
    prompts: tuple[str, ...]
    regions: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    examples_from: str | None = None
    top: int = 3
    tokens: bool = False
    folder: str | None = None
    to: tuple[str, ...] = ()
    labelmap: bool = False
    seg_full_frames: bool = False
    nrrd: bool = False
    overlay: bool = False
    panels: bool = False
    router: str | None = None
    series: str | None = None
    select: str | None = None
    slices: str | None = None
    resample: bool = False
    together: bool = False
    chat: bool = False
    json: bool = False
    report: str | None = None


@click.command("infer", short_help="Ask about scans.")
@click.argument("inputs", nargs=-1, metavar="[INPUT...]")
@click.option("--prompt", "prompts", multiple=True, required=True, metavar="TEXT", help="The question; repeatable.")
@click.option(
    "--region",
    "regions",
    multiple=True,
    metavar="REGION",
    help="A place that is asked about, in pixels of the shown frame; repeatable. "
    "box:x0,y0,x1,y1 or point:x,y or mask:FILE.png",
)
@click.option(
    "--example",
    "examples",
    multiple=True,
    metavar="IMAGE=MASK.png",
    help="An image with what is to be outlined in it, shown before the question (families that take examples); "
    "repeatable. The mask has the size of its image and is where it is not black.",
)
@click.option(
    "--examples-from",
    metavar="INDEX=FOLDER",
    help="Examples, too: those images of an index (edgemed index build --masks) that are most like the INPUT; FOLDER "
    "is what the paths in the index are relative to.",
)
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="How many of --examples-from.")
@click.option("--together", is_flag=True, help="Ask about all inputs in one question.")
@click.option("--chat", is_flag=True, help="The prompts are turns of one conversation.")
@series_options
@family_options
@model_options
@shown_options
@writing_options
@click.option("--tokens", is_flag=True, help="Add prompt_ids and generated_ids to the JSON.")
@click.option(
    "-o",
    "folder",
    metavar="FOLDER",
    help="Write NAME.answer.json of each input there, or what --to lists; made if missing.",
)
@result_options
@click.option("--overlay", is_flag=True, help="Write NAME.overlay.png into FOLDER (default: the current one).")
@click.option("--panels", is_flag=True, help="Write NAME.panels.png: image, mask and both, side by side.")
@click.option("--router", metavar="FILE", help="Write which expert each token went to (mixtures of experts), as JSON.")
@click.option("--json", is_flag=True, help="Print JSON, one line per answer, instead of text.")
@click.option("--report", metavar="FILE", help="Write what ran on what (versions, digests, timings) as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No notes on stderr; errors stay.")
@debug_option
def command(**options: Any) -> None:
    """Ask about scans: an answer in words, boxes and pixel masks.

    INPUT is a DICOM file, a PNG, a JPEG or a TIFF; some families also answer without one. A folder, DICOMDIR, zip
    archive or volume (NIfTI, NRRD, MetaImage) is a series: its slices are asked one by one and what they show is put
    together. Results go to stdout, notes to stderr. With several inputs the command goes on after one that fails and
    ends with exit code 87.
    """
    from edgemed import audit
    from edgemed.cli.results import default_kinds

    request = Request(**options)
    if not request.to and request.folder is not None and not (request.together or request.chat):
        request = replace(request, to=default_kinds())
    with audit.application("infer"):
        run(request)


def run(request: Request) -> None:
    """Answer every prompt about every input.

    Raises the error of a single input; BatchPartlyFailed if some of several inputs failed, each then told on stderr.
    """
    from edgemed import audit
    from edgemed.dicom import Reader

    keep_libraries_quiet()
    check_results(request)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # answers may be Chinese, and a JSON line is always UTF-8
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    outputs = Outputs(request)
    failed = 0
    groups = [request.inputs] if request.together or not request.inputs else [(path,) for path in request.inputs]
    with Reader() as reader:
        reader.start()
        opening = _open_in_background(request)
        examples = _examples(request, reader)
        nearest = _nearest_examples(request, reader)
        for paths in groups:
            started = time.perf_counter()
            if any(is_series(path, request) for path in paths):
                try:
                    run_series(paths[0], request, reader, opening, examples, outputs.series)
                except (BundleError, BackendUnavailable, CannotWrite):
                    raise
                except (EdgemedError, MemoryError) as error:
                    failed += _tell(error, paths, request, groups)
                continue
            try:
                scans = [reader.read(path, frame=request.frame, window=request.window) for path in paths]
                for path in paths:
                    check_source(path, request.to)
                prompts = [replace(p, examples=examples) for p in _prompts(request, scans, reader)]
            except (EdgemedError, MemoryError) as error:
                failed += _tell(error, paths, request, groups)
                continue
            read_ms = (time.perf_counter() - started) * 1000
            session = opening.result()
            history: tuple[Turn, ...] = ()
            audit.record(audit.accessed(_studies(scans, paths), "infer"))
            try:
                similar = nearest(session, scans, paths)
                for prompt in prompts:
                    prompt = replace(prompt, history=history, examples=(*prompt.examples, *similar))
                    if history:  # the regions belong to the turn that they were first asked about in
                        prompt = replace(prompt, regions=())
                    answer = _ask(session, scans, prompt, request, started, read_ms)
                    outputs.write(answer, scans, prompt, paths, notice=session.notice(prompt.language))
                    started, read_ms = time.perf_counter(), 0.0  # a second question does not read the scan again
                    if request.chat:
                        history = (*history, _turn(prompt, answer))
            except (BundleError, BackendUnavailable, CannotWrite):
                raise  # the next input would end in the same
            except (EdgemedError, MemoryError) as error:
                failed += _tell(error, paths, request, groups)
    outputs.finish()
    if failed:
        raise BatchPartlyFailed(f"{failed} of {len(groups)} inputs failed; each is told above")


def _studies(scans: Sequence[Scan], paths: Sequence[str]) -> list[str]:
    """Return what the audit trail records the scans under."""
    from edgemed.audit import named

    return [named(scan.study_instance_uid, path) for scan, path in zip(scans, paths, strict=True)]


def _turn(prompt: Prompt, answer: Answer) -> Turn:
    from edgemed.core import Turn

    return Turn(prompt.text, answer.text, answer.tagged_text, prompt.regions)


def _open_in_background(request: Request) -> Future[Session]:
    """Return the session to be: the bundle is opened in a thread while the first scan is read."""
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(1, thread_name_prefix="open-session")
    future = pool.submit(request.open_session)
    pool.shutdown(wait=False)
    return future


def _examples(request: Request, reader: Reader) -> tuple[Example, ...]:
    """Return the examples, read once for all inputs and shown in their window."""
    if not request.examples:
        return ()
    from edgemed.cli.regions import read_example

    def read_image(path: str) -> Scan:
        return reader.read(path, window=request.window)

    return tuple(read_example(text, read_image, reader.read) for text in request.examples)


def _nearest_examples(
    request: Request, reader: Reader
) -> Callable[[Session, Sequence[Scan], Sequence[str]], tuple[Example, ...]]:
    """Return a function that gives the images of --examples-from most like the first input, never that one itself.

    Raises EdgemedError (usage) if the option has another form or there is no input, and what opening an index raises;
    the function, InvalidInput if another bundle made the index or a file is not the one that was indexed.
    """
    if request.examples_from is None:
        return lambda session, scans, paths: ()
    from edgemed.cli.regions import read_region
    from edgemed.core import Example
    from edgemed.files import sha256_of
    from edgemed.retrieval import Match, open_index

    folder, _, root = request.examples_from.rpartition("=")
    if not (folder and root):
        raise EdgemedError(f"--examples-from {request.examples_from!r} has another form than INDEX=FOLDER")
    if not request.inputs:
        raise EdgemedError("--examples-from was given without an image; an INPUT was expected")
    index = open_index(folder)

    def read(match: Match) -> Example:
        item = match.item
        image = f"{root}/{item.path}"
        if sha256_of(image) != item.sha256:
            raise InvalidInput(f"{image} is not the file that was indexed; build the index anew")
        scan = reader.read(image, frame=item.frame, window=request.window)
        region = read_region(f"mask:{root}/{item.mask}", scan, reader.read)
        assert region.mask is not None
        return Example(scan, region.mask, item.frame)

    def nearest(session: Session, scans: Sequence[Scan], paths: Sequence[str]) -> tuple[Example, ...]:
        own = {sha256_of(path) for path in paths}
        return tuple(map(read, index.find(session, scans[0], request.frame, request.top, own, masked=True)))

    return nearest


def _prompts(request: Request, scans: Sequence[Scan], reader: Reader) -> list[Prompt]:
    """Return the questions with the regions they are about, checked against the first scan."""
    from edgemed.cli.regions import read_region
    from edgemed.core import Prompt

    if request.regions and not scans:
        raise EdgemedError("a region was given without an image; an INPUT was expected")
    regions: tuple[PromptRegion, ...] = tuple(read_region(text, scans[0], reader.read) for text in request.regions)
    settings = request.family_settings()
    return [Prompt(text, regions, request.language(text), request.frame, settings=settings) for text in request.prompts]


def _ask(
    session: Session, scans: Sequence[Scan], prompt: Prompt, request: Request, started: float, read_ms: float
) -> Answer:
    """Return the answer; its timings also tell reading and the time from `started` on."""
    options = request.infer_options(router=request.router is not None)
    answer = session.ask(scans, prompt, options)
    total_ms = (time.perf_counter() - started) * 1000
    timings = {"read": read_ms, **answer.provenance.timings_ms, "total": total_ms}
    return replace(answer, provenance=replace(answer.provenance, timings_ms=timings))


def _tell(error: BaseException, paths: Sequence[str], request: Request, groups: Sequence[Sequence[str]]) -> int:
    """Return 1 after telling on stderr that one of several inputs failed; raises `error` if it is the only one."""
    if len(groups) == 1:
        raise error
    from edgemed.audit import record_refusal

    record_refusal(error, "infer")
    line, code = describe(error)
    place = "" if paths[0] in line else f"{paths[0]}: "
    print(f"edgemed: {place}{line} (code {code})", file=sys.stderr)
    return 1


class Outputs:
    """Where answers go: stdout, files of -o, --to and --overlay, entries of --report."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._folder = Path(request.folder or ".")
        self._entries: list[dict[str, Any]] = []
        self._routed: list[dict[str, Any]] = []
        self._stems = _unused_stems()
        self._results = ResultFiles(request, self._stems)
        self.series = SeriesOutputs(request, self._stems, self._entries)
        if request.folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CannotWrite(f"cannot make the folder {request.folder}: {error.strerror or 'refused'}") from error

    def write(
        self, answer: Answer, scans: Sequence[Scan], prompt: Prompt, paths: Sequence[str], *, notice: str
    ) -> None:
        """Print one answer and write the files that were asked for.

        Raises CannotWrite, and what writing the files of --to raises.
        """
        from edgemed import report

        request = self._request
        path = paths[0] if paths else ""
        scan = scans[0] if scans else None
        stem = self._stems(path or "answer")
        written: dict[str, Path] = {}
        if scan is not None:
            for kind, wanted, draw in (
                ("overlay", request.overlay, report.write_overlay),
                ("panels", request.panels, report.write_panels),
            ):
                if wanted and not (kind == "overlay" and "png" in request.to):  # which is the same picture
                    written[kind] = self._folder / f"{stem}.{kind}.png"
                    draw(answer, scan, prompt, written[kind], notice=notice)
        told: dict[str, Any] = {}
        if request.json or request.folder is not None:
            more = list(zip(scans, paths, strict=True))[1:]
            told = report.to_json(answer, scan, prompt, path=path, more=more, with_tokens=request.tokens)
        results: dict[str, Path] = {}
        if request.folder is not None and (not request.to or "json" in request.to):
            from edgemed.files import write_atomically

            json_files = results if request.to else written
            json_files["json"] = self._folder / f"{stem}.answer.json"
            write_atomically(json_files["json"], _json_line(told).encode())
        if request.to:
            if scan is not None:
                results |= self._results.of_image(answer, scan, prompt, path, stem, notice)
            told["results"] = [str(file) for file in results.values()]
        if request.router is not None:
            self._routed.append(report.to_router_report(answer, prompt))
        if request.report is not None:
            self._entries.append(report.to_run_report(answer, scan, prompt, source=path, outputs=written | results))
        if written or results:
            from edgemed import audit

            audit.record(audit.exported(_studies(scans, paths), "infer", [*written, *results]))
        if request.json:
            sys.stdout.write(_json_line(told))
        else:
            sys.stdout.write(self._text(answer, scan, prompt, path, notice) + wrote([*results.values()]))
        sys.stdout.flush()  # a reader of JSON Lines gets each answer when it is there
        if not request.quiet:
            for note in answer.notes:
                print(f"note: {note}", file=sys.stderr)
            for file in written.values():
                print(f"wrote {file}", file=sys.stderr)

    def finish(self) -> None:
        """Write the report of the run and what the routers said, if they were asked for."""
        if self._request.report is not None:
            from edgemed import report

            report.write_run_report(self._request.report, self._entries)
        if self._request.router is not None:
            import json

            from edgemed.files import write_atomically

            write_atomically(Path(self._request.router), json.dumps(self._routed, indent=1).encode())

    def _text(self, answer: Answer, scan: Scan | None, prompt: Prompt, path: str, notice: str) -> str:
        from edgemed import report

        text = report.to_text(answer, scan, prompt, notice=notice)
        several = max(len(self._request.inputs), 1) * len(self._request.prompts) > 1
        return f"== {path + ': ' if path else ''}{prompt.text}\n{text}\n" if several else text


def _json_line(answer: dict[str, Any]) -> str:
    import json

    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")) + "\n"


def _unused_stems() -> Callable[[str], str]:
    """Return a function path -> file stem that gives no stem twice: scan, scan-2, scan-3 ..."""
    used: set[str] = set()

    def candidates(stem: str) -> Iterator[str]:
        yield stem
        number = 2
        while True:
            yield f"{stem}-{number}"
            number += 1

    def stem_of(path: str) -> str:
        name = Path(path).name
        stem = name.rsplit(".", 1)[0] if name.lower().endswith((".dcm", ".dicom", ".png", ".jpg", ".jpeg")) else name
        free = next(s for s in candidates(stem or "scan") if s not in used)
        used.add(free)
        return free

    return stem_of
