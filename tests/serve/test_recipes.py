"""recipes/orthanc as it is: an Orthanc with the Lua hook forwards a stable study, results come back into it, once."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgemed.serve.settings import NodeSettings, read_settings

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "orthanc"

Serve = Callable[..., Any]


def _live() -> ModuleType:
    """The module test_orthanc.py of this folder: how Orthanc is found and asked."""
    name = "edgemed_tests_live_orthanc"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parent / "test_orthanc.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture
def orthanc(helper: ModuleType, tmp_path: Path) -> Iterator[Any]:
    """Orthanc with the recipe's configuration but for ports, folders, and how long a study must be quiet."""
    live = _live()
    program = live.binary()
    running = live.Orthanc(helper.free_port(), helper.free_port(), False, helper.free_port())
    told = json.loads((RECIPE / "orthanc.json").read_text())
    told |= {"HttpPort": running.http, "DicomPort": running.dicom, "StableAge": 1}
    told |= {"StorageDirectory": str(tmp_path / "db"), "IndexDirectory": str(tmp_path / "db")}
    told["DicomModalities"]["edgemed"]["Port"] = running.node_port
    told["LuaScripts"] = [str(RECIPE / name) for name in told["LuaScripts"]]
    (tmp_path / "orthanc.json").write_text(json.dumps(told))
    with subprocess.Popen(
        [program, tmp_path / "orthanc.json"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as p:
        try:
            live.until(lambda: p.poll() is not None or live._answers(running), 60)
            assert p.poll() is None, "Orthanc ended at once; start it by hand to see why"
            yield running
        finally:
            p.terminate()


def recipe(running: Any) -> dict[str, Any]:
    """Return the recipe's settings of the node as keywords of `serve`, with the ports of the test."""
    settings = read_settings(RECIPE / "node.toml")
    targets = tuple(replace(t, port=running.dicom) for t in settings.targets)
    known = {f.name: getattr(settings, f.name) for f in fields(NodeSettings)}
    wanted = {name: known[name] for name in ("aet", "bind", "senders", "rules")}
    return {**wanted, "targets": targets, "port": running.node_port, "quiet_seconds": 0.5}


def test_a_stable_study_is_forwarded_and_its_result_arrives_in_it_once(
    orthanc: Any, serve: Serve, helper: ModuleType, tmp_path: Path
) -> None:
    live = _live()
    with serve(**recipe(orthanc)) as node:
        (report,) = helper.write_instances(tmp_path / "report", 1, study=2, Modality="SR")  # no image: never sent
        other = orthanc.ask("/instances", report.read_bytes(), "POST")["ParentStudy"]
        for file in helper.write_instances(tmp_path / "scans", 3):
            study = orthanc.ask("/instances", file.read_bytes(), "POST")["ParentStudy"]
        live.until(lambda: node.journal.counts()["deliveries"]["sent"] == 1, 60)
        assert sorted(orthanc.ask("/studies")) == sorted([study, other])
        assert orthanc.modalities() == ["CT", "OT", "SR"]
        live.until(lambda: _stable_changes(orthanc, study) >= 2, 30)  # the result made it stable again
        assert orthanc.ask(f"/studies/{study}/metadata?expand")["EdgemedSent"] == "3"
        assert _stable_changes(orthanc, other) == 1
        assert len(orthanc.ask("/jobs")) == 1
        assert node.journal.counts()["instances"] == {"stored": 3}
        (more,) = helper.write_instances(tmp_path / "more", 4)[3:]
        orthanc.ask("/instances", more.read_bytes(), "POST")
        live.until(lambda: node.journal.counts()["instances"].get("stored") == 4, 30)
        assert len(orthanc.ask("/jobs")) == 2


def _stable_changes(orthanc: Any, study: str) -> int:
    changes = orthanc.ask("/changes?limit=1000")["Changes"]
    return sum(1 for c in changes if c["ChangeType"] == "StableStudy" and c["ID"] == study)


def test_the_recipe_is_what_its_programs_read() -> None:
    settings = read_settings(RECIPE / "node.toml")
    told = json.loads((RECIPE / "orthanc.json").read_text())
    node = told["DicomModalities"]["edgemed"]
    assert (node["AET"], node["Port"], node["Host"]) == (settings.aet, settings.port, settings.bind)
    (target,) = settings.targets
    assert (target.aet, target.port) == (told["DicomAet"], told["DicomPort"])
    assert [s.aet for s in settings.senders] == [told["DicomAet"]]
    script = (RECIPE / "forward.lua").read_text()
    assert "EdgemedSent" in told["UserMetadata"] and "metadata['EdgemedSent']" in script
