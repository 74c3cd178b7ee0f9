"""Files and journal change in an order that holds whatever call fails: every n-th call of the system is made to."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydicom import dcmread

from edgemed.errors import CannotWrite, InvalidInput
from edgemed.serve.journal import Instance, Journal, Result
from edgemed.serve.store import Head, Refused, Store

CALLS = ("fsync", "replace", "mkdir")


def taken(store: Store, file: Path) -> Instance:
    """Give a file to the store as an association does."""
    ds = dcmread(file)
    spool = store.open_spool(Head(ds.SOPInstanceUID, ds.SOPClassUID, ds.file_meta.TransferSyntaxUID))
    data = file.read_bytes()
    start = data.index(b"DICM") + 4
    start += 12 + int.from_bytes(data[start + 8 : start + 12], "little")  # (0002,0000) and the group that it counts
    for at in range(start, len(data), 500):
        spool.write(data[at : at + 500])
    return store.take(spool, "CT1")


def status_of(store: Store, file: Path) -> int:
    try:
        taken(store, file)
    except Refused as error:
        return error.status
    return 0x0000


def whole(store: Store) -> bool:
    """Tell whether every instance of the journal is a file, and every file one of the journal."""
    files = {f"{p.parent.name}/{p.name}" for p in store.instances.rglob("*.dcm")}
    return files == store.journal.names()


@pytest.mark.parametrize("call", CALLS)
def test_every_call_that_fails_leaves_nothing_half_done(
    helper: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    (file,) = helper.write_instances(tmp_path / "scans", 1)
    refused = 0
    for number in range(1, 12):
        with Store(helper.settings(tmp_path / f"node{number}")) as store:
            with monkeypatch.context() as patch:
                broken = _nth(getattr(os, call), number)
                patch.setattr(os, call, broken)
                status = status_of(store, file)
            assert status in (0x0000, 0xA700)
            refused += status != 0x0000
            assert store.journal.counts()["instances"] == {"stored": int(status == 0x0000)}
            store.recover()
            assert whole(store)
            assert list(store.incoming.iterdir()) == []
            assert taken(store, file).sha256
            assert whole(store)
    assert 0 < refused < 11


def _nth(real: Callable[..., Any], number: int) -> Callable[..., Any]:
    """Return `real`, but with its n-th call failing as on a full disk."""
    count = [0]

    def call(*arguments: Any, **more: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            raise OSError(28, "No space left on device")
        return real(*arguments, **more)

    return call


def test_a_file_that_reaches_the_systems_limit_is_refused(helper: ModuleType, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="Windows has no RLIMIT_FSIZE")
    (file,) = helper.write_instances(tmp_path / "scans", 1, size=400_000)
    with Store(helper.settings(tmp_path / "node")) as store:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
        try:
            with pytest.raises(Refused) as told:
                taken(store, file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert told.value.status == 0xA700
        assert list(store.incoming.iterdir()) == []
        taken(store, file)


def test_an_instance_with_other_content_replaces_the_first(helper: ModuleType, tmp_path: Path) -> None:
    (first,) = helper.write_instances(tmp_path / "a", 1)
    (second,) = helper.write_instances(tmp_path / "b", 1, SeriesDescription="corrected")
    with Store(helper.settings(tmp_path / "node")) as store:
        one, two = taken(store, first), taken(store, second)
        assert one.sha256 != two.sha256
        assert store.journal.instances(one.study) == [two]
        assert whole(store)


def test_an_instance_of_another_study_under_the_same_uid_is_refused(helper: ModuleType, tmp_path: Path) -> None:
    (first,) = helper.write_instances(tmp_path / "a", 1)
    (second,) = helper.write_instances(tmp_path / "b", 1, StudyInstanceUID=f"{helper.ROOT}.99")
    with Store(helper.settings(tmp_path / "node")) as store:
        taken(store, first)
        with pytest.raises(Refused) as told:
            taken(store, second)
        assert told.value.status == 0xA900


@pytest.mark.parametrize("uid", ["", "1..2", "../../x", "1.2" + ".3" * 40, "1.2\n"])
def test_a_uid_that_is_none_opens_no_file(helper: ModuleType, tmp_path: Path, uid: str) -> None:
    with Store(helper.settings(tmp_path / "node")) as store:
        spool = store.open_spool(Head(uid, "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"))
        spool.write(b"anything")
        with pytest.raises(Refused) as told:
            store.take(spool, "CT1")
        assert told.value.status == 0xC000
        assert list(store.incoming.iterdir()) == []


def test_data_that_is_no_data_set_is_refused(helper: ModuleType, tmp_path: Path) -> None:
    nested = (b"\x08\x00\x15\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 3000
    with Store(helper.settings(tmp_path / "node")) as store:
        for data in (b"", b"\xff" * 1000, nested):
            spool = store.open_spool(Head("1.2.3", "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.2.1"))
            spool.write(data)
            with pytest.raises(Refused) as told:
                store.take(spool, "CT1")
            assert told.value.status in (0xC000, 0xA900)
            assert list(store.instances.iterdir()) == []


def test_a_job_sees_the_instances_as_they_were_when_it_began(helper: ModuleType, tmp_path: Path) -> None:
    files = helper.write_instances(tmp_path / "scans", 3)
    with Store(helper.settings(tmp_path / "node"), now=lambda: 100.0) as store:
        for file in files[:2]:
            item = taken(store, file)
        assert store.journal.close_study(item.study, ["any"], 100.0, 100.0)
        job = store.journal.claim(100.0)
        assert job is not None
        inside, out = store.open_job(job)
        taken(store, files[2])
        assert sorted(p.stem for p in inside.iterdir()) == [helper.instance_uid(1, n) for n in (1, 2)]
        assert list(out.iterdir()) == []


def test_a_run_that_a_newer_revision_overtook_records_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.add_instance(Instance("1.1", "1", "a", "0", 1), "CT1", 1.0)
        assert journal.close_study("1", ["any"], 1.0, 1.0)
        job = journal.claim(1.0)
        assert job is not None
        journal.add_instance(Instance("1.2", "1", "b", "0", 1), "CT1", 2.0)
        assert not journal.close_study("1", ["any"], 1.0, 2.0)
        assert journal.close_study("1", ["any"], 2.0, 2.0)
        assert not journal.finish(job, [Result("r", "2.1", "0")], ["pacs"], 3.0)
        journal.hand_back(job, 3.0)
        again = journal.claim(3.0)
        assert again is not None and again.revision == 2
        assert journal.finish(again, [Result("r", "2.2", "0"), Result("t", None, "0")], ["pacs"], 3.0)
        assert journal.counts()["deliveries"] == {"pending": 1, "sent": 0, "failed": 0}


def test_a_repeated_run_replaces_its_results_and_is_not_delivered_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.sqlite") as journal:
        journal.add_instance(Instance("1.1", "1", "a", "0", 1), "CT1", 1.0)
        for revision in (1, 2):
            assert journal.close_study("1", ["any"], 9.0, 1.0)
            job = journal.claim(1.0)
            assert job is not None
            assert journal.finish(job, [Result(f"{revision}/r", "2.1", "0")], ["pacs"], 1.0)
            for delivery in journal.due_deliveries(1.0):
                assert revision == 1
                journal.sent(delivery, 1.0)
            journal.add_instance(Instance("1.1", "1", f"a{revision}", "0", 1), "CT1", 2.0)
        assert journal.counts()["results"] == {"stored": 1}
        assert journal.counts()["deliveries"] == {"pending": 0, "sent": 1, "failed": 0}


def test_a_damaged_journal_and_one_of_another_version_are_told(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"no database at all" * 1000)
    with pytest.raises(InvalidInput, match="no journal"):
        Journal(tmp_path / "text")
    db = sqlite3.connect(tmp_path / "newer")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(InvalidInput, match="version 1"):
        Journal(tmp_path / "newer")
    with pytest.raises(CannotWrite):
        Journal(tmp_path)


def test_a_hash_in_the_log_needs_the_journals_key(tmp_path: Path) -> None:
    with Journal(tmp_path / "one") as one, Journal(tmp_path / "two") as two:
        assert one.hashed("1.2.3") != two.hashed("1.2.3")
        told = one.hashed("1.2.3")
    with Journal(tmp_path / "one") as one:
        assert one.hashed("1.2.3") == told
