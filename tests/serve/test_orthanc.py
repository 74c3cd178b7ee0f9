"""A live Orthanc beside the node: a study sent, answered within the same study, found by QIDO-RS, fetched in every way.

Orthanc is started and stopped here, on loopback. EDGEMED_TEST_ORTHANC names its binary where it is not on the PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydicom import dcmread

from edgemed.serve.batch import Batch, Counts, studies_of
from edgemed.serve.pull import fetch_study, find_studies, get_study, move_study, parse_query, pull
from edgemed.serve.settings import Rule, Sender, Target
from edgemed.serve.store import PULLED, Store
from edgemed.serve.study import StudyProcess

Serve = Callable[..., Any]


@dataclass
class Orthanc:
    """A running Orthanc; node_port is where it believes the node to be."""

    http: int
    dicom: int
    web: bool
    node_port: int

    def ask(self, path: str, body: bytes | None = None, method: str | None = None) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}{path}", data=body, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"null")

    @property
    def target(self) -> Target:
        return Target("pacs", "ORTHANC", "127.0.0.1", self.dicom)

    @property
    def web_target(self) -> Target:
        if not self.web:
            pytest.skip("Orthanc has no DICOMweb plugin here (Debian: orthanc-dicomweb)")
        return Target("web", url=f"http://127.0.0.1:{self.http}/dicom-web")

    def modalities(self) -> list[str]:
        return sorted(s["MainDicomTags"]["Modality"] for s in self.ask("/series?expand"))


def binary() -> Path:
    found = os.environ.get("EDGEMED_TEST_ORTHANC") or shutil.which("Orthanc", path=f"{os.environ['PATH']}:/usr/sbin")
    if not found or not Path(found).is_file():
        pytest.skip("Orthanc is not installed (Debian: apt-get install orthanc orthanc-dicomweb)")
    return Path(found)


@pytest.fixture
def orthanc(started: Orthanc) -> Orthanc:
    """The running Orthanc, empty."""
    for study in started.ask("/studies"):
        started.ask(f"/studies/{study}", method="DELETE")
    return started


@pytest.fixture(scope="module")
def started(helper: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """Orthanc, started once: it takes 3 s to stop."""
    program, tmp_path = binary(), tmp_path_factory.mktemp("orthanc")
    plugin = program.resolve().parents[1] / "share" / "orthanc" / "plugins" / "libOrthancDicomWeb.so"
    running = Orthanc(helper.free_port(), helper.free_port(), plugin.is_file(), helper.free_port())
    allowed = dict.fromkeys(("Echo", "Store", "Find", "Move", "Get"), True)
    configuration = {
        "Name": "EDGEMED-TEST",
        "StorageDirectory": str(tmp_path / "orthanc"),
        "IndexDirectory": str(tmp_path / "orthanc"),
        "HttpPort": running.http,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomPort": running.dicom,
        "DicomAet": "ORTHANC",
        **{f"DicomAlwaysAllow{what}": allow for what, allow in allowed.items()},
        "DicomModalities": {"edge": {"AET": "EDGEMED", "Host": "127.0.0.1", "Port": running.node_port}},
        "Plugins": [str(plugin)] if running.web else [],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (tmp_path / "orthanc.json").write_text(json.dumps(configuration))
    with subprocess.Popen(
        [program, tmp_path / "orthanc.json"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as p:
        try:
            until(lambda: p.poll() is not None or _answers(running), 60)
            assert p.poll() is None, "Orthanc ended at once; start it by hand to see why"
            yield running
        finally:
            p.terminate()


def _answers(running: Orthanc) -> bool:
    try:
        return bool(running.ask("/system"))
    except urllib.error.URLError:
        return False


def until(met: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it did not happen"
        threading.Event().wait(0.1)


def senders(helper: ModuleType) -> tuple[Sender, ...]:
    return (Sender("ORTHANC", helper.ANYONE),)


@pytest.mark.parametrize("way", ["C-STORE", "STOW-RS"])
def test_a_study_that_orthanc_sends_is_answered_within_it(
    orthanc: Orthanc, serve: Serve, helper: ModuleType, tmp_path: Path, way: str
) -> None:
    target = orthanc.target if way == "C-STORE" else orthanc.web_target
    rule = Rule("any", "What is there?", ("sr",), (target.name,))
    files = helper.write_instances(tmp_path / "scans", 5)
    for file in files:
        orthanc.ask("/instances", file.read_bytes(), "POST")
    (study,) = orthanc.ask("/studies")
    more = {"senders": senders(helper), "targets": (target,), "rules": (rule,), "quiet_seconds": 0.5}
    with serve(port=orthanc.node_port, **more) as node:
        orthanc.ask("/modalities/edge/store", study.encode(), "POST")
        until(lambda: node.journal.counts()["deliveries"]["sent"] == 1, 60)
        assert orthanc.ask("/studies") == [study]
        assert orthanc.modalities() == ["CT", "OT"]
        orthanc.ask("/modalities/edge/store", study.encode(), "POST")  # the result comes back: nothing begins anew
        assert node.journal.counts()["studies"] == {"receiving": 0, "stable": 1}
        assert node.journal.counts()["instances"] == {"stored": 5}


def test_a_study_is_found_and_fetched_in_every_way(
    orthanc: Orthanc, serve: Serve, helper: ModuleType, tmp_path: Path
) -> None:
    files = helper.write_instances(tmp_path / "scans", 5)
    for file in files:
        orthanc.ask("/instances", file.read_bytes(), "POST")
    uid = f"{helper.ROOT}.1"
    with serve(port=orthanc.node_port, senders=senders(helper)) as node:
        assert move_study(orthanc.target, node.settings, uid) == 5
        assert node.journal.counts()["instances"] == {"stored": 5}
        (tmp_path / "get").mkdir()
        assert len(get_study(orthanc.target, node.settings, uid, tmp_path / "get")) == 5
        web = orthanc.web_target
        assert find_studies(web, node.settings, {"StudyInstanceUID": uid}) == [uid]
        (tmp_path / "web").mkdir()
        fetched = fetch_study(web, node.settings, uid, tmp_path / "web")
        assert [dcmread(f).PixelData for f in fetched] == [dcmread(f).PixelData for f in files]


@pytest.mark.parametrize("way", ["AE", "web"])
def test_studies_of_a_query_are_pulled_and_answered_in_a_batch(
    orthanc: Orthanc, helper: ModuleType, tmp_path: Path, way: str
) -> None:
    for study in (1, 2):
        for file in helper.write_instances(tmp_path / "scans", 3, study):
            orthanc.ask("/instances", file.read_bytes(), "POST")
    target = orthanc.target if way == "AE" else orthanc.web_target
    out = tmp_path / "out"
    settings = helper.batch_settings(out, targets=(target,))
    uids = [f"{helper.ROOT}.1", f"{helper.ROOT}.2"]
    query = parse_query(f"{target.name}:PatientID=PLANTED-ID,ModalitiesInStudy=CT", settings)
    assert sorted(query.studies(settings)) == uids
    assert parse_query(f"{target.name}:PatientID=ANOTHER", settings).source == target
    assert find_studies(target, settings, {"PatientID": "ANOTHER"}) == []
    assert pull(query, uids[0], settings) == 3
    assert len(list((settings.folder / PULLED).glob("*/*.dcm"))) == 3
    with Store(settings, results=out) as store:
        counts = Batch(store, [helper.quick_process]).run(studies_of(query, uids, settings))
    assert counts == Counts(studies=2, done=2, results=2)
    assert {file.parent.name for file in out.glob("1.*/*.dcm")} == set(uids)
    assert len(orthanc.ask("/studies")) == 2
    assert orthanc.modalities() == ["CT", "CT", "OT", "OT"]  # sent back, each into its study


@pytest.mark.slow
def test_the_embedded_bundle_answers_a_ct_with_seg_and_sr(
    orthanc: Orthanc, serve: Serve, helper: ModuleType, sample_scan: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    ds = dcmread(sample_scan)  # its publisher emptied what Orthanc needs
    ds.SOPClassUID, ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientID = f"{helper.ROOT}.1", f"{helper.ROOT}.1.1", "P1"
    ds.save_as(tmp_path / "ct.dcm", enforce_file_format=True)
    orthanc.ask("/instances", (tmp_path / "ct.dcm").read_bytes(), "POST")
    (study,) = orthanc.ask("/studies")
    rule = Rule("liver", "Where is the liver?", ("seg", "sr"), ("pacs",), select={"conditions": {"Modality": "CT"}})
    more = {"senders": senders(helper), "targets": (orthanc.target,), "rules": (rule,), "quiet_seconds": 0.5}
    with serve(port=orthanc.node_port, process=StudyProcess(), **more) as node:
        orthanc.ask("/modalities/edge/store", study.encode(), "POST")
        until(lambda: node.journal.counts()["deliveries"]["sent"] == 2, 300)
        assert orthanc.ask("/studies") == [study]
        assert orthanc.modalities() == ["CT", "SEG", "SR"]
