"""The papers for hospital IT say what is so: tests, files, commands, keys and exit codes that they name are there."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import click
import pytest

from edgemed import config, errors
from edgemed.cli import verbs

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "packaging" / "papers"
PAPERS = sorted(FOLDER.glob("*.md"))
MADE_AT_BUILD = {"SOUP.md", "SHA256SUMS"}


def text_of(paper: Path) -> str:
    return paper.read_text("utf-8")


@cache
def functions(file: Path) -> frozenset[str]:
    """Return the names of the functions in a file."""
    tree = ast.parse(file.read_text("utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_the_papers_are_there_and_short() -> None:
    names = {"site-guide.md", "site-guide.zh.md", "threat-model.md", "hazards.md", "security-statement.md", "mds2.md"}
    names.add("inputs.md")
    assert {paper.name for paper in PAPERS} == names
    assert not [paper.name for paper in PAPERS if len(text_of(paper).splitlines()) >= 250]


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.name)
def test_every_test_that_is_named_exists(paper: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text_of(paper))
    assert paper.name not in ("hazards.md", "inputs.md") or len(named) > 40
    assert not [f"{file}::{test}" for file, test in named if test not in functions(ROOT / file)]


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.name)
def test_every_file_that_is_named_exists(paper: Path) -> None:
    text = text_of(paper)
    named = re.findall(r"`((?:edgemed|packaging|tests|calibration|export)/[\w./-]+)`", text)
    linked = [name for name in re.findall(r"\]\(([\w.-]+)\)", text) if name not in MADE_AT_BUILD]
    assert not [name for name in named if not (ROOT / name).exists()]
    assert not [name for name in linked if not (FOLDER / name).exists()]


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.name)
def test_every_command_and_option_that_is_named_exists(paper: Path) -> None:
    for line in re.findall(r"(?:`|^ {4})edgemed ((?:[a-z]|--).*?)(?:`|$)", text_of(paper), re.MULTILINE):
        verb, *words = line.split()
        command: click.Command = verbs.group
        if verb != "VERB":
            command = importlib.import_module(f"edgemed.cli.{verb}").command
        while isinstance(command, click.Group) and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        options = {name for parameter in command.params for name in parameter.opts}
        unknown = {word for word in words if re.fullmatch(r"--[a-z][a-z-]*", word)} - options - {"--help"}
        assert not unknown, f"edgemed {line}"


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.name)
def test_every_setting_that_is_named_exists(paper: Path) -> None:
    known = {setting.name for setting in config.SETTINGS}
    variables = {setting.variable for setting in config.SETTINGS} | {"EDGEMED_CONFIG", "EDGEMED_HOME"}
    text = text_of(paper)
    assert set(re.findall(r"`((?:bundles|audit)\.[a-z_]+)`", text)) <= known
    assert set(re.findall(r"\bEDGEMED_[A-Z_]+", text)) <= variables


@pytest.mark.parametrize("name", ["site-guide.md", "site-guide.zh.md"])
def test_every_exit_code_is_explained_and_no_other(name: str) -> None:
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", text_of(FOLDER / name), re.MULTILINE)}
    classes = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.EdgemedError)
    ]
    assert told == {0, verbs.INTERRUPTED, *(kind.exit_code for kind in classes)}


def test_both_guides_have_the_same_commands_and_headings() -> None:
    english, chinese = (text_of(FOLDER / name) for name in ("site-guide.md", "site-guide.zh.md"))
    for pattern in (r"^ {4}.*$", r"^#+ ", r"^\| `?[a-z]+\.", r"^\| \d+ "):
        assert re.findall(pattern, english, re.MULTILINE) == re.findall(pattern, chinese, re.MULTILINE)


def test_what_the_security_statement_says_was_not_tested_is_said() -> None:
    text = text_of(FOLDER / "security-statement.md")
    assert "## What was not tested" in text
    for word in ("penetration", "GPU", "Windows", "vulnerability scan"):
        assert word in text.partition("## What was not tested")[2]
