"""`edgemed serve`: the node on the PACS network, and what its journal says.

Covers options, signals and exit codes; `edgemed.serve` does the work.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemed.cli.verbs import debug_option
from edgemed.errors import BatchPartlyFailed, EdgemedError, NoInput

if TYPE_CHECKING:
    from edgemed.serve.journal import Journal
    from edgemed.serve.settings import NodeSettings

config_option = click.option(
    "--config", metavar="FILE", help="The node's TOML file; default: [serve] of the configuration."
)


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


@command.command("pull")
@click.argument("query")
@config_option
@click.option("-o", "folder", metavar="FOLDER", help="Where studies are kept, instead of in the node: FOLDER/STUDY.")
@click.option("--move", is_flag=True, help="By C-MOVE to the node, which must run, instead of C-GET.")
@click.option("--list", "only_list", is_flag=True, help="Print the Study Instance UIDs and fetch nothing.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Most studies.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each study.")
@debug_option
@click.pass_context
def pull(
    ctx: click.Context,
    query: str,
    config: str | None,
    folder: str | None,
    move: bool,
    only_list: bool,
    limit: int,
    as_json: bool,
) -> None:
    """Fetch the studies that an archive of the configuration has for a QUERY.

    QUERY is NAME:KEYWORD=VALUE,... as pacs:StudyDate=20261122,ModalitiesInStudy=CT or pacs:StudyInstanceUID=1.2.3, NAME
    one of the [[target]] tables. DICOMweb: QIDO-RS and WADO-RS; an AE: C-FIND and C-GET.

    The node takes what was fetched, at once if it runs, else when it starts. A study that cannot be fetched is told,
    and the command then ends with exit code 87.
    """
    _need_libraries()
    from edgemed.cli.options import keep_libraries_quiet
    from edgemed.serve.pull import fetch, move_study, parse_query
    from edgemed.serve.pull import pull as to_node

    if move and folder is not None:
        raise EdgemedError("--move was given with -o; C-MOVE sends to the node")
    settings = _settings(config or (ctx.parent.params.get("config") if ctx.parent else None))
    asked = parse_query(query, settings)
    if move and asked.source.url:
        raise EdgemedError(f"--move was given with {asked.source.name}, a DICOMweb service; it is for an AE")
    keep_libraries_quiet()
    failed = 0
    studies = asked.studies(settings, limit)
    for study in studies:
        told: dict[str, Any] = {"study": study}
        try:
            if only_list:
                pass
            elif move:
                told["instances"] = move_study(asked.source, settings, study, asked.series)
            elif folder is not None:
                place = Path(folder) / study
                told["instances"] = len(fetch(asked.source, settings, study, place, asked.series))
            else:
                told["instances"] = to_node(asked, study, settings)
        except EdgemedError as error:
            failed += 1
            told["error"] = " ".join(str(error).split())
        print(json.dumps({"schema": "edgemed.pull/1", **told}) if as_json else "  ".join(map(str, told.values())))
    if failed:
        raise BatchPartlyFailed(f"{failed} of {len(studies)} studies could not be fetched; the lines on stdout say why")


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

    return read_settings(config, **more)


def _need_libraries() -> None:
    from edgemed.cli.extras import need

    need(("pynetdicom", "dicomweb_client"), "serve", "serve")


def run(settings: NodeSettings) -> None:
    """Run the node until a signal; raises what opening the store and listening raise."""
    import signal
    import threading

    _need_libraries()
    from edgemed import audit
    from edgemed.cli.options import keep_libraries_quiet
    from edgemed.serve.node import Node
    from edgemed.serve.store import Store
    from edgemed.serve.worker import open_workers

    keep_libraries_quiet()
    ended = threading.Event()
    before = {sig: signal.signal(sig, lambda *_: ended.set()) for sig in (signal.SIGTERM, signal.SIGINT)}
    try:
        with audit.application("serve", settings.aet), Store(settings) as store:
            workers = open_workers(settings)
            node = Node(store, *workers)
            try:
                node.start()
                while not ended.wait(3600.0):
                    pass
            finally:
                node.stop()
                for worker in workers:
                    worker.close()
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)
