"""The node's journal: what was received, what is to be done about it, what was done. One SQLite file.

    instance   a file in the store that was acknowledged
    study      receiving -> stable; `revision` counts its changes
    job        queued -> running -> done | failed           one for each study and rule
    result     a file that a job wrote
    delivery   pending -> sent | failed                     one for each DICOM result and target

Every method that changes something is one transaction; with synchronous=FULL it is on the disk when the method returns
(write-ahead log). What was `running` when the process died is queued again by `recover`. Times are seconds, as the
caller's clock has them. Threads may share a journal.

Does not cover files: see `store`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgemed.errors import CannotRead, CannotWrite, InvalidInput

VERSION = 1
_TABLES = f"""
PRAGMA user_version = {VERSION};
CREATE TABLE secret (key BLOB NOT NULL);
CREATE TABLE study (
    uid TEXT PRIMARY KEY, sender TEXT NOT NULL, revision INTEGER NOT NULL, changed REAL NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('receiving', 'stable'))) WITHOUT ROWID;
CREATE TABLE instance (
    uid TEXT PRIMARY KEY, study TEXT NOT NULL REFERENCES study (uid) ON DELETE CASCADE, name TEXT NOT NULL UNIQUE,
    sha256 TEXT NOT NULL, bytes INTEGER NOT NULL, received REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX instance_study ON instance (study);
CREATE TABLE job (
    id INTEGER PRIMARY KEY, study TEXT NOT NULL REFERENCES study (uid) ON DELETE CASCADE, rule TEXT NOT NULL,
    revision INTEGER NOT NULL, state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'failed')),
    attempts INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL, error TEXT, finished INTEGER NOT NULL DEFAULT 0,
    changed REAL NOT NULL, UNIQUE (study, rule));
CREATE INDEX job_due ON job (state, due);
CREATE TABLE result (
    job INTEGER NOT NULL REFERENCES job (id) ON DELETE CASCADE, name TEXT NOT NULL, uid TEXT, sha256 TEXT NOT NULL,
    PRIMARY KEY (job, name)) WITHOUT ROWID;
CREATE INDEX result_uid ON result (uid);
CREATE TABLE delivery (
    uid TEXT NOT NULL, target TEXT NOT NULL, job INTEGER NOT NULL REFERENCES job (id) ON DELETE CASCADE,
    name TEXT NOT NULL, state TEXT NOT NULL CHECK (state IN ('pending', 'sent', 'failed')),
    attempts INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL, error TEXT, changed REAL NOT NULL,
    PRIMARY KEY (uid, target)) WITHOUT ROWID;
CREATE INDEX delivery_due ON delivery (state, due);
"""


@dataclass(frozen=True)
class Instance:
    """An acknowledged instance: `name` is its file in the store."""

    uid: str
    study: str
    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Job:
    """A claimed job: rule `rule` about revision `revision` of a study; attempts counts this one, too."""

    id: int
    study: str
    rule: str
    revision: int
    attempts: int


@dataclass(frozen=True)
class Result:
    """A result's file in the store, and its SOP Instance UID where it is a DICOM object."""

    name: str
    uid: str | None
    sha256: str


@dataclass(frozen=True)
class Delivery:
    """A result that is to go to a target; attempts: so far."""

    uid: str
    target: str
    name: str
    attempts: int


_JUMP = 60.0
"""Seconds. A time of change that lies farther ahead than this says that the clock went back since; what waits for a
time there is due at once. Less is what comes in while a question to the journal is on its way."""


class Journal:
    """The journal in the file `path`, made if missing; a context manager.

    Raises CannotRead, CannotWrite, or InvalidInput if the file is no journal of this version.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        with _told(path):
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30.0)
            try:
                self._prepare(path)
            except BaseException:
                self._db.close()
                raise

    def _prepare(self, path: Path) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        with self._change() as db:  # a second process that starts waits here and then finds the tables
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0 and not db.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in _TABLES.split(";"):
                    db.execute(statement)
                db.execute("INSERT INTO secret VALUES (?)", (secrets.token_bytes(32),))
            elif version != VERSION:
                raise InvalidInput(f"{path} is no journal of version {VERSION}; pass another folder, or remove it")
        (key,) = self._db.execute("SELECT key FROM secret").fetchone()
        self._key = bytes(key)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """Give the connection in a transaction; roll back on an error."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, statement: str, *values: object) -> list[tuple[object, ...]]:
        with self._lock:
            return self._db.execute(statement, values).fetchall()

    def hashed(self, uid: str) -> str:
        """Return what a UID (or a name) is called in logs: a keyed hash; the key never leaves this file."""
        return hashlib.blake2b(uid.encode("utf-8", "replace"), key=self._key, digest_size=6).hexdigest()

    # --- reception ---

    def instance(self, uid: str) -> Instance | None:
        """Return the acknowledged instance with this UID."""
        rows = self._rows("SELECT uid, study, name, sha256, bytes FROM instance WHERE uid = ?", uid)
        return Instance(*rows[0]) if rows else None  # type: ignore[arg-type]

    def is_result(self, uid: str) -> bool:
        """Return whether this is the UID of a result."""
        return bool(
            self._rows("SELECT 1 FROM result WHERE uid = ? UNION ALL SELECT 1 FROM delivery WHERE uid = ?", uid, uid)
        )

    def instances(self, study: str) -> list[Instance]:
        """Return the instances of a study in a stable order."""
        rows = self._rows("SELECT uid, study, name, sha256, bytes FROM instance WHERE study = ? ORDER BY uid", study)
        return [Instance(*row) for row in rows]  # type: ignore[arg-type]

    def has_study(self, uid: str) -> bool:
        """Return whether there is an instance of this study."""
        return bool(self._rows("SELECT 1 FROM study WHERE uid = ?", uid))

    def pending_studies(self) -> int:
        """Return how many studies are still being received or answered."""
        ((count,),) = self._rows(
            "SELECT count(*) FROM study WHERE state = 'receiving' OR EXISTS "
            "(SELECT 1 FROM job WHERE job.study = study.uid AND job.state IN ('queued', 'running'))"
        )
        assert isinstance(count, int)
        return count

    def add_instance(self, item: Instance, sender: str, now: float) -> None:
        """Take an instance whose file is on the disk; another one with its UID is replaced. The study is open again."""
        with self._change() as db:
            db.execute(
                "INSERT INTO study VALUES (?, ?, 1, ?, 'receiving') ON CONFLICT (uid) DO UPDATE SET "
                "sender = excluded.sender, revision = revision + 1, changed = excluded.changed, state = 'receiving'",
                (item.study, sender, now),
            )
            db.execute(
                "INSERT OR REPLACE INTO instance VALUES (?, ?, ?, ?, ?, ?)",
                (item.uid, item.study, item.name, item.sha256, item.bytes, now),
            )

    # --- jobs ---

    def due_studies(self, quiet_since: float, now: float) -> list[tuple[str, str]]:
        """Return (study, sender) of the studies that got their last instance at `quiet_since` or before."""
        rows = self._rows(
            "SELECT uid, sender FROM study WHERE state = 'receiving' AND (changed <= ? OR changed > ?) "
            "ORDER BY changed",
            quiet_since,
            now + _JUMP,
        )
        return [(str(uid), str(sender)) for uid, sender in rows]

    def close_study(self, study: str, rules: Sequence[str], quiet_since: float, now: float) -> bool:
        """Make a study stable with a queued job for each rule; False if an instance came in between.

        A job about an earlier revision is queued anew, also if it runs: its end is then that of the earlier revision.
        """
        with self._change() as db:
            row = db.execute(
                "UPDATE study SET state = 'stable' WHERE uid = ? AND state = 'receiving' "
                "AND (changed <= ? OR changed > ?) RETURNING revision",
                (study, quiet_since, now + _JUMP),
            ).fetchone()
            for rule in rules if row else ():
                db.execute(
                    "INSERT INTO job (study, rule, revision, state, due, changed) VALUES (?, ?, ?, 'queued', ?, ?) "
                    "ON CONFLICT (study, rule) DO UPDATE SET revision = excluded.revision, state = 'queued', "
                    "attempts = 0, due = excluded.due, error = NULL, changed = excluded.changed",
                    (study, rule, row[0], now, now),
                )
            return row is not None

    def put_study(self, study: str, items: Sequence[Instance], rules: Sequence[str], now: float) -> None:
        """Take a study as a whole: complete, these instances and no others, with a queued job for each rule.

        What was done about the same instances stays done; what failed is queued again.
        """
        with self._change() as db:
            known = dict(db.execute("SELECT uid, sha256 FROM instance WHERE study = ?", (study,)).fetchall())
            if known == {item.uid: item.sha256 for item in items}:  # the files may have moved
                names = [(item.name, item.uid) for item in items]
                db.executemany("UPDATE OR REPLACE instance SET name = ? WHERE uid = ?", names)
            else:
                db.execute("DELETE FROM instance WHERE study = ?", (study,))
                db.execute(
                    "INSERT INTO study VALUES (?, '', 1, ?, 'stable') ON CONFLICT (uid) DO UPDATE SET "
                    "revision = revision + 1, changed = excluded.changed, state = 'stable'",
                    (study, now),
                )
                for i in items:
                    row = (i.uid, study, i.name, i.sha256, i.bytes, now)
                    db.execute("INSERT OR REPLACE INTO instance VALUES (?, ?, ?, ?, ?, ?)", row)
            for rule in rules:
                db.execute(
                    "INSERT INTO job (study, rule, revision, state, due, changed) "
                    "SELECT uid, ?, revision, 'queued', ?, ? FROM study WHERE uid = ? "
                    "ON CONFLICT (study, rule) DO UPDATE SET revision = excluded.revision, state = 'queued', "
                    "attempts = 0, due = excluded.due, error = NULL, changed = excluded.changed "
                    "WHERE job.state = 'failed' OR job.revision <> excluded.revision",
                    (rule, now, now, study),
                )

    def rules(self) -> set[str]:
        """Return the rules that there are jobs for."""
        return {str(rule) for (rule,) in self._rows("SELECT DISTINCT rule FROM job")}

    def ended(self, study: str, rule: str) -> str | None:
        """Return "" if a study is answered, the error if it was given up, None otherwise."""
        rows = self._rows("SELECT state, error FROM job WHERE study = ? AND rule = ?", study, rule)
        states: dict[object, str | None] = {"done": "", "failed": str(rows and rows[0][1]) or "failed"}
        return states.get(rows[0][0]) if rows else None

    def park(self) -> None:
        """Give up what is queued or running, until `put_study` queues it again."""
        with self._change() as db:
            db.execute("UPDATE job SET state = 'failed', error = 'not ended' WHERE state IN ('queued', 'running')")

    def deliver_again(self, targets: Sequence[str], now: float) -> None:
        """Queue what targets refused, and every DICOM result for targets that it has not been for so far."""
        with self._change() as db:
            db.execute("UPDATE delivery SET state = 'pending', attempts = 0, due = ? WHERE state = 'failed'", (now,))
            db.execute("UPDATE delivery SET attempts = 0, due = ? WHERE state = 'pending'", (now,))
            for target in targets:
                db.execute(
                    "INSERT OR IGNORE INTO delivery (uid, target, job, name, state, due, changed) "
                    "SELECT uid, ?, job, name, 'pending', ?, ? FROM result WHERE uid IS NOT NULL",
                    (target, now, now),
                )

    def has_hope(self, attempts: int) -> bool:
        """Return whether a delivery is pending that was tried less than `attempts` times."""
        return bool(self._rows("SELECT 1 FROM delivery WHERE state = 'pending' AND attempts < ? LIMIT 1", attempts))

    def results(self, job: Job) -> list[str]:
        """Return the file names of what a job wrote."""
        return [str(name) for (name,) in self._rows("SELECT name FROM result WHERE job = ?", job.id)]

    def claim(self, now: float) -> Job | None:
        """Return the job that is due longest, now running; None if there is none."""
        with self._change() as db:
            row = db.execute(
                "UPDATE job SET state = 'running', attempts = attempts + 1, changed = ? WHERE id = "
                "(SELECT id FROM job WHERE state = 'queued' AND (due <= ? OR changed > ?) ORDER BY due, id LIMIT 1) "
                "RETURNING id, study, rule, revision, attempts",
                (now, now, now + _JUMP),
            ).fetchone()
            return Job(*row) if row else None

    def finish(self, job: Job, results: Sequence[Result], targets: Sequence[str], now: float) -> bool:
        """Record a job's results, and a delivery of each DICOM result to each target; False if it is out of date.

        What an earlier run or revision wrote is replaced; a delivery that was made is not made again.
        """
        with self._change() as db:
            if not self._end(db, job, "done", now, None, "finished = finished + 1"):
                return False
            db.execute("DELETE FROM result WHERE job = ?", (job.id,))
            uids = json.dumps([result.uid for result in results if result.uid])
            db.execute(  # what is not sent yet of an earlier revision is out of date
                "DELETE FROM delivery WHERE job = ? AND state = 'pending' "
                "AND uid NOT IN (SELECT value FROM json_each(?))",
                (job.id, uids),
            )
            for result in results:
                db.execute("INSERT INTO result VALUES (?, ?, ?, ?)", (job.id, result.name, result.uid, result.sha256))
                for target in targets if result.uid else ():
                    db.execute(
                        "INSERT INTO delivery (uid, target, job, name, state, due, changed) "
                        "VALUES (?, ?, ?, ?, 'pending', ?, ?) "
                        "ON CONFLICT (uid, target) DO UPDATE SET name = excluded.name",
                        (result.uid, target, job.id, result.name, now, now),
                    )
            return True

    def fail(self, job: Job, error: str, now: float, due: float | None) -> None:
        """Record that a job failed: for good, or to be run again at `due`."""
        with self._change() as db:
            state = "failed" if due is None else "queued"
            self._end(db, job, state, now, error, "due = coalesce(?, due)", due)

    def hand_back(self, job: Job, now: float) -> None:
        """Queue a running job that was not finished; the attempt does not count."""
        with self._change() as db:
            self._end(db, job, "queued", now, None, "attempts = attempts - 1")

    @staticmethod
    def _end(
        db: sqlite3.Connection, job: Job, state: str, now: float, error: str | None, more: str, *values: object
    ) -> bool:
        done = db.execute(
            f"UPDATE job SET state = ?, changed = ?, error = ?, {more} "  # noqa: S608 (`more` is a constant above)
            "WHERE id = ? AND revision = ? AND attempts = ? AND state = 'running'",
            (state, now, error, *values, job.id, job.revision, job.attempts),
        )
        return done.rowcount == 1

    # --- deliveries ---

    def due_deliveries(self, now: float, count: int = 100) -> list[Delivery]:
        """Return deliveries that are due, those of one target together."""
        rows = self._rows(
            "SELECT uid, target, name, attempts FROM delivery WHERE state = 'pending' "
            "AND (due <= ? OR changed > ?) ORDER BY target, due, uid LIMIT ?",
            now,
            now + _JUMP,
            count,
        )
        return [Delivery(*row) for row in rows]  # type: ignore[arg-type]

    def study_of(self, delivery: Delivery) -> str:
        """Return the study that a delivery's result is about."""
        rows = self._rows(
            "SELECT study FROM job JOIN delivery ON job.id = delivery.job WHERE delivery.uid = ? AND target = ?",
            delivery.uid,
            delivery.target,
        )
        return str(rows[0][0]) if rows else ""

    def sent(self, delivery: Delivery, now: float) -> None:
        """Record that the target has the result."""
        self._delivered(delivery, "sent", now, None, now, delivery.attempts + 1)

    def not_sent(self, delivery: Delivery, error: str, now: float, due: float | None) -> None:
        """Record that it has not: for good, or to be tried again at `due`."""
        state = "failed" if due is None else "pending"
        self._delivered(delivery, state, now, error, due or now, delivery.attempts + 1)

    def _delivered(self, d: Delivery, state: str, now: float, error: str | None, due: float, attempts: int) -> None:
        with self._change() as db:
            db.execute(
                "UPDATE delivery SET state = ?, changed = ?, error = ?, due = ?, attempts = ? "
                "WHERE uid = ? AND target = ? AND state = 'pending'",
                (state, now, error, due, attempts, d.uid, d.target),
            )

    # --- upkeep ---

    def recover(self, now: float) -> int:
        """Queue what was running when the process ended; return how many jobs that were. Call it once, at the start."""
        with self._change() as db:
            return db.execute("UPDATE job SET state = 'queued', due = ? WHERE state = 'running'", (now,)).rowcount

    def retry(self, now: float) -> int:
        """Queue what was given up, jobs and deliveries; return how many."""
        with self._change() as db:
            jobs = db.execute("UPDATE job SET state = 'queued', attempts = 0, due = ? WHERE state = 'failed'", (now,))
            sent = db.execute(
                "UPDATE delivery SET state = 'pending', attempts = 0, due = ? WHERE state = 'failed'", (now,)
            )
            return jobs.rowcount + sent.rowcount

    def names(self) -> set[str]:
        """Return the file names of all instances."""
        return {str(name) for (name,) in self._rows("SELECT name FROM instance")}

    def result_names(self) -> set[str]:
        """Return the file names of all results."""
        return {str(name) for (name,) in self._rows("SELECT name FROM result")}

    def forget(self, before: float, count: int = 100) -> list[tuple[str, list[int]]]:
        """Remove studies of which all was done before `before`; return (study, its jobs). Failed ones stay."""
        with self._change() as db:
            studies = db.execute(
                "SELECT uid FROM study WHERE state = 'stable' AND changed <= ? AND NOT EXISTS ("
                "SELECT 1 FROM job LEFT JOIN delivery ON delivery.job = job.id WHERE job.study = study.uid AND "
                "(job.state <> 'done' OR job.changed > ? OR delivery.state <> 'sent' OR delivery.changed > ?)) LIMIT ?",
                (before, before, before, count),
            ).fetchall()
            gone: list[tuple[str, list[int]]] = []
            for (study,) in studies:
                jobs = [job for (job,) in db.execute("SELECT id FROM job WHERE study = ?", (study,))]
                db.execute("DELETE FROM study WHERE uid = ?", (study,))
                gone.append((study, jobs))
            return gone

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many of each thing are in each state."""
        told: dict[str, dict[str, int]] = {
            "studies": {"receiving": 0, "stable": 0},
            "jobs": dict.fromkeys(("queued", "running", "done", "failed"), 0),
            "deliveries": dict.fromkeys(("pending", "sent", "failed"), 0),
        }
        for what, table in (("studies", "study"), ("jobs", "job"), ("deliveries", "delivery")):
            for state, count in self._rows(f"SELECT state, count(*) FROM {table} GROUP BY state"):  # noqa: S608
                told[what][str(state)] = int(str(count))
        for what, table in (("instances", "instance"), ("results", "result")):
            ((count,),) = self._rows(f"SELECT count(*) FROM {table}")  # noqa: S608
            told[what] = {"stored": int(str(count))}
        return told

    def check(self) -> None:
        """Raise InvalidInput if SQLite finds the file damaged."""
        found = self._rows("PRAGMA integrity_check")
        if found != [("ok",)] or self._rows("PRAGMA foreign_key_check"):
            raise InvalidInput("the journal is damaged; restore the folder of the node from a copy")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into edgemed's."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            kind = CannotWrite if path.parent.is_dir() else CannotRead
            raise kind(f"cannot open the journal {path}: {error}") from error
        raise InvalidInput(f"{path} is no journal; pass another folder, or remove it") from error
