"""`edgemed infer`: scans and questions in, answers out.

Covers options, the order of work, and where results go. The scan is read by a child process while this one opens the
bundle, so the two waits overlap. Several inputs or questions share one session: an image is encoded once.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemed.cli.verbs import debug_option, describe
from edgemed.errors import BackendUnavailable, BatchPartlyFailed, BundleError, CannotWrite, EdgemedError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from edgemed.core import Answer, Language, Prompt, PromptRegion, Scan
    from edgemed.dicom import Reader
    from edgemed.infer import DecodeMode, Session


@dataclass(frozen=True)
class Request:
    """The options of `edgemed infer`, under the names they have on the command line."""

    inputs: tuple[str, ...]
    prompts: tuple[str, ...]
    regions: tuple[str, ...] = ()
    bundle: str = "nano"
    backend: str = "auto"
    device: str = "auto"
    allow_cpu: bool = False
    lang: str = "auto"
    frame: int = 0
    window: str | None = None
    decode: DecodeMode = "auto"
    no_grammar: bool = False
    tokens: bool = False
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    folder: str | None = None
    overlay: bool = False
    json: bool = False
    report: str | None = None
    quiet: bool = False


def check_device(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    """Return `value` if it is auto, cpu, gpu or gpu:N; raises click.BadParameter."""
    kind, colon, number = value.partition(":")
    if value in ("auto", "cpu", "gpu") or (kind == "gpu" and colon and number.isdecimal()):
        return value
    raise click.BadParameter(f"{value!r} is not auto, cpu, gpu or gpu:N.")


@click.command("infer", short_help="Ask about scans.")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--prompt", "prompts", multiple=True, required=True, metavar="TEXT", help="The question; repeatable.")
@click.option(
    "--region",
    "regions",
    multiple=True,
    metavar="REGION",
    help="A place that is asked about, in pixels of the shown frame; repeatable. "
    "box:x0,y0,x1,y1 or point:x,y or mask:FILE.png",
)
@click.option("--bundle", default="nano", show_default=True, metavar="NAME|FOLDER", help="The model to ask.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "onnxruntime", "tensorrt", "torch"]),
    default="auto",
    show_default=True,
    help="The engine that runs the graphs.",
)
@click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|gpu|gpu:N", callback=check_device, help="Where."
)
@click.option("--allow-cpu", is_flag=True, help="Use the CPU if the GPU that was asked for is not there.")
@click.option(
    "--lang",
    type=click.Choice(["auto", "en", "zh"]),
    default="auto",
    show_default=True,
    help="Language of the answer; auto: that of the question.",
)
@click.option("--frame", type=click.IntRange(min=0), default=0, show_default=True, help="Frame of a multi-frame file.")
@click.option(
    "--window", metavar="PRESET|CENTER,WIDTH", help="Grey levels to show: a preset (lung, bone, brain ...) or numbers."
)
@click.option(
    "--decode",
    type=click.Choice(["auto", "plain"]),
    default="auto",
    show_default=True,
    help="plain: one token a step, the reference for every faster way.",
)
@click.option("--no-grammar", is_flag=True, help="Let the model write what it likes.")
@click.option("--tokens", is_flag=True, help="Add prompt_ids and generated_ids to the JSON.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Longest answer.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: always the likeliest token."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="For a temperature above 0.")
@click.option("-o", "folder", metavar="FOLDER", help="Write NAME.answer.json of each input there, made if missing.")
@click.option("--overlay", is_flag=True, help="Write NAME.overlay.png into FOLDER (default: the current one).")
@click.option("--json", is_flag=True, help="Print JSON, one line per answer, instead of text.")
@click.option("--report", metavar="FILE", help="Write what ran on what (versions, digests, timings) as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No notes on stderr; errors stay.")
@debug_option
def command(**options: Any) -> None:
    """Ask about scans: an answer in words, boxes and pixel masks.

    INPUT is a DICOM file, a PNG or a JPEG. Results go to stdout, notes to stderr. With several inputs the command goes
    on after one that fails and ends with exit code 87.
    """
    run(Request(**options))


def run(request: Request) -> None:
    """Answer every prompt about every input.

    Raises the error of a single input; BatchPartlyFailed if some of several inputs failed, each then told on stderr.
    """
    from edgemed.dicom import Reader

    _keep_libraries_quiet()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # answers may be Chinese, and a JSON line is always UTF-8
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    outputs = Outputs(request)
    failed = 0
    with Reader() as reader:
        reader.start()
        opening = _open_in_background(request)
        for path in request.inputs:
            started = time.perf_counter()
            try:
                scan = reader.read(path, frame=request.frame, window=request.window)
                prompts = _prompts(request, scan, reader)
            except (EdgemedError, MemoryError) as error:
                failed += _tell(error, path, request)
                continue
            read_ms = (time.perf_counter() - started) * 1000
            session = opening.result()
            try:
                for prompt in prompts:
                    answer = _ask(session, scan, prompt, request, started, read_ms)
                    outputs.write(answer, scan, prompt, path, notice=session.notice(prompt.language))
                    started, read_ms = time.perf_counter(), 0.0  # a second question does not read the scan again
            except (BundleError, BackendUnavailable, CannotWrite):
                raise  # the next input would end in the same
            except (EdgemedError, MemoryError) as error:
                failed += _tell(error, path, request)
    outputs.finish()
    if failed:
        raise BatchPartlyFailed(f"{failed} of {len(request.inputs)} inputs failed; each is told above")


def _keep_libraries_quiet() -> None:
    """Silence warnings and log lines of libraries: they may quote values of a file."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger().addHandler(logging.NullHandler())


def _open_in_background(request: Request) -> Future[Session]:
    """Return the session to be: the bundle is opened in a thread while the first scan is read."""
    from concurrent.futures import ThreadPoolExecutor

    def open_it() -> Session:
        from edgemed.infer import open_session

        return open_session(
            bundle=request.bundle, backend=request.backend, device=request.device, allow_cpu=request.allow_cpu
        )

    pool = ThreadPoolExecutor(1, thread_name_prefix="open-session")
    future = pool.submit(open_it)
    pool.shutdown(wait=False)
    return future


def _prompts(request: Request, scan: Scan, reader: Reader) -> list[Prompt]:
    """Return the questions with the regions they are about, checked against the scan."""
    from edgemed.cli.regions import read_region
    from edgemed.core import Prompt
    from edgemed.language import answer_language

    regions: tuple[PromptRegion, ...] = tuple(read_region(text, scan, reader.read) for text in request.regions)
    chosen: dict[str, Language] = {"en": "en", "zh": "zh"}
    return [
        Prompt(text, regions, chosen.get(request.lang) or answer_language(text), request.frame)
        for text in request.prompts
    ]


def _ask(session: Session, scan: Scan, prompt: Prompt, request: Request, started: float, read_ms: float) -> Answer:
    """Return the answer; its timings also tell reading and the time from `started` on."""
    from edgemed.infer import InferOptions

    options = InferOptions(
        decode=request.decode,
        grammar=not request.no_grammar,
        max_new_tokens=request.max_new_tokens,
        temperature=request.temperature,
        seed=request.seed,
    )
    answer = session.ask(scan, prompt, options)
    total_ms = (time.perf_counter() - started) * 1000
    timings = {"read": read_ms, **answer.provenance.timings_ms, "total": total_ms}
    return replace(answer, provenance=replace(answer.provenance, timings_ms=timings))


def _tell(error: BaseException, path: str, request: Request) -> int:
    """Return 1 after telling on stderr that one of several inputs failed; raises `error` if it is the only input."""
    if len(request.inputs) == 1:
        raise error
    line, code = describe(error)
    place = "" if path in line else f"{path}: "
    print(f"edgemed: {place}{line} (code {code})", file=sys.stderr)
    return 1


class Outputs:
    """Where answers go: stdout, files of -o and --overlay, entries of --report."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._folder = Path(request.folder or ".")
        self._entries: list[dict[str, Any]] = []
        self._stems = _unused_stems()
        if request.folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CannotWrite(f"cannot make the folder {request.folder}: {error.strerror or 'refused'}") from error

    def write(self, answer: Answer, scan: Scan, prompt: Prompt, path: str, *, notice: str) -> None:
        """Print one answer and write the files that were asked for; raises CannotWrite."""
        from edgemed import report

        request = self._request
        stem = self._stems(path)
        written: dict[str, Path] = {}
        if request.overlay:
            written["overlay"] = self._folder / f"{stem}.overlay.png"
            report.write_overlay(answer, scan, prompt, written["overlay"], notice=notice)
        line = ""
        if request.json or request.folder is not None:
            line = _json_line(report.to_json(answer, scan, prompt, path=path, with_tokens=request.tokens))
        if request.folder is not None:
            from edgemed.files import write_atomically

            written["json"] = self._folder / f"{stem}.answer.json"
            write_atomically(written["json"], line.encode())
        if request.report is not None:
            self._entries.append(report.to_run_report(answer, scan, prompt, source=path, outputs=written))
        sys.stdout.write(line if request.json else self._text(answer, scan, prompt, path, notice))
        sys.stdout.flush()  # a reader of JSON Lines gets each answer when it is there
        if not request.quiet:
            for note in answer.notes:
                print(f"note: {note}", file=sys.stderr)
            for file in written.values():
                print(f"wrote {file}", file=sys.stderr)

    def finish(self) -> None:
        """Write the report of the run, if one was asked for."""
        if self._request.report is not None:
            from edgemed import report

            report.write_run_report(self._request.report, self._entries)

    def _text(self, answer: Answer, scan: Scan, prompt: Prompt, path: str, notice: str) -> str:
        from edgemed import report

        text = report.to_text(answer, scan, prompt, notice=notice)
        several = len(self._request.inputs) * len(self._request.prompts) > 1
        return f"== {path}: {prompt.text}\n{text}\n" if several else text


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
