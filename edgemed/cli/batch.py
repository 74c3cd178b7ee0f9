"""`edgemed batch`: every question of a file asked, or one question about every study of a folder or query.

Covers options, the order of work and progress; `edgemed.batch` and `edgemed.serve.batch` do the work. The whole file of
questions is checked before anything is opened or asked.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edgemed.cli.options import (
    Asking,
    check_kinds,
    family_options,
    keep_libraries_quiet,
    model_options,
    shown_options,
    writing_options,
)
from edgemed.cli.verbs import debug_option
from edgemed.errors import BatchPartlyFailed, CannotRead, EdgemedError

if TYPE_CHECKING:
    from edgemed.batch import AnswerFile, Lines
    from edgemed.questions import Question
    from edgemed.serve.batch import Counts, Study
    from edgemed.serve.settings import NodeSettings

FORMATS = ("edgemed", "medrega", "medrega-t2r", "medplib-vqa")
"""As `edgemed.batch.FORMATS`, which is not imported for a help text."""


_STUDIES_ONLY = ("prompt", "to", "select", "slices", "config", "send", "workers")
_STUDIES_TOO = ("questions", "output", "limit", "resume", "bundle", "device", "lang", "window", "quiet", *_STUDIES_ONLY)
_QUERY = re.compile(r"[A-Za-z0-9_-]+:[A-Za-z]+=")
_SHOWN_ERRORS = 20


@dataclass(frozen=True, kw_only=True)
class Request(Asking):
    """The options of `edgemed batch`, under the names they have on the command line."""

    questions: str
    output: str
    images: str | None = None
    format: str = "edgemed"
    answer_type: str = "closed"
    shard: tuple[int, int] = (1, 1)
    resume: bool = False
    limit: int | None = None
    own_history: bool = False
    no_examples: bool = False
    prompt: str | None = None
    to: tuple[str, ...] = ()
    select: str | None = None
    slices: str = "auto"
    config: str | None = None
    send: tuple[str, ...] = ()
    workers: int | None = None


def check_shard(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    """Return (I, N) of "I/N" with I from 1 to N; raises click.BadParameter."""
    number, slash, count = value.partition("/")
    if slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise click.BadParameter(f"{value!r} is not I/N with I from 1 to N.")


@click.command("batch", short_help="Ask every question of a file, or about every study of a folder.")
@click.argument("questions", metavar="QUESTIONS|FOLDER|QUERY")
@click.option(
    "-o",
    "output",
    required=True,
    metavar="FILE|FOLDER",
    help="The answers, one line for each question; of studies, a folder of results for each.",
)
@click.option("--prompt", metavar="TEXT", help="Studies: what is asked about each.")
@click.option(
    "--to",
    multiple=True,
    callback=check_kinds,
    metavar="KIND,...",
    help="Studies: json, seg, sr, gsps, sc, pdf, nifti, fhir, png (default: results.to of the configuration; seg,sr).",
)
@click.option("--select", metavar="FILE", help="Studies: selection rules, the JSON of MONAI Deploy's series selector.")
@click.option(
    "--slices", default="auto", show_default=True, metavar="auto|middle|all|every:N|LIST", help="Studies: which slices."
)
@click.option(
    "--config",
    metavar="FILE",
    help="Studies: the node's TOML file, whose targets QUERY and --send name; default: [serve] of the configuration.",
)
@click.option("--send", multiple=True, metavar="TARGET", help="Studies: where DICOM results are sent, too; repeatable.")
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Studies: inference processes on --device. Default: one for each GPU, else one.",
)
@click.option("--images", metavar="FOLDER", help="Where the paths in QUESTIONS start (default: the folder it lies in).")
@click.option(
    "--format",
    type=click.Choice(FORMATS),
    default="edgemed",
    show_default=True,
    help="Of the answers: our JSON Lines, or what the authors' evaluators read.",
)
@click.option(
    "--answer-type",
    type=click.Choice(["closed", "open"]),
    default="closed",
    show_default=True,
    help="Of questions without one, in format medplib-vqa.",
)
@click.option("--own-history", is_flag=True, help="Earlier turns have the model's answers, not those of QUESTIONS.")
@click.option("--no-examples", is_flag=True, help="Do not show the icl_examples of QUESTIONS.")
@click.option(
    "--shard",
    default="1/1",
    show_default=True,
    metavar="I/N",
    callback=check_shard,
    help="Of N processes, this is number I: it takes every N-th row.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N rows, or studies.")
@click.option("--resume", is_flag=True, help="Go on after the answers that FILE has; studies always do.")
@family_options
@model_options
@shown_options
@writing_options
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr; errors stay.")
@debug_option
def command(**options: Any) -> None:
    """Ask every question of the file QUESTIONS: JSON Lines or a JSON list of {image, conversations}.

    Or ask --prompt about every study of a FOLDER (DICOMDIR, zip), or of those that an archive has for a QUERY as
    pacs:StudyDate=20261122,ModalitiesInStudy=CT; results go to FOLDER/STUDY. The same command again goes on where it
    was left, and asks again what failed.

    A question or study that fails is told, and the command then ends with exit code 87.
    """
    request = Request(**options)
    ctx = click.get_current_context()
    by_name = {str(p.name): p.opts[0] for p in ctx.command.params}
    given = [name for name in options if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    about_studies = _is_studies(request.questions)
    others = set(options) - set(_STUDIES_TOO) if about_studies else set(_STUDIES_ONLY)
    wrong = [name for name in given if name in others]
    if wrong:
        what = "studies; it is for a file of questions" if about_studies else "a file of questions; it is for studies"
        raise EdgemedError(f"{by_name[wrong[0]]} was given with {what}")
    from edgemed import audit

    with audit.application("batch"):
        (run_studies if about_studies else run)(request)


def _is_studies(path: str) -> bool:
    """Tell whether this is a folder, DICOMDIR, archive or query, not a file of questions."""
    if os.path.isdir(path) or os.path.basename(path).upper() == "DICOMDIR":
        return True
    if not os.path.exists(path):
        return _QUERY.match(path) is not None
    from edgemed.dicom.series import is_source

    return is_source(path)


def run_studies(request: Request) -> None:
    """Write the results of every study.

    Raises EdgemedError (usage), BundleError, what finding the studies raises; BatchPartlyFailed with the counts.
    """
    from edgemed.cli.extras import need
    from edgemed.serve.batch import Batch
    from edgemed.serve.store import Store
    from edgemed.serve.worker import open_workers

    if _needs_node(request):
        need(("pynetdicom", "dicomweb_client"), "serve", "batch with targets")
    settings = _settings(request)
    keep_libraries_quiet()
    failures: list[str] = []

    def tell(uid: str, error: str | None) -> None:
        if error is not None:
            failures.append(uid)
            if len(failures) <= _SHOWN_ERRORS:
                print(f"edgemed: {f'study {uid}: ' if uid else ''}{error}", file=sys.stderr)

    with _studies(request, settings) as (studies, total, unreadable):
        for file, problem in unreadable[:_SHOWN_ERRORS]:
            print(f"edgemed: {file}: {problem}", file=sys.stderr)
        workers = open_workers(settings)
        hidden = request.quiet or not sys.stderr.isatty()
        try:
            with (
                Store(settings, results=Path(request.output)) as store,
                click.progressbar(studies, length=total, label="studies", file=sys.stderr, hidden=hidden) as shown,
            ):
                counts = Batch(store, workers, tell).run(shown)
        finally:
            for worker in workers:
                worker.close()
    if not request.quiet:
        again = f" ({counts.done_before} before)" if counts.done_before else ""
        done = counts.done + counts.done_before
        print(f"wrote {request.output}: {done} studies{again}, {counts.results} results", file=sys.stderr)
    _raise_for(request, counts, len(unreadable))


def _raise_for(request: Request, counts: Counts, unreadable: int) -> None:
    told = [
        f"{count} {what}"
        for count, what in (
            (counts.failed, f"of {counts.studies} studies failed"),
            (unreadable, "files could not be read"),
            (counts.unsent, "results could not be sent"),
        )
        if count
    ]
    if told:
        raise BatchPartlyFailed(f"{' and '.join(told)}; the same command tries them again")


def _needs_node(request: Request) -> bool:
    """Tell whether the targets of a node are named."""
    return bool(request.config or request.send or not os.path.exists(request.questions))


def _settings(request: Request) -> NodeSettings:
    """Return the settings of the journal in the folder of results, with the one rule of this question."""
    import json

    from edgemed.bundle import open_bundle
    from edgemed.cli.results import default_kinds
    from edgemed.dicom.select import read_rules
    from edgemed.serve.batch import JOURNAL, batch_rule
    from edgemed.serve.settings import NodeSettings, Rule, read_settings

    if not request.prompt:
        raise EdgemedError("--prompt is missing; the question about each study was expected")
    select = {}
    if request.select is not None:
        read_rules(request.select)  # says what is wrong with it
        rules = json.loads(Path(request.select).read_bytes())["selections"]
        if len(rules) != 1:
            raise EdgemedError(f"{request.select} has {len(rules)} selections; one was expected for a batch")
        select = rules[0]
    rule = Rule(
        "batch",
        request.prompt,
        request.to or default_kinds() or ("seg", "sr"),
        request.send,
        select=select,
        language=request.lang,
        slices=request.slices,
        window=request.window,
        bundle=request.bundle,
    )
    rule = batch_rule(rule, open_bundle(request.bundle).digest)
    folder = Path(request.output) / JOURNAL
    given = request.device != "auto" or request.workers is not None
    own: dict[str, Any] = {
        "folder": folder,
        "rules": (rule,),
        "retry_seconds": 1.0,
        "max_attempts": 3,
        "workers": (request.device,) * (request.workers or 1) if given else (),
    }
    if not _needs_node(request):
        return NodeSettings(**own)
    return replace(read_settings(request.config), **own)


@contextmanager
def _studies(
    request: Request, settings: NodeSettings
) -> Iterator[tuple[Iterable[Study], int, tuple[tuple[str, EdgemedError], ...]]]:
    """Give (the studies, how many they are, files that could not be read)."""
    from edgemed.serve.batch import studies_in, studies_of

    if not os.path.exists(request.questions):
        from edgemed.serve.pull import parse_query

        query = parse_query(request.questions, settings)
        uids = query.studies(settings, request.limit or _MOST_STUDIES)
        yield studies_of(query, uids, settings), len(uids), ()
        return
    from edgemed.dicom.series import open_source

    results = os.path.realpath(request.output)
    with open_source(request.questions) as source:
        paths = [p for p in source.paths if not os.path.realpath(p).startswith(results + os.sep)]
        hidden = request.quiet or not sys.stderr.isatty()
        with click.progressbar(length=len(paths), label="headers", file=sys.stderr, hidden=hidden) as bar:
            studies, failed = studies_in(paths, bar.update)
        studies = studies[: request.limit]
        yield studies, len(studies), tuple((source.shown(path), error) for path, error in failed)


_MOST_STUDIES = 1_000_000


def run(request: Request) -> None:
    """Write the answers file.

    Raises what the file of questions, the answers file or the bundle ends in; BatchPartlyFailed if lines of the answers
    file, earlier ones too, have an error.
    """
    from edgemed.batch import AnswerFile, Lines
    from edgemed.questions import Shard, read_questions

    folder = Path(request.images if request.images is not None else Path(request.questions).parent)
    if not folder.is_dir():
        raise CannotRead(f"cannot read {folder}: there is no such folder; the folder of the images was expected")

    def questions() -> Iterator[Question]:
        return read_questions(request.questions, Shard(*request.shard), request.limit)

    total = sum(1 for _ in questions())  # and nothing is asked of a file that is no file of questions
    lines = Lines(request.format, folder, request.answer_type)
    with AnswerFile(request.output, lines, resume=request.resume) as answers:
        left = answers.left(questions())
        if answers.answered < total:
            hidden = request.quiet or not sys.stderr.isatty()
            with click.progressbar(length=total - answers.answered, file=sys.stderr, hidden=hidden) as bar:
                for _ in _asked(request, left, answers, lines):
                    bar.update(1)
    if not request.quiet:
        print(f"wrote {request.output}: {answers.answered} answers", file=sys.stderr)
    if answers.failed:
        raise BatchPartlyFailed(
            f"{answers.failed} of {answers.answered} questions failed; each has an 'error' in {request.output}"
        )


def _asked(request: Request, left: Iterable[Question], answers: AnswerFile, lines: Lines) -> Iterator[None]:
    """Yield after each question that was answered and written."""
    from edgemed import audit
    from edgemed.batch import Asker, Manner, settings_for
    from edgemed.cli.regions import read_region
    from edgemed.core import PromptRegion, Scan
    from edgemed.dicom import Reader

    keep_libraries_quiet()
    options = request.infer_options()
    studies: dict[str, None] = {}  # those that were read, each recorded once
    with Reader() as reader:
        reader.start()

        def read(path: str) -> Scan:
            scan = reader.read(path, frame=request.frame, window=request.window)
            study = audit.named(scan.study_instance_uid, path)
            if study not in studies:
                audit.record(audit.accessed([study], "batch"))
                studies[study] = None
            return scan

        def read_mask(path: str, scan: Scan) -> PromptRegion:
            return read_region(f"mask:{path}", scan, reader.read)

        with request.open_session() as session:
            manner = Manner(
                language=request.language,
                settings=settings_for(lines, session, request.family_settings()),
                options=options,
                frame=request.frame,
                own_history=request.own_history,
                examples=not request.no_examples,
            )
            asker = Asker(session, lines.folder, manner, read, read_mask)
            for question in left:
                answers.write(asker.ask(question))
                yield
    audit.record(audit.exported(studies, "batch", [request.format]))
