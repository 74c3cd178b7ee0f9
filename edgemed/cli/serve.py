"""`edgemed serve`: the node on the PACS network, and what its journal says.

Covers options, signals and exit codes; `edgemed.serve` does the work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemed.cli.verbs import debug_option
from edgemed.errors import BackendUnavailable, EdgemedError, NoInput

if TYPE_CHECKING:
    from edgemed.serve.journal import Journal
    from edgemed.serve.settings import NodeSettings

config_option = click.option("--config", metavar="FILE", help="The node's TOML file: senders, rules, targets, folder.")


@click.group("serve", short_help="Answer the studies that a PACS sends.", invoke_without_command=True)
@click.option("--dicom", is_flag=True, help="Be a DICOM node: C-STORE and C-ECHO in, results out.")
@config_option
@click.option("--port", type=click.IntRange(0, 65535), help="Instead of the file's port; 0: any that is free.")
@click.option("--aet", metavar="TITLE", help="Instead of the file's AE title.")
@click.option("--bind", metavar="ADDRESS", help="Instead of the file's; beyond loopback only if the file allows it.")
@debug_option
@click.pass_context
def command(
    ctx: click.Context, dicom: bool, config: str | None, port: int | None, aet: str | None, bind: str | None
) -> None:
    """Take studies from the network, answer them, and send the results on, until SIGTERM or Ctrl-C.

    The log goes to stderr, one JSON object a line, with hashed UIDs and nothing of a patient.
    """
    if ctx.invoked_subcommand is not None:
        return
    if not dicom:
        raise EdgemedError("--dicom is missing; it is the one kind of node there is")
    run(_settings(config, port=port, aet=aet, bind=bind))


@command.command("status")
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.pass_context
def status(ctx: click.Context, config: str | None, as_json: bool) -> None:
    """Tell what the journal of a node counts, running or not."""
    with _journal(ctx, config) as journal:
        counts = journal.counts()
    if as_json:
        print(json.dumps({"schema": "edgemed.serve-status/1", **counts}))
        return
    for what, states in counts.items():
        print(f"{what:<12}" + "  ".join(f"{state} {count}" for state, count in states.items()))


@command.command("retry")
@config_option
@click.pass_context
def retry(ctx: click.Context, config: str | None) -> None:
    """Try again what was given up: studies that failed, results that a target refused."""
    import time

    with _journal(ctx, config) as journal:
        print(f"{journal.retry(time.time())} to be tried again")


def _journal(ctx: click.Context, config: str | None) -> Journal:
    """Return the journal of the configuration that the subcommand, or `serve` itself, was given."""
    from edgemed.serve.journal import Journal

    given = ctx.parent.params.get("config") if ctx.parent else None
    path = _settings(config or given).folder / "journal.sqlite"
    if not path.is_file():
        raise NoInput(f"there is no journal {path}; 'edgemed serve --dicom' makes it")
    return Journal(path)


def _settings(config: str | None, **more: Any) -> NodeSettings:
    from edgemed.serve.settings import read_settings

    if config is None:
        raise EdgemedError("--config is missing; the node's TOML file was expected")
    return read_settings(Path(config), **more)


def run(settings: NodeSettings) -> None:
    """Run the node until a signal; raises what opening the store and listening raise."""
    import signal
    import threading
    from importlib.util import find_spec

    for library in ("pynetdicom", "dicomweb_client"):
        if find_spec(library) is None:
            raise BackendUnavailable(f"a node needs {library}, which is not installed (extra: edgemed[serve])")
    from edgemed.cli.options import keep_libraries_quiet
    from edgemed.serve.node import Node
    from edgemed.serve.store import Store
    from edgemed.serve.study import StudyProcess

    keep_libraries_quiet()
    ended = threading.Event()
    before = {sig: signal.signal(sig, lambda *_: ended.set()) for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        with Store(settings) as store:
            process = StudyProcess()
            node = Node(store, process)
            try:
                node.start()
                while not ended.wait(3600.0):
                    pass
            finally:
                node.stop()
                process.close()
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
