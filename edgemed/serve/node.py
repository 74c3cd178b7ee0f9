"""The node on the network: it takes instances, answers studies that are complete, and sends the results on.

    with Store(settings) as store:
        node = Node(store, process)
        node.start()
        ...
        node.stop()

Covers who may connect, statuses, the two threads of work, stopping. `store` and `journal` hold what must not be lost;
`process` (the real one: `study.StudyProcess`) answers a study. Logs are JSON lines with hashed UIDs only.

Each step of the work is a method (`close_quiet_studies`, `run_job`, `deliver_due`) that returns what it did, so that
tests call it with a clock of their own; the threads call the same methods.

Source: DICOM PS3.4 annexes A (verification) and B (storage), PS3.8 9.3.4 (reasons of a rejection).
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgemed.errors import CannotRead, EdgemedError, InvalidInput, NoInput, ResourceLimit, UnsupportedDicom
from edgemed.serve.deliver import Outcome, deliver
from edgemed.serve.journal import Delivery, Job
from edgemed.serve.settings import NodeSettings, Rule, Target
from edgemed.serve.store import CANNOT_UNDERSTAND, SUCCESS, Refused, Store

if TYPE_CHECKING:
    from pynetdicom import evt

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


class Node:
    """The node of a store. tell: takes the lines of the log."""

    def __init__(
        self, store: Store, process: Process, *, send: Deliver = deliver, tell: Callable[..., None] = to_stderr
    ) -> None:
        self.store, self.settings, self.journal = store, store.settings, store.journal
        self._process, self._send, self._tell = process, send, tell
        self._stopping = threading.Event()
        self._wake = {"work": threading.Event(), "courier": threading.Event()}
        self._threads: list[threading.Thread] = []
        self._server: Any = None
        self._listening = False
        self._job: Job | None = None

    # --- the life of a node ---

    def start(self) -> None:
        """Recover the store, listen, and begin to work.

        Raises CannotRead if the port cannot be had or TLS files cannot be used, InvalidInput as `Store.recover`.
        """
        self._tell("recovered", **self.store.recover())
        self._listen()
        self._tell("listening", port=self.address[1], tls=self.settings.tls is not None)
        for name, work in (("work", self._work), ("courier", self._carry)):
            self._threads.append(threading.Thread(target=work, name=f"edgemed-{name}", daemon=True))
            self._threads[-1].start()

    @property
    def address(self) -> tuple[str, int]:
        """The address and port that the node listens on."""
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    def stop(self) -> None:
        """End the node: no new association, those there may end, the running job is finished or handed back."""
        self._stopping.set()
        for wake in self._wake.values():
            wake.set()
        if self._listening:
            self._listening = False
            self._server.shutdown()
            self._end_associations()
        for thread in self._threads:
            thread.join(self.settings.stop_seconds)
        job, self._job = self._job, None
        if job is not None:
            self.journal.hand_back(job, self.store.now())
            self._tell("handed back", job=job.id)
        self._tell("stopped")

    def _end_associations(self) -> None:
        from time import monotonic

        end = monotonic() + self.settings.stop_seconds
        for assoc in self._server.active_associations:
            assoc.join(max(end - monotonic(), 0))
        for assoc in self._server.active_associations:
            assoc.abort()

    def _listen(self) -> None:
        from pynetdicom import AE, _config, evt
        from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

        from edgemed.serve.association import Server, server_context
        from edgemed.serve.pull import storage_contexts

        _config.LOG_HANDLER_LEVEL = "none"  # its own log tells the elements of identifiers
        logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
        logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
        s = self.settings
        ae = AE(ae_title=s.aet)
        ae.require_called_aet = True
        ae.maximum_associations, ae.maximum_pdu_size = s.max_associations, s.max_pdu
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = s.network_seconds
        ae.supported_contexts = storage_contexts(s)
        ae.add_supported_context(Verification)
        tls = None if s.tls is None else server_context(s.tls.certificate, s.tls.key, s.tls.authorities)
        handlers: list[Any] = [
            (evt.EVT_REQUESTED, self._on_request),
            (evt.EVT_REJECTED, self._on_rejected),
            (evt.EVT_C_ECHO, lambda event: SUCCESS),
            (evt.EVT_C_STORE, self._on_store),
        ]
        try:
            self._server = ae.make_server(
                (s.bind, s.port),
                ssl_context=tls,
                evt_handlers=handlers,
                server_class=Server,
                seconds=s.network_seconds,
                open_spool=self.store.open_spool,
                allows=lambda host: any(sender.may_come_from(host) for sender in s.senders),
            )
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or "refused"
            raise CannotRead(f"cannot listen on {s.bind} port {s.port}: {reason}") from error
        ae._servers.append(self._server)  # as AE.start_server does; shutdown takes it out again
        self._listening = True
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="edgemed-listen", daemon=True).start()

    # --- events of the network ---

    def _on_request(self, event: evt.Event) -> None:
        """Reject who is not known, or comes from elsewhere, before anything else is looked at."""
        assoc = event.assoc
        aet = _title(event)
        sender = self.settings.sender(aet)
        if self._stopping.is_set():
            assoc.acse.send_reject(0x02, 0x03, 0x01)  # transient, provider (presentation), temporary congestion
        elif sender is None or not sender.may_come_from(str(assoc.requestor.address)):
            assoc.acse.send_reject(0x01, 0x01, 0x03)  # permanent, service user, calling AE title not recognised
        else:
            return
        self._tell("rejected", reason="stopping" if self._stopping.is_set() else "sender", sender=self._known(aet))
        assoc.is_rejected = True
        assoc.kill()

    def _on_rejected(self, event: evt.Event) -> None:
        aet = _title(event)
        self._tell("rejected", reason="called AE title, or too many associations", sender=self._known(aet))

    def _known(self, aet: str) -> str:
        """Return an AE title for the log: that of the configuration, a hash of anyone else's."""
        return aet if self.settings.sender(aet) is not None else f"#{self.journal.hashed(aet)}"

    def _on_store(self, event: evt.Event) -> int:
        """Return the status of an instance: success when it is on the disk and in the journal, not before."""
        from edgemed.serve.association import spool_of

        spool = spool_of(event)
        if spool is None:
            return CANNOT_UNDERSTAND
        sender = event.assoc.requestor.ae_title.strip()
        uid = self.journal.hashed(spool.head.uid)
        try:
            item = self.store.take(spool, sender)
        except Refused as error:
            self._tell("refused", instance=uid, status=f"0x{error.status:04X}", reason=str(error), sender=sender)
            return error.status
        self._tell("stored", instance=uid, study=self.journal.hashed(item.study), bytes=spool.bytes, sender=sender)
        return SUCCESS

    # --- the work ---

    def close_quiet_studies(self) -> int:
        """Queue a job for each rule about each study that is complete; return how many studies."""
        now = self.store.now()
        since = now - self.settings.quiet_seconds
        closed = 0
        for study, sender in self.journal.due_studies(since):
            rules = [r.name for r in self.settings.rules if not r.senders or sender in r.senders]
            if self.journal.close_study(study, rules, since, now):
                closed += 1
                self._tell("complete", study=self.journal.hashed(study), jobs=len(rules))
        return closed

    def run_job(self) -> bool:
        """Run the job that is due longest; False if there is none."""
        job = self.journal.claim(self.store.now())
        if job is None:
            return False
        self._job = job
        told: dict[str, Any] = {"job": job.id, "study": self.journal.hashed(job.study), "rule": job.rule}
        try:
            self._tell("started", **told, attempt=job.attempts)
            self._tell("answered", **told, results=self._answer(job))
        except Stopped:
            self.journal.hand_back(job, self.store.now())
            self._tell("handed back", **told)
        except EdgemedError as error:
            self._failed(job, error, told, for_good=isinstance(error, _FOR_GOOD))
        except MemoryError as error:
            self._failed(job, error, told)
        except Exception as error:  # noqa: BLE001  one study must not end the node
            self._failed(job, error, told)
        finally:
            self.store.close_job(job)
            self._job = None
        return True

    def _answer(self, job: Job) -> int:
        rule = self.settings.rule(job.rule)
        if rule is None:
            raise InvalidInput(f"the configuration has no rule {job.rule} any more")
        study, out = self.store.open_job(job)
        try:
            files = self._process(rule, study, out, self._stopping.is_set)
        except NoInput:
            files = ()
        results = self.store.keep_results(job, files)
        if self.journal.finish(job, results, rule.targets, self.store.now()):
            self._wake["courier"].set()
        return len(results)

    def _failed(self, job: Job, error: BaseException, told: dict[str, Any], *, for_good: bool = False) -> None:
        now = self.store.now()
        due = None if for_good or job.attempts >= self.settings.max_attempts else now + self._delay(job.attempts)
        why = self._words(error)
        self.journal.fail(job, why, now, due)
        self._tell("failed", **told, error=why, again=due is not None)

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

    def _work(self) -> None:
        self._loop("work", lambda: self.close_quiet_studies() + self.run_job())

    def _carry(self) -> None:
        self._loop("courier", lambda: self.deliver_due() + self.store.forget())

    def _loop(self, name: str, step: Callable[[], int]) -> None:
        wake = self._wake[name]
        while not self._stopping.is_set():
            wake.clear()
            try:
                done = step()
            except Exception as error:  # noqa: BLE001  a full disk, say: told, and tried again
                self._tell("trouble", thread=name, error=self._words(error))
                done = 0
            if not done and not self._stopping.is_set():
                wake.wait(POLL_SECONDS)


def _title(event: evt.Event) -> str:
    """Return the calling AE title of an association that is asked for."""
    request = event.assoc.requestor.primitive
    return "" if request is None else request.calling_ae_title.strip()
