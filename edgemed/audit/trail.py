"""The trail: records that are on the disk before anything else happens, each chained to the one before.

    trail = open_trail(folder)
    trail.append("... one line ...")
    trail.check()

A folder, of its owner alone, holds

    trail       a line a record: number, SHA-256, text. The hash is over the hash before, the number and the text.
    trail-N     goes on where a file would become too large, from record N on. Its first line says after which number
                and hash, so that a file that is missing, or has another's name, does not fit
    head        number, hash and end of the last record, written after it: tells a trail that was cut off. Two slots,
                written in turn; the file that writers lock
    sent        the same of the last record that the server has confirmed, and when a delivery last failed
    key         what UIDs are hashed with, unless the configuration names another

No file is ever renamed or removed here: what a site may throw away when is its own to say, and files before the last
are not written to again. Covers one writer at a time (a lock), a writer that is killed anywhere, and a disk that is
full: a record is whole or not there. Damage stays visible for ever: the chain goes on from the head, not from what was
put in its place. What it cannot tell: a rewriting of trail and head together by their owner or by root; the copy on the
server does.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from edgemed.errors import CannotRead, CannotWrite

START = "0" * 64
_PLACE_BYTES = 128
_MAX_LINE = 1 << 20
_NAME = re.compile(r"trail-([1-9][0-9]{0,17})")
_HEADER = re.compile(r"after ([0-9]{1,18}) ([0-9a-f]{64})\n")
FILE_BYTES = 64 << 20
"""Of a file of the trail, where the configuration does not say otherwise: about 30,000 records."""
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_PLAIN = _NOFOLLOW | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe in its place must not block


@dataclass(frozen=True)
class Place:
    """A place between two records: the number and hash of the one before it, and where that one ends in its file.

    offset: in bytes. at: of `sent`, when a delivery last failed, in seconds since 1970; 0.0 if the last one did not.
    file: the number of the first record in the file.
    """

    number: int = 0
    hash: str = START
    offset: int = 0
    at: float = 0.0
    file: int = 1


@dataclass(frozen=True)
class Record:
    """One record: its number, its text, the place after it, and whether its hash follows from the one before."""

    number: int
    text: str
    end: Place
    holds: bool


@dataclass(frozen=True)
class Verdict:
    """How a trail is. damage: "" or what is wrong with the first record that does not hold. unsent: of those that
    are here. records: the number of the last one that holds. first: of the first that was looked at.
    """

    records: int
    unsent: int
    damage: str = ""
    first: int = 1


_DAMAGED = Place(0, "damaged")


class Trail:
    """The trail in a folder of its own; made with `open_trail`."""

    def __init__(self, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        self.folder = folder
        self.file_bytes = file_bytes

    def append(self, text: Callable[[int], str]) -> None:
        """Write a record: what `text` gives for its number, one line. It is on the disk when this returns.

        Raises CannotWrite if the system refuses; then nothing of the record is left.
        """
        with self._opened("head") as lock, _locked(lock):
            try:
                head = self._head()
                number = head.number + 1
                line = text(number)
                assert "\n" not in line
                hashed = _chained(head.hash, number, line)
                data = f"{number} {hashed} {line}\n".encode("utf-8", "replace")
                file = self._file_for(number, len(data))
                with self._opened(_name(file)) as trail:
                    self._add(trail, data, Place(number, hashed, file=file), head)
            except (OSError, CannotRead) as error:
                raise CannotWrite(
                    f"cannot write the audit trail in {self.folder}: {getattr(error, 'strerror', None) or error}"
                ) from error

    def _file_for(self, number: int, length: int) -> int:
        """Return the file for a record of so many bytes: the last one, or a new one where that is full."""
        last = max((file for file in self._files() if file <= number), default=number)
        if last == number:
            return number
        size = self._size_of(last)
        return number if size and size + length > self.file_bytes > 0 else last

    def _add(self, trail: int, data: bytes, place: Place, before: Place) -> None:
        """Write a record at the end of its file, and the head. Raises CannotWrite; then nothing of it is left."""
        start = _size(trail)
        if start and _read(trail, 1, start - 1) != b"\n":  # cut off in a line: the damage stays in that one
            data = b"\n" + data
        if not start and place.number > 1:
            data = _header(before) + data
        try:
            _write(trail, data, start)
            os.fsync(trail)
            if not start:
                self._flush_folder()
            self._put("head", replace(place, offset=start + len(data)))
        except (OSError, CannotWrite) as error:
            with contextlib.suppress(OSError):
                os.ftruncate(trail, start)
            raise CannotWrite(
                f"cannot write the audit trail in {self.folder}: {getattr(error, 'strerror', None) or 'refused'}; "
                "what cannot be recorded is not done, so make room, or correct audit.folder"
            ) from error

    def _head(self) -> Place:
        """Return where the chain goes on; a last record that was not finished is cut off. Raises OSError."""
        head, files = self._place("head"), self._files()
        if head in (None, _DAMAGED) and not any(map(self._size_of, files)):
            self._put("head", Place())  # before the first record, which is then one that came after the head
            return Place()
        if head is None or head == _DAMAGED:  # what is there is not vouched for: the next record shows that for ever
            number = max((record.number for record in self._walk(None)), default=0)
            return Place(max(number, 0), hashlib.sha256(b"the head was lost").hexdigest())
        if head.number and (head.file not in files or self._size_of(head.file) < head.offset):
            return head
        for record in self._walk(head):  # a writer was killed before it could write the head
            if not record.holds:
                return head
            head = record.end
        for file, end in ((head.file, head.offset), (head.number + 1, 0)):
            if file in files and self._size_of(file) > end:
                with self._opened(_name(file)) as trail:
                    if b"\n" not in _read(trail, _MAX_LINE, end).removeprefix(b"" if end else _header(head)):
                        os.ftruncate(trail, end)
        return head

    def records(self, after: Place | None = None) -> Iterator[Record]:
        """Yield the records after a place (default: all). Raises CannotRead."""
        try:
            yield from self._walk(after)
        except OSError as error:
            raise CannotRead(f"cannot read the audit trail in {self.folder}: {error.strerror or 'refused'}") from error

    def _walk(self, after: Place | None) -> Iterator[Record]:
        """Yield the records after a place, from file to file. Raises OSError."""
        at = after or Place()
        files = self._files()
        for file in [file for file in files if file >= at.file] or files[-1:]:
            descriptor = self._open(_name(file), os.O_RDONLY)
            try:
                if file != at.file or at.offset > _size(descriptor):  # cut off: what came later is not
                    at = replace(at, offset=0, file=file) if file > at.file else Place(file=file)
                for record in self._records(descriptor, at):
                    at = record.end
                    yield record
            finally:
                os.close(descriptor)

    def _records(self, trail: int, at: Place) -> Iterator[Record]:
        """Yield the whole lines of a file from a place on, each compared with the stored hash before it.

        What is none has number -1. After a first line that tells of another record before it, the next does not hold.
        """
        fits = True
        with os.fdopen(os.dup(trail), "rb") as stream:
            stream.seek(at.offset)
            while (line := stream.readline(_MAX_LINE)).endswith(b"\n"):
                text = line.decode("utf-8", "replace")
                end = at.offset + len(line)
                if not at.offset and (at.file > 1 or text.startswith("after ")):
                    header = _HEADER.fullmatch(text)
                    fits = header is not None and (at.file, at.hash) == (int(header[1]) + 1, header[2])
                    fits = fits and at.file == at.number + 1
                    if header is not None:
                        at = replace(at, number=int(header[1]), hash=header[2], offset=end)
                        continue
                number, _, rest = text[:-1].partition(" ")
                hashed, _, text = rest.partition(" ")
                if not (number.isascii() and number.isdecimal() and len(number) < 19 and len(hashed) == 64):
                    at = replace(at, offset=end)
                    yield Record(-1, "", at, False)
                    continue
                holds = fits and int(number) == at.number + 1 and hashed == _chained(at.hash, int(number), text)
                at, fits = Place(int(number), hashed, end, file=at.file), True
                yield Record(int(number), text, at, holds)

    def _files(self) -> list[int]:
        """Return the numbers of the first records of the trail's files, sorted. Raises OSError."""
        names = os.listdir(self.folder)
        found = [int(named[1]) for name in names if (named := _NAME.fullmatch(name)) and named[1] != "1"]
        return sorted([*found, 1] if "trail" in names else found)

    def _size_of(self, file: int) -> int:
        descriptor = self._open(_name(file), os.O_RDONLY)
        try:
            return _size(descriptor)
        finally:
            os.close(descriptor)

    def check(self, *, from_oldest: bool = False) -> Verdict:
        """Return how the trail is: every record is hashed anew and the last one compared with the head.

        from_oldest: files before the oldest that is here were taken away by the site and are not missed; what that file
        says of the record before it is taken as it is.

        Raises CannotRead, CannotWrite.
        """
        with self._opened("head") as lock, _locked(lock):
            try:
                return self._verdict(from_oldest)
            except OSError as error:
                why = error.strerror or "refused"
                raise CannotRead(f"cannot read the audit trail in {self.folder}: {why}") from error

    def _verdict(self, from_oldest: bool) -> Verdict:
        head, sent, files = self._place("head"), self.sent(), self._files()
        start = self._start_of(files[0]) if from_oldest and files else Place()
        first = start.number + 1
        last, at_head = start, Place()
        for record in self._walk(start):
            if not record.holds:
                return Verdict(last.number, 0, self._told(record, last, files), first)
            last = record.end
            if head is not None and last.number == head.number:
                at_head = last
        unsent = max(last.number - max(sent.number, start.number), 0)
        damage = ""
        if head == _DAMAGED or sent == _DAMAGED:
            damage = "what is told of the last record is damaged (head or sent)"
        elif head is None and last.number:
            damage = f"the head is missing; whether there were more than {last.number} records is not known"
        elif head is not None and head.number > last.number:
            damage = f"record {last.number + 1} is missing: the trail was cut off, it had {head.number}"
        elif head is not None and head.number >= first and at_head.hash != head.hash:
            damage = f"record {head.number} is not the one that the head tells of"
        elif sent.number > last.number:
            damage = f"record {last.number + 1} is missing: {sent.number} were sent"
        return Verdict(last.number, unsent, damage, first)

    def _told(self, record: Record, last: Place, files: list[int]) -> str:
        """Return what is wrong with the first record that does not hold, after the last one that does."""
        file, number = record.end.file, last.number + 1
        if file != last.file and file > number:
            hint = "; if the site took them away, see --from-oldest" if file == files[0] else ""
            return f"records {number} to {file - 1} are missing: the next file is {_name(file)}{hint}"
        if file != last.file and replace(self._start_of(file), file=last.file) != replace(last, offset=0):
            return f"record {number} is missing: {_name(file)} does not go on after the {last.number} before it"
        seen = "is no record" if record.number < 0 else f"is numbered {record.number} or was changed"
        return f"record {number} {seen}; the {last.number} before it hold"

    def _start_of(self, file: int) -> Place:
        """Return the place that a file says it goes on after; the start of all where it says none."""
        descriptor = self._open(_name(file), os.O_RDONLY)
        try:
            header = _HEADER.match(_read(descriptor, 100, 0).decode("ascii", "replace"))
        finally:
            os.close(descriptor)
        here = header is not None and int(header[1]) + 1 == file > 1
        return Place(file - 1, header[2], 0, file=file) if header is not None and here else Place()

    # --- what is sent ---

    def sent(self) -> Place:
        """Return the place after the last record that the server has confirmed."""
        return self._place("sent") or Place()

    def unsent(self) -> Iterator[Record]:
        """Yield the records that the server has not confirmed; those that do not hold, too."""
        sent = self.sent()
        yield from (record for record in self.records(sent) if not 0 <= record.number <= sent.number)

    @contextlib.contextmanager
    def sending(self) -> Iterator[bool]:
        """Hold the right to send; gives False where another process has it. Raises CannotWrite."""
        with self._opened("sent") as sent, contextlib.ExitStack() as held:
            try:
                held.enter_context(_locked(sent, wait=False))
            except OSError:
                yield False
            else:
                yield True

    def note_sent(self, place: Place) -> None:
        """Write down what the server has confirmed. Raises CannotWrite."""
        try:
            self._put("sent", place)
        except OSError as error:
            raise CannotWrite(f"cannot write {self.folder / 'sent'}: {error.strerror or 'refused'}") from error

    # --- small files ---

    def key(self) -> bytes:
        """Return the 32 bytes that UIDs are hashed with, made at the first call. Raises CannotRead, CannotWrite."""
        with self._opened("key") as key, _locked(key):
            if not _size(key):
                try:
                    _write(key, os.urandom(32), 0)
                    os.fsync(key)
                except OSError as error:
                    os.ftruncate(key, 0)
                    raise CannotWrite(f"cannot write {self.folder / 'key'}: {error.strerror or 'refused'}") from error
            return _read(key, 32, 0)

    def _place(self, name: str) -> Place | None:
        """Return what a small file tells, None if it is not there or empty. Raises CannotRead."""
        try:
            descriptor = self._open(name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CannotRead(f"cannot read {self.folder / name}: {error.strerror or 'refused'}") from error
        try:
            data = _read(descriptor, 2 * _PLACE_BYTES, 0)
        finally:
            os.close(descriptor)
        return max(_slots(data), key=lambda slot: slot[0])[1] if data.strip() else None

    def _put(self, name: str, place: Place) -> None:
        """Write a small file in place, always of one length: so it needs no room on a full disk. Raises OSError.

        It has two slots, the older of which is written: one that is written by half leaves the other. It is flushed
        when it is new. Later a power cut may bring an older one back, which the trail makes up for.
        """
        with self._opened(name) as file:
            slots = _slots(_read(file, 2 * _PLACE_BYTES, 0))
            turn = max(turn for turn, _ in slots) + 1
            text = f"{place.number} {place.hash} {place.offset} {place.at:.3f} {place.file} {turn}"
            new = not _size(file)
            slot = 0 if slots[0][0] <= slots[1][0] else 1
            _write(file, f"{text} {_sum(text)}".ljust(_PLACE_BYTES - 1).encode() + b"\n", slot * _PLACE_BYTES)
            if new:
                os.fsync(file)
                self._flush_folder()

    def _flush_folder(self) -> None:
        if os.name == "posix":
            with _as_owner(self.folder):
                descriptor = os.open(self.folder, os.O_RDONLY | _NOFOLLOW)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """Give a file of the trail, made for its owner alone. Raises CannotWrite."""
        try:
            descriptor = self._open(name, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise CannotWrite(f"cannot write {self.folder / name}: {error.strerror or 'refused'}") from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self, name: str, flags: int) -> int:
        """Open a plain file of the trail. Raises OSError."""
        with _as_owner(self.folder):
            descriptor = os.open(self.folder / name, flags | _PLAIN, 0o600)
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode) or (os.name == "posix" and mode & 0o077):
            os.close(descriptor)
            raise OSError(errno.EPERM, "it is no plain file of its owner alone (chmod 600)")
        return descriptor


@contextlib.contextmanager
def _as_owner(folder: Path) -> Iterator[None]:
    """Have root open the files of another user's trail as that user.

    Root sends for all, in folders where users can put links to whatever they like; so no file of root's is reached.
    """
    owner = os.lstat(folder)
    if os.name != "posix" or os.geteuid() != 0 or owner.st_uid == 0:
        yield
        return
    group, groups = os.getegid(), os.getgroups()
    os.setgroups([])
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def open_trail(folder: Path, file_bytes: int = FILE_BYTES) -> Trail:
    """Return this user's trail in a folder, which is made if it is missing.

    Where several users have trails, audit.folder lets each make a folder (mode 1777, as /tmp).

    Raises CannotWrite if it cannot be made, is another user's, or others have rights to it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(0o700)
        info = os.lstat(folder)
    except OSError as error:
        raise CannotWrite(
            f"cannot make {folder} for the audit trail: {error.strerror or 'refused'}; audit.folder must let each user "
            "who runs edgemed make a folder (chmod 1777)"
        ) from error
    if not stat.S_ISDIR(info.st_mode):
        raise CannotWrite(f"{folder} is no folder; the audit trail was to be there")
    if os.name == "posix" and (info.st_mode & 0o077 or info.st_uid != os.geteuid()):
        raise CannotWrite(
            f"{folder} holds the audit trail and is open to others or another user's; chmod 700, chown it"
        )
    return Trail(folder, file_bytes)


def _name(file: int) -> str:
    return "trail" if file == 1 else f"trail-{file}"


def _header(before: Place) -> bytes:
    """Return the first line of a file that goes on after a place."""
    return f"after {before.number} {before.hash}\n".encode()


def _slots(data: bytes) -> list[tuple[int, Place]]:
    """Return the turn and the place of the two slots of a small file; one that does not hold has the turn -1."""
    found = []
    for start in (0, _PLACE_BYTES):
        said, _, summed = data[start : start + _PLACE_BYTES].decode("ascii", "replace").strip().rpartition(" ")
        slot = (-1, _DAMAGED)
        with contextlib.suppress(ValueError):
            if summed and summed == _sum(said):
                number, hashed, offset, at, file, turn = said.split(" ")
                slot = int(turn), Place(int(number), hashed, int(offset), float(at), int(file))
        found.append(slot)
    return found


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]


def _chained(before: str, number: int, text: str) -> str:
    return hashlib.sha256(f"{before} {number} {text}".encode("utf-8", "replace")).hexdigest()


def _size(descriptor: int) -> int:
    return os.fstat(descriptor).st_size


def _read(descriptor: int, count: int, offset: int) -> bytes:
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, count)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at an offset; a full disk takes a part first and then refuses."""
    os.lseek(descriptor, offset, os.SEEK_SET)
    while data:
        data = data[os.write(descriptor, data) :]


@contextlib.contextmanager
def _locked(descriptor: int, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file. Raises OSError where it is held and `wait` is not set."""
    _lock(descriptor, wait)
    try:
        yield
    finally:
        _unlock(descriptor)


if sys.platform == "win32":
    import msvcrt

    _FAR = 1 << 40  # a lock there keeps nobody from reading and writing

    def _lock(descriptor: int, wait: bool) -> None:
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int, wait: bool) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
