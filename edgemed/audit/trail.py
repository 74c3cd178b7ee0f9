"""The trail: records that are on the disk before anything else happens, each chained to the one before.

    trail = open_trail(folder)
    trail.append("... one line ...")
    trail.check()

A folder, of its owner alone, holds

    trail       a line a record: number, SHA-256, text. The hash is over the hash before, the number and the text.
    head        number, hash and end of the last record, written after it: tells a trail that was cut off
    sent        the same of the last record that the server has confirmed, and when a delivery last failed
    key         what UIDs are hashed with, unless the configuration names another

Covers one writer at a time (a lock), a writer that is killed anywhere, and a disk that is full: a record is whole or
not there. Damage stays visible for ever: the chain goes on from the head, not from what was put in its place. What it
cannot tell: a rewriting of trail and head together by their owner or by root; the copy on the server does.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edgemed.errors import CannotRead, CannotWrite

START = "0" * 64
_PLACE_BYTES = 128
_MAX_LINE = 1 << 20
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_PLAIN = _NOFOLLOW | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe in its place must not block


@dataclass(frozen=True)
class Place:
    """A place between two records: the number and hash of the one before it, and its offset in bytes.

    at: of `sent`, when a delivery last failed, in seconds since 1970; 0.0 if the last one did not.
    """

    number: int = 0
    hash: str = START
    offset: int = 0
    at: float = 0.0


@dataclass(frozen=True)
class Record:
    """One record: its number, its text, the place after it, and whether its hash follows from the one before."""

    number: int
    text: str
    end: Place
    holds: bool


@dataclass(frozen=True)
class Verdict:
    """How a trail is. damage: "" or what is wrong with the first record that does not hold. unsent: of `records`."""

    records: int
    unsent: int
    damage: str = ""


_DAMAGED = Place(0, "damaged")


class Trail:
    """The trail in a folder of its own; made with `open_trail`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def append(self, text: Callable[[int], str]) -> None:
        """Write a record: what `text` gives for its number, one line. It is on the disk when this returns.

        Raises CannotWrite if the system refuses; then nothing of the record is left.
        """
        with self._opened("trail") as trail, _locked(trail):
            head = self._head(trail)
            number = head.number + 1
            line = text(number)
            assert "\n" not in line
            hashed = _chained(head.hash, number, line)
            start = _size(trail)
            data = f"{number} {hashed} {line}\n".encode("utf-8", "replace")
            if start and _read(trail, 1, start - 1) != b"\n":  # cut off in a line: the damage stays in that one
                data = b"\n" + data
            try:
                _write(trail, data, start)
                os.fsync(trail)
                self._put("head", Place(number, hashed, start + len(data)))
            except (OSError, CannotWrite) as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(trail, start)
                raise CannotWrite(
                    f"cannot write the audit trail in {self.folder}: {getattr(error, 'strerror', None) or 'refused'}; "
                    "what cannot be recorded is not done, so make room, or correct audit.folder"
                ) from error

    def _head(self, trail: int) -> Place:
        """Return where the chain goes on; a last record that was not finished is cut off."""
        head = self._place("head")
        if head is None and not _size(trail):
            return Place()
        if head is None or head == _DAMAGED:  # what is there is not vouched for: the next record shows that for ever
            number = max((r.number for r in self._records(trail, Place())), default=0)
            return Place(max(number, 0), hashlib.sha256(b"the head was lost").hexdigest())
        if _size(trail) > head.offset:  # a writer was killed before it could write the head
            for record in self._records(trail, head):
                if not record.holds:
                    return head
                head = record.end
            if b"\n" not in _read(trail, _MAX_LINE, head.offset):
                os.ftruncate(trail, head.offset)
        return head

    def records(self, after: Place | None = None) -> Iterator[Record]:
        """Yield the records after a place (default: all). Raises CannotRead."""
        try:
            descriptor = self._open("trail", os.O_RDONLY)
        except FileNotFoundError:
            return
        except OSError as error:
            raise CannotRead(f"cannot read the audit trail in {self.folder}: {error.strerror or 'refused'}") from error
        try:
            if after is None or after.offset > _size(descriptor):  # it was cut off: what came later is not
                after = Place()
            yield from self._records(descriptor, after)
        finally:
            os.close(descriptor)

    def _records(self, trail: int, after: Place) -> Iterator[Record]:
        """Yield whole lines from a place on, each compared with the stored hash before it; others have number -1."""
        at = after
        with os.fdopen(os.dup(trail), "rb") as file:
            file.seek(after.offset)
            while (line := file.readline(_MAX_LINE)).endswith(b"\n"):
                end = at.offset + len(line)
                number, _, rest = line[:-1].decode("utf-8", "replace").partition(" ")
                hashed, _, text = rest.partition(" ")
                if not (number.isascii() and number.isdecimal() and len(number) < 19 and len(hashed) == 64):
                    at = Place(at.number, at.hash, end)
                    yield Record(-1, "", at, False)
                    continue
                holds = int(number) == at.number + 1 and hashed == _chained(at.hash, int(number), text)
                at = Place(int(number), hashed, end)
                yield Record(int(number), text, at, holds)

    def check(self) -> Verdict:
        """Return how the trail is: every record is hashed anew and the last one compared with the head."""
        with self._opened("trail") as trail, _locked(trail):
            head, sent = self._place("head"), self.sent()
            last, at_head = Place(), Place()
            for record in self._records(trail, Place()):
                if not record.holds:
                    seen = "is no record" if record.number < 0 else f"is numbered {record.number} or was changed"
                    what = f"record {last.number + 1} {seen}; the {last.number} before it hold"
                    return Verdict(last.number, 0, what)
                last = record.end
                if head is not None and last.number == head.number:
                    at_head = last
            unsent = max(last.number - sent.number, 0)
            damage = ""
            if head == _DAMAGED or sent == _DAMAGED:
                damage = "what is told of the last record is damaged (head or sent)"
            elif head is None and last.number:
                damage = f"the head is missing; whether there were more than {last.number} records is not known"
            elif head is not None and head.number > last.number:
                damage = f"record {last.number + 1} is missing: the trail was cut off, it had {head.number}"
            elif head is not None and head.number and at_head.hash != head.hash:
                damage = f"record {head.number} is not the one that the head tells of"
            elif sent.number > last.number:
                damage = f"record {last.number + 1} is missing: {sent.number} were sent"
            return Verdict(last.number, unsent, damage)

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
        with os.fdopen(descriptor, "rb") as file:
            parts = file.read(_PLACE_BYTES + 1).decode("ascii", "replace").split()
        if not parts:
            return None
        with contextlib.suppress(ValueError):
            if len(parts) == 4 and len(parts[1]) == 64:
                return Place(int(parts[0]), parts[1], int(parts[2]), float(parts[3]))
        return _DAMAGED

    def _put(self, name: str, place: Place) -> None:
        """Write a small file in place, always of one length: so it needs no room on a full disk. Raises OSError.

        It is flushed when it is new. Later a power cut may bring an older one back, which the trail makes up for.
        """
        text = f"{place.number} {place.hash} {place.offset} {place.at:.3f}".ljust(_PLACE_BYTES - 1) + "\n"
        with self._opened(name) as file:
            new = not _size(file)
            _write(file, text.encode(), 0)
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


def open_trail(folder: Path) -> Trail:
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
    return Trail(folder)


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
