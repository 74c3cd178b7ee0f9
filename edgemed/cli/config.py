"""`edgemed config`: what is set on this machine, and where. No engine and no library is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from edgemed.cli.verbs import debug_option


@click.group("config", short_help="The settings of this machine.")
def command() -> None:
    """Show the settings: one TOML file, below the environment (EDGEMED_*), below options."""


@command.command("show")
@click.option("--origin", is_flag=True, help="Tell where each value comes from.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with origins.")
@debug_option
def show(origin: bool, as_json: bool) -> None:
    """Print every setting and its value as a line of TOML; with --origin, where it comes from and what it means.

    The file is $EDGEMED_CONFIG, else /etc/edgemed/config.toml, else config.toml in the user's folder for settings. An
    unknown key in it is an error.
    """
    from edgemed.config import SETTINGS, config_file, read_settings

    found = read_settings()
    if as_json:
        rows = {name: {"value": _plain(value.value), "origin": value.origin} for name, value in found.items()}
        file = config_file()
        told = {"schema": "edgemed.config/1", "file": None if file is None else str(file), "settings": rows}
        print(json.dumps(told, ensure_ascii=False))
        return
    section = ""
    for setting in SETTINGS:
        ours, _, key = setting.name.partition(".")
        if ours != section:
            click.echo(f"[{ours}]")
            section = ours
        value = found[setting.name]
        if origin:
            click.echo(f"# {setting.meaning} From: {value.origin}; {setting.variable} would go before a file.")
        if value.value is None:
            click.echo(f"# {key} is not set")
        else:
            click.echo(f"{key} = {json.dumps(_plain(value.value), ensure_ascii=False)}")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
