"""The work of a node or a batch: complete studies become jobs, jobs go to workers, results are kept and sent on.

    with Store(settings) as store:
        work = Work(store, *workers)
        work.start_work()
        ...
        work.stop_work()

Each worker has a thread that claims one job after another from the journal; a further thread delivers. A job that was
begun `max_attempts` times is given up, also if each time whoever ran it died. Logs are JSON lines with hashed UIDs.

Each step is a method (`close_quiet_studies`, `run_job`, `deliver_due`) that returns what it did, so that tests call it
with a clock of their own; the threads call the same methods.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from edgemed import audit
from edgemed.errors import CannotRead, EdgemedError, InvalidInput, NoInput, ResourceLimit, UnsupportedDicom
from edgemed.serve.deliver import Outcome, deliver
from edgemed.serve.journal import Delivery, Job
from edgemed.serve.settings import NodeSettings, Rule, Target
from edgemed.serve.store import Store

POLL_SECONDS = 1.0
"""How long the threads of work wait where nothing wakes them."""

_FOR_GOOD = (InvalidInput, UnsupportedDicom, ResourceLimit)
"""Errors of a job that would come again."""

_UIDS = re.compile(r"\d+(?:\.\d+){3,}")


class Stopped(Exception):
    """Raised by a process that was asked to stop; its job is handed back."""


class Process(Protocol):
    """What answers a study."""

    def __call__(self, rule: Rule, study: Path, out: Path, stopping: Callable[[], bool]) -> Sequence[Path]:
        """Return the files it wrote into `out` about the instances in `study`; the same ones for the same instances.

        Raises NoInput if the rule fits no series, Stopped if `stopping()` became true, else an EdgemedError.
        """


Deliver = Callable[[Target, Sequence[Path], NodeSettings], Iterator[Outcome]]


def to_stderr(what: str, **facts: Any) -> None:
    """Write one line of the log."""
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    print(json.dumps({"at": at, "event": what, **facts}, ensure_ascii=True), file=sys.stderr, flush=True)


class Work:
    """What is done about the studies of a store, by one worker or several. tell: takes the lines of the log."""

    def __init__(
        self, store: Store, *workers: Process, send: Deliver = deliver, tell: Callable[..., None] = to_stderr
    ) -> None:
        self.store, self.settings, self.journal = store, store.settings, store.journal
        self._workers, self._send, self._tell = workers, send, tell
        self._stopping = threading.Event()
        self._wake = [threading.Event() for _ in (*workers, "courier")]
        self._threads: list[threading.Thread] = []
        self._running: dict[int, Job] = {}
        self._unrecorded: list[Job] = []  # whose end the journal could not take: the disk is full, say

    def start_work(self) -> None:
        """Begin to work."""
        steps = [partial(self._work, worker) for worker in self._workers]
        for wake, step in zip(self._wake, (*steps, self._carry), strict=True):
            self._threads.append(threading.Thread(target=self._loop, args=(wake, step), daemon=True))
            self._threads[-1].start()

    def stop_work(self) -> None:
        """End the work: running jobs are finished within `stop_seconds`, or handed back."""
        self._stopping.set()
        self.wake()
        end = time.monotonic() + self.settings.stop_seconds
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0))
        for job in [self._running.pop(key) for key in list(self._running)]:
            self.journal.hand_back(job, self.store.now())
            self._tell("handed back", job=job.id)

    def wake(self) -> None:
        """Have the threads look at once for what is to be done."""
        for wake in self._wake:
            wake.set()

    # --- the steps ---

    def close_quiet_studies(self) -> int:
        """Queue a job for each rule about each study that is complete; return how many studies."""
        now = self.store.now()
        since = now - self.settings.quiet_seconds
        closed = 0
        for study, sender in self.journal.due_studies(since, now):
            rules = [r.name for r in self.settings.rules if not r.senders or sender in r.senders]
            if self.journal.close_study(study, rules, since, now):
                closed += 1
                self._tell("complete", study=self.journal.hashed(study), jobs=len(rules))
                count = len(self.journal.instances(study))
                self._record(audit.received([study], sender, "", count, self.settings.aet))
        return closed

    def run_job(self, worker: Process | None = None) -> bool:
        """Run the job that is due longest, by the first worker if none is named; False if there is none."""
        for lost in list(self._unrecorded):
            self.journal.hand_back(lost, self.store.now())
            self._unrecorded.remove(lost)
        job = self.journal.claim(self.store.now())
        if job is None:
            return False
        self._running[job.id] = job
        told: dict[str, Any] = {"job": job.id, "study": self.journal.hashed(job.study), "rule": job.rule}
        try:
            self._run(job, worker or self._workers[0], told)
        except Exception:
            self._unrecorded.append(job)
            raise
        finally:
            self.store.close_job(job)
            self._running.pop(job.id, None)
        return True

    def _run(self, job: Job, worker: Process, told: dict[str, Any]) -> None:
        """Answer a job and record how it ended."""
        try:
            if job.attempts > self.settings.max_attempts:
                raise InvalidInput(f"it was begun {job.attempts - 1} times, and whoever ran it ended each time")
            self._tell("started", **told, attempt=job.attempts)
            self._tell("answered", **told, results=self._answer(job, worker))
        except Stopped:
            self.journal.hand_back(job, self.store.now())
            self._tell("handed back", **told)
        except EdgemedError as error:
            self._failed(job, error, told, for_good=isinstance(error, _FOR_GOOD))
        except MemoryError as error:
            self._failed(job, error, told)
        except Exception as error:  # noqa: BLE001  one study must not end the node
            self._failed(job, error, told)

    def _answer(self, job: Job, worker: Process) -> int:
        rule = self.settings.rule(job.rule)
        if rule is None:
            raise InvalidInput(f"the configuration has no rule {job.rule} any more")
        audit.record(audit.accessed([job.study], "serve"))  # one that cannot be recorded is not answered
        study, out = self.store.open_job(job)
        try:
            files = worker(rule, study, out, self._stopping.is_set)
        except NoInput:
            files = ()
        before = self.journal.results(job)
        results = self.store.keep_results(job, files)
        if self.journal.finish(job, results, rule.targets, self.store.now()):
            self._wake[-1].set()
            self.store.drop_results(set(before) - {result.name for result in results})
        return len(results)

    def _failed(self, job: Job, error: BaseException, told: dict[str, Any], *, for_good: bool = False) -> None:
        now = self.store.now()
        due = None if for_good or job.attempts >= self.settings.max_attempts else now + self._delay(job.attempts)
        why = self._words(error)
        self.journal.fail(job, why, now, due)
        self._tell("failed", **told, error=why, again=due is not None)
        audit.record_refusal(error, "serve")

    def deliver_due(self) -> int:
        """Send the results that are due; return how many targets took them."""
        sent = 0
        for name, group in itertools.groupby(self.journal.due_deliveries(self.store.now()), key=lambda d: d.target):
            waiting = {self.store.result(d.name): d for d in group}
            target = self.settings.target(name)
            if target is None:
                outcomes: Iterator[Outcome] = iter(
                    [(f, CannotRead("the configuration has no such target")) for f in waiting]
                )
            else:
                outcomes = self._send(target, list(waiting), self.settings)
            try:
                for file, error in outcomes:
                    sent += self._delivered(waiting.pop(file), error)
                    if self._stopping.is_set():
                        return sent
            except Exception as error:  # noqa: BLE001  one damaged result must not end the node
                for delivery in waiting.values():
                    self._delivered(delivery, error)
        return sent

    def _delivered(self, delivery: Delivery, error: Exception | None) -> bool:
        now = self.store.now()
        told = {"result": self.journal.hashed(delivery.uid), "target": delivery.target}
        target = self.settings.target(delivery.target)
        self._record(
            audit.sent(
                [self.journal.study_of(delivery)], delivery.target, target.host if target else "", 1,
                self.settings.aet, audit.SUCCESS if error is None else audit.SERIOUS,
            )
        )  # fmt: skip
        if error is None:
            self.journal.sent(delivery, now)
            self._tell("sent", **told)
            return True
        counts = not isinstance(error, EdgemedError) or isinstance(error, InvalidInput)
        given_up = counts and delivery.attempts + 1 >= self.settings.max_attempts
        due = None if given_up else now + self._delay(delivery.attempts + 1)
        why = self._words(error)
        self.journal.not_sent(delivery, why, now, due)
        self._tell("not sent", **told, error=why, again=due is not None)
        return False

    def _delay(self, attempts: int) -> float:
        """Return the seconds until the next attempt: doubled each time, up to the cap."""
        return min(self.settings.retry_seconds * 2.0 ** min(attempts - 1, 60), self.settings.retry_cap_seconds)

    def _words(self, error: BaseException) -> str:
        """Return an error for the log: its class, and edgemed's own words with hashed UIDs. Others may quote a file."""
        if not isinstance(error, EdgemedError):
            return type(error).__name__
        text = _UIDS.sub(lambda m: f"#{self.journal.hashed(m[0])}", " ".join(str(error).split()))
        return f"{type(error).__name__}: {text.replace(str(self.store.folder), '')}"

    # --- threads ---

    def _work(self, worker: Process) -> int:
        return self.close_quiet_studies() + self.run_job(worker)

    def _carry(self) -> int:
        audit.drain()
        return self.deliver_due() + self.upkeep()

    def _record(self, event: audit.Event) -> None:
        """Record what has happened; that it cannot be recorded is told, for it cannot be undone."""
        try:
            audit.record(event)
        except EdgemedError as error:
            self._tell("trouble", error=self._words(error))

    def upkeep(self) -> int:
        """Do what is to be done now and then; return how much that was."""
        return 0

    def _loop(self, wake: threading.Event, step: Callable[[], int]) -> None:
        while not self._stopping.is_set():
            wake.clear()
            try:
                done = step()
            except Exception as error:  # noqa: BLE001  a full disk, say: told, and tried again
                self._tell("trouble", error=self._words(error))
                done = 0
            if not done and not self._stopping.is_set():
                wake.wait(POLL_SECONDS)
