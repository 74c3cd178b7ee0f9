"""`edgemed export`: a checkpoint in, a bundle of ONNX graphs out, compared with torch before anything is kept."""

from __future__ import annotations

from pathlib import Path

import click

from edgemed.cli.extras import need
from edgemed.cli.verbs import debug_option
from edgemed.errors import CannotRead


@click.command("export", short_help="Make a bundle from a checkpoint.")
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("-o", "output", required=True, metavar="BUNDLE", help="Folder to write.")
@click.option("--name", metavar="NAME", help="Name of the bundle (default: the checkpoint's folder).")
@click.option("--slices", metavar="FOLDER", help="Scans to compare on (default: some inside the pydicom package).")
@click.option(
    "--decoder", type=click.Choice(["int8", "fp32"]), default="int8", show_default=True, help="The decoder's weights."
)
@click.option("--replace", is_flag=True, help="Replace an older bundle in that folder.")
@debug_option
def command(checkpoint: str, output: str, name: str | None, slices: str | None, decoder: str, replace: bool) -> None:
    """Turn the folder CHECKPOINT into a bundle of ONNX graphs.

    Fails, and writes nothing, if the graphs do not compute what torch does.
    """
    if not Path(checkpoint).exists():
        raise CannotRead(f"cannot read {checkpoint}: there is no such file or folder; a checkpoint was expected")
    need(("torch", "onnx", "onnxscript", "onnxruntime"), "export", "export")
    from edgemed.calibration.weight_only import quantize_weights
    from edgemed.export import export_bundle

    bundle = export_bundle(
        Path(checkpoint),
        Path(output),
        name=name,
        slices=Path(slices) if slices else None,
        shrink_decoder=(lambda model: quantize_weights(model)[0]) if decoder == "int8" else None,
        replace=replace,
    )
    print(f"wrote {bundle.path}, sha256 {bundle.digest}")
