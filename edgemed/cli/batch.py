"""`edgemed batch`: every question of a file asked, one line of an answers file each.

Covers options, the order of work and progress; `edgemed.batch` does the work. The whole file is checked before anything
is opened or asked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemed.cli.options import (
    Asking,
    family_options,
    keep_libraries_quiet,
    model_options,
    shown_options,
    writing_options,
)
from edgemed.cli.verbs import debug_option
from edgemed.errors import BatchPartlyFailed, CannotRead

if TYPE_CHECKING:
    from edgemed.batch import AnswerFile, Lines
    from edgemed.questions import Question

FORMATS = ("edgemed", "medrega", "medrega-t2r", "medplib-vqa")
"""As `edgemed.batch.FORMATS`, which is not imported for a help text."""


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


def check_shard(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    """Return (I, N) of "I/N" with I from 1 to N; raises click.BadParameter."""
    number, slash, count = value.partition("/")
    if slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise click.BadParameter(f"{value!r} is not I/N with I from 1 to N.")


@click.command("batch", short_help="Ask every question of a file.")
@click.argument("questions", metavar="QUESTIONS")
@click.option("-o", "output", required=True, metavar="FILE", help="The answers, one line for each question.")
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
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N rows of QUESTIONS.")
@click.option("--resume", is_flag=True, help="Go on after the answers that FILE has.")
@family_options
@model_options
@shown_options
@writing_options
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr; errors stay.")
@debug_option
def command(**options: Any) -> None:
    """Ask every question of the file QUESTIONS: JSON Lines or a JSON list of {image, conversations}.

    A question that fails has an error in its line; the command then ends with exit code 87.
    """
    run(Request(**options))


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
    from edgemed.batch import Asker, Manner, settings_for
    from edgemed.cli.regions import read_region
    from edgemed.core import PromptRegion, Scan
    from edgemed.dicom import Reader

    keep_libraries_quiet()
    options = request.infer_options()
    with Reader() as reader:
        reader.start()

        def read(path: str) -> Scan:
            return reader.read(path, frame=request.frame, window=request.window)

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
