"""`edgemed eval`: the quality of a bundle on labelled images, through the same session that answers users."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgemed.cli.extras import need
from edgemed.cli.verbs import debug_option
from edgemed.errors import CannotRead, EdgemedError

if TYPE_CHECKING:
    from edgemed.evaluation import Evaluation

C = TypeVar("C", bound=Callable[..., Any])


def common_options(function: C) -> C:
    """Add the options that both kinds of evaluation share."""
    for option in (
        debug_option,
        click.option("-q", "--quiet", is_flag=True, help="No progress on stderr."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON with every sample instead of tables."),
        click.option("-o", "output", metavar="STEM", help="Write STEM.json and STEM.md, too."),
        click.option("--bundle", default="nano", show_default=True, metavar="NAME|FOLDER", help="What is measured."),
    ):
        function = option(function)
    return function


@click.group("eval", short_help="Quality on labelled images.")
def command() -> None:
    """Measure the quality of a bundle: boxes, masks, names, absent structures, both languages, modality.

    Every mean has a 95 % bootstrap interval over slices or patients.
    """


@command.command("series")
@click.argument("folder", metavar="FOLDER")
@click.argument("labels", metavar="LABELS")
@click.option("--every", type=click.IntRange(min=1), default=1, show_default=True, help="Every n-th slice only.")
@common_options
def series(folder: str, labels: str, every: int, bundle: str, output: str | None, as_json: bool, quiet: bool) -> None:
    """Measure on the DICOM slices in FOLDER with the NIfTI label map LABELS of the same grid."""
    for path in (folder, labels):
        if not Path(path).exists():
            raise CannotRead(f"cannot read {path}: there is no such file or folder")
    need(("nibabel", "onnxruntime"), "cpu,train", "eval")
    from edgemed.evaluation import evaluate_test_series
    from edgemed.infer import open_session

    with open_session(bundle=bundle) as session:
        evaluation = evaluate_test_series(
            session, Path(folder), Path(labels), every=every, progress=None if quiet else _progress
        )
    _tell(evaluation, output, as_json)


@command.command("records")
@click.argument("records", metavar="RECORDS")
@click.option(
    "--split",
    type=click.Choice(["test", "all"]),
    default="test",
    show_default=True,
    help="test: what the recipe of `nano` holds out, by patient (needs edgemed[train]).",
)
@click.option("--limit", type=click.IntRange(min=1), help="At most so many records of each source.")
@common_options
def records(
    records: str, split: str, limit: int | None, bundle: str, output: str | None, as_json: bool, quiet: bool
) -> None:
    """Measure on the pictures that the file RECORDS (records.jsonl) lists, beside which they lie."""
    path = Path(records)
    if not path.is_file():
        raise CannotRead(f"cannot read {records}: there is no such file; a records.jsonl was expected")
    choose = _choice(split)
    from edgemed.evaluation import evaluate_records
    from edgemed.infer import open_session

    with open_session(bundle=bundle) as session:
        evaluation = evaluate_records(
            session, path, path.parent, choose, limit=limit, progress=None if quiet else _progress
        )
    _tell(evaluation, output, as_json)


@command.command("confidence")
@click.option(
    "--records", metavar="FILE", help="Pictures of a records.jsonl: those that the recipe of `nano` holds out."
)
@click.option("--series", nargs=2, metavar="FOLDER LABELS", help="DICOM slices and a NIfTI label map of the same grid.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many records of each source.")
@click.option("--every", type=click.IntRange(min=1), default=1, show_default=True, help="Every n-th slice only.")
@common_options
def confidence(
    records: str | None, series: tuple[str, str] | None, limit: int | None, every: int, bundle: str,
    output: str | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Measure how true the scores of boxes are, and fit them.

    Writes STEM.json and STEM.png (the reliability plot). Beside the weights of a checkpoint, as confidence.json, they
    go into the bundles that are made of it.
    """
    if records is None and series is None:
        raise EdgemedError("eval confidence needs --records, --series or both")
    for part in (*(() if records is None else (records,)), *(series or ())):
        if not Path(part).exists():
            raise CannotRead(f"cannot read {part}: there is no such file or folder")
    need(("matplotlib",), "train", "eval confidence")
    from edgemed.box_confidence import to_markdown
    from edgemed.box_evaluation import boxes_of_records, boxes_of_series, judge, to_json, write_confidence
    from edgemed.infer import open_session

    samples = []
    progress = None if quiet else _progress
    with open_session(bundle=bundle) as session:
        if records is not None:
            path = Path(records)
            samples += boxes_of_records(session, path, path.parent, _choice("test"), limit=limit, progress=progress)
        if series is not None:
            folder, labels = map(Path, series)
            samples += boxes_of_series(session, folder, labels, every=every, progress=progress)
    report = judge(samples)
    if output is not None:
        for file in write_confidence(report, Path(output)):
            print(f"wrote {file}", file=sys.stderr)
    found = to_json(report)
    click.echo(json.dumps(found) + "\n" if as_json else to_markdown(found), nl=False)


def _choice(split: str) -> Callable[[Mapping[str, Any]], bool]:
    """Return whether a record is evaluated on, by the name of the split."""
    if split == "all":
        return lambda record: True
    need(("torch",), "train", "eval records --split test")
    from edgemed.training.sources import record_split

    return lambda record: record_split(record) == split


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _tell(evaluation: Evaluation, output: str | None, as_json: bool) -> None:
    """Print the tables, or the JSON, and write both if that was asked for."""
    from edgemed.evaluation import summary, to_markdown, write_evaluation

    if output is not None:
        for file in write_evaluation(evaluation, Path(output)):
            print(f"wrote {file}", file=sys.stderr)
    text = json.dumps(summary(evaluation), ensure_ascii=False) + "\n" if as_json else to_markdown(evaluation)
    click.echo(text, nl=False)
