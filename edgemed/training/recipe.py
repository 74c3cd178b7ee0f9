"""Recipe: what one training run does, read from TOML. Every key has a default; an unknown key is an error."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from edgemed.errors import CannotRead, InvalidInput


@dataclass(frozen=True)
class Data:
    """Where the pictures are and how many samples to make of them.

    packages: folder that `recipes/fetch_packages.py` fills. records: folder with `records.jsonl`, or "" for none.
    plan: samples to draw from each source. most: stop after that many of the plan's random order, 0 for all.
    """

    packages: str = "packages"
    records: str = ""
    plan: dict[str, int] = field(default_factory=dict)
    most: int = 0


@dataclass(frozen=True)
class Structures:
    """Stage 1: steps, batch size, peak learning rate, how often a group's samples are shown in one pass (default 1)."""

    steps: int = 2600
    batch: int = 4
    rate: float = 1.5e-3
    repeat: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Language:
    """Stage 2: steps, pictures a step, question-answer turns a picture, peak learning rate."""

    steps: int = 2400
    batch: int = 4
    turns: int = 6
    rate: float = 1.5e-3


@dataclass(frozen=True)
class Masks:
    """Stage 3: steps of one picture, prompts a picture, peak learning rate of the published weights."""

    steps: int = 1200
    prompts: int = 4
    rate: float = 1e-4


@dataclass(frozen=True)
class Recipe:
    """One training run. `folder` gets the cache, the stages' states, the log, the curves and the checkpoint."""

    name: str
    folder: str
    seed: int = 1
    data: Data = field(default_factory=Data)
    structures: Structures = field(default_factory=Structures)
    language: Language = field(default_factory=Language)
    masks: Masks = field(default_factory=Masks)
    base: Path = Path(".")

    def path(self, relative: str) -> Path:
        """Return a path of the recipe, relative ones taken from the recipe file's folder."""
        return (self.base / Path(relative).expanduser()).resolve()


def _fill(kind: type[Any], values: dict[str, Any], where: str) -> Any:
    known = {f.name: f for f in fields(kind) if f.name != "base"}
    if unknown := sorted(set(values) - set(known)):
        raise InvalidInput(f"recipe key {where}{unknown[0]} is unknown; expected one of {', '.join(sorted(known))}")
    return kind(**values)


def with_folders(recipe: Recipe, records: Path | None, packages: Path | None) -> Recipe:
    """Return the recipe with other data folders where they are given.

    Raises CannotRead if one of them is not a folder, or `records` holds no records.jsonl.
    """
    for folder in (records, packages):
        if folder is not None and not folder.is_dir():
            raise CannotRead(f"cannot read {folder}: there is no such folder")
    if records is not None and not (records / "records.jsonl").is_file():
        raise CannotRead(f"cannot read {records}: records.jsonl was expected in it")
    given = {"records": records, "packages": packages}
    changed: dict[str, Any] = {key: str(folder.resolve()) for key, folder in given.items() if folder is not None}
    return replace(recipe, data=replace(recipe.data, **changed))


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in a TOML file. Raises CannotRead or InvalidInput naming the file or the key."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CannotRead(f"recipe {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidInput(f"recipe {path} is not TOML: {error}") from error
    parts = {"data": Data, "structures": Structures, "language": Language, "masks": Masks}
    for key, kind in parts.items():
        values[key] = _fill(kind, values.get(key, {}), f"{key}.")
    if "name" not in values or "folder" not in values:
        raise InvalidInput(f"recipe {path} lacks `name` or `folder`")
    recipe: Recipe = _fill(Recipe, values, "")
    return replace(recipe, base=path.resolve().parent)
