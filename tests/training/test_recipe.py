"""Recipes: every key is known, paths are the recipe's own, data folders can be given."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemed.errors import CannotRead, InvalidInput
from edgemed.training.recipe import Recipe, read_recipe, with_folders

NANO = Path(__file__).resolve().parents[2] / "recipes" / "nano.toml"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_what_is_not_said_has_a_default(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, 'name = "x"\nfolder = "run"\n[masks]\nsteps = 3\n'))
    assert recipe == Recipe("x", "run", base=tmp_path, masks=recipe.masks)
    assert (recipe.masks.steps, recipe.masks.prompts) == (3, 4)
    assert recipe.path("run") == tmp_path / "run"
    assert recipe.path("/abc") == Path("/abc")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('name = "x"\nfolder = "y"\nsteps = 3', "recipe key steps is unknown"),
        ('name = "x"\nfolder = "y"\n[masks]\nstep = 3', "recipe key masks.step is unknown"),
        ('name = "x"\nfolder = "y"\n[data]\nplans = 3', "recipe key data.plans is unknown; expected one of most,"),
        ('name = "x"\nfolder = "y"\nbase = "/"', "recipe key base is unknown"),
        ('name = "x"', "lacks `name` or `folder`"),
        ("name = ", "is not TOML"),
    ],
)
def test_a_wrong_recipe_is_told_by_its_key(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_recipe(write(tmp_path, text))
    assert told in str(caught.value)


def test_a_missing_recipe_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CannotRead, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")


def test_data_folders_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe(write(tmp_path, 'name = "x"\nfolder = "run"\n[data]\nmost = 7\nrecords = "a"\n'))
    assert with_folders(recipe, None, None) == recipe
    monkeypatch.chdir(tmp_path)
    for name in ("pictures", "packages"):
        (tmp_path / name).mkdir()
    (tmp_path / "pictures" / "records.jsonl").touch()
    other = with_folders(recipe, Path("pictures"), Path("packages"))
    assert recipe.path(other.data.records) == tmp_path / "pictures"
    assert recipe.path(other.data.packages) == tmp_path / "packages"
    assert other.data.most == 7


def test_data_folders_must_be_there(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, 'name = "x"\nfolder = "run"\n'))
    with pytest.raises(CannotRead, match="there is no such folder"):
        with_folders(recipe, None, tmp_path / "none")
    with pytest.raises(CannotRead, match=r"records\.jsonl was expected"):
        with_folders(recipe, tmp_path, None)


def test_the_recipe_of_nano_names_no_folder_outside_the_project() -> None:
    recipe = read_recipe(NANO)
    assert recipe.data.records == ""
    for relative in (recipe.folder, recipe.data.packages):
        assert recipe.path(relative).is_relative_to(NANO.parents[1])
    assert sum(recipe.data.plan.values()) >= recipe.data.most > 0
