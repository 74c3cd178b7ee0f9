"""Bills of materials validate and tell what is there; what is shipped has a licence that may be shipped."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import features

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "edgemed" / "bundles" / "nano"
NATIVE = "r3.libs/libpng16-35002b02.so.16.55.0"


@pytest.fixture(scope="module")
def sbom() -> ModuleType:
    """The script packaging/sbom.py."""
    spec = importlib.util.spec_from_file_location("edgemed_sbom", ROOT / "packaging" / "sbom.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["edgemed_sbom"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shipped(sbom: ModuleType) -> dict[str, Any]:
    """The installed packages that the base install and the shipped extras ask for, and what those need."""
    packages: dict[str, Any] = sbom.read_installed(sbom.asked_for().values())
    return packages


def make_wheel(
    folder: Path, name: str, licence: str, needs: str = "", files: Mapping[str, bytes] | None = None
) -> Path:
    """Write a wheel of the named files with the metadata that a bill is read from."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    requires = "".join(f"Requires-Dist: {text}\n" for text in filter(None, needs.split(";;")))
    told = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\nLicense-Expression: {licence}\n{requires}"
    held = {f"{info}/METADATA": told.encode(), f"{name}/__init__.py": b"", **(files or {})}
    mark = "sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"  # of no bytes
    record = "".join(f"{file},{mark},0\n" for file in held) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in held.items():
            archive.writestr(file, content)
        archive.writestr(f"{info}/RECORD", record)
    return path


@pytest.fixture
def wheelhouse(tmp_path: Path) -> Path:
    """A folder of wheels: edgemed with the manifest, notice and card of nano, and two that it needs."""
    place = "edgemed/bundles/nano/"
    nano = {place + n: (NANO / n).read_bytes() for n in ("bundle.json", "NOTICE", "reports/card.md")}
    notice = {"edgemed-1.0.dist-info/licenses/NOTICE": (ROOT / "NOTICE").read_bytes()}
    make_wheel(tmp_path, "edgemed", "Apache-2.0", "r1>=1;;r3; extra == 'cpu'", {**nano, **notice})
    make_wheel(tmp_path, "r1", "MIT", "r2")
    make_wheel(tmp_path, "r2", "MIT OR GPL-2.0-only")
    inner = {"components": [{"type": "library", "name": "crate", "version": "2", "licenses": [{"expression": "ISC"}]}]}
    own = {NATIVE: b"", "r3-1.0.dist-info/sboms/rust.cdx.json": json.dumps(inner).encode()}
    make_wheel(tmp_path, "r3", "BSD-3-Clause", "", own)
    return tmp_path


def checked(bill: dict[str, Any]) -> dict[str, Any]:
    """Return the components of a bill by name, after the schema's strict validator has seen it."""
    validation = pytest.importorskip("cyclonedx.validation.json", reason="cyclonedx-python-lib is not installed")
    from cyclonedx.schema import SchemaVersion

    problem = validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill))
    assert problem is None, str(problem)[:1000]
    refs = [bill["metadata"]["component"]["bom-ref"], *all_refs(bill["components"])]
    refs += all_refs(bill["metadata"]["component"].get("components", []))
    assert len(refs) == len(set(refs))
    for row in bill["dependencies"]:
        assert {row["ref"], *row["dependsOn"]} <= set(refs)
    return {component["name"]: component for component in bill["components"]}


def all_refs(components: list[dict[str, Any]]) -> list[str]:
    return [ref for c in components for ref in (c["bom-ref"], *all_refs(c.get("components", [])))]


def test_a_bundle_lists_its_graphs_its_card_and_its_training_data_with_licences(sbom: ModuleType) -> None:
    bill = sbom.bundle_bill(NANO)
    components = checked(bill)
    model = bill["metadata"]["component"]
    manifest = json.loads((NANO / "bundle.json").read_text("utf-8"))
    assert {c["name"]: c["hashes"][0]["content"] for c in model["components"]} == manifest["files"]
    data = [c for c in components.values() if c["type"] == "data"]
    said = (NANO / "NOTICE").read_text("utf-8").partition("Trained on")[2].strip().splitlines()
    assert len(data) == len(said) == len(model["modelCard"]["modelParameters"]["datasets"])
    assert all(c["licenses"] for c in data)
    assert "diagnosis" in " ".join(model["modelCard"]["considerations"]["technicalLimitations"])
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {m["type"]: m["value"] for m in metrics}["box IoU"] == "0.786"


def test_a_wheelhouse_lists_every_wheel_who_needs_whom_and_the_model_inside(sbom: ModuleType, wheelhouse: Path) -> None:
    bill = sbom.wheelhouse_bill(wheelhouse)
    components = checked(bill)
    assert {"edgemed", "r1", "r2", "r3", "nano"} <= set(components)
    needs = {row["ref"]: row["dependsOn"] for row in bill["dependencies"]}
    assert set(needs["pkg:pypi/edgemed@1.0"]) == {"pkg:pypi/r1@1.0", "pkg:pypi/r3@1.0", "bundle:nano@0"}
    assert needs["pkg:pypi/r1@1.0"] == ["pkg:pypi/r2@1.0"]
    assert len(components["r1"]["hashes"][0]["content"]) == 64
    inner = {c["name"]: c for c in components["r3"]["components"]}
    assert inner["libpng16"]["version"] == "16.55.0"
    assert inner["crate"]["licenses"] == [{"expression": "ISC"}]


def test_a_wheel_lists_what_it_will_need_and_the_works_of_others_in_it(sbom: ModuleType, wheelhouse: Path) -> None:
    components = checked(sbom.wheel_bill(wheelhouse / "edgemed-1.0-py3-none-any.whl"))
    assert components["r1"]["scope"] == "required"
    assert components["r3"]["scope"] == "optional"
    assert components["nano"]["type"] == "machine-learning-model"
    assert any(ref.startswith("notice:edgemed/bundles/nano") for ref in all_refs(list(components.values())))


def test_the_same_input_gives_the_same_bytes(
    sbom: ModuleType, wheelhouse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1790000000")
    for name in ("one", "two"):
        assert sbom.main(["wheelhouse", str(wheelhouse), "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert checked(json.loads((tmp_path / "one").read_text("utf-8")))


@pytest.mark.parametrize(
    ("licence", "files", "told"),
    [
        ("GPL-3.0-or-later", {}, "bad: GPL-3.0-or-later"),
        ("MIT AND AGPL-3.0-only", {}, "bad: MIT AND AGPL-3.0-only"),
        ("MIT", {"bad.libs/libmystery-00000000.so.1": b""}, "libmystery-00000000.so.1: licence unknown"),
    ],
)
def test_what_may_not_be_shipped_is_named_and_refused(
    sbom: ModuleType,
    wheelhouse: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    licence: str,
    files: dict[str, bytes],
    told: str,
) -> None:
    make_wheel(wheelhouse, "bad", licence, "", files)
    assert sbom.main(["wheelhouse", str(wheelhouse), "-o", str(tmp_path / "out.json")]) == 1
    assert told in capsys.readouterr().err


def test_everything_that_is_installed_of_what_is_shipped_may_be_shipped(
    sbom: ModuleType, shipped: dict[str, Any]
) -> None:
    assert {"numpy", "onnxruntime", "pydicom", "cryptography"} <= set(shipped)
    assert sbom.refused(shipped.values()) == []


def test_no_gpl_is_shipped_without_its_exception_and_every_lgpl_is_named(
    sbom: ModuleType, shipped: dict[str, Any]
) -> None:
    rules = sbom.rules()
    named = {*rules["allowed"], *rules["justified"], *rules["native"].values()}
    copyleft = {text for text in named if re.search(r"GPL", text)}
    assert copyleft == {"LGPL-2.1-or-later", "GPL-3.0-or-later WITH GCC-exception-3.1"}
    with_lgpl = {what.split("-")[0] for licence, what in sbom.justified(shipped.values()) if licence.startswith("LGPL")}
    assert with_lgpl <= {"numpy: libquadmath"}


def test_what_pillow_lists_and_is_said_to_lack_is_not_there(sbom: ModuleType, shipped: dict[str, Any]) -> None:
    assert not features.check("libimagequant")
    assert not [file for file, _ in shipped["pillow"].native if "fribidi" in file.lower()]
    assert {line.split(":")[0] for line in sbom.rules()["absent"]} == {"pillow"}


@pytest.mark.parametrize(
    ("file", "library"),
    [
        ("libtiff-20b7e810.so.6.3.0", ("libtiff", "6.3.0")),
        ("libscipy_openblas64_-32a4b2a6.so", ("libscipy_openblas64_", "")),
        ("libgfortran-040039e1-0352e75f.so.5.0.0", ("libgfortran", "5.0.0")),
        ("msvcp140-a4c2229bdc2a2a630acdc095b4d86008.dll", ("msvcp140", "")),
    ],
)
def test_shared_libraries_are_known_by_their_names(sbom: ModuleType, file: str, library: tuple[str, str]) -> None:
    assert sbom.library_of(file) == library


def test_soup_gives_every_package_a_purpose_and_every_direct_one_that_of_decisions(
    sbom: ModuleType, shipped: dict[str, Any]
) -> None:
    text = sbom.soup(list(shipped.values()))
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.count(" | ") == 4}
    assert set(rows) >= set(shipped)
    assert not [name for name, row in rows.items() if row[3] == "needed by nothing here"]
    purposes = sbom.purposes((ROOT / "DECISIONS.md").read_text("utf-8"))
    assert not [name for name in sbom.asked_for() if name not in purposes and name in shipped]
    assert rows["pydicom"][3] == purposes["pydicom"][0]


# --- known anomalies --------------------------------------------------------------------------------------------------


def test_every_known_anomaly_names_the_files_that_work_around_it_and_a_text_in_them(sbom: ModuleType) -> None:
    rows = sbom.anomalies()
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"id", "component", "defect", "measure", "files", "text", "found"}, row["id"]
        contents = [(ROOT / file).read_text("utf-8") for file in row["files"]]
        assert contents, row["id"]
        assert any(row["text"] in content for content in contents), f"{row['id']}: the work-around has gone or changed"


def test_every_known_anomaly_is_of_something_that_is_used(sbom: ModuleType) -> None:
    purposes = sbom.purposes((ROOT / "DECISIONS.md").read_text("utf-8"))
    for row in sbom.anomalies():
        assert sbom.normal(row["component"].split()[0]) in purposes, row["id"]
