"""`edgemed train`: a recipe file in, a checkpoint out."""

from __future__ import annotations

from pathlib import Path

import click

from edgemed.cli.extras import need
from edgemed.cli.verbs import debug_option
from edgemed.errors import CannotRead


@click.command("train", short_help="Train from a recipe.")
@click.argument("recipe", metavar="RECIPE")
@debug_option
def command(recipe: str) -> None:
    """Train what the file RECIPE (TOML) describes, in full precision; prints the checkpoint's folder.

    A run that was stopped goes on where it was. A GPU is used if there is one; for many, start this with
    `accelerate launch -m edgemed train RECIPE`.
    """
    if not Path(recipe).is_file():
        raise CannotRead(f"cannot read {recipe}: there is no such file; a recipe in TOML was expected")
    need(("torch", "safetensors", "accelerate", "matplotlib", "nibabel"), "train", "train")
    from edgemed.training import run

    print(run(Path(recipe)))
