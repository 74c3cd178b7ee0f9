"""`edgemed config`: what is set on this machine, and where. No engine and no library is imported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemed.cli.verbs import debug_option

if TYPE_CHECKING:
    from edgemed.config import Setting, Value


@click.group("config", short_help="The settings of this machine.")
def command() -> None:
    """Show and check the settings: one TOML file, below the environment (EDGEMED_*), below options."""


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
    sections = list(_sections())
    if as_json:
        rows = {name: {"value": _plain(value.value), "origin": value.origin} for name, value in found.items()}
        rows |= {
            f"{section}.{key}": {"value": value.value, "origin": value.origin}
            for section, values in sections
            for key, value in values.items()
        }
        file = config_file()
        told = {"schema": "edgemed.config/1", "file": None if file is None else str(file), "settings": rows}
        print(json.dumps(told, ensure_ascii=False, default=str))
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
    for section, values in sections:
        click.echo(f"[{section}]")
        for key, value in values.items():
            if origin:
                click.echo(f"# From: {value.origin}.")
            click.echo(f"{key} = {_toml(value.value)}")


@command.command("check")
@debug_option
def check() -> None:
    """Check the settings: unknown keys, wrong values, and that files with secrets are for their owner alone.

    Exit code 1 for a key or value, 20 for a file that cannot be read or whose rights are too wide.
    """
    from edgemed.audit import read_audit
    from edgemed.config import SETTINGS, config_file, read_secret, read_settings
    from edgemed.serve.settings import to_tls

    found = read_settings()
    if tls := dict(_sections()).get("serve", {}).get("tls"):
        to_tls(tls.value)
    for setting in SETTINGS:
        if setting.kind == "secret" and found[setting.name].value is not None:
            read_secret(found[setting.name].value)
    read_audit()
    print(f"{config_file() or 'no file'}: the settings hold")


@command.command("keys")
@click.option("--markdown", "form", flag_value="markdown", help="As a table for a document.")
@click.option("--man", "form", flag_value="man", help="As the page edgemed-config(5).")
@debug_option
def keys(form: str | None) -> None:
    """Print every key there is: its kind, default, meaning and variable."""
    from edgemed.config import SECTIONS, SETTINGS

    rows = [
        (s.name, s.kind, "not set" if s.default is None else _toml(s.default), s.meaning, s.variable)
        for s in (*SETTINGS, *_keys_of_sections())
    ]
    if form == "markdown":
        click.echo("| key | kind | default | meaning |\n|---|---|---|---|")
        for name, kind, default, meaning, _ in rows:
            click.echo(f"| `{name}` | {kind} | {default if default == 'not set' else f'`{default}`'} | {meaning} |")
        for name, (_, meaning) in SECTIONS.items():
            click.echo(f"| `[{name}]` | section | not set | {meaning} |")
    elif form == "man":
        click.echo(_MAN_HEAD, nl=False)
        for name, kind, default, meaning, variable in rows:
            click.echo(f".TP\n.B {name}\n{meaning} Kind: {kind}; default: {default}; variable: {variable}.")
        for name, (_, meaning) in SECTIONS.items():
            click.echo(f".TP\n.B [{name}]\n{meaning}")
    else:
        for name, kind, default, meaning, variable in rows:
            click.echo(f"{name}  ({kind}, default {default}, {variable})\n    {meaning}")


_MAN_HEAD = """\
.TH EDGEMED-CONFIG 5
.SH NAME
edgemed-config \\- settings of edgemed
.SH FILES
The first of $EDGEMED_CONFIG, /etc/edgemed/config.toml and the user's config.toml counts, one file alone. It is TOML; a
section is a table. A variable EDGEMED_SECTION_KEY goes before the file, an option of a command before both. An unknown
key is an error. A key that ends in _file names a file that holds a secret and that only its owner may read.
.SH KEYS
"""


def _sections() -> Iterator[tuple[str, dict[str, Value]]]:
    """Yield the sections that a part of its own reads, where something is set in them."""
    from edgemed.config import SECTIONS, kinds_of, read_section

    for section in SECTIONS:
        if values := read_section(section, kinds_of(_dataclass(section))):
            yield section, values


def _dataclass(section: str) -> Any:
    import importlib

    from edgemed.config import SECTIONS

    module, _, name = SECTIONS[section][0].partition(":")
    return getattr(importlib.import_module(module), name)


def _keys_of_sections() -> Iterator[Setting]:
    """Yield the plain keys of the sections that a part of its own reads, with their defaults."""
    from dataclasses import MISSING, fields

    from edgemed.config import SECTIONS, Setting, kinds_of

    for section in SECTIONS:
        made = _dataclass(section)
        kinds = kinds_of(made)
        for key in (field for field in fields(made) if field.name in kinds):
            default = None if key.default is MISSING else key.default
            yield Setting(f"{section}.{key.name}", kinds[key.name], default, f"A key of [{section}].")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _toml(value: Any) -> str:
    """Return a value as TOML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(_plain(value), ensure_ascii=False, default=str)
