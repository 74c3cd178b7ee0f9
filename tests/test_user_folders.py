"""Where a user's own files lie on each platform."""

from pathlib import Path

import pytest

from edgemed.user_folders import Kind, own_folder

HOME = Path("/of/a/user")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("EDGEMED_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "APPDATA", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", lambda: HOME)


@pytest.mark.parametrize(
    ("platform", "settings", "data", "cache"),
    [
        ("linux", ".config", ".local/share", ".cache"),
        ("freebsd14", ".config", ".local/share", ".cache"),
        ("darwin", ".config", "Library/Application Support", "Library/Caches"),
        ("win32", "AppData/Roaming", "AppData/Local", "AppData/Local"),
    ],
)
def test_each_platform_has_its_places(
    monkeypatch: pytest.MonkeyPatch, platform: str, settings: str, data: str, cache: str
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    assert own_folder("settings") == HOME / settings / "edgemed"
    assert own_folder("data") == HOME / data / "edgemed"
    assert own_folder("cache") == HOME / cache / "edgemed"


@pytest.mark.parametrize(
    ("platform", "kind", "variable"),
    [
        ("linux", "settings", "XDG_CONFIG_HOME"),
        ("linux", "data", "XDG_DATA_HOME"),
        ("linux", "cache", "XDG_CACHE_HOME"),
        ("win32", "settings", "APPDATA"),
        ("win32", "data", "LOCALAPPDATA"),
        ("win32", "cache", "LOCALAPPDATA"),
    ],
)
def test_a_variable_names_the_place(monkeypatch: pytest.MonkeyPatch, platform: str, kind: Kind, variable: str) -> None:
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setenv(variable, "/elsewhere")
    assert own_folder(kind) == Path("/elsewhere/edgemed")
    monkeypatch.setenv(variable, "")
    assert own_folder(kind).is_relative_to(HOME)


def test_one_variable_moves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEMED_HOME", "/all/of/it")
    monkeypatch.setenv("XDG_DATA_HOME", "/elsewhere")
    kinds: tuple[Kind, ...] = ("settings", "data", "cache")
    assert {own_folder(kind) for kind in kinds} == {Path("/all/of/it")}
