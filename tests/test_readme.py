"""The README says what is: its commands parse, its scripts exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from edgemed.cli.verbs import group

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^    (?:\$ )?edgemed (.+)$", README, re.MULTILINE)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_parses(example: str) -> None:
    verb, *arguments = shlex.split(example.split(" > ")[0])
    with click.Context(group) as ctx:
        command = group.get_command(ctx, verb)
        assert command is not None
        command.make_context(verb, arguments, parent=ctx)  # parses and checks the options, runs nothing


def test_both_commands_are_one_line_and_their_scripts_exist() -> None:
    scripts = re.findall(r"^    python3 (packaging/\w+\.py)$", README, re.MULTILINE)
    assert scripts == ["packaging/demo.py", "packaging/check.py"]
    assert all((ROOT / script).is_file() for script in scripts)


def test_ci_runs_exactly_the_second_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == "exec python3 packaging/check.py"


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "DECISIONS.md"])
def test_links_and_named_paths_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:tests|packaging|recipes|edgemed)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path
