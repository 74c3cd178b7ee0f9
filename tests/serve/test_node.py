"""The node on loopback: who may send, what is acknowledged, from study to delivered result."""

from __future__ import annotations

import json
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydicom import DataElement, dcmread
from pydicom.config import IGNORE
from pydicom.dataset import Dataset
from pynetdicom.dsutils import encode

from edgemed.errors import CannotRead, InvalidInput, NoInput
from edgemed.serve.settings import MIB, Rule, Sender, Target
from edgemed.serve.work import Stopped

Serve = Callable[..., Any]
Scans = Callable[..., Sequence[Path]]
Log = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def no_traceback(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Whatever a sender does, and in whichever thread, the node prints no traceback."""
    yield
    assert "Traceback" not in capfd.readouterr().err


def until(met: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait for something that other threads do."""
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it did not happen"
        threading.Event().wait(0.02)


def test_echo_is_answered(serve: Serve, helper: ModuleType) -> None:
    with serve() as node, helper.association(node.address[1]) as assoc:
        assert assoc.send_c_echo().Status == 0x0000


def test_an_acknowledged_instance_is_on_the_disk_as_it_was_sent(serve: Serve, helper: ModuleType, scans: Scans) -> None:
    (file,) = scans(1)
    with serve() as node:
        assert helper.send(node.address[1], [file]) == [0x0000]
        (item,) = node.journal.instances(f"{helper.ROOT}.1")
        assert (node.store.instances / item.name).read_bytes()[:132] == b"\0" * 128 + b"DICM"
        kept = dcmread(node.store.instances / item.name)
        assert kept == dcmread(file)
        assert kept.file_meta.TransferSyntaxUID == dcmread(file).file_meta.TransferSyntaxUID
        assert list(node.store.incoming.iterdir()) == []


def test_an_unknown_calling_ae_is_rejected(serve: Serve, helper: ModuleType, log: Log) -> None:
    with serve() as node, helper.association(node.address[1], "STRANGER") as assoc:
        assert assoc.is_rejected
        primitive = assoc.acceptor.primitive
        assert (primitive.result, primitive.result_source, primitive.diagnostic) == (1, 1, 3)
    assert "STRANGER" not in str(log)
    assert any(line["event"] == "rejected" for line in log)


def test_another_called_ae_is_rejected(serve: Serve, helper: ModuleType) -> None:
    with serve() as node, helper.association(node.address[1], called="OTHER") as assoc:
        assert assoc.is_rejected
        assert assoc.acceptor.primitive.diagnostic == 7


def test_a_known_ae_from_another_address_is_rejected(serve: Serve, helper: ModuleType) -> None:
    senders = (Sender("CT1", ("10.1.2.3",)), Sender("CT2", ("127.0.0.0/8",)))
    with serve(senders=senders) as node:
        with helper.association(node.address[1], "CT1") as assoc:
            assert assoc.is_rejected
        with helper.association(node.address[1], "CT2") as assoc:
            assert assoc.is_established


def test_a_connection_from_an_address_of_nobody_is_closed(serve: Serve) -> None:
    nobody = (Sender("CT1", ("10.1.2.3",)),)
    with serve(senders=nobody) as node, socket.create_connection(node.address, timeout=10) as connection:
        assert connection.recv(1) == b""


def test_one_association_too_many_is_rejected(serve: Serve, helper: ModuleType) -> None:
    with serve(max_associations=2) as node:
        port = node.address[1]
        with helper.association(port) as first, helper.association(port) as second:
            assert first.is_established and second.is_established
            with helper.association(port) as third:
                assert third.is_rejected
                primitive = third.acceptor.primitive
                assert (primitive.result, primitive.result_source, primitive.diagnostic) == (2, 3, 2)
            assert first.send_c_echo().Status == 0x0000


def test_idle_connections_beyond_the_limit_are_closed(serve: Serve, helper: ModuleType) -> None:
    with serve(max_associations=1, network_seconds=1.0) as node:
        opened = [socket.create_connection(node.address, timeout=10) for _ in range(5)]
        try:
            with socket.create_connection(node.address, timeout=10) as one_more:
                assert one_more.recv(1) == b""
        finally:
            for connection in opened:
                connection.close()
        until(lambda: _echoes(node.address[1], helper))


def _echoes(port: int, helper: ModuleType) -> bool:
    with helper.association(port) as assoc:
        return bool(assoc.is_established and assoc.send_c_echo().Status == 0x0000)


def test_a_sop_class_that_is_not_listed_is_not_accepted(serve: Serve, helper: ModuleType) -> None:
    with serve(storage=("MRImageStorage",)) as node, helper.association(node.address[1]) as assoc:
        assert [cx.abstract_syntax.name for cx in assoc.accepted_contexts] == ["Verification SOP Class"]


# --- hostile and slow senders -----------------------------------------------------------------------------------------


def associate_request(title: bytes = b"CT1") -> bytes:
    """Return an A-ASSOCIATE-RQ for CT storage in explicit little endian (PS3.8 9.3.2)."""

    def item(kind: int, data: bytes) -> bytes:
        return struct.pack(">BxH", kind, len(data)) + data

    syntaxes = item(0x30, b"1.2.840.10008.5.1.4.1.1.2") + item(0x40, b"1.2.840.10008.1.2.1")
    user = item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3")
    body = struct.pack(">HH16s16s32x", 1, 0, b"EDGEMED".ljust(16), title.ljust(16))
    body += item(0x10, b"1.2.840.10008.3.1.1.1") + item(0x20, b"\x01\0\0\0" + syntaxes) + item(0x50, user)
    return struct.pack(">BxI", 1, len(body)) + body


@pytest.fixture
def connected(serve: Serve) -> Iterator[tuple[Any, socket.socket]]:
    """A node that waits one second, and a raw connection with an association."""
    with serve(network_seconds=1.0) as node, socket.create_connection(node.address, timeout=20) as connection:
        connection.sendall(associate_request())
        assert connection.recv(1) == b"\x02"  # A-ASSOCIATE-AC
        yield node, connection


def is_closed(connection: socket.socket) -> bool:
    """Read to the end; a reset counts."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def test_a_truncated_association_request_leaves_the_node_well(serve: Serve, helper: ModuleType) -> None:
    with serve(network_seconds=1.0) as node:
        for cut in (1, 6, 40, 100):
            with socket.create_connection(node.address, timeout=20) as connection:
                connection.sendall(associate_request()[:cut])
        until(lambda: _echoes(node.address[1], helper))


@pytest.mark.parametrize("cut", [0, 1, 40], ids=["nothing", "one byte", "half"])
def test_who_stops_within_a_request_is_cut_off_in_time(serve: Serve, cut: int) -> None:
    with serve(network_seconds=0.5) as node, socket.create_connection(node.address, timeout=20) as connection:
        connection.sendall(associate_request()[:cut])
        assert is_closed(connection)


def test_who_sends_a_pdu_byte_by_byte_is_cut_off_in_time(connected: tuple[Any, socket.socket]) -> None:
    _, connection = connected
    connection.sendall(struct.pack(">BxI", 4, 10_000))
    began = time.monotonic()
    with pytest.raises(OSError):  # noqa: PT011, PT012 (reset or broken pipe)
        for _ in range(400):
            connection.sendall(b"\0")
            threading.Event().wait(0.05)
    assert time.monotonic() - began < 15


def test_a_pdu_longer_than_negotiated_is_not_read(connected: tuple[Any, socket.socket]) -> None:
    _, connection = connected
    connection.sendall(struct.pack(">BxI", 4, 0xFFFFFFFF))
    assert is_closed(connection)


def test_an_endless_command_is_cut_off(connected: tuple[Any, socket.socket]) -> None:
    _, connection = connected
    fragment = struct.pack(">IBB", 30_002, 1, 1) + b"\0" * 30_000  # command, not the last fragment
    pdu = struct.pack(">BxI", 4, len(fragment)) + fragment
    with pytest.raises(OSError):  # noqa: PT011, PT012
        for _ in range(50):
            connection.sendall(pdu)
            threading.Event().wait(0.02)


def test_a_sender_that_leaves_within_an_instance_leaves_nothing(serve: Serve, helper: ModuleType, scans: Scans) -> None:
    (file,) = scans(1, size=400_000)
    with serve(network_seconds=2.0) as node:
        with helper.association(node.address[1]) as assoc:
            sock = assoc.dul.socket
            real, sent = sock.send, []

            def send(data: bytes) -> None:
                sent.append(len(data))
                if sum(sent) <= 100_000:
                    real(data)
                elif sock.socket is not None:
                    sock.socket.shutdown(socket.SHUT_RDWR)

            sock.send = send
            assoc.send_c_store(file)
        until(lambda: not list(node.store.incoming.iterdir()))
        assert node.journal.counts()["instances"] == {"stored": 0}
        until(lambda: not node._server.active_associations)
        assert helper.send(node.address[1], [file]) == [0x0000]


@pytest.mark.parametrize("how", ["abort", "reset", "wrong PDU", "cut PDU"])
def test_an_association_that_breaks_within_an_instance_leaves_nothing(
    connected: tuple[Any, socket.socket], helper: ModuleType, log: Log, how: str
) -> None:
    node, connection = connected
    command = Dataset()
    command.AffectedSOPClassUID, command.CommandField, command.MessageID = "1.2.840.10008.5.1.4.1.1.2", 1, 7
    command.Priority, command.CommandDataSetType, command.AffectedSOPInstanceUID = 0, 1, f"{helper.ROOT}.9"
    encoded = bytes(encode(command, True, True) or b"")
    whole = struct.pack("<HHII", 0, 0, 4, len(encoded)) + encoded
    for data, control in ((whole, 3), (b"\x08\0\x05\0CS\x0a\0ISO_IR 192" + b"\0" * 8000, 0)):
        fragment = struct.pack(">IBB", len(data) + 2, 1, control) + data
        connection.sendall(struct.pack(">BxI", 4, len(fragment)) + fragment)
    until(lambda: list(node.store.incoming.iterdir()))
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    else:
        last = {
            "abort": struct.pack(">BxI4x", 7, 4),
            "wrong PDU": b"\x99\0\0\0\0\x04abcd",
            "cut PDU": b"\4\0\0\0\x40\0ab",
        }
        connection.sendall(last[how])
        assert is_closed(connection)
    until(lambda: not list(node.store.incoming.iterdir()) and not node._server.active_associations)
    assert node.journal.counts()["instances"] == {"stored": 0}
    assert not any(line["event"] == "stored" for line in log)
    until(lambda: _echoes(node.address[1], helper))


def test_an_oversized_instance_is_refused_and_the_next_is_taken(serve: Serve, helper: ModuleType, scans: Scans) -> None:
    large, small = scans(1, 1, size=200_000)[0], scans(1, 2)[0]
    with serve(max_instance_mib=0.1) as node:
        assert helper.send(node.address[1], [large, small]) == [0xA700, 0x0000]
        assert node.journal.counts()["instances"] == {"stored": 1}
        assert list(node.store.incoming.iterdir()) == []


def test_a_disk_that_is_nearly_full_refuses_before_it_is_full(serve: Serve, helper: ModuleType, scans: Scans) -> None:
    free = [1000 * MIB]
    files = scans(3)
    with serve(min_free_mib=500.0, free_bytes=lambda folder: free[0]) as node:
        port = node.address[1]
        assert helper.send(port, files[:1]) == [0x0000]
        free[0] = 499 * MIB
        assert helper.send(port, files[1:2]) == [0xA700]
        free[0] = 1000 * MIB
        assert helper.send(port, files[1:]) == [0x0000, 0x0000]


def test_a_full_file_system_refuses_and_loses_nothing(helper: ModuleType, tmp_path: Path) -> None:
    """As `dicom_node.fill_the_disk` says, on a file system of 4 MiB."""
    isolated = ("unshare", "-rm")
    try:
        probe = subprocess.run([*isolated, "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare here (util-linux)")
    if probe.returncode:
        pytest.skip("a file system of one's own is not permitted here")
    done = subprocess.run(
        [*isolated, sys.executable, str(helper.__file__), "full", str(tmp_path)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    told = json.loads(done.stdout)
    first, second = told["statuses"]
    assert set(first) == {0x0000, 0xA700}
    assert set(second) == {0x0000}
    assert told["kept while full"] == first.count(0x0000)
    assert told["left over"] == []
    assert told["kept"] == told["as sent"] == len(first)
    assert told["jobs"] == {"queued": 0, "running": 0, "done": 1, "failed": 0}
    assert told["delivered"] >= 1
    assert "trouble" in told["events"]


def test_a_slow_sender_is_served_and_keeps_nobody_out(serve: Serve, helper: ModuleType, scans: Scans) -> None:
    (file,), (other,) = scans(1, 1, size=400_000), scans(1, 2)
    with serve(network_seconds=1.0, max_associations=2, max_pdu=16384) as node:
        with helper.association(node.address[1]) as assoc:
            sock = assoc.dul.socket
            real, others = sock.send, []

            def send(data: bytes) -> None:
                threading.Event().wait(0.06)  # each PDU is in time, the instance takes longer than one may
                real(data)
                if not others:
                    others.extend(helper.send(node.address[1], [other]))

            sock.send = send
            began = time.monotonic()
            assert assoc.send_c_store(file).Status == 0x0000
            assert time.monotonic() - began > 1.0
        assert others == [0x0000]
        (item,) = node.journal.instances(f"{helper.ROOT}.1")
        assert dcmread(node.store.instances / item.name) == dcmread(file)


def test_a_full_queue_refuses_a_new_study_but_not_the_rest_of_one(
    serve: Serve, helper: ModuleType, scans: Scans
) -> None:
    one, two = scans(2, 1), scans(1, 2)
    with serve(queue=1) as node:
        assert helper.send(node.address[1], [one[0], two[0], one[1]]) == [0x0000, 0xA700, 0x0000]


def test_a_data_set_about_another_instance_is_refused(serve: Serve, helper: ModuleType, scans: Scans) -> None:
    (file,) = scans(1)
    ds = dcmread(file)
    with serve() as node, helper.association(node.address[1]) as assoc:
        ds.SOPInstanceUID = f"{helper.ROOT}.9"
        ds.file_meta.MediaStorageSOPInstanceUID = f"{helper.ROOT}.9"
        real = assoc.dimse.send_msg

        def send_msg(primitive: Any, context_id: int) -> None:
            primitive.AffectedSOPInstanceUID = f"{helper.ROOT}.10"
            real(primitive, context_id)

        assoc.dimse.send_msg = send_msg
        assert assoc.send_c_store(ds).Status == 0xA900


@pytest.mark.parametrize("study", ["", "no-uid", "../../etc"])
def test_an_instance_without_a_sound_study_uid_is_refused(
    serve: Serve, helper: ModuleType, scans: Scans, study: str
) -> None:
    ds = dcmread(scans(1)[0])
    ds["StudyInstanceUID"] = DataElement(0x0020000D, "UI", study, validation_mode=IGNORE)
    with serve() as node, helper.association(node.address[1]) as assoc:
        assert assoc.send_c_store(ds).Status == 0xC000
        assert list(node.store.instances.iterdir()) == []


# --- studies, jobs, results -------------------------------------------------------------------------------------------


def test_a_study_is_answered_once_it_is_quiet_and_the_result_delivered(
    serve: Serve, helper: ModuleType, scans: Scans, clock: Any, log: Log
) -> None:
    with helper.archive() as (pacs, port), serve(now=clock, quiet_seconds=30.0, target_port=port) as node:
        helper.send(node.address[1], scans(3))
        assert node.close_quiet_studies() == 0
        clock.seconds += 30
        until(lambda: node.journal.counts()["deliveries"]["sent"] == 1)
        assert len(pacs.received) == 1
        assert node.journal.counts()["jobs"]["done"] == 1
        assert node.journal.counts()["results"] == {"stored": 1}
    assert helper.NAME not in str(log)
    assert helper.ROOT not in str(log)


def test_the_same_instance_again_starts_nothing(serve: Serve, helper: ModuleType, scans: Scans, clock: Any) -> None:
    files = scans(2)
    with serve(now=clock, quiet_seconds=1.0) as node:
        helper.send(node.address[1], files)
        clock.seconds += 2
        until(lambda: node.journal.counts()["jobs"]["done"] == 1)
        assert helper.send(node.address[1], files) == [0x0000, 0x0000]
        assert node.journal.counts()["studies"] == {"receiving": 0, "stable": 1}


def test_a_late_instance_starts_the_study_anew(serve: Serve, helper: ModuleType, scans: Scans, clock: Any) -> None:
    files = scans(3)
    seen: list[int] = []

    def count(rule: Rule, study: Path, out: Path, stopping: Callable[[], bool]) -> Sequence[Path]:
        seen.append(len(list(study.iterdir())))
        return ()

    with serve(now=clock, quiet_seconds=1.0, process=count) as node:
        helper.send(node.address[1], files[:2])
        clock.seconds += 2
        until(lambda: seen == [2])
        helper.send(node.address[1], files[2:])
        clock.seconds += 2
        until(lambda: seen == [2, 3])


def test_a_result_that_the_archive_sends_back_starts_nothing(
    serve: Serve, helper: ModuleType, scans: Scans, clock: Any
) -> None:
    with helper.archive() as (_, port), serve(now=clock, quiet_seconds=1.0, target_port=port) as node:
        helper.send(node.address[1], scans(1))
        clock.seconds += 2
        until(lambda: node.journal.counts()["deliveries"]["sent"] == 1)
        (result,) = node.store.results.rglob("*.dcm")
        ae = helper.sender()
        ae.add_requested_context(dcmread(result).SOPClassUID)
        assoc = ae.associate("127.0.0.1", node.address[1], ae_title="EDGEMED")
        assert assoc.send_c_store(result).Status == 0x0000
        assoc.release()
        assert node.journal.counts()["studies"] == {"receiving": 0, "stable": 1}
        assert node.journal.counts()["instances"] == {"stored": 1}


def test_a_rule_for_other_senders_is_not_asked(serve: Serve, helper: ModuleType, scans: Scans, clock: Any) -> None:
    rules = (Rule("mine", "?", ("sr",), senders=("CT1",)), Rule("other", "?", ("sr",), senders=("MR1",)))
    with serve(now=clock, quiet_seconds=1.0, rules=rules) as node:
        helper.send(node.address[1], scans(1))
        clock.seconds += 2
        until(lambda: node.journal.counts()["jobs"]["done"] == 1)
        assert sum(node.journal.counts()["jobs"].values()) == 1


class Failing:
    """A process that fails in its own way the first times."""

    def __init__(self, error: Exception, times: int, then: Any) -> None:
        self.error, self.times, self.then = error, times, then
        self.calls = 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return self.then(*arguments)


def quiet_node(serve: Serve, helper: ModuleType, scans: Scans, clock: Any, process: Any, **more: Any) -> Any:
    """Return the context of a node whose threads stand still; the test does their steps."""
    from contextlib import contextmanager

    @contextmanager
    def run() -> Iterator[Any]:
        with serve(now=clock, quiet_seconds=1.0, process=process, **more) as node:
            node._stopping.set()
            for thread in node._threads:
                thread.join(10)
            node._stopping.clear()
            helper.send(node.address[1], scans(1))
            clock.seconds += 2
            assert node.close_quiet_studies() == 1
            yield node

    return run()


def test_a_failed_job_is_run_again_after_longer_and_longer_waits(
    serve: Serve, helper: ModuleType, scans: Scans, clock: Any
) -> None:
    process = Failing(CannotRead("busy"), 3, helper.quick_process)
    with quiet_node(serve, helper, scans, clock, process, retry_seconds=10.0, retry_cap_seconds=25.0) as node:
        for wait in (10, 20, 25):
            assert node.run_job()
            clock.seconds += wait - 1
            assert not node.run_job()
            clock.seconds += 1
        assert node.run_job()
        assert node.journal.counts()["jobs"]["done"] == 1
        assert process.calls == 4


def test_a_job_that_keeps_failing_is_given_up(
    serve: Serve, helper: ModuleType, scans: Scans, clock: Any, log: Log
) -> None:
    process = Failing(RuntimeError("Planted^Name"), 99, None)
    with quiet_node(serve, helper, scans, clock, process, max_attempts=3, retry_seconds=1.0) as node:
        for _ in range(3):
            assert node.run_job()
            clock.seconds += 100
        assert not node.run_job()
        assert node.journal.counts()["jobs"]["failed"] == 1
    assert "Planted" not in str(log)


@pytest.mark.parametrize("step", ["finish", "fail"])
def test_a_job_whose_end_the_full_disk_does_not_take_is_run_again(
    serve: Serve, helper: ModuleType, scans: Scans, clock: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    process = Failing(RuntimeError("no room"), 1, helper.quick_process) if step == "fail" else helper.quick_process
    with quiet_node(serve, helper, scans, clock, process) as node:
        with monkeypatch.context() as patch:

            def full(*_: Any) -> None:
                raise sqlite3.OperationalError("database or disk is full")

            patch.setattr(node.journal, step, full)
            patch.setattr(node.journal, "fail", full)
            with pytest.raises(sqlite3.OperationalError):
                node.run_job()
        assert node.journal.counts()["jobs"] == {"queued": 0, "running": 1, "done": 0, "failed": 0}
        assert node.run_job()
        assert node.journal.counts()["jobs"] == {"queued": 0, "running": 0, "done": 1, "failed": 0}
        assert node.journal.counts()["results"] == {"stored": 1}


def test_an_error_that_would_come_again_is_not_tried_again(
    serve: Serve, helper: ModuleType, scans: Scans, clock: Any
) -> None:
    with quiet_node(serve, helper, scans, clock, Failing(InvalidInput("damaged"), 99, None)) as node:
        assert node.run_job()
        assert node.journal.counts()["jobs"]["failed"] == 1


def test_a_study_that_no_rule_fits_is_done_without_results(
    serve: Serve, helper: ModuleType, scans: Scans, clock: Any
) -> None:
    with quiet_node(serve, helper, scans, clock, Failing(NoInput("no series"), 99, None)) as node:
        assert node.run_job()
        assert node.journal.counts()["jobs"]["done"] == 1
        assert node.journal.counts()["results"] == {"stored": 0}


def test_an_archive_that_cannot_be_reached_gets_the_result_later(
    serve: Serve, helper: ModuleType, scans: Scans, clock: Any
) -> None:
    port = helper.free_port()
    more = {"target_port": port, "retry_seconds": 10.0, "max_attempts": 1}
    with quiet_node(serve, helper, scans, clock, helper.quick_process, **more) as node:
        assert node.run_job()
        assert node.deliver_due() == 0
        assert node.deliver_due() == 0
        assert node.journal.counts()["deliveries"]["pending"] == 1
        with helper.archive(port) as (pacs, _):
            clock.seconds += 10
            assert node.deliver_due() == 1
            assert node.deliver_due() == 0
            assert len(pacs.received) == 1


@pytest.mark.parametrize(("status", "state"), [(0xC000, "failed"), (0xA700, "pending"), (0xB007, "sent")])
def test_what_the_archives_status_means(
    serve: Serve, helper: ModuleType, scans: Scans, clock: Any, status: int, state: str
) -> None:
    with helper.archive() as (pacs, port):
        pacs.status = status
        more = {"target_port": port, "max_attempts": 1}
        with quiet_node(serve, helper, scans, clock, helper.quick_process, **more) as node:
            assert node.run_job()
            node.deliver_due()
            assert node.journal.counts()["deliveries"][state] == 1


def test_a_running_job_is_handed_back_at_a_stop(serve: Serve, helper: ModuleType, scans: Scans, clock: Any) -> None:
    started = threading.Event()

    def slow(rule: Rule, study: Path, out: Path, stopping: Callable[[], bool]) -> Sequence[Path]:
        started.set()
        until(stopping)
        raise Stopped

    with serve(now=clock, quiet_seconds=1.0, process=slow) as node:
        helper.send(node.address[1], scans(1))
        clock.seconds += 2
        assert started.wait(30)
    with serve(now=clock, quiet_seconds=1.0) as node:
        until(lambda: node.journal.counts()["jobs"]["done"] == 1)


def test_a_job_that_does_not_stop_is_handed_back_and_its_late_end_ignored(
    serve: Serve, helper: ModuleType, scans: Scans, clock: Any
) -> None:
    started, go_on = threading.Event(), threading.Event()

    def deaf(*arguments: Any) -> Sequence[Path]:
        started.set()
        go_on.wait(30)
        return ()

    with serve(now=clock, quiet_seconds=1.0, process=deaf, stop_seconds=0.2) as node:
        helper.send(node.address[1], scans(1))
        clock.seconds += 2
        assert started.wait(30)
        node.stop()
        go_on.set()
        node._threads[0].join(30)
        assert node.journal.counts()["jobs"] == {"queued": 1, "running": 0, "done": 0, "failed": 0}


def test_no_new_association_after_a_stop_but_the_running_one_ends_well(
    serve: Serve, helper: ModuleType, scans: Scans
) -> None:
    files = scans(2)
    with serve() as node:
        port = node.address[1]
        with helper.association(port) as assoc:
            assert assoc.send_c_store(files[0]).Status == 0x0000
            stopping = threading.Thread(target=node.stop)
            stopping.start()
            until(lambda: not helper.sender().associate("127.0.0.1", port, ae_title="EDGEMED").is_established)
            assert assoc.send_c_store(files[1]).Status == 0x0000
        stopping.join(30)
        assert node.journal.counts()["instances"] == {"stored": 2}


def test_what_is_done_is_forgotten_after_its_time(serve: Serve, helper: ModuleType, scans: Scans, clock: Any) -> None:
    with helper.archive() as (_, port):
        more = {"target_port": port, "keep_hours": 1.0}
        with quiet_node(serve, helper, scans, clock, helper.quick_process, **more) as node:
            assert node.run_job()
            assert node.store.forget() == 0
            clock.seconds += 4000
            assert node.store.forget() == 0  # not delivered yet
            assert node.deliver_due() == 1
            clock.seconds += 3601
            assert node.store.forget() == 1
            assert not list(node.store.instances.iterdir())
            assert not list(node.store.results.iterdir())
            assert node.journal.counts()["instances"] == {"stored": 0}


def test_a_second_node_on_the_folder_is_refused(serve: Serve) -> None:
    from edgemed.errors import CannotWrite

    with serve(), pytest.raises(CannotWrite, match="another node"), serve():
        pass


def test_a_target_that_the_configuration_lost_keeps_its_results(
    serve: Serve, helper: ModuleType, scans: Scans, clock: Any
) -> None:
    port = helper.free_port()
    with quiet_node(serve, helper, scans, clock, helper.quick_process, target_port=port) as node:
        assert node.run_job()
    lost = Rule("any", "?", ("sr",), ("else",))
    with serve(now=clock, targets=(Target("else", "PACS", "127.0.0.1", 104),), rules=(lost,)) as node:
        until(lambda: node.journal._rows("SELECT 1 FROM delivery WHERE attempts > 0"))
        assert node.journal.counts()["deliveries"]["pending"] == 1


@pytest.mark.slow
def test_2000_instances_over_four_associations_arrive(serve: Serve, helper: ModuleType, tmp_path: Path) -> None:
    count = 2000
    files = [helper.write_instances(tmp_path / f"s{study}", count // 4, study) for study in (1, 2, 3, 4)]
    told: list[list[int | None]] = []
    with serve() as node:
        port = node.address[1]
        began = time.monotonic()
        threads = [threading.Thread(target=lambda some=some: told.append(helper.send(port, some))) for some in files]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        print(f"{count} instances in {seconds:.1f} s, {count / seconds:.0f} a second (shared machine)")
        assert [status for some in told for status in some] == [0x0000] * count
        for study in (1, 2, 3, 4):
            items = node.journal.instances(f"{helper.ROOT}.{study}")
            assert len(items) == count // 4
            for item in items:
                assert dcmread(node.store.instances / item.name).SOPInstanceUID == item.uid
