"""Inference processes: jobs over pipes, what happens when one dies, hangs or is told to stop; several at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgemed.errors import EdgemedError, InvalidInput, Timeout
from edgemed.serve.settings import Rule
from edgemed.serve.work import Stopped
from edgemed.serve.worker import Worker, devices_of

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-in kills itself with a POSIX signal")

Serve = Callable[..., Any]


def until(met: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it did not happen"
        threading.Event().wait(0.02)


@pytest.fixture
def worker(helper: ModuleType) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(**more: Any) -> Worker:
        made.append(Worker("cpu", 1, command=(sys.executable, str(helper.__file__), "worker"), **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


def asked(
    worker: Worker, scans: Path, folder: Path, prompt: str, stopping: Callable[[], bool] = bool
) -> Sequence[Path]:
    out = folder / "work" / "1" / "out"
    out.mkdir(parents=True, exist_ok=True)
    return worker(Rule("any", prompt, ("sr",), select={"conditions": {"Modality": "CT"}}), scans, out, stopping)


@pytest.fixture
def study(helper: ModuleType, tmp_path: Path) -> Path:
    (file,) = helper.write_instances(tmp_path / "scans", 1)
    (tmp_path / "in").mkdir()
    file.rename(tmp_path / "in" / "1.2.3.dcm")
    return tmp_path / "in"


def test_files_and_errors_come_back(worker: Callable[..., Worker], study: Path, tmp_path: Path) -> None:
    one = worker()
    (file,) = asked(one, study, tmp_path, "?")
    assert file == tmp_path / "work" / "1" / "out" / "result.dcm"
    pid = one.pid
    with pytest.raises(InvalidInput, match="these slices are damaged"):
        asked(one, study, tmp_path, "refuse")
    with pytest.raises(EdgemedError, match="RuntimeError") as error:
        asked(one, study, tmp_path, "break")
    assert "Planted" not in str(error.value)
    assert one.pid == pid


def test_a_process_that_dies_fails_its_job_and_the_next_has_a_fresh_one(
    worker: Callable[..., Worker], study: Path, tmp_path: Path
) -> None:
    one = worker()
    with pytest.raises(EdgemedError, match="SIGKILL"):
        asked(one, study, tmp_path, "crash once")
    assert asked(one, study, tmp_path, "crash once")


def test_a_job_stops_where_it_is_told_to(worker: Callable[..., Worker], study: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        asked(worker(), study, tmp_path, "hang", lambda: (tmp_path / "begun").exists())


def test_a_job_that_takes_too_long_is_ended(worker: Callable[..., Worker], study: Path, tmp_path: Path) -> None:
    one = worker(seconds=0.1)
    with pytest.raises(Timeout):
        asked(one, study, tmp_path, "hang")
    assert one.pid is None


def test_a_process_ends_when_the_node_is_gone(helper: ModuleType, study: Path, tmp_path: Path) -> None:
    out = tmp_path / "work" / "1" / "out"
    out.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, str(helper.__file__), "worker", "cpu", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        rule = {"name": "any", "prompt": "hang", "kinds": ["sr"]}
        child.stdin.write(f'{{"rule": {rule}, "study": "{study}", "out": "{out}"}}\n'.replace("'", '"').encode())
        child.stdin.close()
        assert child.wait(30) == 0


def test_a_study_whose_process_dies_is_claimed_again(
    serve: Serve, helper: ModuleType, worker: Callable[..., Worker], tmp_path: Path
) -> None:
    files = helper.write_instances(tmp_path / "scans", 2)
    more = {"rules": (Rule("any", "crash once", ("sr",)),), "quiet_seconds": 0.1, "retry_seconds": 0.01}
    with serve(process=worker(), **more) as node:
        assert helper.send(node.address[1], files) == [0x0000] * 2
        until(lambda: node.journal.counts()["jobs"]["done"] == 1)
        assert node.journal.counts()["results"] == {"stored": 1}
        assert node.journal._rows("SELECT attempts FROM job") == [(2,)]


def test_a_study_that_kills_every_process_is_given_up(
    serve: Serve, helper: ModuleType, worker: Callable[..., Worker], tmp_path: Path
) -> None:
    files = helper.write_instances(tmp_path / "scans", 1)
    rules = (Rule("any", "always crash", ("sr",)),)
    with serve(process=worker(), rules=rules, quiet_seconds=0.1, retry_seconds=0.01, max_attempts=2) as node:
        assert helper.send(node.address[1], files) == [0x0000]
        until(lambda: node.journal.counts()["jobs"]["failed"] == 1)
        assert len((tmp_path / "node" / "begun").read_text().split()) == 2


def test_two_workers_answer_two_studies_at_once(
    helper: ModuleType, worker: Callable[..., Worker], tmp_path: Path
) -> None:
    from edgemed.serve.batch import Batch, studies_in
    from edgemed.serve.store import Store

    files = [f for study in (1, 2) for f in helper.write_instances(tmp_path / "scans", 1, study)]
    out = tmp_path / "out"
    with Store(helper.batch_settings(out, "wait for two"), results=out) as store:
        counts = Batch(store, [worker(), worker()]).run(studies_in([str(f) for f in files])[0])
    assert (counts.done, counts.failed) == (2, 0)
    assert len(set((out / ".edgemed" / "begun").read_text().split())) == 2


def test_a_study_that_kills_the_node_is_given_up(serve: Serve, helper: ModuleType, tmp_path: Path) -> None:
    """As after kill -9 each time: the job was claimed and never ended."""
    (file,) = helper.write_instances(tmp_path / "scans", 1)
    with serve(max_attempts=2, quiet_seconds=0.0) as node:
        node._stopping.set()
        for thread in node._threads:
            thread.join(10)
        node._stopping.clear()
        assert helper.send(node.address[1], [file]) == [0x0000]
        assert node.close_quiet_studies() == 1
        for _ in range(2):
            assert node.journal.claim(node.store.now()) is not None
            assert node.journal.recover(node.store.now()) == 1
        assert node.run_job()
        assert node.journal.counts()["jobs"]["failed"] == 1


def test_the_devices_are_those_of_the_settings_else_one(helper: ModuleType, tmp_path: Path) -> None:
    assert devices_of(helper.settings(tmp_path, workers=("cpu", "cpu"))) == ("cpu", "cpu")
    assert len(devices_of(helper.settings(tmp_path))) >= 1
    with pytest.raises(InvalidInput, match="workers"):
        helper.settings(tmp_path, workers=("tpu",))


def test_ctrl_c_of_the_terminal_leaves_the_process_to_its_node(
    worker: Callable[..., Worker], study: Path, tmp_path: Path
) -> None:
    one = worker()
    asked(one, study, tmp_path, "?")
    assert one.pid is not None
    os.kill(one.pid, signal.SIGINT)
    os.kill(one.pid, signal.SIGTERM)
    assert asked(one, study, tmp_path, "?")
