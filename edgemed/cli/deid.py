"""`edgemed deid`: copies of DICOM files without what tells who the patient is."""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import TYPE_CHECKING

import click

from edgemed.cli.progress import Progress
from edgemed.cli.verbs import debug_option
from edgemed.errors import BatchPartlyFailed, EdgemedError

if TYPE_CHECKING:
    from edgemed.dicom.deid import Box


def check_box(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[Box, ...]:
    """Return regions written as x,y,w,h; raises click.BadParameter."""
    boxes: list[Box] = []
    for text in value:
        parts = text.split(",")
        if len(parts) != 4 or not all(part.strip().isdecimal() for part in parts):
            raise click.BadParameter(f"{text!r} has another form than x,y,w,h in pixels.")
        x, y, width, height = (int(part) for part in parts)
        boxes.append((x, y, width, height))
    return tuple(boxes)


@click.command("deid", short_help="Copy DICOM files without the patient's identity.")
@click.argument("inputs", nargs=-1, required=True, metavar="IN...")
@click.option("-o", "--out", required=True, metavar="FOLDER", help="Where the copies and deid.json go.")
@click.option("--key", "key_file", metavar="FILE", help="Same new UIDs, pseudonyms and shifts in every run; made if "
              "it is not there. Who has it can tell which file became which.")  # fmt: skip
@click.option("--retain-uids", is_flag=True, help="Keep UIDs.")
@click.option("--retain-dates", type=click.Choice(["full", "modified"]), help="Keep dates, or shift each patient's.")
@click.option("--retain-patient", is_flag=True, help="Keep age (to 90), sex, size, weight and the like.")
@click.option("--retain-device", is_flag=True, help="Keep station names, serial numbers and the like.")
@click.option("--retain-institution", is_flag=True, help="Keep the institution's name and address.")
@click.option("--retain-safe-private", is_flag=True, help="Keep the private numbers that the standard calls safe.")
@click.option("--clean-descriptors", is_flag=True, help="Keep the medical words of descriptions instead of nothing.")
@click.option("--clean-content", is_flag=True, help="Keep codes, numbers and references of structured reports.")
@click.option("--clean-graphics", is_flag=True, help="Keep drawn lines and outlines, without their texts.")
@click.option("--blank", multiple=True, callback=check_box, metavar="x,y,w,h",
              help="Overwrite this region in every frame; repeatable. The copy is not compressed.")  # fmt: skip
@click.option("--clean-pixel-data", is_flag=True, help="State that --blank covers all text in the pixels: you looked.")
@click.option("--json", "as_json", is_flag=True, help="Print the report.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no warnings.")
@debug_option
def command(
    inputs: tuple[str, ...],
    out: str,
    key_file: str | None,
    blank: tuple[Box, ...],
    as_json: bool,
    quiet: bool,
    retain_dates: str | None,
    **options: bool,
) -> None:
    """Write copies of DICOM files from which names, ids, dates, UIDs and free texts are gone.

    IN is a file, a folder, a DICOMDIR or a zip archive. The rules are the Basic Application Level Confidentiality
    Profile of DICOM PS3.15 Annex E, the options those of its section E.3; which ones were used is written into every
    copy. Text inside of pixels is not found: look at what the warnings name. Exit code 87: some files were refused.
    """
    from edgemed.dicom.deid import REPORT, Profile, deidentify, read_key

    def tell(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr)

    def refuse(path: str, error: EdgemedError) -> None:
        tell(f"refused: {path}: {error}")

    profile = Profile(retain_dates=retain_dates or "", **options)
    key = None if key_file is None else read_key(key_file)
    with Progress(shown=not quiet) as progress:
        step = partial(progress.to, "De-identifying")
        report = deidentify(inputs, out, profile, key, blank=blank, progress=step, on_refusal=refuse)
    for file in report["files"]:
        for warning in file["warnings"]:
            tell(f"warning: {file['file']}: {warning}")
    written, refused = len(report["files"]), report["refused"]
    if as_json:
        print(json.dumps(report, ensure_ascii=False, separators=(",", ":")))
    else:
        print(f"{written} written, {len(refused)} refused, {report['passed_over']} no DICOM; {out}/{REPORT}")
    if refused:
        raise BatchPartlyFailed(
            f"{len(refused)} of {written + len(refused)} files were refused; {out}/{REPORT} tells why"
        )
