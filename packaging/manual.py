"""Write the man page and the completions of a wheel's command line: what click knows, nothing typed by hand.

    python packaging/manual.py edgemed-0.1.0-py3-none-any.whl FOLDER

FOLDER gets man/man1/edgemed.1 and completions/edgemed.{bash,zsh,fish}. Needs click and the wheel, which is not
installed: verbs import their libraries when they run.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import get_completion_class

NAME = "edgemed"


def main() -> None:
    """Write the files of the wheel and into the folder that the command line names."""
    wheel, folder = (Path(argument).resolve() for argument in sys.argv[1:])
    sys.path.insert(0, str(wheel))
    from edgemed import __version__
    from edgemed.cli.verbs import group

    (folder / "man" / "man1").mkdir(parents=True, exist_ok=True)
    page = "\n".join(man_page(group, __version__)) + "\n"
    (folder / "man" / "man1" / f"{NAME}.1").write_text(page, encoding="utf-8")
    (folder / "completions").mkdir(exist_ok=True)
    for shell in ("bash", "zsh", "fish"):
        of = get_completion_class(shell)
        assert of is not None
        script = of(group, {}, NAME, f"_{NAME.upper()}_COMPLETE")
        source = script.source_template % script.source_vars()
        (folder / "completions" / f"{NAME}.{shell}").write_text(source, encoding="utf-8")


def man_page(group: click.Group, version: str) -> Iterator[str]:
    """Yield the lines of a page in roff: the group, then every verb and its own verbs."""
    day = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    ctx = click.Context(group, info_name=NAME, **group.context_settings)
    yield f'.TH {NAME.upper()} 1 "{day}" "{NAME} {version}"'
    yield from (".SH NAME", f"{NAME} \\- {_escape((group.help or '').splitlines()[0].rstrip('.'))}")
    yield from (".SH SYNOPSIS", _synopsis(ctx), ".SH OPTIONS", *_options(ctx), ".SH VERBS")
    yield from _verbs(ctx)
    yield from (".SH NOTES", _escape(group.epilog or ""))


def _verbs(parent: click.Context) -> Iterator[str]:
    group = parent.command
    assert isinstance(group, click.Group)
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        assert command is not None
        ctx = click.Context(command, info_name=name, parent=parent, **command.context_settings)
        yield f".SS {_escape(ctx.command_path)}"
        yield _synopsis(ctx)
        for paragraph in re.split(r"\n\s*\n", (command.help or "").replace("\b", "")):
            yield from (".PP", _escape(" ".join(paragraph.split())))
        yield from _options(ctx)
        if isinstance(command, click.Group):
            yield from _verbs(ctx)


def _synopsis(ctx: click.Context) -> str:
    pieces = " ".join(ctx.command.collect_usage_pieces(ctx))
    return f".B {_escape(ctx.command_path)}\n{_escape(pieces)}"


def _options(ctx: click.Context) -> Iterator[str]:
    for parameter in ctx.command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None:
            yield from (".TP", f".B {_escape(record[0])}", _escape(record[1]))


def _escape(text: str) -> str:
    """Return the text as roff takes it for letters, on one line."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("\n", " ")
    return f"\\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    main()
