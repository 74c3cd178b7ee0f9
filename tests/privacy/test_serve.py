"""The log, the store's names and the journal of a node tell nothing of the patients whose studies it was sent."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pynetdicom", reason="pynetdicom is not installed (extra: edgemed[serve])")

CONFIG = """
folder = "{folder}"
port = 0
min_free_mib = 0
quiet_seconds = 0
keep_hours = 0
max_attempts = 1
[[sender]]
aet = "CT1"
addresses = ["127.0.0.1"]
[[rule]]
name = "liver"
prompt = "Where is the liver?"
kinds = ["json"]
slices = "middle"
"""


def test_a_node_that_answers_a_study_and_refuses_others(
    run: Callable[..., Any], whole: Path, small: Path, plant: Any, tmp_path: Path
) -> None:
    from pydicom import dcmread
    from pynetdicom import AE
    from pynetdicom.sop_class import CTImageStorage  # type: ignore[attr-defined]

    def send(title: str, *scans: Any) -> list[int | None]:
        ae = AE(title)
        ae.add_requested_context(CTImageStorage, "1.2.840.10008.1.2.1")
        assoc = ae.associate("127.0.0.1", port, ae_title="EDGEMED")
        if not assoc.is_established:
            return []
        told = [assoc.send_c_store(scan).get("Status") for scan in scans]
        assoc.release()
        return told

    config = tmp_path / "node.toml"
    config.write_text(CONFIG.format(folder=(tmp_path / "home").as_posix()))
    good, spoiled = dcmread(whole), dcmread(small)
    spoiled.SOPInstanceUID, spoiled.StudyInstanceUID = f"{plant.STUDY}.8", f"{plant.STUDY}.9"
    spoiled.PhotometricInterpretation = "ZQ7PLANT"
    process, noted = run.start("serve", "--dicom", "--config", config)  # type: ignore[attr-defined]
    lines: list[str] = []
    try:
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r'"listening", "port": (\d+)', line):
                port = int(found[1])
                assert send("CT1", good, spoiled) == [0, 0]
                assert send(plant.MARK, good) == []
            events = [json.loads(line)["event"] for line in lines]
            if sum(events.count(name) for name in ("answered", "failed")) == 2 and "rejected" in events:
                break
    finally:
        process.send_signal(signal.SIGTERM)
        out, rest = process.communicate(timeout=60)
    ran = run.left(process.returncode, out, "".join(lines) + rest, noted)  # type: ignore[attr-defined]
    assert ran.code == 0
    marks = (*plant.HEADER_MARKS, *plant.UIDS)
    assert plant.found(ran.out + ran.err, marks) == []
    assert plant.found(ran.names, plant.HEADER_MARKS) == []
    journal = tmp_path / "home" / "journal.sqlite"
    with sqlite3.connect(journal) as db:
        assert plant.found("\n".join(db.iterdump()), plant.HEADER_MARKS) == []
    db.close()
    names = [str(file.relative_to(tmp_path)) for file in (tmp_path / "home").rglob("*")]
    assert plant.found("\n".join(names), plant.HEADER_MARKS) == []
