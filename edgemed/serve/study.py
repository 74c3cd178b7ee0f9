"""The real answer to a study: the series that a rule selects, asked slice by slice, results in the forms it names.

As `edgemed infer FOLDER` does it, one series after another; every series that the rule's selections fit is asked, each
once (without selections, the one that would be chosen by default). Results of a series are written before the next is
read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgemed.errors import NoInput
from edgemed.serve.settings import Rule
from edgemed.serve.work import Stopped

if TYPE_CHECKING:
    from edgemed.core import Answer, Language, Prompt, Scan
    from edgemed.dicom import Reader
    from edgemed.dicom.series import Series
    from edgemed.infer import InferOptions, Session


class StudyProcess:
    """Answers studies; keeps the sessions of its bundles open. See `edgemed.serve.work.Process`.

    device: for rules that name none. threads: of the CPU; None: one for each core.
    """

    def __init__(self, device: str = "auto", threads: int | None = None) -> None:
        self._device, self._threads = device, threads
        self._sessions: dict[tuple[str, str], Session] = {}

    def __call__(self, rule: Rule, study: Path, out: Path, stopping: Callable[[], bool]) -> Sequence[Path]:
        from edgemed.dicom import Reader
        from edgemed.dicom.select import keywords_of, parse_rules
        from edgemed.dicom.series import find_series, open_source
        from edgemed.infer import InferOptions

        selections = parse_rules({"selections": [dict(rule.select)]}) if rule.select else ()
        with open_source(study) as source:
            found = find_series(source.paths, keywords=keywords_of(selections))
        chosen = list(_fitting(found.series, selections))
        if not chosen:
            raise NoInput(f"none of {len(found.series)} series fits rule {rule.name}")
        session = self._session(rule)
        written: list[Path] = []
        with Reader() as reader:
            for number, series in enumerate(chosen, 1):
                folder = out / str(number)
                files = self._series(series, rule, reader, session, folder, InferOptions(), stopping)
                written += [file.rename(out / f"{number}-{file.name}") for file in files]
        return written

    def _session(self, rule: Rule) -> Session:
        from edgemed.infer import open_session

        device = self._device if rule.device == "auto" else rule.device
        key = (rule.bundle, device)
        if key not in self._sessions:
            self._sessions[key] = open_session(bundle=rule.bundle, device=device, threads=self._threads)
        return self._sessions[key]

    def _series(
        self,
        series: Series,
        rule: Rule,
        reader: Reader,
        session: Session,
        folder: Path,
        options: InferOptions,
        stopping: Callable[[], bool],
    ) -> tuple[Path, ...]:
        """Ask the slices of a series and return the results, written into `folder`."""
        from edgemed.core import Prompt
        from edgemed.dicom.slices import DicomSlices
        from edgemed.report.packed import packed
        from edgemed.report.results import Analysed, ResultOptions, write_results
        from edgemed.volume import Journal, SliceRun, to_answer

        language = _language(rule)
        prompt = Prompt(rule.prompt, (), language)

        def ask(scan: Scan, asked: Prompt) -> Answer:
            if stopping():
                raise Stopped
            return session.ask((scan,), asked, options)

        def read(path: Path, frame: int) -> Scan:
            return reader.read(str(path), frame=frame, window=rule.window)

        slices = DicomSlices(series, reader, rule.window)
        with Journal() as journal, SliceRun(slices, ask, prompt, journal) as run:
            run.ask_slices(rule.slices)
            answers = ((index, packed(to_answer(record))) for index, record in run.answers())
            analysed = [Analysed(Path(slices.file(k)), slices.frame(k), answer) for k, answer in answers]
        told = ResultOptions(prompt=prompt, notice=session.notice(language), read=read)
        return write_results(analysed, folder, rule.kinds, language=language, options=told)

    def close(self) -> None:
        """Close the sessions."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()


def _language(rule: Rule) -> Language:
    from edgemed.language import answer_language

    return "zh" if rule.language == "zh" else "en" if rule.language == "en" else answer_language(rule.prompt)


def _fitting(found: Sequence[Series], selections: Sequence[object]) -> Iterator[Series]:
    """Yield the series that the selections fit, original pictures only; without selections the default choice."""
    from edgemed.dicom.select import Selection, choose

    if not selections:
        yield choose(found)[0]
        return
    for series in found:
        if series.is_original and any(isinstance(s, Selection) and s.fits(series) for s in selections):
            yield series
