"""`edgemed export`: a checkpoint in, a bundle of ONNX graphs out, compared with torch before anything is kept."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from edgemed.cli.extras import need
from edgemed.cli.progress import Progress
from edgemed.cli.verbs import debug_option
from edgemed.errors import CannotRead, EdgemedError

FORMATS = click.Choice(["auto", "fp32", "fp16", "bf16", "int8", "int4"])


@click.command("export", short_help="Make a bundle from a checkpoint.")
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("-o", "output", required=True, metavar="BUNDLE", help="Folder to write.")
@click.option("--name", metavar="NAME", help="Name of the bundle (default: the checkpoint's folder).")
@click.option("--slices", metavar="FOLDER", help="Scans to compare on (default: some inside the pydicom package).")
@click.option(
    "--target",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    default="onnxruntime",
    show_default=True,
    help="What the graphs are for; tensorrt: standard operators only, strongly typed.",
)
@click.option(
    "--decoder",
    type=FORMATS,
    default="auto",
    show_default=True,
    help="How the decoder's matrices are stored; fp32 is exact. auto: fp16 for tensorrt; for onnxruntime int8 of a "
    "native checkpoint, else fp32.",
)
@click.option("--vision", type=FORMATS, default="auto", show_default=True, help="The same for the vision encoder.")
@click.option(
    "--block", type=click.IntRange(min=16), metavar="N", help="Weights that share a scale (int8: 32, int4: 64)."
)
@click.option("--compat", metavar="NAME", help="Default of the bundle: reference, corrected or release-cli.")
@click.option("--cache", type=click.IntRange(min=16), metavar="TOKENS", help="Longest prompt and answer together.")
@click.option(
    "--extra",
    "extra",
    multiple=True,
    metavar="PREFIX=FILE",
    help="Tensors from a file beside the folder, their names after PREFIX; repeatable.",
)
@click.option(
    "--compare/--no-compare", "compare", default=None, help="Compare with torch (default: if the memory allows it)."
)
@click.option("--replace", is_flag=True, help="Replace an older bundle in that folder.")
@click.option("-q", "--quiet", is_flag=True, help="No notes and no progress on stderr.")
@debug_option
def command(checkpoint: str, output: str, extra: tuple[str, ...], quiet: bool, **options: Any) -> None:
    """Turn the folder CHECKPOINT (native, MedRegA or MedPLIB) into a bundle of ONNX graphs.

    Fails, and writes nothing, if the graphs do not compute what torch does. A conversion that is interrupted goes on
    where it was when the same command is given again.
    """
    if not Path(checkpoint).exists():
        raise CannotRead(f"cannot read {checkpoint}: there is no such file or folder; a checkpoint was expected")
    need(("torch", "onnx", "onnxscript", "onnxruntime"), "export", "export")
    from edgemed.calibration.weight_only import quantize_weights
    from edgemed.export import ExportOptions, export_bundle

    def tell(line: str) -> None:
        if not quiet:
            print(f"note: {line}", file=sys.stderr)

    with Progress(shown=not quiet) as progress:
        bundle = export_bundle(
            Path(checkpoint),
            Path(output),
            ExportOptions(
                **{**options, "slices": Path(options["slices"]) if options["slices"] else None},
                extra=dict(_file_of(text) for text in extra),
                progress=partial(progress.to, "weights"),
                shrink=lambda model: quantize_weights(model)[0],
                tell=tell,
            ),
        )
    print(f"wrote {bundle.path}, sha256 {bundle.digest}")


def _file_of(text: str) -> tuple[str, Path]:
    prefix, equals, file = text.partition("=")
    if not (equals and file):
        raise EdgemedError(f"--extra {text!r} has another form than PREFIX=FILE")
    return prefix, Path(file)
