"""For tests of `edgemed serve`: settings, instances, a quick stand-in for the model, senders and targets on loopback.

Run as a program it makes nodes that tests kill: `python dicom_node.py FOLDER QUIET_SECONDS TARGET_PORT`; or it is an
inference process with a stand-in for the model: `python dicom_node.py worker DEVICE THREADS`; or a batch about the
studies of a folder: `python dicom_node.py batch FOLDER RESULTS`; or a node whose disk fills up, in a namespace of its
own: `unshare -rm python dicom_node.py full FOLDER`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, SecondaryCaptureImageStorage
from pynetdicom import AE, evt
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from pynetdicom.transport import AssociationSocket

from edgemed.errors import InvalidInput
from edgemed.serve.association import close_socket
from edgemed.serve.settings import NodeSettings, Rule, Sender, Target
from edgemed.serve.work import Stopped

# The others' side, which is plain pynetdicom, leaves a socket open where the node closes first: a ResourceWarning.
AssociationSocket._shutdown_socket = lambda self: close_socket(self.socket)  # type: ignore[method-assign]

ROOT = "1.2.826.0.1.3680043.8.498.77"
NAME = "Planted^Name"
ANYONE = ("127.0.0.1/32",)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def settings(folder: Path, **more: Any) -> NodeSettings:
    """Return settings of a node on any port of loopback that knows the sender CT1 and has one rule."""
    port = more.pop("target_port", None)
    targets = () if port is None else (Target("pacs", "PACS", "127.0.0.1", port),)
    kept: dict[str, Any] = {
        "folder": folder,
        "port": 0,
        "senders": (Sender("CT1", ANYONE),),
        "targets": targets,
        "rules": (Rule("any", "What is there?", ("sr",), tuple(t.name for t in targets)),),
        "quiet_seconds": 3600.0,
        "network_seconds": 10.0,
        "min_free_mib": 0.0,
        "stop_seconds": 10.0,
    }
    return NodeSettings(**{**kept, **more})


def instance_uid(study: int, number: int) -> str:
    return f"{ROOT}.{study}.1.{number}"


def write_instances(folder: Path, count: int, study: int = 1, size: int = 2048, **elements: Any) -> list[Path]:
    """Write small instances of one series; their bytes tell their number."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number in range(1, count + 1):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = UID(instance_uid(study, number))
        ds = Dataset()
        ds.file_meta = meta
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, instance_uid(study, number)
        ds.StudyInstanceUID, ds.SeriesInstanceUID = f"{ROOT}.{study}", f"{ROOT}.{study}.1"
        ds.Modality, ds.PatientName, ds.PatientID = "CT", NAME, "PLANTED-ID"
        ds.InstanceNumber = number
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = size // 16, 8, 1, "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit, ds.PixelRepresentation = 15, 0
        ds.PixelData = number.to_bytes(2, "little") * (size // 2)
        ds["PixelData"].VR = "OW"
        for keyword, value in elements.items():
            setattr(ds, keyword, value)
        files.append(folder / f"{study}-{number:05d}.dcm")
        dcmwrite(files[-1], ds, enforce_file_format=True)
    return files


def quick_process(rule: Rule, study: Path, out: Path, stopping: Callable[[], bool]) -> Sequence[Path]:
    """Write one object whose UID and content come from the instances' UIDs, in place of asking a model."""
    names = sorted(file.stem for file in study.iterdir())
    digest = hashlib.sha256("".join(names).encode()).hexdigest()
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.SOPInstanceUID = f"2.25.{int(digest[:30], 16)}"
    first = dcmread(study / f"{names[0]}.dcm", stop_before_pixels=True)
    ds.StudyInstanceUID, ds.PatientID, ds.PatientName = first.StudyInstanceUID, first.PatientID, first.PatientName
    ds.SeriesInstanceUID, ds.Modality, ds.ImageComments = f"{ds.SOPInstanceUID}.1"[:64], "OT", f"{len(names)} instances"
    dcmwrite(out / "result.dcm", ds, enforce_file_format=True)
    return [out / "result.dcm"]


def acting_process(rule: Rule, study: Path, out: Path, stopping: Callable[[], bool]) -> Sequence[Path]:
    """Do what the rule's prompt says, then as `quick_process`. Notes are kept in the store's folder."""
    notes = out.parents[2]
    with open(notes / "begun", "a") as file:
        file.write(f"{os.getpid()}\n")
    crashed = notes / "crashed"
    if rule.prompt == "always crash" or (rule.prompt == "crash once" and not crashed.exists()):
        crashed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    while rule.prompt == "wait for two" and len(set((notes / "begun").read_text().split())) < 2:
        threading.Event().wait(0.02)
    while rule.prompt == "hang":
        if stopping():
            raise Stopped
        threading.Event().wait(0.02)
    if rule.prompt == "refuse":
        raise InvalidInput("these slices are damaged")
    if rule.prompt == "break":
        raise RuntimeError("Planted^Name")
    if rule.prompt == "slowly":
        threading.Event().wait(0.05)
    return quick_process(rule, study, out, stopping)


def sender(title: str = "CT1", seconds: float = 20.0) -> AE:
    """Return an AE that asks for verification and CT storage."""
    ae = AE(title)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = ae.connection_timeout = seconds
    ae.add_requested_context(Verification)
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    return ae


@contextmanager
def association(port: int, title: str = "CT1", called: str = "EDGEMED", **more: Any) -> Iterator[Any]:
    """Give an association with a node; it may have been rejected."""
    assoc = sender(title).associate("127.0.0.1", port, ae_title=called, **more)
    try:
        yield assoc
    finally:
        if assoc.is_established:
            assoc.release()


def send(port: int, files: Sequence[Path], title: str = "CT1") -> list[int | None]:
    """Return the status of each file; None where there was no answer."""
    told: list[int | None] = []
    with association(port, title) as assoc:
        for file in files:
            if not assoc.is_established:
                break
            told.append(assoc.send_c_store(file).get("Status"))
    return told + [None] * (len(files) - len(told))


class Pacs:
    """An archive that keeps the instances that it is sent; `status` is what it answers."""

    def __init__(self) -> None:
        self.received: list[str] = []
        self.status = 0x0000
        self._lock = threading.Lock()

    def keep(self, event: evt.Event) -> int:
        with self._lock:
            self.received.append(str(event.request.AffectedSOPInstanceUID))
        return self.status


@contextmanager
def archive(port: int = 0) -> Iterator[tuple[Pacs, int]]:
    """Give (an archive called PACS, its port)."""
    pacs = Pacs()
    ae = AE("PACS")
    ae.add_supported_context(SecondaryCaptureImageStorage)
    ae.add_supported_context(Verification)
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, pacs.keep)])
    assert server is not None
    try:
        yield pacs, server.server_address[1]
    finally:
        server.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def be_a_node(folder: str, quiet_seconds: str, target_port: str) -> None:
    """Run until killed; the line on stdout is the port."""
    from edgemed.serve.node import Node
    from edgemed.serve.store import Store

    more: dict[str, Any] = {"target_port": int(target_port), "quiet_seconds": float(quiet_seconds)}
    more["rules"] = (Rule("any", "slowly", ("sr",), ("pacs",)),)
    kept = settings(Path(folder), max_attempts=1_000_000, retry_seconds=0.05, retry_cap_seconds=0.2, **more)
    with Store(kept) as store:
        node = Node(store, acting_process, acting_process, tell=lambda what, **facts: None)
        node.start()
        print(os.getpid(), node.address[1], flush=True)
        threading.Event().wait()


def be_a_batch(out: str, studies: Sequence[Any]) -> None:
    """Answer studies; the line on stdout is the process id."""
    from edgemed.serve.batch import Batch
    from edgemed.serve.store import Store

    print(os.getpid(), flush=True)
    with Store(batch_settings(Path(out), prompt="slowly"), results=Path(out)) as store:
        Batch(store, [acting_process]).run(studies)


def fill_the_disk(folder: Path) -> dict[str, Any]:
    """Send a study to a node on a file system that is full before its end, make room, and send what was refused.

    The study is quiet while the disk is full, so that its job is due then. The answer tells what the node did.
    """
    from edgemed.serve.node import Node
    from edgemed.serve.store import Store

    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], check=True)
    files = write_instances(Path(tempfile.mkdtemp()), 10, size=200_000)
    events: list[str] = []
    clock = Clock()
    with archive() as (pacs, port):
        kept = settings(folder / "node", target_port=port, quiet_seconds=1.0, retry_seconds=0.05)
        with Store(kept, now=clock) as store:
            node = Node(store, quick_process, tell=lambda what, **facts: events.append(what))
            node.start()
            ballast = folder / "ballast"
            ballast.write_bytes(b"\0" * (shutil.disk_usage(folder).free - 900_000))
            first = send(node.address[1], files)
            with open(ballast, "ab", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * 4096)
            while_full = node.journal.counts()["instances"]["stored"]
            clock.seconds += 2
            node.wake()
            wait_until(lambda: "trouble" in events)
            ballast.unlink()
            refused = [file for file, status in zip(files, first, strict=True) if status != 0x0000]
            second = send(node.address[1], refused)
            clock.seconds += 2
            wait_until(lambda: len(list(store.instances.rglob("*.dcm"))) == len(files) and all_quiet(node.journal))
            items = node.journal.instances(f"{ROOT}.1")
            same = sum(dcmread(store.instances / item.name) == dcmread(files[_number(item.uid)]) for item in items)
            told = {
                "statuses": [first, second], "kept while full": while_full, "kept": len(items), "as sent": same,
                "left over": [path.name for path in store.incoming.iterdir()], "jobs": node.journal.counts()["jobs"],
                "delivered": len(pacs.received), "events": events,
            }  # fmt: skip
            node.stop()
    return told


def _number(uid: str) -> int:
    return int(uid.rpartition(".")[2]) - 1


def all_quiet(journal: Any) -> bool:
    """Tell whether nothing is left to be received, answered or delivered."""
    counts = journal.counts()
    return (
        counts["studies"]["receiving"] == counts["jobs"]["queued"] == counts["jobs"]["running"] == 0
        and counts["deliveries"]["pending"] == 0
    )


def wait_until(met: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end, "it did not happen"
        threading.Event().wait(0.02)


def batch_settings(out: Path, prompt: str = "?", **more: Any) -> NodeSettings:
    """Return settings of a batch whose results go to `out`."""
    targets = tuple(more.pop("targets", ()))
    rule = Rule("batch", prompt, ("sr",), tuple(t.name for t in targets))
    kept: dict[str, Any] = {"retry_seconds": 0.0, "max_attempts": 2, "min_free_mib": 0.0, "network_seconds": 10.0}
    return NodeSettings(folder=out / ".edgemed", rules=(rule,), targets=targets, **{**kept, **more})


def main(*arguments: str) -> None:
    """For each line on stdin, fork a node or batch: a fresh process that has its libraries already."""
    be: Callable[[], None] = lambda: be_a_node(*arguments)  # noqa: E731
    if arguments[0] == "batch":
        from edgemed.serve.batch import studies_in

        studies, _ = studies_in(sorted(map(str, Path(arguments[1]).iterdir())))
        be = lambda: be_a_batch(arguments[2], studies)  # noqa: E731
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            be()
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        from edgemed.serve.worker import serve_jobs

        sys.exit(serve_jobs(acting_process))
    if sys.argv[1] == "full":
        print(json.dumps(fill_the_disk(Path(sys.argv[2]))))
        sys.exit()
    main(*sys.argv[1:])
