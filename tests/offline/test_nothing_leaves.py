"""Answering, batches and a node, run in this process with the guard on its sockets."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydicom import dcmread

from edgemed.cli import main

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def test_an_answer_with_every_kind_of_result(sample_scan: str, tmp_path: Path, guard: list[str]) -> None:
    kinds = "json,seg,sr,gsps,sc,nifti,png"
    asked = ["infer", sample_scan, "--prompt", "Where is the liver?", "--json", "--to", kinds, "-o", str(tmp_path)]
    assert main([*asked, "--overlay", "--report", str(tmp_path / "run.json")]) == 0


def test_pdf_and_fhir(sample_scan: str, tmp_path: Path, guard: list[str]) -> None:
    for library in ("reportlab", "fhir.resources"):
        pytest.importorskip(library)
    asked = ["infer", sample_scan, "--prompt", "肝脏在哪里?", "--to", "pdf,fhir", "-o", str(tmp_path)]
    assert main(asked) == 0


def test_a_batch(sample_scan: str, tmp_path: Path, guard: list[str]) -> None:
    turns = [{"from": "human", "value": "Which modality is this?"}, {"from": "gpt", "value": ""}]
    questions = tmp_path / "questions.jsonl"
    scan = Path(sample_scan)
    questions.write_text(json.dumps({"id": 1, "image": scan.name, "conversations": turns}))
    assert main(["batch", str(questions), "-o", str(tmp_path / "answers.jsonl"), "--images", str(scan.parent)]) == 0


@pytest.mark.parametrize(
    "arguments", [["models", "list"], ["models", "verify", "nano"], ["doctor"], ["config", "show"]]
)
def test_what_looks_after_a_workstation(arguments: list[str], guard: list[str]) -> None:
    assert main(arguments) == 0


def test_a_study_in_and_its_result_out_over_loopback(
    dicom_node: ModuleType, sample_scan: str, tmp_path: Path, guard: list[str]
) -> None:
    from edgemed.serve.node import Node
    from edgemed.serve.settings import Rule, Target
    from edgemed.serve.store import Store
    from edgemed.serve.study import StudyProcess

    ds = dcmread(sample_scan)  # its publisher emptied what a study needs
    ds.decompress()
    ds.SOPClassUID, ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientID = f"{dicom_node.ROOT}.1", f"{dicom_node.ROOT}.1.1", "P1"
    ds.save_as(tmp_path / "ct.dcm", enforce_file_format=True)
    ended = threading.Event()
    events: list[dict[str, Any]] = []

    def tell(what: str, **facts: Any) -> None:
        events.append({"event": what, **facts})
        if what in ("sent", "failed", "not sent", "trouble"):
            ended.set()

    with dicom_node.archive() as (pacs, port):
        rules = (Rule("liver", "Where is the liver?", ("sc",), ("pacs",)),)
        targets = (Target("pacs", "PACS", "127.0.0.1", port),)
        settings = dicom_node.settings(tmp_path / "node", rules=rules, targets=targets, quiet_seconds=0.0)
        process = StudyProcess()
        with Store(settings) as store:
            node = Node(store, process, tell=tell)
            node.start()
            try:
                assert dicom_node.send(node.address[1], [tmp_path / "ct.dcm"]) == [0]
                assert ended.wait(60)
            finally:
                node.stop()
                process.close()
        assert len(pacs.received) == 1, events
