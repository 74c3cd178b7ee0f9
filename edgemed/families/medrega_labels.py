"""Label lists of classification: of public data sets, of a site's file, of a base prompt; answers mapped to them.

Covers which labels there are and which of them an answer means. Does not cover how a question lists them
(`medrega_prompts`) or scores over a data set.

Source: github xmed-lab/MedRegA at dfdb0db (classification evaluator); BLEU: Papineni et al., ACL 2002.
"""

from __future__ import annotations

import math
import re
import string
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from edgemed.errors import CannotRead, InvalidInput, NoInput, ResourceLimit

__all__ = ["LabelList", "classify", "label_lists", "labels_in", "read_labels", "read_text"]

MAX_LABEL_BYTES = 1 << 20

_COMMAS = re.compile("[,，、]")
_END_MARKS = string.punctuation + "。！？；：”’"
_WORD = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[^\s\u3400-\u4dbf\u4e00-\u9fff]+")
_QUOTES = "\"“'‘「"


@dataclass(frozen=True)
class LabelList:
    """The labels of a task, at least one, no two the same but for case. multi: an image may have several."""

    labels: tuple[str, ...]
    multi: bool

    def __post_init__(self) -> None:
        if not self.labels:
            raise InvalidInput("the label list is empty; at least one label was expected")
        seen: set[str] = set()
        for label in self.labels:
            if not label.strip() or "\n" in label:
                raise InvalidInput(f"label {label!r} is empty or has several lines; one line of text was expected")
            if label.casefold() in seen:
                raise InvalidInput(f"label {label!r} is listed twice; each was expected once")
            seen.add(label.casefold())


@cache
def label_lists() -> Mapping[str, LabelList]:
    """Return the label lists of public data sets by name.

    >>> label_lists()["octmnist"].labels
    ('choroidal neovascularization', 'diabetic macular edema', 'drusen', 'normal')
    >>> len(label_lists()["chexpert"].labels), label_lists()["chexpert"].multi
    (14, True)
    """
    data = tomllib.loads(files("edgemed.families").joinpath("medrega_labels.toml").read_text(encoding="utf-8"))
    return MappingProxyType({name: LabelList(tuple(one["labels"]), one["multi"]) for name, one in data.items()})


def read_text(path: str | Path, limit: int, what: str) -> str:
    """Return the text of a site's UTF-8 file of at most `limit` bytes; what: its kind, for errors.

    Raises CannotRead, ResourceLimit if it is larger, InvalidInput if it is not UTF-8.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise CannotRead(f"cannot read {what} {path}: {error.strerror or 'refused'}") from error
    if len(data) > limit:
        raise ResourceLimit(f"{what} {path} is larger than {limit >> 20} MiB; pass a {what} of at most that size")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{what} {path} is not UTF-8 (byte {error.start}); save it as UTF-8 text") from error


def read_labels(path: str | Path, *, multi: bool = False) -> LabelList:
    """Return the labels of a site's file: UTF-8, one a line; empty lines are skipped.

    Raises CannotRead, NoInput if there is no label, InvalidInput if one is there twice or the file is not UTF-8,
    ResourceLimit above 1 MiB.
    """
    text = read_text(path, MAX_LABEL_BYTES, "label file")
    labels = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not labels:
        raise NoInput(f"label file {path} has no labels; write one a line")
    try:
        return LabelList(labels, multi)
    except InvalidInput as error:
        raise InvalidInput(f"label file {path}: {error}") from error


def labels_in(base_prompt: str) -> tuple[str, ...]:
    """Return the labels a base prompt lists: the lines after the last one that ends in a colon; () if there are none.

    The list ends at an empty line, or at a remark: a line that starts with a quotation mark or ends with a full stop.

    >>> labels_in('Choose one. Labels:\\nPneumonia\\nNo Finding\\n"No Finding" means that nothing else applies.')
    ('Pneumonia', 'No Finding')
    >>> labels_in("The possible diagnoses are normal and abnormal.")
    ()
    """
    lines = [line.strip() for line in base_prompt.splitlines()]
    start = max((i for i, line in enumerate(lines) if line.endswith((":", "："))), default=len(lines))
    labels: list[str] = []
    for line in lines[start + 1 :]:
        if not line or line[0] in _QUOTES or line.endswith((".", "。")):
            break
        labels.append(line)
    return tuple(labels)


def classify(answer: str, labels: Sequence[str], multi: bool, *, reference: bool = False) -> tuple[str, ...]:
    """Return the labels that an answer names, in its order, each once.

    The answer is cut at commas (ASCII, full-width, Chinese enumeration); each piece means the label with the highest
    BLEU-1 against it, the first of equals, whatever the case. Unless `multi`, only the first piece counts. A Chinese
    character is a word. A piece that shares no word with any label means none. Words are compared, not read: "no edema"
    means Edema.

    reference: as the published evaluator does. It takes the first label for a piece that shares no word with any, so
    that every answer is scored as some class; and it cuts at ASCII commas and takes a run without a space as one word.

    Raises InvalidInput if there are no labels.
    Source: github xmed-lab/MedRegA at dfdb0db (BLEU as torchmetrics computes it, unsmoothed).

    >>> classify("pleural effusion, some edema.", ["No Finding", "Edema", "Pleural Effusion"], multi=True)
    ('Pleural Effusion', 'Edema')
    >>> classify("I cannot tell", ["benign", "malignant"], multi=False)
    ()
    >>> classify("I cannot tell", ["benign", "malignant"], multi=False, reference=True)
    ('benign',)
    """
    if not labels:
        raise InvalidInput("there are no labels to map an answer to; at least one was expected")
    answer = answer.lower()
    pieces = (
        answer.rstrip(string.punctuation).split(",") if reference else _COMMAS.split(answer.strip(_END_MARKS + " "))
    )
    words = [_words(label.lower(), reference) for label in labels]
    found: dict[str, None] = {}
    for piece in pieces if multi else pieces[:1]:
        said = _words(piece if reference else piece.rstrip(_END_MARKS + " "), reference)
        scores = [_bleu_1(said, label) for label in words]
        best = max(scores)
        if best > 0 or reference:
            found[labels[scores.index(best)]] = None
    return tuple(found)


def _words(text: str, reference: bool) -> list[str]:
    return text.split() if reference else _WORD.findall(text)


def _bleu_1(said: Sequence[str], label: Sequence[str]) -> float:
    """Return clipped word precision times the brevity penalty, 0..1; 0 if nothing was said."""
    common = (Counter(said) & Counter(label)).total()
    if not common:
        return 0.0
    return common / len(said) * min(1.0, math.exp(1 - len(label) / len(said)))
