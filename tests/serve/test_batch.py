"""Studies of a folder or a query answered in one go: results for each, nothing twice, whatever ends the process."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydicom import dcmread

from edgemed.errors import CannotRead, InvalidInput, NoInput
from edgemed.files import sha256_of
from edgemed.serve.batch import Batch, Counts, batch_rule, studies_in, studies_of
from edgemed.serve.journal import Journal
from edgemed.serve.pull import Query
from edgemed.serve.settings import Rule
from edgemed.serve.store import Store

Told = list[tuple[str, str | None]]


@pytest.fixture
def folder(helper: ModuleType, tmp_path: Path) -> Path:
    """Three studies of two instances."""
    for study in (1, 2, 3):
        helper.write_instances(tmp_path / "scans", 2, study)
    return tmp_path / "scans"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


class Counting:
    """The quick stand-in for a model, which fails for some studies and counts the others."""

    def __init__(self, helper: ModuleType, *errors: tuple[str, Exception]) -> None:
        self._helper, self._errors = helper, dict(errors)
        self.asked: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, rule: Rule, study: Path, out: Path, stopping: Callable[[], bool]) -> Sequence[Path]:
        uid = str(dcmread(next(study.iterdir())).StudyInstanceUID)
        with self._lock:
            self.asked.append(uid)
        if uid in self._errors:
            raise self._errors[uid]
        done: Sequence[Path] = self._helper.quick_process(rule, study, out, stopping)
        return done


def files_in(folder: Path) -> list[str]:
    return sorted(str(file) for file in folder.rglob("*") if file.is_file())


def answered(
    helper: ModuleType, folder: Path, out: Path, process: Any, told: Told | None = None, **more: Any
) -> Counts:
    def tell(uid: str, error: str | None) -> None:
        (told if told is not None else []).append((uid, error))

    with Store(helper.batch_settings(out, **more), results=out) as store:
        return Batch(store, [process], tell).run(studies_in(files_in(folder))[0])


def results(out: Path) -> dict[str, str]:
    """Return study -> digest of its one result."""
    return {file.parent.name: sha256_of(file) for file in out.glob("*/result.dcm") if file.parent.name[0] != "."}


def test_each_study_has_its_folder_of_results_and_its_files_stay(helper: ModuleType, folder: Path, out: Path) -> None:
    before = {file: sha256_of(file) for file in files_in(folder)}
    told: Told = []
    counts = answered(helper, folder, out, helper.quick_process, told)
    assert counts == Counts(studies=3, done=3, results=3)
    assert set(results(out)) == {f"{helper.ROOT}.{study}" for study in (1, 2, 3)}
    assert {uid for uid, error in told if error is None} == set(results(out))
    assert {file: sha256_of(file) for file in files_in(folder)} == before
    assert list((out / ".edgemed" / "work").iterdir()) == []


def test_the_same_call_again_asks_nothing(helper: ModuleType, folder: Path, out: Path) -> None:
    answered(helper, folder, out, helper.quick_process)
    before = results(out)
    process = Counting(helper)
    folder.rename(folder.with_name("elsewhere"))  # the files are known by what is in them
    counts = answered(helper, folder.with_name("elsewhere"), out, process)
    assert counts == Counts(studies=3, done_before=3, results=3)
    assert process.asked == []
    assert results(out) == before


def test_a_study_that_got_an_instance_is_asked_again_and_only_that(helper: ModuleType, folder: Path, out: Path) -> None:
    answered(helper, folder, out, helper.quick_process)
    helper.write_instances(folder, 3, 2)
    process = Counting(helper)
    assert answered(helper, folder, out, process).done_before == 2
    assert process.asked == [f"{helper.ROOT}.2"]
    assert dcmread(out / f"{helper.ROOT}.2" / "result.dcm").ImageComments == "3 instances"


def test_what_a_study_no_longer_has_is_removed_and_what_is_the_users_is_not(
    helper: ModuleType, folder: Path, out: Path
) -> None:
    answered(helper, folder, out, helper.quick_process)
    study = out / f"{helper.ROOT}.1"
    (study / "notes.txt").write_text("mine")
    (out / "other").mkdir()
    (out / "other" / "notes.txt").write_text("mine")
    helper.write_instances(folder, 3, 1)

    def nothing(*arguments: Any) -> Sequence[Path]:
        return ()

    assert answered(helper, folder, out, nothing).results == 2
    assert [file.name for file in study.iterdir()] == ["notes.txt"]
    assert (out / "other" / "notes.txt").read_text() == "mine"


def test_studies_that_fail_are_told_and_tried_again_by_the_next_call(
    helper: ModuleType, folder: Path, out: Path
) -> None:
    damaged, busy = f"{helper.ROOT}.1", f"{helper.ROOT}.3"
    process = Counting(helper, (damaged, InvalidInput("damaged")), (busy, CannotRead("busy")))
    told: Told = []
    counts = answered(helper, folder, out, process, told)
    assert counts == Counts(studies=3, done=1, failed=2, results=1)
    assert dict(told)[damaged] == "InvalidInput: damaged"
    assert (process.asked.count(damaged), process.asked.count(busy)) == (1, 2)
    assert answered(helper, folder, out, helper.quick_process) == Counts(studies=3, done=2, done_before=1, results=3)


def test_a_study_that_no_series_of_fits_is_done_without_results(helper: ModuleType, folder: Path, out: Path) -> None:
    process = Counting(helper, (f"{helper.ROOT}.1", NoInput("none fits")))
    assert answered(helper, folder, out, process) == Counts(studies=3, done=3, results=2)


def test_an_instance_that_is_in_two_studies_is_answered_in_both(helper: ModuleType, folder: Path, out: Path) -> None:
    helper.write_instances(folder, 1, 9, SOPInstanceUID=helper.instance_uid(1, 1))
    assert answered(helper, folder, out, helper.quick_process).done == 4
    assert answered(helper, folder, out, helper.quick_process).done_before == 4


def test_results_of_another_question_are_not_mixed_with_these(helper: ModuleType, folder: Path, out: Path) -> None:
    rules = [
        batch_rule(Rule("batch", prompt, ("sr",)), digest) for prompt, digest in (("a", "0"), ("b", "0"), ("a", "1"))
    ]
    assert len({rule.name for rule in rules}) == 3
    answered(helper, folder, out, helper.quick_process)
    from dataclasses import replace

    settings = replace(helper.batch_settings(out), rules=(rules[0],))
    with Store(settings, results=out) as store, pytest.raises(InvalidInput, match="another question"):
        Batch(store, [helper.quick_process])


def test_results_are_sent_and_what_was_not_taken_is_sent_by_the_next_call(
    helper: ModuleType, folder: Path, out: Path
) -> None:
    from edgemed.serve.settings import Target

    port = helper.free_port()
    targets = (Target("pacs", "PACS", "127.0.0.1", port),)
    answered(helper, folder, out, helper.quick_process)
    counts = answered(helper, folder, out, helper.quick_process, targets=targets)
    assert counts == Counts(studies=3, done_before=3, results=3, unsent=3)
    with helper.archive(port) as (pacs, _):
        assert answered(helper, folder, out, helper.quick_process, targets=targets).unsent == 0
        assert len(pacs.received) == 3
        assert answered(helper, folder, out, helper.quick_process, targets=targets).unsent == 0
        assert len(pacs.received) == 3


def test_studies_of_a_query_are_fetched_one_after_another_and_not_kept(
    helper: ModuleType, folder: Path, out: Path
) -> None:
    from edgemed.serve import batch

    fetched: list[str] = []

    def fetch(source: Any, settings: Any, study: str, folder_of: Path, series: str | None) -> list[Path]:
        fetched.append(study)
        if study.endswith(".3"):
            raise CannotRead("source pacs cannot be reached")
        folder_of.mkdir(parents=True)
        files = []
        for file in map(Path, files_in(folder)):
            ds = dcmread(file)
            if ds.StudyInstanceUID == study:
                files.append(folder_of / f"{ds.SOPInstanceUID}.dcm")
                files[-1].write_bytes(file.read_bytes())
        return files

    uids = [f"{helper.ROOT}.{study}" for study in (1, 2, 3)]
    settings = helper.batch_settings(out)
    query = Query(None, {"PatientID": "1"})  # type: ignore[arg-type]  # `fetch` above asks no source
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgemed.serve.pull.fetch", fetch)
        for done, before in ((2, 0), (0, 2)):
            with Store(settings, results=out) as store:
                counts = Batch(store, [helper.quick_process]).run(studies_of(query, uids, settings))
            assert (counts.done, counts.done_before, counts.failed) == (done, before, 1)
            assert not list((out / ".edgemed" / batch.FETCHED).iterdir() if before == 0 else ())
    assert fetched == [*uids, uids[2]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 and fork are POSIX's")
def test_a_batch_that_is_killed_goes_on_and_repeats_nothing_that_is_done(
    helper: ModuleType, tmp_path: Path, out: Path
) -> None:
    kills, studies = (100, 400) if os.environ.get("EDGEMED_NIGHTLY") else (8, 20)
    for study in range(1, studies + 1):
        helper.write_instances(tmp_path / "scans", 2, study)
    draw = random.Random(1)
    command = [sys.executable, str(helper.__file__), "batch", str(tmp_path / "scans"), str(out)]
    done: dict[str, str] = {}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        for _ in range(kills):
            program.stdin.write("go\n")
            program.stdin.flush()
            pid = int(program.stdout.readline())
            threading.Event().wait(draw.uniform(0.0, 0.5))
            with contextlib.suppress(ProcessLookupError):  # it was done with all of them by then
                os.kill(pid, signal.SIGKILL)
            with Journal(out / ".edgemed" / "journal.sqlite") as journal:
                rows = journal._rows(
                    "SELECT study, finished, sha256 FROM job JOIN result ON result.job = job.id WHERE state = 'done'"
                )
            for study, finished, sha256 in rows:
                assert finished == 1
                assert done.setdefault(str(study), str(sha256)) == sha256
            assert {study: results(out)[study] for study in done} == done
        program.stdin.close()
        assert program.wait(30) == 0
    print(f"{kills} kills, {len(done)} of {studies} studies done by then")
    counts = answered(helper, tmp_path / "scans", out, helper.acting_process, prompt="slowly")
    assert (counts.studies, counts.failed, counts.results) == (studies, 0, studies)
    assert counts.done_before >= len(done)
    assert {study: results(out)[study] for study in done} == done
    assert len(results(out)) == studies
