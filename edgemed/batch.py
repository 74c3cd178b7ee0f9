"""Files of questions answered: one line of an answers file for each question, in the order of the file.

    with AnswerFile(output, Lines("edgemed", folder), resume=True) as answers:
        for question in answers.left(read_questions(path)):
            answers.write(asker.ask(question))

`<region>mask.png</region>` in a question is a region of the picture; paths start at one folder and stay below it.

Covers asking, the own answer lines (schema edgemed.batch/1, batch.schema.json in `edgemed.report`), the authors' three
kinds of answer files, and going on with a file that was left. Nothing is kept from row to row but the last pictures.
Does not cover reading rows (`edgemed.questions`) or scores.

Source: github xmed-lab/MedRegA at dfdb0db, github ShawnHuang497/MedPLIB at 5ab54bc.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from pathlib import Path, PureWindowsPath
from types import TracebackType
from typing import Any, BinaryIO

from edgemed.core import Answer, Example, Language, Prompt, PromptRegion, Scan, Turn
from edgemed.errors import BackendUnavailable, BundleError, CannotWrite, EdgemedError, InvalidInput, OutOfMemory
from edgemed.families import check_settings
from edgemed.infer import InferOptions, Session
from edgemed.questions import Question
from edgemed.report import to_json

SCHEMA = "edgemed.batch/1"

_REGION = re.compile(r"<region>([^<]*)</region>")
_MASK = re.compile(r"<mask>[^<]*</mask>")
_IMAGE = "<image>"


# --- asking -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a question: the answer with the scans and the prompt that it is about, or the error."""

    question: Question
    scans: tuple[Scan, ...] = ()
    prompt: Prompt | None = None
    answer: Answer | None = None
    error: EdgemedError | None = None


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a file's questions are asked.

    language: of the answer to a text. frame: of every picture. own_history: earlier answers are the model's own, not
    the row's. examples: whether the rows' are shown.
    """

    language: Callable[[str], Language]
    settings: Mapping[str, str]
    options: InferOptions
    frame: int = 0
    own_history: bool = False
    examples: bool = True


class Asker:
    """Asks a session the questions of a file, in order.

    folder: where the paths of the rows start; none leads out of it by its name (links in it are its owner's and are
    followed). read: path -> scan. read_mask: path, scan -> the region of its pixels that are not black.

    Raises InvalidInput if the family lacks one of the settings.
    """

    def __init__(
        self,
        session: Session,
        folder: Path,
        manner: Manner,
        read: Callable[[str], Scan],
        read_mask: Callable[[str, Scan], PromptRegion],
    ) -> None:
        check_settings(Prompt("?", settings=manner.settings), session.family.settings(), session.bundle.manifest.family)
        self._session, self._folder, self._manner = session, folder, manner
        self._read, self._read_mask = read, read_mask
        self._images: tuple[str, ...] = ()
        self._scans: tuple[Scan, ...] = ()
        self._told: list[Turn | None] = []

    def ask(self, question: Question) -> Outcome:
        """Return the answer or the error.

        Raises what every further question would end in, too: BundleError, BackendUnavailable.
        """
        if question.turn == 0:
            self._told = []
        try:
            outcome = self._ask(question)
        except (BundleError, BackendUnavailable):
            raise
        except EdgemedError as error:
            outcome = Outcome(question, error=error)
        except MemoryError:
            outcome = Outcome(question, error=OutOfMemory("out of memory; use smaller images or a larger machine"))
        answer, prompt = outcome.answer, outcome.prompt
        self._told.append(Turn(prompt.text, answer.text, answer.tagged_text) if answer and prompt else None)
        return outcome

    def _ask(self, question: Question) -> Outcome:
        if question.problem:
            raise InvalidInput(question.problem)
        scans = self._pictures(question.images)
        masks = _REGION.findall(question.text)
        if masks and not scans:
            raise InvalidInput("a region is asked about without an image; an image was expected")
        text = _emptied(question.text)
        if not text.strip():
            raise InvalidInput("the question is empty; words were expected")
        manner = self._manner
        prompt = Prompt(
            text,
            tuple(self._read_mask(self._path(name), scans[0]) for name in masks),
            manner.language(text),
            manner.frame,
            self._history(question),
            manner.settings,
            tuple(map(self._example, question.examples)) if manner.examples else (),
        )
        return Outcome(question, scans, prompt, self._session.ask(scans, prompt, manner.options))

    def _pictures(self, names: tuple[str, ...]) -> tuple[Scan, ...]:
        """Return the scans of these paths; those of the question before are not read again."""
        if names != self._images:
            self._images, self._scans = (), ()
            scans = tuple(self._read(self._path(name)) for name in names)
            self._images, self._scans = names, scans
        return self._scans

    def _example(self, paths: tuple[str, str]) -> Example:
        scan = self._read(self._path(paths[0]))
        mask = self._read_mask(self._path(paths[1]), scan).mask
        assert mask is not None
        return Example(scan, mask, scan.first_frame)

    def _path(self, name: str) -> str:
        """Return a path of a row below the folder. Raises InvalidInput if it is none of a file inside."""
        path = PureWindowsPath(name)  # knows both separators, and drives
        if path.anchor or ".." in path.parts or not name.strip() or "\0" in name:
            raise InvalidInput(f"path {name!r} is not relative to the folder of images, or leads out of it")
        return os.path.join(self._folder, name)

    def _history(self, question: Question) -> tuple[Turn, ...]:
        if any(_REGION.search(text) for text, _ in question.earlier):
            raise InvalidInput(
                "an earlier turn asks about a region, which cannot be repeated; ask it in a row of its own"
            )
        turns: list[Turn] = []
        for number, (text, truth) in enumerate(question.earlier):
            given = None if truth is None else Turn(text, truth, truth)
            turn = self._told[number] if self._manner.own_history else given
            if turn is None:
                why = "failed" if self._manner.own_history else "has no answer in the row"
                raise InvalidInput(f"turn {number}, which this one goes on from, {why}")
            turns.append(turn)
        return tuple(turns)


def _emptied(question: str) -> str:
    """Return a question with nothing between its region tags."""
    return _REGION.sub("<region></region>", question)


# --- answer lines -----------------------------------------------------------------------------------------------------

FORMATS = ("edgemed", "medrega", "medrega-t2r", "medplib-vqa")


@dataclass(frozen=True)
class Lines:
    """What a line of the answers file holds.

    format: edgemed: schema edgemed.batch/1; medrega, medrega-t2r, medplib-vqa: what the authors' evaluators read, the
    first two in one JSON list. folder: of the images, which MedPLIB's paths hold. answer_type: of rows without one.

    A question that failed has a line with an empty answer and an `error` in every format, so that it counts as wrong.
    """

    format: str
    folder: Path
    answer_type: str = "closed"

    @property
    def listed(self) -> bool:
        """Whether the lines are a JSON list."""
        return self.format in ("medrega", "medrega-t2r")

    @property
    def first_key(self) -> str:
        """What every line begins with."""
        return {"edgemed": "schema", "medrega": "question", "medrega-t2r": "hw", "medplib-vqa": "question_id"}[
            self.format
        ]

    def known(self, question: Question) -> dict[str, Any]:
        """Return the part of a line that is told by the question alone."""
        truth = question.truth or ""
        if self.format == "medrega":
            return {"question": question.text, "question_id": question.id, "gt_answer": truth}
        if self.format == "medrega-t2r":
            return {"gt": truth}
        if self.format == "medplib-vqa":
            return {
                "question_id": question.index,
                "image_path": os.path.join(self.folder, question.images[0]) if question.images else "",
                "prompt": _emptied(question.text).replace(_IMAGE, "").strip(),
                "gt": _MASK.sub("", truth),
                "answer_type": question.answer_type or self.answer_type,
            }
        line: dict[str, Any] = {"schema": SCHEMA, "id": question.id, "index": question.index, "turn": question.turn}
        line |= {"images": list(question.images), "question": question.text}
        return line if question.truth is None else {**line, "gt": question.truth}

    def line(self, outcome: Outcome) -> dict[str, Any]:
        """Return the line of an outcome, keys in the order of the format."""
        q, answer, known = outcome.question, outcome.answer, self.known(outcome.question)
        text = answer.text if answer else ""
        error = {} if outcome.error is None else {"error": _error(outcome.error)}
        if self.format == "medrega":
            asked, truth = _part(known, "question", "question_id"), _part(known, "gt_answer")
            return {**asked, "pred_answer": text, **truth, **error}
        if self.format == "medrega-t2r":
            size = [outcome.scans[0].rows, outcome.scans[0].columns] if outcome.scans else q.size and list(q.size)
            return {"hw": size, "answer": text, **known, **error}
        if self.format == "medplib-vqa":
            return {
                **_part(known, "question_id", "image_path", "prompt", "gt"),
                "text": answer.tagged_text if answer else "",  # the published code shows <SEG>
                "answer_id": f"{q.index}-{q.turn}",
                "model_id": answer.provenance.bundle if answer else "",
                "answer_type": known["answer_type"],
                "metadata": {},
                **error,
            }
        return {**known, **(_told(outcome) if answer else {}), **error}


def _part(line: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: line[key] for key in keys if key in line}


def _told(outcome: Outcome) -> dict[str, Any]:
    """Return what edgemed.answer/1 says, under the names of edgemed.batch/1; no times, so that runs can be compared."""
    assert outcome.answer is not None
    assert outcome.prompt is not None
    scan = outcome.scans[0] if outcome.scans else None
    whole = to_json(outcome.answer, scan, outcome.prompt, path="")
    provenance = {key: value for key, value in whole["provenance"].items() if key != "timings_ms"}
    told = _part(whole, "tagged_text", "regions", "labels", "findings", "notes")
    return {"language": outcome.prompt.language, "answer": whole["text"], **told, "provenance": provenance}


def _error(error: EdgemedError) -> dict[str, Any]:
    return {"name": type(error).__name__, "code": error.exit_code, "message": " ".join(str(error).split())}


def read_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a line of format edgemed, with the schema of answers that it uses."""
    folder = resources.files("edgemed.report")
    texts = (folder.joinpath(name).read_text("utf-8") for name in ("batch.schema.json", "answer.schema.json"))
    schema, answer = map(json.loads, texts)
    return {**schema, "$defs": {**schema["$defs"], "answer": answer}}


# --- the answers file -------------------------------------------------------------------------------------------------


class AnswerFile:
    """A file that takes answer lines one by one, each flushed; use it as a context manager.

    resume: a file that is there is gone on with, else it must be empty. answered, failed: lines in the file, and how
    many of them have an error.

    Raises CannotWrite if the file has answers and `resume` is off, or the system refuses.
    """

    def __init__(self, path: str | Path, lines: Lines, *, resume: bool = False) -> None:
        self._path, self._lines = path, lines
        self._begin, self._between, self._after, self._end = (
            (b"[\n", b",\n", b"", b"\n]\n") if lines.listed else (b"", b"", b"\n", b"")
        )
        self.answered = self.failed = 0
        self._ready = False  # where the next line goes is known
        try:
            self._stream: BinaryIO = open(path, "r+b" if os.path.exists(path) else "w+b")  # noqa: SIM115 (closed below)
            if not resume and self._stream.read(1):
                self._stream.close()
                raise CannotWrite(f"{path} is there and not empty; pass --resume to go on with it, or another name")
        except OSError as error:
            raise CannotWrite(f"cannot write {path}: {error.strerror or 'refused'}") from error

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; a list gets its end, also after an error."""
        with self._stream:
            if self._end and self._ready and (self.answered or error is None):
                self._put(self._end if self.answered else b"[]\n")

    def left(self, questions: Iterator[Question]) -> Iterator[Question]:
        """Return the questions that the file has no line for, after cutting off a last line that was not finished.

        A row of several turns that was left half-way is asked anew.

        Raises InvalidInput if the file holds the answers to other questions; it is then left as it is.
        """
        self._stream.seek(0)
        row: list[Question] = []
        row_start = (0, 0, 0)  # offset, answered, failed
        offset = end = 0
        torn = False
        for raw in self._stream:
            start, offset = offset, offset + len(raw)
            line = self._read_line(raw)
            torn = line == {}
            if not line:
                continue
            question = next(questions, None)
            if question is None or any(line.get(k) != v for k, v in self._lines.known(question).items()):
                raise self._other_file()
            if question.turn == 0:
                row, row_start = [], (end, self.answered, self.failed)
            row.append(question)
            end = start + len(raw.rstrip(b"\n").removesuffix(b","))
            self.answered += 1
            self.failed += "error" in line
        following = next(questions, None)
        if torn and following is None:
            raise self._other_file()
        again = row if following is not None and following.turn else []
        if again:
            end, self.answered, self.failed = row_start
        try:
            self._stream.seek(end)
            self._stream.truncate()
        except OSError as error:
            raise CannotWrite(f"cannot write {self._path}: {error.strerror or 'refused'}") from error
        if self.answered:
            self._put(self._after)
        self._ready = True
        return chain(again, [] if following is None else [following], questions)

    def _read_line(self, raw: bytes) -> dict[str, Any] | None:
        """Return the line, None for what frames a list, {} for one that was not finished; raises InvalidInput else."""
        body = raw.strip()
        if self._lines.listed and body in (b"[", b"]", b"[]", b""):
            return None
        try:
            line = json.loads(body.removesuffix(b",").decode() if self._lines.listed else body.decode())
            if isinstance(line, dict) and line:
                return line
        except (ValueError, RecursionError):
            head = f'{{"{self._lines.first_key}":'.encode()
            if not raw.endswith(b"\n") and (body.startswith(head) or head.startswith(body)):
                return {}
        raise self._other_file()

    def _other_file(self) -> InvalidInput:
        return InvalidInput(
            f"line {self.answered + 1} of the answers in {self._path} belongs to other questions; pass the same "
            "file, format, shard and limit as before, or another -o"
        )

    def write(self, outcome: Outcome) -> None:
        """Append the line of an outcome. Raises CannotWrite."""
        line = json.dumps(self._lines.line(outcome), ensure_ascii=False, separators=(",", ":")).encode()
        self._put((self._between if self.answered else self._begin) + line + self._after)
        self.answered += 1
        self.failed += outcome.error is not None

    def _put(self, data: bytes) -> None:
        try:
            self._stream.write(data)
            self._stream.flush()
        except OSError as error:
            raise CannotWrite(f"cannot write {self._path}: {error.strerror or 'refused'}") from error


def settings_for(lines: Lines, session: Session, settings: Mapping[str, str]) -> Mapping[str, str]:
    """Return the settings; the formats of MedRegA hold what its published code shows, unless another was chosen."""
    if lines.format.startswith("medrega") and "compat" in session.family.settings():
        return {"compat": "reference", **settings}
    return settings
