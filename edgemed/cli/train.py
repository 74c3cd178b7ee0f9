"""`edgemed train`: a recipe file in, a checkpoint out."""

from __future__ import annotations

from pathlib import Path

import click

from edgemed.cli.extras import need
from edgemed.cli.verbs import debug_option
from edgemed.errors import CannotRead


@click.command("train", short_help="Train from a recipe.")
@click.argument("recipe", metavar="RECIPE")
@click.option("--records", metavar="FOLDER", help="A folder with records.jsonl, in place of the recipe's.")
@click.option("--packages", metavar="FOLDER", help="What fetch_packages.py filled, in place of the recipe's.")
@debug_option
def command(recipe: str, records: str | None, packages: str | None) -> None:
    """Train what the file RECIPE (TOML) describes; prints the checkpoint's folder.

    Weights are float32, products bfloat16.

    A run that was stopped goes on where it was. A GPU is used if there is one; for many, start this with
    `accelerate launch -m edgemed train RECIPE`.
    """
    if not Path(recipe).is_file():
        raise CannotRead(f"cannot read {recipe}: there is no such file; a recipe in TOML was expected")
    need(("torch", "safetensors", "accelerate", "matplotlib", "nibabel"), "train", "train")
    from edgemed.training import run
    from edgemed.training.device import is_main_process

    checkpoint = run(Path(recipe), Path(records) if records else None, Path(packages) if packages else None)
    if is_main_process():
        print(checkpoint)
