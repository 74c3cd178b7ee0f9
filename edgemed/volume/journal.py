"""Answers by slice on disk, so that memory stays flat and a run that was left goes on where it was."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from edgemed.core import Prompt
from edgemed.errors import CannotWrite, InvalidInput
from edgemed.report.rle import to_rle
from edgemed.volume.records import Record

JOURNAL_SCHEMA = "edgemed.slices/1"


def question_key(prompt: Prompt, options: object, more: Mapping[str, Any]) -> str:
    """Return what tells one question from another: a digest of the prompt, the options (a dataclass) and `more`."""
    regions = [
        {"kind": r.kind, "box": r.box, "point": r.point, "mask": None if r.mask is None else to_rle(r.mask)}
        for r in prompt.regions
    ]
    asked = {"text": prompt.text, "language": prompt.language, "regions": regions, "settings": dict(prompt.settings)}
    whole = {**asked, "frame": prompt.frame, "options": asdict(options), **more}  # type: ignore[call-overload]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


class Journal:
    """Answers by slice in a file of JSON lines, each flushed; use it as a context manager.

    path: None for a file that is gone at the end. key: of the question; a file with another is begun anew. A last line
    that was not finished is cut off.

    Raises CannotWrite if the system refuses, or InvalidInput if the file is no journal: it is then left as it is.
    """

    def __init__(self, path: Path | None = None, key: str = "") -> None:
        self._places: dict[int, tuple[int, str]] = {}
        self._path = path
        try:
            self._file: IO[bytes] = (
                tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
                if path is None
                else open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
            )
        except OSError as error:
            raise CannotWrite(f"cannot write {path}: {error.strerror or 'refused'}") from error
        self._load(json.dumps({"schema": JOURNAL_SCHEMA, "key": key}).encode() + b"\n")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _load(self, head: bytes) -> None:
        first = self._file.readline()
        if first and JOURNAL_SCHEMA.encode() not in first:
            self._file.close()
            raise InvalidInput(f"{self._path} is no journal of slices; remove it, or pass another folder to -o")
        end = 0
        if first == head:
            end = len(first)
            for line in self._file:
                if not line.endswith(b"\n"):
                    break
                told = json.loads(line)
                self._places[told["slice"]] = (end, told["sha256"])
                end += len(line)
        self._file.truncate(end)
        if not end:
            self._put(head)

    def _put(self, line: bytes) -> int:
        try:
            at = self._file.seek(0, 2)
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise CannotWrite(f"cannot write {self._path}: {error.strerror or 'refused'}") from error
        return at

    def holds(self, index: int, digest: str) -> bool:
        """Return whether there is an answer about this slice with this content."""
        return self._places.get(index, (0, None))[1] == digest

    def put(self, index: int, digest: str, record: Record) -> None:
        """Write the answer of a slice; a later one replaces an earlier one."""
        line = {"slice": index, "sha256": digest, "answer": record}
        at = self._put(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        self._places[index] = (at, digest)

    def get(self, index: int) -> Record:
        """Return the answer of a slice."""
        self._file.seek(self._places[index][0])
        record: Record = json.loads(self._file.readline())["answer"]
        return record
