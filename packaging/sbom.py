"""Bills of materials, the SOUP list and the licence check, read from what is shipped: nothing of them is typed.

    python packaging/sbom.py wheel dist/edgemed-0.1.0-py3-none-any.whl -o edgemed.cdx.json
    python packaging/sbom.py wheelhouse FOLDER -o wheelhouse.cdx.json     every .whl of a folder, and who needs whom
    python packaging/sbom.py bundle FOLDER -o bundle.cdx.json             a model, what it was trained on, its licences
    python packaging/sbom.py soup [FOLDER] -o SOUP.md                     of a wheelhouse, or of what is installed

Bills are CycloneDX 1.6 JSON; the same input gives the same bytes (SOURCE_DATE_EPOCH, if set, is their time). A wheel or
wheelhouse with a licence that licences.toml does not allow is refused with exit code 1. Sources: METADATA, RECORD and
sboms/ (PEP 770) of each wheel; bundle.json, NOTICE and reports/card.md of a bundle; purposes from the tables of
DECISIONS.md; known anomalies from anomalies.toml. Does not cover code that a wheel links statically and does not name.

Source: CycloneDX 1.6 (ECMA-424), PEP 503, PEP 639, PEP 770.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import sys
import tomllib
import uuid
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHIPPED_EXTRAS = ("cpu", "gpu", "gpu-ort", "results", "serve")
"""Extras that a site installs; the others train, export and test."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Package:
    """A distribution: its licence as SPDX writes it ("" if unknown), what it needs, what native code it carries.

    native: (file, sha256) of shared libraries in NAME.libs. inside: components of its own bills (PEP 770). modules:
    what it is imported as.
    """

    name: str
    version: str
    licence: str
    summary: str = ""
    supplier: str = ""
    requires: tuple[Requirement, ...] = ()
    native: tuple[tuple[str, str], ...] = ()
    inside: tuple[Json, ...] = ()
    modules: tuple[str, ...] = ()
    sha256: str = ""
    wheel: Path | None = field(default=None, compare=False)

    @property
    def ref(self) -> str:
        """Its package URL, which is its reference in a bill, too."""
        return f"pkg:pypi/{self.name}@{self.version}"

    def needs(self, extras: Iterable[str] = SHIPPED_EXTRAS) -> Iterator[str]:
        """Yield the names of the packages it needs here, those of its extras in `extras` among them."""
        for requirement in self.requires:
            if applies(requirement, extras):
                yield normal(requirement.name)


def normal(name: str) -> str:
    """Return a name as PEP 503 compares it.

    >>> normal("Python_GDCM")
    'python-gdcm'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def asked_for() -> Mapping[str, str]:
    """Return package -> requirement of pyproject.toml, for the base install and the extras that are shipped."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (project["optional-dependencies"][extra] for extra in SHIPPED_EXTRAS)
    texts = [*project["dependencies"], *(text for extra in extras for text in extra)]
    return {normal(Requirement(text).name): text for text in texts}


def applies(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Return whether a requirement holds on this machine, for one of `extras` or none."""
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras))


# --- reading packages -------------------------------------------------------------------------------------------------


def read_wheel(path: Path) -> Package:
    """Return what a wheel says of itself."""
    with zipfile.ZipFile(path) as archive:
        (info,) = {n.split("/")[0] for n in archive.namelist() if n.split("/")[0].endswith(".dist-info")}
        there = metadata.PathDistribution(zipfile.Path(archive, f"{info}/"))
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return _read(there, digest, path)


def read_installed(requirements: Iterable[str]) -> dict[str, Package]:
    """Return the installed packages that `requirements` ask for and those that they need, by name."""
    found: dict[str, Package] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        asked = waiting.pop()
        name = normal(asked.name)
        new = [extra for extra in ("", *sorted(asked.extras)) if (name, extra) not in seen]
        seen.update((name, extra) for extra in new)
        try:
            found.setdefault(name, _read(metadata.distribution(name)))
        except metadata.PackageNotFoundError:
            continue
        for extra in new:
            waiting += [r for r in found[name].requires if r.marker is None or r.marker.evaluate({"extra": extra})]
    return dict(sorted(found.items()))


def _read(there: metadata.Distribution, digest: str = "", wheel: Path | None = None) -> Package:
    told: Any = there.metadata
    files = [(str(file), file.hash) for file in there.files or ()]
    native = [
        (name.split("/")[-1], base64.urlsafe_b64decode(mark.value + "=").hex())
        for name, mark in files
        if mark is not None and re.match(r"[^/]+\.libs/[^/]+$", name)
    ]
    tops = {name.split("/")[0].split(".")[0] for name, _ in files if name.endswith((".py", ".so", ".pyd"))}
    return Package(
        name=normal(told["Name"]),
        version=told["Version"],
        licence=_licence(told),
        summary=told.get("Summary", ""),
        supplier=told.get("Author") or told.get("Maintainer") or "",
        requires=tuple(Requirement(text) for text in there.requires or ()),
        native=tuple(sorted(native)),
        inside=tuple(_inside(there, [name for name, _ in files], normal(told["Name"]))),
        modules=tuple(sorted(top for top in tops if top and not top.startswith(".."))),
        sha256=digest,
        wheel=wheel,
    )


def _inside(there: metadata.Distribution, files: Sequence[str], name: str) -> Iterator[Json]:
    """Yield name, version, purl and licences of the components in a wheel's own bills."""
    absent = rules()["absent"]
    for file in files:
        place = re.fullmatch(r"[^/]+\.dist-info/(sboms/[^/]+\.json)", file)
        text = there.read_text(place[1]) if place else None
        for component in json.loads(text).get("components", []) if text else []:
            if normal(component["name"]) != name and f"{name}: {component['name']}" not in absent:
                yield {key: component[key] for key in ("name", "version", "purl", "licenses") if key in component}


@cache
def rules() -> Json:
    """Return licences.toml."""
    return tomllib.loads((HERE / "licences.toml").read_text(encoding="utf-8"))


def _licence(told: Any) -> str:
    """Return License-Expression, else what License or the classifiers mean, else the first words of them, or ""."""
    if told.get("License-Expression"):
        return str(told["License-Expression"])
    spelled = rules()["spelled"]
    known = {*rules()["allowed"], *rules()["justified"]}
    classes = [c.split(" :: ")[-1] for c in told.get_all("Classifier", []) if c.startswith("License ::")]
    said = [str(told.get("License") or "").strip(), *classes]
    for text in said:
        if permitted(spelled.get(text, text), known):
            return str(spelled.get(text, text))
    return next((text.split("\n")[0][:60] for text in said if text), "")


# --- licences ---------------------------------------------------------------------------------------------------------


def _split(expression: str, operator: str) -> list[str]:
    """Return the operands of an operator that is in no brackets."""
    parts, depth = [""], 0
    for word in re.findall(r"[()]|[^\s()]+", expression):
        depth += {"(": 1, ")": -1}.get(word, 0)
        if word.upper() == operator and not depth:
            parts.append("")
        else:
            parts[-1] = f"{parts[-1]} {word}".strip()
    return parts


def permitted(expression: str, allowed: Iterable[str]) -> bool:
    """Return whether an SPDX expression can be kept with the licences in `allowed`.

    >>> permitted("(MIT OR GPL-2.0-only) AND ISC", ["MIT", "ISC"])
    True
    """
    allowed = set(allowed)
    if len(parts := _split(expression, "OR")) > 1:
        return any(permitted(part, allowed) for part in parts)
    if len(parts := _split(expression, "AND")) > 1:
        return all(permitted(part, allowed) for part in parts)
    inner = expression.strip()
    return permitted(inner[1:-1], allowed) if inner.startswith("(") else inner in allowed


def licences_in(package: Package) -> Iterator[tuple[str, str]]:
    """Yield (what, its SPDX expression) of a package, its shared libraries, and what its own bills give a licence."""
    yield package.name, package.licence
    for file, _ in package.native:
        yield f"{package.name}: {file}", rules()["native"].get(library_of(file)[0], "")
    for component in package.inside:
        if expression := expression_of(component):
            yield f"{package.name}: {component['name']}", expression


def library_of(file: str) -> tuple[str, str]:
    """Return name and version of a shared library in a wheel.

    >>> library_of("libtiff-20b7e810.so.6.3.0")
    ('libtiff', '6.3.0')
    """
    name, version = re.fullmatch(r"(.*?)(?:\.so|\.dll|\.dylib|$)(.*)", file).groups()  # type: ignore[union-attr]
    return re.sub(r"(-[0-9a-f]{8,64})+$", "", name), version.lstrip(".")


def expression_of(component: Json) -> str:
    """Return the licences of a component of a bill as one expression."""
    terms = []
    for row in component.get("licenses", []):
        own = row.get("license", {})
        terms.append(row.get("expression") or own.get("id") or own.get("name") or "")
    return " AND ".join(f"({term})" if " OR " in term and len(terms) > 1 else term for term in terms if term)


def refused(packages: Iterable[Package]) -> list[str]:
    """Return a line for everything whose licence is unknown or not allowed."""
    known = {*rules()["allowed"], *rules()["justified"]}
    rows = {(what, expression) for package in packages for what, expression in licences_in(package)}
    return [f"{what}: {expr or 'licence unknown'}" for what, expr in sorted(rows) if not permitted(expr, known)]


def justified(packages: Iterable[Package]) -> list[tuple[str, str]]:
    """Return (licence, what has it) of everything that the list of allowed licences alone would not let through."""
    rows = {(expr, what) for package in packages for what, expr in licences_in(package)}
    return sorted((expr, what) for expr, what in rows if not permitted(expr, rules()["allowed"]))


# --- bills of packages ------------------------------------------------------------------------------------------------


def wheel_bill(path: Path) -> Json:
    """Return the bill of one wheel: what is in it, its models, and what it will need (requirements, no versions)."""
    package = read_wheel(path)
    needed = [
        {
            "type": "library",
            "bom-ref": f"requirement:{number}",
            "name": normal(requirement.name),
            "purl": f"pkg:pypi/{normal(requirement.name)}",
            "scope": "required" if "extra" not in str(requirement.marker or "") else "optional",
            "properties": [{"name": "edgemed:requirement", "value": str(requirement)}],
        }
        for number, requirement in enumerate(package.requires)
    ]
    main = _component(package)
    models, links = _models_in(path)
    links[package.ref] = [str(c["bom-ref"]) for c in (*needed, *models) if "modelCard" in c or c in needed]
    return _bill(main, [*_works_in(path), *models, *needed], links)


def wheelhouse_bill(folder: Path) -> Json:
    """Return the bill of every wheel in a folder, and which needs which."""
    packages = read_wheelhouse(folder)
    names = {package.name: package.ref for package in packages}
    links = {p.ref: sorted({names[n] for n in p.needs() if n in names and n != p.name}) for p in packages}
    parts = [_component(package) for package in packages]
    for package in packages:
        if package.name == "edgemed" and package.wheel is not None:
            models, more = _models_in(package.wheel)
            parts += models
            links |= more
            links[package.ref] = links[package.ref] + [c["bom-ref"] for c in models if "modelCard" in c]
    version = next((p.version for p in packages if p.name == "edgemed"), "0")
    main = {"type": "application", "bom-ref": "wheelhouse", "name": "edgemed wheelhouse", "version": version}
    links["wheelhouse"] = [names["edgemed"]] if "edgemed" in names else sorted(names.values())
    return _bill(main, parts, links)


def read_wheelhouse(folder: Path) -> list[Package]:
    """Return the packages of the wheels in a folder, by name. Raises SystemExit if there are none."""
    packages = sorted((read_wheel(file) for file in folder.glob("*.whl")), key=lambda p: (p.name, p.version, p.sha256))
    if not packages:
        raise SystemExit(f"{folder} holds no wheels")
    return packages


def _component(package: Package) -> Json:
    """Return a package as a component; what it carries is nested in it."""
    inner = [
        {
            "type": "library",
            "bom-ref": f"{package.ref}#{file}",
            "name": library_of(file)[0],
            "version": library_of(file)[1],
            "hashes": [{"alg": "SHA-256", "content": digest}],
            "licenses": _licences(rules()["native"].get(library_of(file)[0], "")),
        }
        for file, digest in package.native
    ]
    for number, told in enumerate(package.inside):
        more = {"licenses": _licences(expression)} if (expression := expression_of(told)) else {}
        kept = {key: value for key, value in told.items() if key != "licenses" and value}
        inner.append({"type": "library", "bom-ref": f"{package.ref}#inside-{number}", **kept, **more})
    made: Json = {
        "type": "application" if package.name == "edgemed" else "library",
        "bom-ref": package.ref,
        "name": package.name,
        "version": package.version,
        "description": package.summary,
        "licenses": _licences(package.licence),
        "purl": package.ref,
    }
    if package.supplier:
        made["supplier"] = {"name": package.supplier}
    if package.sha256:
        made["hashes"] = [{"alg": "SHA-256", "content": package.sha256}]
    return {**made, "components": inner} if inner else made


def _licences(expression: str) -> list[Json]:
    """Return a licence as a bill has it: as SPDX's expression if it is one that we know, else by its words."""
    if permitted(expression, {*rules()["allowed"], *rules()["justified"]}):
        return [{"expression": expression}]
    return [{"license": {"name": expression or "unknown"}}]


def _works_in(wheel: Path) -> list[Json]:
    """Return the works of others that a wheel's NOTICE names and the wheel holds, as files."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (place,) = [name for name in names if name.endswith(".dist-info/licenses/NOTICE")]
        notice = archive.read(place).decode("utf-8")
    works = []
    for head, text in re.findall(r"^(\S[^\n]*)\n((?: {4}[^\n]*\n?)+)", notice, re.MULTILINE):
        path = head.split(",")[0].split(" and ")[0].strip()
        if any(name.startswith(path) for name in names):
            works.append(
                {"type": "file", "bom-ref": f"notice:{path}", "name": head, "description": " ".join(text.split())}
            )
    return works


def _bill(main: Json, components: Sequence[Json], links: Mapping[str, Sequence[str]]) -> Json:
    """Return a bill; its serial number is made from its content."""
    links = {main["bom-ref"]: [], **links}
    content: Json = {
        "metadata": {
            "component": main,
            "tools": {"components": [{"type": "application", "name": "packaging/sbom.py"}]},
        },
        "components": list(components),
        "dependencies": [{"ref": ref, "dependsOn": list(needs)} for ref, needs in sorted(links.items())],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        content["metadata"]["timestamp"] = datetime.fromtimestamp(int(epoch), UTC).isoformat()
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        **content,
    }


# --- bills of bundles -------------------------------------------------------------------------------------------------

WORK = re.compile(r"^(?:  |- )(.+) \(([^()]+)\)$", re.MULTILINE)
"""A line of NOTICE, or of a model card's list of sources: what it is, and its licence in brackets."""

METRIC = re.compile(r"^\| ([^|]+?) \| ([\d.]+) \(([\d.]+) to ([\d.]+)\) \| (\d+) \|", re.MULTILINE)


def bundle_bill(folder: Path) -> Json:
    """Return the bill of a bundle folder: the model with its card, its graphs and files, its training data."""
    main, *parts = _model(folder, folder.name)
    data = [c["bom-ref"] for c in parts]
    return _bill(main, parts, {main["bom-ref"]: data})


def _models_in(wheel: Path) -> tuple[list[Json], dict[str, list[str]]]:
    """Return the components of the bundles in a wheel, and what each model depends on."""
    with zipfile.ZipFile(wheel) as archive:
        found = [name.removesuffix("bundle.json") for name in archive.namelist() if name.endswith("/bundle.json")]
        models = [_model(zipfile.Path(archive, place), place.rstrip("/").split("/")[-1]) for place in found]
    links = {model[0]["bom-ref"]: [c["bom-ref"] for c in model[1:]] for model in models}
    return [component for model in models for component in model], links


def _model(place: Any, fallback: str) -> list[Json]:
    """Return the component of a bundle (a folder on a disk or in a wheel), then those of its data and origins."""
    manifest = json.loads((place / "bundle.json").read_text(encoding="utf-8"))
    notice = _text(place, manifest, "NOTICE")
    card = _text(place, manifest, "reports/card.md")
    name, version = manifest.get("name", fallback), manifest.get("versions", {}).get("bundle", "0")
    ref = f"bundle:{name}@{version}"
    made, _, trained = notice.partition("Trained on")
    origins = [_work(f"{ref}#origin-{i}", "machine-learning-model", *row) for i, row in enumerate(WORK.findall(made))]
    sources = WORK.findall(trained) or WORK.findall(_section(card, "How it was trained"))
    data = [_work(f"{ref}#data-{i}", "data", *row) for i, row in enumerate(sources)]
    files = [
        {
            "type": "machine-learning-model" if file.endswith(".onnx") else "file",
            "bom-ref": f"{ref}#{file}",
            "name": file,
            "hashes": [{"alg": "SHA-256", "content": digest}],
        }
        for file, digest in sorted(manifest["files"].items())
    ]
    main = {
        "type": "machine-learning-model",
        "bom-ref": ref,
        "name": name,
        "version": version,
        "description": " ".join(_section(card, "What it does").split())[:1000] or f"family {manifest['family']}",
        "licenses": [{"expression": text} for text in sorted(set(manifest.get("licences", {}).values()))][:1],
        "hashes": [{"alg": "SHA-256", "content": hashlib.sha256((place / "bundle.json").read_bytes()).hexdigest()}],
        "components": files,
        "modelCard": _card(manifest, card, data),
        "properties": [
            *(
                {"name": f"edgemed:licence of {part}", "value": text}
                for part, text in manifest.get("licences", {}).items()
            ),
            *({"name": f"edgemed:precision of {role}", "value": text} for role, text in manifest["precision"].items()),
            *({"name": f"edgemed:made with {tool}", "value": text} for tool, text in manifest["versions"].items()),
        ],
    }
    return [main, *origins, *data]


def _text(place: Any, manifest: Json, file: str) -> str:
    return str((place / file).read_text(encoding="utf-8")) if file in manifest["files"] else ""


def _section(card: str, title: str) -> str:
    """Return the text below a heading of a model card, up to the next one."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def _work(ref: str, kind: str, name: str, licence: str) -> Json:
    """Return a work of others; a licence that SPDX has no id for keeps its words."""
    spdx = {"CC BY 3.0": "CC-BY-3.0", "CC BY 4.0": "CC-BY-4.0", "CC0-1.0": "CC0-1.0"}.get(licence, licence)
    known = spdx.startswith("CC-BY-") or spdx in rules()["allowed"]
    made: Json = {"type": kind, "bom-ref": ref, "name": name}
    made["licenses"] = [{"license": {"id": spdx} if known else {"name": licence}}]
    if kind == "data":
        made["data"] = [{"type": "dataset", "name": name}]
    return made


def _card(manifest: Json, card: str, data: Sequence[Json]) -> Json:
    """Return CycloneDX's model card from a manifest and a bundle's own card."""
    made: Json = {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "answers about a medical image: text, boxes, masks",
            "architectureFamily": manifest["family"],
            "datasets": [{"ref": component["bom-ref"]} for component in data],
            "inputs": [{"format": "image, question"}],
            "outputs": [{"format": "text, boxes, masks"}],
        }
    }
    metrics = [
        {"type": what, "value": mean, "confidenceInterval": {"lowerBound": low, "upperBound": high}}
        for what, mean, low, high, _ in METRIC.findall(_section(card, "Measured quality"))
    ]
    if metrics:
        made["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    notices = manifest.get("settings", {}).get("notice", {})
    limits = [" ".join(_section(card, "What it cannot do").split()), *(notices[lang] for lang in sorted(notices))]
    if any(limits):
        made["considerations"] = {"technicalLimitations": [text for text in limits if text]}
    return made


# --- SOUP -------------------------------------------------------------------------------------------------------------


def purposes(decisions: str) -> dict[str, tuple[str, str]]:
    """Return package -> (why it is used, month of its release) from the tables of DECISIONS.md: its one source."""
    found: dict[str, tuple[str, str]] = {}
    for line in decisions.splitlines():
        cells = [cell.strip() for cell in line.strip("| \n").split("|")]
        if not line.startswith("|") or len(cells) not in (4, 5) or set(cells[0]) <= set("- "):
            continue
        packages, why, _, release = cells[-4:]
        for package in packages.split(","):
            if name := re.match(r"[A-Za-z][\w.-]*", package.strip()):
                found.setdefault(normal(name[0]), (why, release))
    return found


def soup(packages: Sequence[Package]) -> str:
    """Return the list of software of unknown provenance as Markdown: every package, and every known anomaly."""
    why = purposes((ROOT / "DECISIONS.md").read_text(encoding="utf-8"))
    others = [package for package in packages if package.name != "edgemed"]
    asked = asked_for()
    users: dict[str, list[str]] = {}
    for package in others:
        for name in package.needs(()):
            users.setdefault(name, []).append(package.name)
    ours, tests = _imports("edgemed", "calibration", "export"), _imports("tests")
    rows = ["# SOUP: software of others that is shipped", "", f"{len(others)} packages. Made by packaging/sbom.py."]
    rows += ["", "| package | version | licence | purpose | why trusted |", "|---|---|---|---|---|"]
    for package in others:
        by = ", ".join(sorted(set(users.get(package.name, ()))))
        purpose = why[package.name][0] if package.name in why else f"needed by {by or 'nothing here'}"
        seen = [sum(bool(set(package.modules) & names) for names in files) for files in (ours, tests)]
        trust = [f"asked for as {asked[package.name]}"] if package.name in asked else []
        trust += [f"imported by {seen[0]} files and {seen[1]} tests"] if seen[0] else ["no import of ours"]
        trust += [f"sha256 {package.sha256[:12]}..."] if package.sha256 else []
        rows.append(
            f"| {package.name} | {package.version} | {package.licence or '?'} | {purpose} | {'; '.join(trust)} |"
        )
    rows += ["", "## Licences with a reason", "", "| licence | what has it | why it is shipped |", "|---|---|---|"]
    reasons = rules()["justified"]
    for expression, what in justified(packages):
        told = " ".join(text for licence, text in reasons.items() if licence in expression)
        rows.append(f"| {expression} | {what} | {told} |")
    rows += [
        "",
        "## Known anomalies",
        "",
        "| id | component | what goes wrong | what is done, where |",
        "|---|---|---|---|",
    ]
    rows += [
        f"| {a['id']} | {a['component']} | {a['defect']} | {a['measure']} ({', '.join(a['files'])}) |"
        for a in anomalies()
    ]
    return "\n".join(rows) + "\n"


def _imports(*folders: str) -> list[set[str]]:
    """Return, for each Python file of our folders, the top-level names that it imports."""
    files = (file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))
    wanted = re.compile(r"^\s*(?:from|import) (\w+)|importorskip\(\"(\w+)", re.MULTILINE)
    return [{a or b for a, b in wanted.findall(file.read_text(encoding="utf-8"))} for file in files]


def anomalies() -> list[Json]:
    """Return the entries of anomalies.toml."""
    rows: list[Json] = tomllib.loads((HERE / "anomalies.toml").read_text(encoding="utf-8"))["anomaly"]
    return rows


# --- command line -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, or 1 after naming what may not be shipped; the file is written either way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=("wheel", "wheelhouse", "bundle", "soup"))
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    if given.source is None and given.kind != "soup":
        parser.error("the wheel or folder is missing")
    packages: Sequence[Package] = ()
    if given.kind == "soup":
        packages = (
            read_wheelhouse(given.source) if given.source else list(read_installed(asked_for().values()).values())
        )
        text = soup(packages)
    else:
        make = {"wheel": wheel_bill, "wheelhouse": wheelhouse_bill, "bundle": bundle_bill}[given.kind]
        text = json.dumps(make(given.source), indent=1, ensure_ascii=False) + "\n"
        packages = read_wheelhouse(given.source) if given.kind == "wheelhouse" else ()
    given.output.write_text(text, encoding="utf-8")
    problems = refused(packages)
    for problem in problems:
        print(f"may not be shipped: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
