"""Full-precision training: sources -> samples -> features -> stages -> checkpoint. Needs the extra `edgemed[train]`."""

from __future__ import annotations

from pathlib import Path

__all__ = ["run"]


def run(recipe: Path, records: Path | None = None, packages: Path | None = None) -> Path:
    """Train what `recipe` (TOML) describes and return the checkpoint folder. Resumes where an earlier run stopped.

    records, packages: folders to use in place of the recipe's; relative ones are taken from the working folder.
    """
    from edgemed.training.recipe import read_recipe, with_folders
    from edgemed.training.stages import run_stages

    return run_stages(with_folders(read_recipe(recipe), records, packages))
