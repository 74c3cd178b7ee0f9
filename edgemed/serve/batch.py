"""Many studies answered in one go, on a journal of the node's kind: those of a folder, or what an archive finds.

    with Store(settings, results=out) as store:
        batch = Batch(store, open_workers(settings))
        batch.run(studies_in(folder))

Each study is one job. Killed at any moment, the same call goes on where it was: what is done stays done, what was
running is run again, and its results, which have the same UIDs and names, replace themselves. A study whose files have
changed is answered anew; one that failed is tried again.

Files of a folder are not copied, those of a query are fetched study by study and removed when they are done with.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgemed.errors import EdgemedError, InvalidInput
from edgemed.files import sha256_of
from edgemed.serve.journal import Instance
from edgemed.serve.settings import NodeSettings, Rule
from edgemed.serve.store import Store, is_uid
from edgemed.serve.work import POLL_SECONDS, Process, Work

if TYPE_CHECKING:
    from edgemed.serve.pull import Query

JOURNAL = ".edgemed"
"""The folder of the journal, in the folder of the results."""
FETCHED = "fetched"
"""The folder, beside the journal, of studies of a query."""
AHEAD = 2
"""Studies for each worker that are made ready, or fetched, before it can take them."""


@dataclass(frozen=True)
class Study:
    """A study to be answered: its UID, and what gives its instances (UID, file) for as long as it takes.

    final: where it is done, its instances are not looked at again.
    """

    uid: str
    instances: Callable[[], AbstractContextManager[Sequence[tuple[str, Path]]]]
    final: bool = False


@dataclass
class Counts:
    """What became of the studies, and of the results: those that there are, those that no target took."""

    studies: int = 0
    done: int = 0
    done_before: int = 0
    failed: int = 0
    results: int = 0
    unsent: int = 0


def batch_rule(rule: Rule, bundle_digest: str, *more: object) -> Rule:
    """Return the rule under a name that tells this question to this bundle from others; targets do not count."""
    asked = {**asdict(rule), "name": "", "targets": (), "device": "", "bundle": bundle_digest, "more": more}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    return replace(rule, name=f"batch-{digest}")


class Batch:
    """Answers studies with the one rule of the store's settings.

    tell: gets each study's UID and why it failed, None for one that is done; "" for the UID where it is about no study.

    Raises InvalidInput if the folder holds the answers to another question.
    """

    def __init__(
        self,
        store: Store,
        workers: Sequence[Process],
        tell: Callable[[str, str | None], None] = lambda uid, error: None,
    ) -> None:
        self._store, self._journal, self._told = store, store.journal, tell
        (self._rule,) = store.settings.rules
        if store.journal.rules() - {self._rule.name}:
            raise InvalidInput(f"{store.results} has the results of another question or bundle; pass another folder")
        self._room = AHEAD * len(workers)
        self._work = Work(store, *workers, tell=self._heard)
        self._open: dict[str, ExitStack] = {}
        self._news = threading.Event()
        self.counts = Counts()

    def _heard(self, what: str, **facts: object) -> None:
        if what == "trouble":
            self._told("", str(facts["error"]))
        self._news.set()

    def run(self, studies: Iterable[Study]) -> Counts:
        """Answer the studies and send the results; return the counts.

        Raises what giving the studies raises, CannotWrite, InvalidInput; what was begun is handed back then.
        """
        self._store.recover()
        shutil.rmtree(self._store.folder / FETCHED, ignore_errors=True)
        self._journal.park()
        self._journal.deliver_again(self._rule.targets, self._store.now())
        self._work.start_work()
        try:
            for study in studies:
                self._begin(study)
                while len(self._open) >= self._room:
                    self._wait()
            while self._open:
                self._wait()
            while self._journal.has_hope(self._store.settings.max_attempts):
                self._news.clear()
                self._news.wait(POLL_SECONDS)
        finally:
            self._work.stop_work()
            for source in self._open.values():
                source.close()
        told = self._journal.counts()
        self.counts.unsent = told["deliveries"]["pending"] + told["deliveries"]["failed"]
        self.counts.results = told["results"]["stored"]
        return self.counts

    def _begin(self, study: Study) -> None:
        """Put a study in the journal; it stays open until its job has ended."""
        self.counts.studies += 1
        before = self._journal.ended(study.uid, self._rule.name)
        if before == "" and study.final:
            self.counts.done_before += 1
            return
        source = ExitStack()
        try:
            found = source.enter_context(study.instances())
            items = [self._instance(study.uid, uid, file) for uid, file in found]
        except EdgemedError as error:
            source.close()
            self.counts.failed += 1
            self._told(study.uid, str(error))
            return
        self._open[study.uid] = source
        self._journal.put_study(study.uid, items, [self._rule.name], self._store.now())
        self._work.wake()
        if before == "" and self._journal.ended(study.uid, self._rule.name) == "":
            self._open.pop(study.uid).close()
            self.counts.done_before += 1

    def _instance(self, study: str, uid: str, file: Path) -> Instance:
        known = self._journal.instance(uid)
        if known is not None and known.study != study:
            uid = derived_uid(study, uid)  # one instance in two studies is two instances here
        return Instance(uid, study, str(file), sha256_of(file), file.stat().st_size)

    def _wait(self) -> None:
        """Close the studies whose jobs have ended; wait a little if there is none."""
        self._news.clear()
        ended = {study: self._journal.ended(study, self._rule.name) for study in self._open}
        for study, error in ended.items():
            if error is not None:
                self._open.pop(study).close()
                self.counts.failed += bool(error)
                self.counts.done += not error
                self._told(study, error or None)
        if not any(error is not None for error in ended.values()):
            self._news.wait(POLL_SECONDS)


def derived_uid(*what: str) -> str:
    """Return the UID 2.25.N that these texts always give."""
    return f"2.25.{int(hashlib.sha256(chr(0).join(what).encode()).hexdigest()[:30], 16)}"


# --- where studies come from ------------------------------------------------------------------------------------------


def studies_in(
    paths: Sequence[str], progress: Callable[[int], None] | None = None
) -> tuple[list[Study], tuple[tuple[str, EdgemedError], ...]]:
    """Return (the studies of these files, the files that could not be read with their errors).

    Raises NoInput if no file is an image.
    """
    from edgemed.dicom.series import find_series

    found = find_series(paths, progress=progress)
    files: dict[str, dict[str, str]] = {}
    for series in found.series:
        study = series.study_uid or ""
        uid = study if is_uid(study) else derived_uid("study", series.name, series.slices[0].path)
        for item in series.slices:
            instance = item.sop_instance_uid or ""
            files.setdefault(uid, {})[item.path] = instance if is_uid(instance) else derived_uid(item.path)
    return [Study(uid, _those(names)) for uid, names in files.items()], found.failed


def _those(names: dict[str, str]) -> Callable[[], AbstractContextManager[Sequence[tuple[str, Path]]]]:
    @contextmanager
    def give() -> Iterator[Sequence[tuple[str, Path]]]:
        uids: dict[str, Path] = {}
        for path, uid in names.items():
            uids.setdefault(uid, Path(path).absolute())
        yield list(uids.items())

    return give


def studies_of(query: Query, uids: Iterable[str], settings: NodeSettings) -> Iterator[Study]:
    """Yield the studies with these UIDs; each is fetched when it is its turn and removed when it is done with."""
    from edgemed.serve.pull import fetch

    for uid in uids:

        @contextmanager
        def give(uid: str = uid) -> Iterator[Sequence[tuple[str, Path]]]:
            folder = settings.folder / FETCHED / derived_uid(uid)
            try:
                files = fetch(query.source, settings, uid, folder, query.series)
                yield [(file.stem, file) for file in files]
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        yield Study(uid, give, final=True)
