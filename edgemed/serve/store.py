"""The node's files, and the order in which they and the journal change.

    journal.sqlite              see `journal`
    incoming/N                  an instance on its way in; removed at the start
    instances/STUDY/NAME        what was acknowledged
    work/JOB/in, out            links to a job's instances, and what it writes; removed at the start
    results/JOB-REVISION/NAME   what jobs wrote
    pulled/TARGET.N/UID.dcm     what `pull` fetched, as TARGET.N.part while it does; taken as if TARGET had sent it

An instance is acknowledged after: its bytes are on the disk under a temporary name, they have their final name, the
folder is on the disk, the journal has it. A file that the journal does not have was never acknowledged; `recover`
removes it, and its sender sends it again. A result takes its final name before the journal has it; the same job writes
it again.

STUDY is a hash: no UID of a patient's study is a folder's name. NAME begins with the instance's UID.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemed.errors import CannotRead, CannotWrite, EdgemedError, InvalidInput
from edgemed.files import sha256_of
from edgemed.serve.journal import Instance, Job, Journal, Result
from edgemed.serve.settings import MIB, NodeSettings

_UID = re.compile(r"(?=.{1,64}$)[0-9]+(\.[0-9]+)*")

PULLED, PART = "pulled", ".part"

SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
MISMATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000


class Refused(Exception):
    """An instance that is not taken, with the status that its sender is told (PS3.4 B.2.3)."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def is_uid(text: str) -> bool:
    """Return whether `text` can be a UID, and so part of a file's name."""
    return _UID.fullmatch(text) is not None


@dataclass(frozen=True)
class Head:
    """What the command of a C-STORE says of the instance that follows."""

    uid: str
    sop_class: str
    transfer_syntax: str


class Spool:
    """An instance on its way in: `write` takes its data set piece by piece. Never raises; `problem` says what is wrong.

    A piece that is one too many (size, disk) removes what was written; the rest is let go by, so that the sender can be
    told the status.
    """

    def __init__(self, path: Path, head: Head, max_bytes: int, may_write: Callable[[], bool]) -> None:
        self.path, self.head, self.bytes = path, head, 0
        self.problem: Refused | None = None
        self._max, self._may_write = max_bytes, may_write
        self._checked = 0
        self._hash = hashlib.sha256()
        self._file: Any = None
        try:
            if not may_write():
                raise Refused(OUT_OF_RESOURCES, "the disk is nearly full")
            self._file = open(path, "xb")  # noqa: SIM115 (closed in keep or drop)
            self._put(_file_meta(head))
        except (OSError, ValueError, Refused) as error:
            self._refuse(error)

    def write(self, data: bytes) -> None:
        """Take the next piece of the data set."""
        self.bytes += len(data)
        if self.problem is not None:
            return
        try:
            if self.bytes > self._max:
                raise Refused(OUT_OF_RESOURCES, f"the instance has more than {self._max} bytes")
            if self.bytes - self._checked > 8 * MIB:
                self._checked = self.bytes
                if not self._may_write():
                    raise Refused(OUT_OF_RESOURCES, "the disk is nearly full")
            self._put(data)
        except (OSError, ValueError, Refused) as error:  # ValueError: dropped meanwhile
            self._refuse(error)

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)

    def _refuse(self, error: Exception) -> None:
        full = Refused(OUT_OF_RESOURCES, f"the file cannot be written ({type(error).__name__})")
        bad = Refused(CANNOT_UNDERSTAND, "the command has no sound UIDs")
        self.problem = error if isinstance(error, Refused) else full if isinstance(error, OSError) else bad
        self.drop()

    def keep(self) -> str:
        """Bring the bytes to the disk and return their SHA-256. Raises Refused."""
        if self.problem is None:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            except (OSError, ValueError) as error:  # ValueError: dropped meanwhile, since the sender is gone
                self._refuse(OSError(str(error)))
        if self.problem is not None:
            raise self.problem
        return self._hash.hexdigest()

    def drop(self) -> None:
        """Remove the file, if it is there."""
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


class FileSpool:
    """As `Spool`, of a file that is there: it is linked to `path`, and stays."""

    def __init__(self, file: Path, path: Path) -> None:
        self.path, self.bytes = path, 0
        self.head = Head("", "", "")
        self._file = file

    def keep(self) -> str:
        """Return the SHA-256 of the file, which is on the disk. Raises Refused."""
        from pydicom.errors import InvalidDicomError
        from pydicom.filereader import read_file_meta_info

        try:
            meta = read_file_meta_info(self._file)
            told = ("MediaStorageSOPInstanceUID", "MediaStorageSOPClassUID", "TransferSyntaxUID")
            self.head = Head(*(str(meta.get(keyword) or "") for keyword in told))
            self.bytes = self._file.stat().st_size
            os.link(self._file, self.path)
            return sha256_of(self.path)
        except (InvalidDicomError, ValueError, EOFError) as error:
            raise Refused(CANNOT_UNDERSTAND, "the file is no DICOM file") from error
        except CannotRead as error:
            raise Refused(OUT_OF_RESOURCES, "the file cannot be read") from error

    def drop(self) -> None:
        """Remove the link, if it is there."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def _file_meta(head: Head) -> bytes:
    """Return the preamble (zeros) and the File Meta Information. Raises ValueError if a UID is none."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_file_meta_info
    from pydicom.uid import UID

    if not all(map(is_uid, (head.uid, head.sop_class, head.transfer_syntax))):
        raise ValueError("no UID")
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(head.sop_class)
    meta.MediaStorageSOPInstanceUID = UID(head.uid)
    meta.TransferSyntaxUID = UID(head.transfer_syntax)
    stream = DicomBytesIO()
    stream.write(b"\0" * 128 + b"DICM")
    write_file_meta_info(stream, meta, enforce_standard=True)
    return stream.getvalue()


class Store:
    """The folder of a node; a context manager. now: the wall clock. free_bytes: of the disk that a folder is on.

    results: a folder of the user's that results go to instead, RESULTS/STUDY/NAME by Study Instance UID; what else lies
    there is left alone.

    Raises CannotWrite, CannotRead or InvalidInput if the folder cannot be used.
    """

    def __init__(
        self,
        settings: NodeSettings,
        *,
        now: Callable[[], float] = time.time,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
        results: Path | None = None,
    ) -> None:
        self.settings, self.now, self._free_bytes = settings, now, free_bytes
        self.folder = settings.folder
        self.incoming, self.instances, self.work, self.pulled = (
            self.folder / name for name in ("incoming", "instances", "work", PULLED)
        )
        self._users_results = results is not None
        self.results = results or self.folder / "results"
        self._numbers = itertools.count(1)
        self._changing = threading.Lock()
        try:
            self.results.mkdir(parents=True, exist_ok=True, mode=0o777 if self._users_results else 0o700)
            for folder in (self.incoming, self.instances, self.work, self.pulled):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _sync(self.folder)
        except OSError as error:
            raise CannotWrite(f"cannot use the folder {self.folder}: {error.strerror or 'refused'}") from error
        self._lock = self._locked()
        try:
            self.journal = Journal(self.folder / "journal.sqlite")
        except EdgemedError:
            self._lock.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()
        self._lock.close()

    def _locked(self) -> sqlite3.Connection:
        """Return what keeps other processes out of the folder until it is closed, or the process ends in any way."""
        lock = sqlite3.connect(self.folder / "lock.sqlite", timeout=0, isolation_level=None, check_same_thread=False)
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.DatabaseError as error:
            lock.close()
            raise CannotWrite(
                f"{self.folder} is used by another node; stop that one, or pass another folder"
            ) from error
        return lock

    def has_room(self) -> bool:
        """Return whether the disk has more free than must be left."""
        return self._free_bytes(self.folder) >= self.settings.min_free_mib * MIB

    # --- instances ---

    def open_spool(self, head: Head) -> Spool:
        """Return where an instance may be written to, under a temporary name."""
        path = self.incoming / f"{os.getpid()}-{next(self._numbers)}"
        return Spool(path, head, int(self.settings.max_instance_mib * MIB), self.has_room)

    def take_pulled(self) -> list[tuple[str, Refused | None]]:
        """Take what `pull` fetched; return (UID, None or why it never will be) of each instance.

        Where there is no room the rest waits for the next call.
        """
        told: list[tuple[str, Refused | None]] = []
        for folder in sorted(self.pulled.iterdir()):
            if folder.suffix == PART or not folder.is_dir():
                continue
            sender = folder.name.partition(".")[0]
            for file in sorted(folder.iterdir()):
                try:
                    self.take(FileSpool(file, self.incoming / f"{os.getpid()}-{next(self._numbers)}"), sender)
                    told.append((file.stem, None))
                except Refused as error:
                    if error.status == OUT_OF_RESOURCES:
                        return told
                    told.append((file.stem, error))
                file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()
        return told

    def take(self, spool: Spool | FileSpool, sender: str) -> Instance:
        """Make a spooled instance one of the store's: on the disk and in the journal when this returns.

        One that is there with the same content stays as it is; one with other content is replaced. A result of this
        node that comes back (an archive that forwards whole studies) is let go: it must not open its study again.

        Raises Refused; the spool is gone then.
        """
        try:
            sha256 = spool.keep()
            study = _study_of(spool.path, spool.head)
            with self._changing:  # `forget` must not take away the folder in between
                return self._take(spool, study, sha256, sender)
        except (OSError, sqlite3.Error) as error:
            raise Refused(OUT_OF_RESOURCES, f"the instance cannot be kept ({type(error).__name__})") from error
        finally:
            spool.drop()

    def _take(self, spool: Spool | FileSpool, study: str, sha256: str, sender: str) -> Instance:
        known = self.journal.instance(spool.head.uid)
        if known is None and self.journal.is_result(spool.head.uid):
            return Instance(spool.head.uid, study, "", sha256, 0)
        if known is not None and known.sha256 == sha256:
            return known
        if known is not None and known.study != study:
            raise Refused(MISMATCH, "the instance is there as one of another study")
        if not self.journal.has_study(study) and self.journal.pending_studies() >= self.settings.queue:
            raise Refused(OUT_OF_RESOURCES, f"{self.settings.queue} studies wait to be answered")
        name = f"{self._study_folder(study)}/{spool.head.uid}-{sha256[:16]}.dcm"
        path = self.instances / name
        if not path.parent.is_dir():
            path.parent.mkdir(mode=0o700)
            _sync(self.instances)
        os.replace(spool.path, path)
        _sync(path.parent)
        item = Instance(spool.head.uid, study, name, sha256, spool.bytes)
        self.journal.add_instance(item, sender, self.now())
        if known is not None:
            with contextlib.suppress(OSError):
                (self.instances / known.name).unlink()
        return item

    def _study_folder(self, study: str) -> str:
        return self.journal.hashed(f"folder of {study}")

    # --- jobs ---

    def open_job(self, job: Job) -> tuple[Path, Path]:
        """Return (a folder with the instances of the job's study, an empty one for its results).

        The instances are hard links under their UIDs (copies of files on another disk): a study that changes meanwhile
        does not change them. Raises CannotRead, CannotWrite.
        """
        folder = self.work / str(job.id)
        inside, out = folder / "in", folder / "out"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            inside.mkdir(parents=True)
            out.mkdir()
            for item in self.journal.instances(job.study):
                _link(self.instances / item.name, inside / f"{item.uid}.dcm")
        except FileNotFoundError as error:
            raise CannotRead(
                "an instance is missing in the store; restore the folder of the node from a copy"
            ) from error
        except OSError as error:
            raise CannotWrite(f"cannot prepare a job: {error.strerror or 'refused'}") from error
        return inside, out

    def keep_results(self, job: Job, files: Sequence[Path]) -> list[Result]:
        """Move what a job wrote to its results, on the disk when this returns. Raises CannotWrite, InvalidInput."""
        folder = self.results / (job.study if self._users_results else f"{job.id}-{job.revision}")
        kept: list[Result] = []
        try:
            if files and not folder.is_dir():
                folder.mkdir(mode=0o777 if self._users_results else 0o700)
                _sync(self.results)
            for file in files:
                result = Result(f"{folder.name}/{file.name}", _uid_of_result(file), sha256_of(file))
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
                os.replace(file, folder / file.name)
                kept.append(result)
            if files:
                _sync(folder)
        except OSError as error:
            raise CannotWrite(f"cannot keep the results of a job: {error.strerror or 'refused'}") from error
        return kept

    def close_job(self, job: Job) -> None:
        """Remove a job's folder of work."""
        shutil.rmtree(self.work / str(job.id), ignore_errors=True)

    def drop_results(self, names: Iterable[str]) -> None:
        """Remove results of an earlier revision from the user's folder; those of a node go when it starts."""
        for name in names if self._users_results else ():
            with contextlib.suppress(OSError):
                self.result(name).unlink()

    def result(self, name: str) -> Path:
        """Return the file of a result."""
        return self.results / name

    # --- upkeep ---

    def recover(self) -> dict[str, int]:
        """Bring files and journal together after whatever ended the last process; return what was done.

        Call it once at the start, before anything else. Raises InvalidInput if the journal is damaged.
        """
        self.journal.check()
        requeued = self.journal.recover(self.now())
        orphans = 0
        for folder in (self.incoming, self.work):
            for path in list(folder.iterdir()):
                orphans += 1
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        names = self.journal.names()
        bases = [(self.instances, names), (self.results, self.journal.result_names())]
        for base, known in bases[: 1 if self._users_results else 2]:
            for folder in list(base.iterdir()):
                for path in list(folder.iterdir()):
                    if f"{folder.name}/{path.name}" not in known:
                        orphans += 1
                        path.unlink()
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()
        missing = sum(not (self.instances / name).is_file() for name in names)
        return {"requeued": requeued, "orphans": orphans, "missing": missing}

    def forget(self) -> int:
        """Remove studies that have been done for `keep_hours`, journal first; return how many."""
        with self._changing:
            gone = self.journal.forget(self.now() - self.settings.keep_hours * 3600)
            for study, jobs in gone:
                shutil.rmtree(self.instances / self._study_folder(study), ignore_errors=True)
                for job in jobs:
                    for folder in self.results.glob(f"{job}-*"):
                        shutil.rmtree(folder, ignore_errors=True)
        return len(gone)


def _study_of(path: Path, head: Head) -> str:
    """Return the Study Instance UID of a file, of which only three elements are read.

    Raises Refused if there is none, or the data set is about another instance than the command.
    """
    from pydicom import dcmread

    try:
        ds = dcmread(path, stop_before_pixels=True, specific_tags=["SOPInstanceUID", "SOPClassUID", "StudyInstanceUID"])
        study, uid, sop_class = (
            str(ds.get(k, "") or "") for k in ("StudyInstanceUID", "SOPInstanceUID", "SOPClassUID")
        )
    except OSError as error:
        if error.errno:
            raise
        raise Refused(CANNOT_UNDERSTAND, "the data set cannot be parsed") from None
    except Exception as error:  # noqa: BLE001  the last resort of a parser of hostile data: its class, never its text
        raise Refused(CANNOT_UNDERSTAND, f"the data set cannot be parsed ({type(error).__name__})") from None
    if (uid, sop_class) != (head.uid, head.sop_class):
        raise Refused(MISMATCH, "the data set is about another instance than the command")
    if not is_uid(study):
        raise Refused(CANNOT_UNDERSTAND, "the data set has no sound Study Instance UID")
    return study


def _uid_of_result(path: Path) -> str | None:
    """Return the SOP Instance UID of a DICOM result, None of other files."""
    if path.suffix != ".dcm":
        return None
    from pydicom.filereader import read_file_meta_info

    uid = str(read_file_meta_info(path).get("MediaStorageSOPInstanceUID", ""))
    if not is_uid(uid):
        raise InvalidInput("a DICOM result has no SOP Instance UID")
    return uid


def _link(file: Path, name: Path) -> None:
    """Give `file` a second name, or copy it where the system does not allow that (another disk, another's file)."""
    try:
        os.link(file, name)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(file, name)


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name == "nt":
        return  # Windows has no such call; NTFS journals names
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
