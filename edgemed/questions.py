"""Files of questions, as MedRegA's and MedPLIB's authors write them: rows in, checked questions out.

A row is a JSON object {image, conversations: [{from: human|gpt, value}]}. Rows are JSON Lines (MedRegA's files, which
add `id`, `width` and `height`) or one JSON list (MedPLIB's, which add `answer_type` and `icl_examples`). `image` is one
path or a list of paths; a row without it is about no picture. Every human turn is a question, with the turns before it
as its history.

Covers reading a row at a time and the form of rows. Does not cover what texts and paths mean (`edgemed.batch`).
Source: github xmed-lab/MedRegA at dfdb0db, github ShawnHuang497/MedPLIB at 5ab54bc.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from edgemed.errors import CannotRead, EdgemedError, InvalidInput, NoInput

MAX_ROW = 16 << 20
"""Characters of a row; the longest published ones have some thousand."""

_CHUNK = 1 << 16
_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `count`: every count-th row. Raises EdgemedError (usage) if there is no such part."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise EdgemedError(f"the shard is {self.number}/{self.count}; I/N with I from 1 to N was expected")

    def has(self, index: int) -> bool:
        """Tell whether the row with this index (from 0) is in this part."""
        return index % self.count == self.number - 1


@dataclass(frozen=True)
class Question:
    """One human turn of a row, texts as they are in the file.

    index: of the row, from 0. id: the row's own, else its index. turn: of the human, from 0. truth: the row's answer.
    images: paths below the folder of images. examples: (image, mask) paths. earlier: (question, answer or None) of the
    turns before. size: (height, width) as the row says. problem: why the row cannot be asked about.
    """

    index: int
    id: int | str
    turn: int = 0
    text: str = ""
    truth: str | None = None
    images: tuple[str, ...] = ()
    examples: tuple[tuple[str, str], ...] = ()
    earlier: tuple[tuple[str, str | None], ...] = ()
    size: tuple[int, int] | None = None
    answer_type: str | None = None
    problem: str = ""


def read_questions(path: str | Path, shard: Shard | None = None, limit: int | None = None) -> Iterator[Question]:
    """Yield the questions of a file in order; limit: of its first rows only, before the shard is taken.

    A row that is no question is yielded with its `problem`.

    Raises, when it gets there, CannotRead, InvalidInput if the file is not UTF-8 or holds something else than JSON
    objects, NoInput if it holds none.
    """
    shard = shard or Shard()
    index = -1
    for index, row in enumerate(read_rows(path)):
        if shard.has(index) and (limit is None or index < limit):
            yield from _questions(index, row)
    if index < 0:
        raise NoInput(f"{path} holds no rows; JSON objects with 'image' and 'conversations' were expected")


def _questions(index: int, row: Mapping[str, Any]) -> list[Question]:
    own = row.get("id")
    usable = (isinstance(own, int) and not isinstance(own, bool)) or (isinstance(own, str) and _is_unicode(own))
    head = Question(index, own if usable else index)  # type: ignore[arg-type]
    try:
        if not usable and own is not None:
            raise InvalidInput("'id' is no whole number and no text")
        return _turns(head, row)
    except InvalidInput as error:
        return [replace(head, problem=str(error))]


def _turns(head: Question, row: Mapping[str, Any]) -> list[Question]:
    image, parts, kind = row.get("image"), row.get("conversations"), row.get("answer_type")
    images = [image] if isinstance(image, str) else [] if image is None else image
    if not (isinstance(images, list) and all(isinstance(name, str) for name in images)):
        raise InvalidInput("'image' is no path and no list of paths")
    pairs: list[tuple[str, str | None]] = []
    for speaker, value in _conversation(parts):
        if speaker == "human":
            pairs.append((value, None))
        elif pairs and pairs[-1][1] is not None:
            raise InvalidInput("'conversations' has two turns of gpt in a row")
        elif pairs:  # an answer before the first question is passed over, as the authors do
            pairs[-1] = (pairs[-1][0], value)
    if not pairs:
        raise InvalidInput("'conversations' has no turn of human")
    examples = _examples(row.get("icl_examples") or [])
    texts = (kind, *images, *chain(*examples), *chain(*pairs))
    if not all(_is_unicode(text) for text in texts if isinstance(text, str)):
        raise InvalidInput("a text has half a surrogate pair; write it whole")
    size = (row.get("height"), row.get("width"))
    shared = replace(
        head,
        images=tuple(images),
        examples=examples,
        size=(int(size[0]), int(size[1])) if all(type(n) is int for n in size) else None,  # type: ignore[arg-type]
        answer_type=kind if isinstance(kind, str) else None,
    )
    return [
        replace(shared, turn=turn, text=text, truth=truth, earlier=tuple(pairs[:turn]))
        for turn, (text, truth) in enumerate(pairs)
    ]


def _conversation(parts: Any) -> Iterator[tuple[str, str]]:
    """Yield (speaker, text) of each turn. A value that is a number is text, as it is to the authors."""
    if not isinstance(parts, list):
        raise InvalidInput("'conversations' is no list; [{'from': 'human', 'value': ...}, ...] was expected")
    for part in parts:
        speaker, value = (part.get("from"), part.get("value")) if isinstance(part, dict) else (None, None)
        if speaker not in ("human", "gpt") or not isinstance(value, str | int | float):
            raise InvalidInput("'conversations' has a turn without 'from' human or gpt, or without 'value'")
        yield speaker, str(value)


def _examples(rows: Any) -> tuple[tuple[str, str], ...]:
    pairs = [(r.get("image"), r.get("mask")) for r in rows if isinstance(r, dict)] if isinstance(rows, list) else []
    texts = [(i, m) for i, m in pairs if isinstance(i, str) and isinstance(m, str)]
    if len(texts) != len(rows):
        raise InvalidInput("'icl_examples' is no list of {'image': path, 'mask': path}")
    return tuple(texts)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, one after another or in one list; no more than one is in memory.

    Raises CannotRead, InvalidInput naming the line of what is no JSON object.
    """
    try:
        with open(path, encoding="utf-8-sig") as stream:
            yield from _Objects(stream, path).read()
    except OSError as error:
        raise CannotRead(f"cannot read {path}: {error.strerror or 'refused'}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{path} is not UTF-8 text (byte {error.object[error.start]:#04x}); write it anew"
        ) from error


class _Objects:
    """The JSON objects of a text stream, through a buffer of the last row and the chunk behind it."""

    def __init__(self, stream: TextIO, path: str | Path) -> None:
        self._stream, self._path = stream, path
        self._text, self._at, self._lines = "", 0, 1

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the objects of a list, or those that follow each other."""
        listed = self._next() == "["
        self._at += listed
        while (found := self._next()) and not (listed and found == "]"):
            yield self._object()
            if listed and self._next() == ",":
                self._at += 1
                if self._next() == "]":
                    raise self._error("a row was expected after the comma")
            elif listed and self._next() != "]":
                raise self._error("a comma or the end of the list was expected")
        if listed:
            if not found:
                raise self._error("the list has no end; the file was cut")
            self._at += 1
            if self._next():
                raise self._error("there is something behind the end of the list")

    def _next(self) -> str:
        """Return the next character that is not blank, "" at the end of the file."""
        while True:
            blank = _BLANK.match(self._text, self._at)
            self._at = blank.end() if blank else self._at
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _more(self) -> bool:
        """Drop what was read and take twice as much as is left, a chunk at least; False at the end of the file."""
        self._lines += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :], 0
        if len(self._text) > MAX_ROW:
            raise self._error(f"the row is longer than {MAX_ROW} characters")
        added = self._stream.read(max(_CHUNK, len(self._text)))
        self._text += added
        return bool(added)

    def _object(self) -> dict[str, Any]:
        if self._text[self._at] != "{":
            raise self._error("a JSON object was expected")
        while True:
            try:
                value, self._at = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # What is cut shows at the end of the buffer, or as a text without an end; all else is no JSON.
                line = self._line(error.pos)
                cut = error.pos > len(self._text) - 16 or error.msg.startswith("Unterminated")
                if not (cut and self._more()):
                    raise self._error(error.msg, line) from error
                continue
            except (ValueError, RecursionError) as error:
                raise self._error("a number is too long, or the nesting too deep") from error
            assert isinstance(value, dict)
            return value

    def _line(self, position: int) -> int:
        """Return the number of the line that a place in the buffer is in."""
        return self._lines + self._text.count("\n", 0, position)

    def _error(self, what: str, line: int | None = None) -> InvalidInput:
        where = f"{self._path} line {self._line(self._at) if line is None else line}"
        return InvalidInput(f"{where}: {what}; JSON objects, one a line, or a list of them were expected")
