"""kill -9 at random moments of reception, processing and delivery: nothing acknowledged is lost, nothing done twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydicom import dcmread

from edgemed.files import sha256_of
from edgemed.serve.journal import Journal
from edgemed.serve.store import Store

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 and fork are POSIX's")

INSTANCES = 3
ROUNDS = 500 if os.environ.get("EDGEMED_NIGHTLY") else 100
"""In each a study is new, so that there is something to lose."""


class Nodes:
    """Starts nodes on one folder, one after another."""

    def __init__(self, program: Any) -> None:
        self._program = program

    def start(self) -> tuple[int, int]:
        """Return (process id, port) of a node that listens."""
        self._program.stdin.write("go\n")
        self._program.stdin.flush()
        line = self._program.stdout.readline()
        assert line, "the node did not start"
        pid, port = map(int, line.split())
        return pid, port


@contextmanager
def nodes(helper: ModuleType, folder: Path, target_port: int) -> Iterator[Nodes]:
    arguments = [sys.executable, str(helper.__file__), str(folder), "0.05", str(target_port)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        yield Nodes(program)
        assert program.stdin is not None
        program.stdin.close()
        assert program.wait(30) == 0


def sending(helper: ModuleType, port: int, files: list[Path], acknowledged: set[Path], ended: threading.Event) -> None:
    """Send what was not acknowledged, and then all once more, until the node is gone."""
    waiting = [f for f in files if f not in acknowledged] + files
    with helper.association(port) as assoc:
        for file in waiting:
            if ended.is_set() or not assoc.is_established:
                return
            try:
                status = assoc.send_c_store(file).get("Status")
            except RuntimeError:  # the association ended in between
                return
            if status == 0x0000:
                acknowledged.add(file)


@pytest.mark.slow
def test_a_node_that_is_killed_loses_and_repeats_nothing(helper: ModuleType, tmp_path: Path) -> None:
    draw, studies = random.Random(1), ROUNDS
    files = [
        file for study in range(1, studies + 1) for file in helper.write_instances(tmp_path / "scans", INSTANCES, study)
    ]
    acknowledged: set[Path] = set()
    folder = tmp_path / "node"
    kills_with = {"work": 0, "incoming": 0}
    with helper.archive() as (pacs, target_port), nodes(helper, folder, target_port) as started:
        for _ in range(ROUNDS):
            pid, port = started.start()
            ended = threading.Event()
            thread = threading.Thread(target=sending, args=(helper, port, files, acknowledged, ended))
            thread.start()
            threading.Event().wait(draw.uniform(0.0, 0.4))
            os.kill(pid, signal.SIGKILL)
            ended.set()
            thread.join(60)
            assert not thread.is_alive()
            for name in kills_with:
                kills_with[name] += bool(list((folder / name).iterdir()))
        pid, port = started.start()
        with Journal(folder / "journal.sqlite") as journal:
            known = {uid for (uid,) in journal._rows("SELECT uid FROM instance")}
            assert {dcmread(f).SOPInstanceUID for f in acknowledged} <= known
            left = [f for f in files if f not in acknowledged]
            assert helper.send(port, left) == [0x0000] * len(left)
            end = time.monotonic() + 120
            while not all_done(journal.counts(), studies):
                assert time.monotonic() < end, journal.counts()
                threading.Event().wait(0.1)
        os.kill(pid, signal.SIGKILL)
    check(helper, folder, files, pacs, target_port)
    print(
        f"{ROUNDS} kills, {len(acknowledged)} of {len(files)} acknowledged by then; kills that left work: {kills_with}"
    )


def all_done(counts: dict[str, dict[str, int]], studies: int) -> bool:
    jobs, deliveries = counts["jobs"], counts["deliveries"]
    return (
        counts["studies"] == {"receiving": 0, "stable": studies}
        and jobs == {"queued": 0, "running": 0, "done": studies, "failed": 0}
        and deliveries["pending"] == deliveries["failed"] == 0
    )


def check(helper: ModuleType, folder: Path, files: list[Path], pacs: Any, target_port: int) -> None:
    """Compare the journal with the files, the results with what they must be, the archive with the deliveries."""
    with Store(helper.settings(folder, target_port=target_port)) as store:
        assert store.recover()["missing"] == 0  # and files of results that later ones replaced are gone
        assert store.recover() == {"requeued": 0, "orphans": 0, "missing": 0}
        journal = store.journal
        for file in files:
            sent = dcmread(file)
            item = journal.instance(sent.SOPInstanceUID)
            assert item is not None
            assert dcmread(store.instances / item.name) == sent
            assert sha256_of(store.instances / item.name) == item.sha256
        rows = journal._rows("SELECT name, uid, sha256, study FROM result JOIN job ON job.id = result.job")
        assert len(rows) == len(files) // INSTANCES
        for name, uid, sha256, study in rows:
            file = store.result(str(name))
            assert sha256_of(file) == sha256
            assert dcmread(file).ImageComments == f"{INSTANCES} instances"
            assert dcmread(file).StudyInstanceUID == study
            assert journal._rows("SELECT state FROM delivery WHERE uid = ?", uid) == [("sent",)]
        delivered = {str(uid) for (uid,) in journal._rows("SELECT uid FROM delivery WHERE state = 'sent'")}
        assert delivered <= set(pacs.received)
