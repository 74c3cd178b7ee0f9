"""`edgemed models`: the bundles on this machine. Instant: manifests, reports and hashes only, no engine is imported."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemed.cli.verbs import debug_option

if TYPE_CHECKING:
    from edgemed.bundle import Manifest

KERNELS, REPORTS = "kernels/", "reports/"
"""Folders of a bundle: compiled kernels by target, and what was measured when it was made."""


@click.group("models", short_help="The bundles on this machine.")
def command() -> None:
    """List, show, verify, import and remove bundles."""


# --- list -------------------------------------------------------------------------------------------------------------


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@debug_option
def list_them(as_json: bool) -> None:
    """List the bundles that came with edgemed (embedded), the machine's (shared) and your own (imported).

    A bundle of the machine goes before one of your own that has its name.
    """
    from edgemed.bundle import list_bundles

    bundles = list_bundles()
    sizes = [_size(listed.path, listed.manifest) for listed in bundles]
    if as_json:
        rows = [
            {
                "name": listed.name,
                "family": listed.manifest.family if listed.manifest else None,
                "precision": dict(listed.manifest.precision) if listed.manifest else None,
                "calibrated": listed.manifest.calibration_digest is not None if listed.manifest else None,
                "size_bytes": size,
                "embedded": listed.embedded,
                "place": listed.place,
                "folder": str(listed.path),
                "hides": None if listed.hides is None else str(listed.hides),
                "problem": listed.problem,
            }
            for listed, size in zip(bundles, sizes, strict=True)
        ]
        print(json.dumps({"schema": "edgemed.models/1", "models": rows}, ensure_ascii=False))
        return
    table: list[tuple[str, ...]] = [("name", "family", "precision", "calibrated", "MB", "place")]
    for listed, size in zip(bundles, sizes, strict=True):
        place = "imported" if listed.place == "user" else listed.place
        place += f", goes before {listed.hides}" if listed.hides else ""
        place += f": {listed.problem}" if listed.problem else ""
        if listed.manifest is None:
            table.append((listed.name, "?", "?", "?", "?", place))
        else:
            precision = ",".join(sorted(set(listed.manifest.precision.values())))
            calibrated = "yes" if listed.manifest.calibration_digest else "no"
            table.append((listed.name, listed.manifest.family, precision, calibrated, _megabytes(size), place))
    _print_table(table)


def _size(folder: Path, manifest: Manifest | None) -> int | None:
    """Return the bytes of a bundle's files, those that are missing left out; None without a manifest."""
    if manifest is None:
        return None
    return sum(file.stat().st_size for name in manifest.files if (file := folder / name).is_file())


def _megabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e6:.1f}"


# --- show -------------------------------------------------------------------------------------------------------------


@command.command("show")
@click.argument("bundle", metavar="NAME|FOLDER")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as one JSON object.")
@click.option("--report", metavar="NAME", help="Print one of its reports as it is, such as parity.json.")
@debug_option
def show(bundle: str, as_json: bool, report: str | None) -> None:
    """Show what a bundle says of itself: family, graphs, precisions, versions, licences, settings, reports, model card.

    The files are not checked; 'edgemed models verify' does that.
    """
    from edgemed.bundle import find_bundle, read_manifest, to_bytes

    folder = find_bundle(bundle)
    manifest = read_manifest(folder)
    if report is not None:
        click.echo(_read_report(folder, manifest, report), nl=False)
        return
    if as_json:
        click.echo(to_bytes(manifest), nl=False)
        return
    _print_table(_facts(folder, manifest))
    for name, summary in SUMMARIES.items():
        if REPORTS + name in manifest.files:
            click.echo()
            _print_summary(name, summary, _read_report(folder, manifest, name))
    if REPORTS + "card.md" in manifest.files:
        click.echo(b"\n" + _read_report(folder, manifest, "card.md"), nl=False)


def _facts(folder: Path, manifest: Manifest) -> list[tuple[str, ...]]:
    from edgemed.families import settings_of

    files = manifest.files
    facts: list[tuple[str, ...]] = [("name", manifest.name), ("family", manifest.family)]
    facts += [(f"graph {role}", manifest.precision[role]) for role in manifest.graphs]
    facts += [("calibration", manifest.calibration_digest or "none")]
    facts += [(f"made with {name}", version) for name, version in manifest.versions.items()]
    facts += [(f"licence of {part}", licence) for part, licence in manifest.licences.items()]
    facts += [("files", f"{len(files)}, {_megabytes(_size(folder, manifest))} MB")]
    facts += [("memory", _memory(folder, manifest))]
    if targets := sorted({name.split("/")[1] for name in files if name.startswith(KERNELS) and name.count("/") > 1}):
        facts += [("kernels for", ", ".join(targets))]
    if reports := sorted(name.removeprefix(REPORTS) for name in files if name.startswith(REPORTS)):
        facts += [("reports", ", ".join(reports))]
    facts += [(f"--set {name}=", meaning) for name, meaning in settings_of(manifest.family).items()]
    return facts


def _memory(folder: Path, manifest: Manifest) -> str:
    """Return what the bundle needs on a CPU, for a short question and for the longest prompt."""
    from edgemed.bundle import Bundle
    from edgemed.errors import BundleError
    from edgemed.memory import MIB, plan_memory

    bundle = Bundle(folder, manifest, "")
    try:
        plans = [plan_memory(bundle)]
        if "decoder" in manifest.graphs and (cache := manifest.graphs["decoder"].dims.get("cache")):
            plans.append(plan_memory(bundle, cache.max))
    except BundleError as error:
        return str(error)
    told = ", ".join(f"{plan.total / MIB:.0f} MiB for {plan.tokens} tokens" for plan in plans)
    return f"about {told}, on a CPU"


def _read_report(folder: Path, manifest: Manifest, name: str) -> bytes:
    """Return a report file. Raises BundleError if the bundle has none of this name, or it is no longer there."""
    from edgemed.errors import BundleError

    if REPORTS + name not in manifest.files:
        there = ", ".join(sorted(file.removeprefix(REPORTS) for file in manifest.files if file.startswith(REPORTS)))
        raise BundleError(f"bundle {manifest.name} has no report {name!r}; it has: {there or 'none'}")
    try:
        return (folder / REPORTS / name).read_bytes()
    except OSError as error:
        raise BundleError(
            f"cannot read {REPORTS}{name} of bundle {manifest.name}: {error.strerror or 'refused'}; get the bundle anew"
        ) from error


def _print_summary(name: str, summary: Callable[[Any], Iterator[Sequence[str]]], content: bytes) -> None:
    """Print a report as a short table; one of another form is named, and can be printed as it is."""
    try:
        rows = list(summary(json.loads(content)))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        click.echo(f"{name}: of another form than this version knows; --report {name} prints it")
        return
    click.echo(rows[0][0])
    _print_table(rows[1:])


def _parity(report: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """Yield a title and the rows of parity.json: each graph's worst output, by relative error."""
    yield (f"parity.json, {report['date']}, against {report['reference']}, {report['slices']} slices",)
    yield "graph", "weights", "worst output", "relative error", "cosine"
    for precision, rows in report.items():
        if not isinstance(rows, list):
            continue
        for graph in dict.fromkeys(row["graph"] for row in rows):
            worst = max((row for row in rows if row["graph"] == graph), key=lambda row: float(row["relative_error"]))
            yield graph, precision, worst["output"], f"{worst['relative_error']:.1e}", f"{worst['cosine']:.6f}"


def _accuracy(report: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """Yield a title and the rows of accuracy.json: each graph's worst output by cosine, then the answers."""
    slices = report["slices"]
    yield (
        f"accuracy.json, {report['date']}, against bundle {report['reference']['bundle']}, "
        f"{slices['held_out']} held-out slices, calibrated on {slices['calibration']}",
    )
    yield "graph", "weights", "worst output", "relative error", "cosine", "gate"
    rows = report["graphs"]
    for graph in dict.fromkeys(row["graph"] for row in rows):
        own = [row for row in rows if row["graph"] == graph]
        worst = min(own, key=lambda row: float(row["cosine"]))
        gate = "passed" if all(row["passed"] for row in own) else "missed"
        error, cosine = f"{worst['relative_error']:.1e}", f"{worst['cosine']:.6f}"
        yield graph, worst["precision"], worst["output"], error, cosine, gate
    for name, value in report["answers"].items():
        if value is not None:
            yield "answers", "", name, "", f"{value:g}", ""


SUMMARIES: Mapping[str, Callable[[Any], Iterator[Sequence[str]]]] = {
    "parity.json": _parity,
    "accuracy.json": _accuracy,
}
"""Report -> what makes a title and a table of it."""


# --- verify, import, rm -----------------------------------------------------------------------------------------------


@command.command("verify")
@click.argument("bundle", metavar="NAME|FOLDER")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option
def verify(bundle: str, as_json: bool) -> int:
    """Check every file of a bundle against its manifest: a line for each problem, and exit code 80 if there is one."""
    from edgemed.bundle import MANIFEST, find_bundle, read_manifest
    from edgemed.errors import BundleError
    from edgemed.files import sha256_of

    folder = find_bundle(bundle)
    manifest, digest = read_manifest(folder), sha256_of(folder / MANIFEST)
    problems = list(_problems(folder, manifest))
    if as_json:
        told = {"schema": "edgemed.verify/1", "name": manifest.name, "sha256": digest, "files": len(manifest.files)}
        print(json.dumps({**told, "problems": problems}, ensure_ascii=False))
    elif not problems:
        print(f"{manifest.name}: {len(manifest.files)} files match the manifest, sha256 {digest}")
    for problem in () if as_json else problems:
        click.echo(f"edgemed: {problem}; get the bundle anew", err=True)
    return BundleError.exit_code if problems else 0


def _problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield a line for every file that is missing, changed, unknown or no plain file."""
    from edgemed.bundle import MANIFEST, SIGNATURE
    from edgemed.errors import CannotRead
    from edgemed.files import sha256_of

    there = set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield f"{name} is a link or a special file"
        elif path.is_file():
            there.add(name)
            if name not in manifest.files and name not in (MANIFEST, SIGNATURE):
                yield f"{name} is not in the manifest"
    for name, expected in sorted(manifest.files.items()):
        if name not in there:
            if not (folder / name).is_symlink():
                yield f"{name} is missing"
            continue
        try:
            found = sha256_of(folder / name)
        except CannotRead as error:
            yield str(error)
            continue
        if found != expected:
            yield f"{name} has sha256 {found[:8]}..., the manifest says {expected[:8]}..."


@command.command("import")
@click.argument("folder", metavar="FOLDER")
@click.option("--name", metavar="NAME", help="Name to give it here (default: its own).")
@click.option("--replace", is_flag=True, help="Replace an imported bundle of this name.")
@click.option("--force", is_flag=True, help="Take an older version, too.")
@click.option(
    "--shared", is_flag=True, help="For all users of this machine (into bundles.shared, by its owner or root)."
)
@debug_option
def import_it(folder: str, name: str | None, replace: bool, force: bool, shared: bool) -> None:
    """Copy a bundle to this user's bundles after checking every file; `infer --bundle NAME` then finds it."""
    from edgemed import audit
    from edgemed.bundle import MANIFEST, find_bundle, install_bundle, read_manifest, shared_target, user_folder

    here = Path(folder)
    source = here.absolute() if (here / MANIFEST).is_file() else find_bundle(folder)
    target = shared_target() if shared else user_folder()
    _check_room(target, _size(source, read_manifest(source)) or 0, "bundles.shared" if shared else "EDGEMED_HOME")
    installed = install_bundle(source, name, replace=replace, force=force, shared=shared)
    audit.record(audit.configured("imported", installed.path.name, installed.digest))
    audit.drain()
    print(f"imported {installed.path.name}, sha256 {installed.digest}")


def _check_room(folder: Path, size: int, setting: str) -> None:
    """Raise CannotWrite where the disk of a folder, which may not be there yet, has less than `size` bytes free."""
    import shutil

    from edgemed.errors import CannotWrite

    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise CannotWrite(
            f"the bundle takes {size / 1e6:.1f} MB and {there} has {free / 1e6:.1f} MB free; make room, or set "
            f"{setting} to a folder on another disk"
        )


@command.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--shared", is_flag=True, help="Those of the machine (in bundles.shared, by its owner or root).")
@debug_option
def remove(names: tuple[str, ...], shared: bool) -> None:
    """Remove imported bundles; embedded ones stay."""
    from edgemed import audit
    from edgemed.bundle import remove_bundle

    for name in names:
        remove_bundle(name, shared=shared)
        audit.record(audit.configured("removed", name))
        print(f"removed {name}")
    audit.drain()


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
