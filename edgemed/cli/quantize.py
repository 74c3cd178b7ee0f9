"""`edgemed quantize`: a bundle in, a smaller bundle out, judged on slices that it was not made with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edgemed.cli.extras import need
from edgemed.cli.progress import Progress
from edgemed.cli.verbs import debug_option
from edgemed.errors import CannotRead, InvalidInput

_SHARE = click.FloatRange(-1, 1)


@click.command("quantize", short_help="Make a smaller bundle from a bundle.")
@click.argument("bundle", metavar="BUNDLE")
@click.option("-o", "output", required=True, metavar="BUNDLE2", help="Folder to write.")
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    metavar="NAME|PLAN.toml",
    help="int8, fp8, int4 (the decoder's weights; int8 elsewhere), auto (the smallest that passes), or a file.",
)
@click.option(
    "--slices",
    is_flag=False,
    flag_value="",
    metavar="[FOLDER]",
    help="Scans to calibrate and judge on; without a folder, public ones inside pydicom (the default).",
)
@click.option("--calibrate", type=click.IntRange(1), default=8, show_default=True, metavar="N", help="Slices measured.")
@click.option("--held-out", type=click.IntRange(1), default=4, show_default=True, metavar="N", help="Slices judged on.")
@click.option(
    "--method",
    type=click.Choice(["minmax", "percentile", "entropy"]),
    default="minmax",
    show_default=True,
    help="Where activations are clipped; minmax, nowhere, lost least on nano.",
)
@click.option(
    "--block", type=click.IntRange(16), default=32, show_default=True, metavar="N", help="4-bit weights per scale."
)
@click.option(
    "--kv-cache",
    "cache",
    type=click.Choice(["fp32", "int8"]),
    default="fp32",
    show_default=True,
    help="The decoder's keys and values; int8: a quarter of the memory, for onnxruntime alone.",
)
@click.option("--min-cosine", type=_SHARE, default=0.999, show_default=True, help="Of each output in int8 or fp8.")
@click.option("--min-iou", type=_SHARE, default=0.90, show_default=True, help="Mean IoU of boxes of the same prompt.")
@click.option("--min-dice", type=_SHARE, default=0.97, show_default=True, help="Mean Dice of masks of the same prompt.")
@click.option("--min-same-text", type=_SHARE, help="Share of answers with the same text (native: 0.95, others: 0).")
@click.option("--max-new-tokens", type=click.IntRange(1), default=96, show_default=True, metavar="N")
@click.option("--name", metavar="NAME", help="Name of the bundle (default: the same).")
@click.option("--replace", is_flag=True, help="Replace an older bundle in that folder.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads (default: one for each core).")
@click.option("-q", "--quiet", is_flag=True, help="No notes and no progress on stderr.")
@debug_option
def command(bundle: str, output: str, precision: str, slices: str | None, quiet: bool, **options: Any) -> None:
    """Write BUNDLE with smaller graphs to BUNDLE2.

    Activations are measured on slices, and the answers are compared with those of BUNDLE on other slices. Where they
    are too far apart, nodes of a named precision keep theirs until they are not; if that does not help, nothing is
    written. The plan that was used, what every output lost and how answers agree are reports of the new bundle.
    """
    need(("onnx", "onnxruntime"), "quantize", "export")
    from edgemed.calibration.gates import Gates
    from edgemed.calibration.plan import plan_from_toml
    from edgemed.calibration.quantize_bundle import TABLE, QuantizeOptions, quantize_bundle

    wanted: Any = precision
    if precision.endswith(".toml"):
        try:
            wanted = plan_from_toml(Path(precision).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CannotRead(f"cannot read {precision}; a plan in TOML was expected") from error
    elif precision not in ("int8", "fp8", "int4", "auto"):
        raise InvalidInput(f"precision is {precision!r}; int8, fp8, int4, auto or a file PLAN.toml was expected")
    gates = Gates(
        options.pop("min_cosine"), options.pop("min_iou"), options.pop("min_dice"), options.pop("min_same_text")
    )

    def tell(line: str) -> None:
        if not quiet:
            print(f"note: {line}", file=sys.stderr)

    with Progress(shown=not quiet) as progress:
        made = quantize_bundle(
            bundle,
            Path(output),
            wanted,
            QuantizeOptions(
                slices=Path(slices) if slices else None, gates=gates, tell=tell, progress=progress.to, **options
            ),
        )
    if precision == "auto" and TABLE in made.manifest.files:
        print(made.file(TABLE).read_text(encoding="utf-8"))
    print(f"wrote {made.path}, sha256 {made.digest}")
