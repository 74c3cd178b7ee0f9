"""Full-precision training: sources -> samples -> features -> stages -> checkpoint. Needs the extra `edgemed[train]`."""

from __future__ import annotations

from pathlib import Path

__all__ = ["run"]


def run(recipe: Path) -> Path:
    """Train what `recipe` (TOML) describes and return the checkpoint folder. Resumes where an earlier run stopped."""
    from edgemed.training.recipe import read_recipe
    from edgemed.training.stages import run_stages

    return run_stages(read_recipe(recipe))
