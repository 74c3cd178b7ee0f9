"""`edgemed models`: the bundles on this machine. Instant: manifests and hashes only, no engine is imported."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click

from edgemed.cli.verbs import debug_option


@click.group("models", short_help="The bundles on this machine.")
def command() -> None:
    """List, show, verify, import and remove bundles."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def list_them(as_json: bool) -> None:
    """List the embedded and the imported bundles."""
    from edgemed.bundle import list_bundles

    bundles = list_bundles()
    if as_json:
        rows = [
            {
                "name": listed.name,
                "family": listed.manifest.family if listed.manifest else None,
                "precision": dict(listed.manifest.precision) if listed.manifest else None,
                "embedded": listed.embedded,
                "problem": listed.problem,
            }
            for listed in bundles
        ]
        print(json.dumps({"schema": "edgemed.models/1", "models": rows}, ensure_ascii=False))
        return
    table: list[tuple[str, ...]] = [("name", "family", "precision", "place")]
    for listed in bundles:
        place = listed.problem or ("embedded" if listed.embedded else "imported")
        if listed.manifest is None:
            table.append((listed.name, "?", "?", place))
        else:
            precision = ",".join(sorted(set(listed.manifest.precision.values())))
            table.append((listed.name, listed.manifest.family, precision, place))
    _print_table(table)


@command.command("show")
@click.argument("bundle", metavar="NAME|FOLDER")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as one JSON object.")
@debug_option
def show(bundle: str, as_json: bool) -> None:
    """Show what a bundle says of itself: family, graphs, precisions, versions, licences, settings, model card."""
    from edgemed.bundle import find_bundle, read_manifest, to_bytes
    from edgemed.families import settings_of

    folder = find_bundle(bundle)
    manifest = read_manifest(folder)
    if as_json:
        click.echo(to_bytes(manifest), nl=False)
        return
    facts: list[tuple[str, ...]] = [("name", manifest.name), ("family", manifest.family)]
    facts += [(f"graph {role}", manifest.precision[role]) for role in manifest.graphs]
    facts += [("calibration", manifest.calibration_digest or "none")]
    facts += [(f"made with {name}", version) for name, version in manifest.versions.items()]
    facts += [(f"licence of {part}", licence) for part, licence in manifest.licences.items()]
    facts += [("files", str(len(manifest.files)))]
    facts += [(f"--set {name}=", meaning) for name, meaning in settings_of(manifest.family).items()]
    _print_table(facts)
    card = folder / "reports" / "card.md"
    if "reports/card.md" in manifest.files and card.is_file():
        click.echo("\n" + card.read_text(encoding="utf-8"), nl=False)


@command.command("verify")
@click.argument("bundle", metavar="NAME|FOLDER")
@debug_option
def verify(bundle: str) -> None:
    """Check every file of a bundle against its manifest; exit code 80 if one does not fit."""
    from edgemed.bundle import open_bundle

    opened = open_bundle(bundle)
    print(f"{opened.manifest.name}: {len(opened.manifest.files)} files match the manifest, sha256 {opened.digest}")


@command.command("import")
@click.argument("folder", metavar="FOLDER")
@click.option("--name", metavar="NAME", help="Name to give it here (default: its own).")
@click.option("--replace", is_flag=True, help="Replace an imported bundle of this name.")
@debug_option
def import_it(folder: str, name: str | None, replace: bool) -> None:
    """Copy a bundle to this user's bundles after checking every file; `infer --bundle NAME` then finds it."""
    from edgemed.bundle import install_bundle

    installed = install_bundle(folder, name, replace=replace)
    print(f"imported {installed.path.name}, sha256 {installed.digest}")


@command.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@debug_option
def remove(names: tuple[str, ...]) -> None:
    """Remove imported bundles; embedded ones stay."""
    from edgemed.bundle import remove_bundle

    for name in names:
        remove_bundle(name)
        print(f"removed {name}")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
