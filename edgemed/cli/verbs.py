"""The group of verbs and the one error handler.

Every failure ends here as one line on stderr and the exit code of `edgemed.errors`. A traceback needs --debug: it can
hold values of a file.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from edgemed import __version__
from edgemed.errors import EdgemedError, OutOfMemory

VERBS = {
    "infer": "Ask about scans: an answer in words, boxes and masks.",
    "index": "Find the images of a collection that are most like another.",
    "batch": "Ask every question of a file, or about every study of a folder.",
    "models": "List, show, verify, import and remove bundles.",
    "eval": "Measure the quality of a bundle on labelled images.",
    "train": "Train a model from a recipe file (needs edgemed[train]).",
    "export": "Turn a checkpoint into a bundle of ONNX graphs (needs edgemed[export]).",
    "quantize": "Make a smaller bundle: INT8, FP8 or INT4 (needs edgemed[export]).",
    "compile": "Build engines for GPUs from a bundle.",
    "bundle": "Sign, verify, pack and unpack bundles.",
    "config": "Show the settings of this machine.",
    "audit": "Verify, show and send the audit trail.",
    "deid": "Copy DICOM files without the patient's identity.",
    "serve": "Answer the studies that a PACS sends (needs edgemed[serve]).",
    "doctor": "Check whether this workstation is ready.",
}
"""Verb -> its line in the help. The module of a verb is imported when the verb is used."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""

C = TypeVar("C", bound=Callable[..., Any])


@dataclass
class State:
    """What the error handler needs to know about the command that runs."""

    debug: bool = False


class Verbs(click.Group):
    """The verbs of `VERBS`, each imported when it is used; the help needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the help."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of a verb, or None if there is no such verb."""
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"edgemed.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of verbs without importing them."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


def debug_option(function: C) -> C:
    """Add --debug, which makes the error handler show tracebacks."""

    def note(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            ctx.ensure_object(State).debug = True

    option = click.option(
        "--debug", is_flag=True, expose_value=False, is_eager=True, callback=note, help="Show tracebacks of errors."
    )
    return option(function)


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="'edgemed VERB --help' explains a verb. Not a medical device; not for diagnosis.",
    subcommand_metavar="VERB [ARGS]...",
)
@click.version_option(__version__, prog_name="edgemed", message="%(prog)s %(version)s")
@debug_option
def group() -> None:
    """Ask a medical image a question, offline: answers in words, boxes and pixel masks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code of the command in `arguments` (default: the process's); the documented codes only.

    0 and a result on stdout, or one line on stderr and the code of the error's class (`edgemed.errors`).
    """
    state = State()
    try:
        result = group.main(args=arguments, prog_name="edgemed", standalone_mode=False, obj=state)
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return _reader_left()
    except Exception as error:  # noqa: BLE001 (the one handler: nothing else may catch everything)
        if state.debug:
            import traceback

            traceback.print_exc()
        from edgemed.audit import record_refusal

        record_refusal(error)
        line, code = describe(error)
        print(f"edgemed: {line}", file=sys.stderr)
        return code
    return result if isinstance(result, int) else 0


def describe(error: BaseException) -> tuple[str, int]:
    """Return (the one line for stderr, the exit code) for an error.

    Of an error that is not edgemed's own only the type and the place are told: its text may quote a patient's data.
    """
    if _lacks_memory(error):
        return "out of memory; use a smaller image or a machine with more memory", OutOfMemory.exit_code
    if isinstance(error, EdgemedError):
        return " ".join(str(error).split()), error.exit_code
    if isinstance(error, click.ClickException):
        return _usage(error), EdgemedError.exit_code
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f" in {os.path.basename(place.tb_frame.f_code.co_filename)} line {place.tb_lineno}" if place else ""
    line = f"internal error: {type(error).__name__}{where}; run it again with --debug to see the traceback"
    return line, EdgemedError.exit_code


def _lacks_memory(error: BaseException | None) -> bool:
    """Return whether there was no memory for an object, a library, a thread or a mapping; each says it its own way."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if isinstance(error, ImportError) and ("cannot allocate memory" in text or "failed to map segment" in text):
            return True
        if isinstance(error, RuntimeError) and "can't start new thread" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def _usage(error: click.ClickException) -> str:
    """Return click's message as one line, with the help to look at."""
    text = " ".join(error.format_message().split())
    ctx = getattr(error, "ctx", None)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        text = "a verb is missing"
    return f"{text} See '{ctx.command_path if ctx else 'edgemed'} --help'."


def _reader_left() -> int:
    """Return 0 quietly: the program that read our output had enough (`edgemed models list | head -1`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would complain
    return 0
