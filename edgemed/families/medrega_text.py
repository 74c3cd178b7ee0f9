"""The text of MedRegA: prompt to ids, ids to tagged text, tagged or stripped text to places.

Covers the Hermes-2 template with MedRegA's own system message, image placeholders, the two prompt orders, history,
labelled images, tiles, training targets, boxes as text and the parsing of answers. Does not cover the tokenizer
(`published_tokens`), pixels (`medrega_view`), or what is asked in which words (`medrega_prompts`).

An answer names places as

    <ref>left kidney</ref><box>[[120, 300, 260, 480], [700, 310, 820, 500]]</box>

four integers 0..999 a box (left, top, right, bottom), several boxes in one list, several objects with ", " between. A
grounded report is a row of items: places, a colon (full-width in Chinese), and what is said about them. The published
code decodes without the tags, so what its users see and its evaluator reads is `left kidney[[120, 300, 260, 480]]`.

Source: github xmed-lab/MedRegA at dfdb0db; tests/reference/medrega-tiny.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from edgemed.errors import InvalidInput
from edgemed.families.medrega_view import BOX_SCALE, NormBox
from edgemed.families.published_tokens import PublishedTokens

__all__ = [
    "Found",
    "Item",
    "MedRegaText",
    "Piece",
    "boxes_text",
    "grounded_items",
    "label_images",
    "order",
    "parse",
    "place_text",
    "plain",
]

Order = Literal["demo", "training"]

IMAGE = "<image>"
"""Stands for one image in a question; `MedRegaText` puts the image's tokens there."""

SYSTEM_MESSAGE = "Answer the questions."
"""MedRegA's own; upstream's template of the same name has another."""

IGNORED = -100
"""The training label of a position without a target."""


def order(base_prompt: str, question: str, which: Order = "demo") -> str:
    """Return the user's turn of one image: base prompt, image and question in the demo's or in training's order.

    >>> order("Base.", "Where?"), order("Base.", "Where?", "training")
    ('Base. <image>\\nWhere?', '<image>\\nBase. Where?')
    """
    question = question.replace(IMAGE, "")
    if which == "training":
        return f"{IMAGE}\n{base_prompt} {question}"
    # The demo's Chinese prompts end in a full-width stop and take no space.
    gap = " " if base_prompt and base_prompt[-1].isascii() else ""
    return f"{base_prompt}{gap}{IMAGE}\n{question}"


def label_images(question: str, images: int) -> str:
    """Return the question about several images, each with its English and Chinese number.

    >>> label_images("Which is larger?", 2)
    '<image 1> (图1):<image><image 2> (图2):<image>\\nWhich is larger?'
    """
    labels = "".join(f"<image {i}> (图{i}):{IMAGE}" for i in range(1, images + 1))
    return f"{labels}\n{question}"


# --- boxes as text ----------------------------------------------------------------------------------------------------


def boxes_text(boxes: Iterable[NormBox]) -> str:
    """Return boxes as the model reads and writes them.

    Raises InvalidInput unless 0 <= x0 < x1 <= 999 and 0 <= y0 < y1 <= 999.

    >>> boxes_text([(1, 2, 3, 4), (5, 6, 7, 8)])
    '[[1, 2, 3, 4], [5, 6, 7, 8]]'
    """
    listed = [tuple(box) for box in boxes]
    for box in listed:
        if not _valid(box):
            raise InvalidInput(f"box is {list(box)}; 0 <= x0 < x1 <= {BOX_SCALE} and the same for y was expected")
    return "[" + ", ".join("[" + ", ".join(map(str, box)) + "]" for box in listed) + "]"


def place_text(name: str, boxes: Iterable[NormBox] = ()) -> str:
    """Return a place with its tags; without boxes, as one asks for it.

    >>> place_text("liver"), place_text("this", [(1, 2, 3, 4)])
    ('<ref>liver</ref>', '<ref>this</ref><box>[[1, 2, 3, 4]]</box>')
    """
    listed = tuple(boxes)
    return f"<ref>{name}</ref>" + (f"<box>{boxes_text(listed)}</box>" if listed else "")


def _valid(box: Sequence[int]) -> bool:
    return len(box) == 4 and 0 <= box[0] < box[2] <= BOX_SCALE and 0 <= box[1] < box[3] <= BOX_SCALE


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """One named place: its name ("" where a box has none) and its boxes 0..999, none if only the name was written.

    dropped: lists of numbers that were there and are no box (not four, out of range, no extent), as written.
    """

    name: str
    boxes: tuple[NormBox, ...]
    dropped: tuple[str, ...] = ()


Piece = str | Found


@dataclass(frozen=True)
class Item:
    """One item of a grounded report: its places and what is said about them ("" if nothing)."""

    places: tuple[Found, ...]
    text: str


_TAGS = re.compile(r"</?(?:ref|box|quad)>")
_RAW = re.compile(
    r"<ref>(?P<name>(?:(?!</?ref>|</?box>).)*)</ref>(?:\s*<box>(?P<boxes>(?:(?!</?box>|</?ref>).)*)</box>)?"
    r"|<box>(?P<only>(?:(?!</?box>|</?ref>).)*)</box>",
    re.DOTALL,
)
_NUMBER = r"-?\d+(?:\.\d+)?"
_LIST = rf"\[\s*{_NUMBER}(?:\s*,\s*{_NUMBER})*\s*\]"
_STRIPPED = re.compile(rf"\[\s*{_LIST}(?:\s*,\s*{_LIST})*\s*\]")
_LAST_BREAK = re.compile(r".*(?:[,;:!?\[\]\n，。；：！？、]|\.\s)\s*", re.DOTALL)
_JOINER = re.compile(r"[\s,;，、；]*(?:and|和|与|及)?\s*")
_SENTENCE_END = re.compile(r"[.!?;。！？；\n]\s*$")


def parse(text: str) -> list[Piece]:
    """Return an answer as plain strings and places, in order. Never raises; what cannot be parsed stays text.

    text: with tags, or as the published code shows it, without. In the stripped form the name of a place is what
    stands between the last mark (comma, colon, stop) and the brackets: `The liver[[1, 2, 3, 4]]` is named "The liver".

    >>> parse("<ref>liver</ref><box>[[1, 2, 3, 4]]</box>, enlarged.")
    [Found(name='liver', boxes=((1, 2, 3, 4),), dropped=()), ', enlarged.']
    >>> parse("Here: liver[[1, 2, 3, 4]]")
    ['Here: ', Found(name='liver', boxes=((1, 2, 3, 4),), dropped=())]
    """
    return _parse_raw(text) if _TAGS.search(text) else _parse_stripped(text)


def _parse_raw(text: str) -> list[Piece]:
    pieces: list[Piece] = []
    at = 0
    for match in _RAW.finditer(text):
        boxes = match["boxes"] if match["boxes"] is not None else match["only"]
        found = None if boxes is None else _numbers(boxes)
        if boxes is not None and found is None and match["name"] is None:
            continue  # a box of no numbers and without a name says nothing that can be placed
        _add(pieces, text[at : match.start()])
        at = match.end()
        name = (match["name"] or "").strip()
        if boxes is not None and found is None:
            pieces.append(Found(name, (), (boxes.strip(),) if boxes.strip() else ()))
        else:
            pieces.append(Found(name, *(found or ((), ()))))
    _add(pieces, text[at:])
    return pieces


def _parse_stripped(text: str) -> list[Piece]:
    pieces: list[Piece] = []
    at = 0
    for match in _STRIPPED.finditer(text):
        found = _numbers(match[0])
        if found is None or not found[0]:
            continue
        before = text[at : match.start()]
        cut = _LAST_BREAK.match(before)
        start = cut.end() if cut else 0
        _add(pieces, before[:start])
        pieces.append(Found(before[start:].strip(), *found))
        at = match.end()
    _add(pieces, text[at:])
    return pieces


def _add(pieces: list[Piece], text: str) -> None:
    text = _TAGS.sub("", text)
    if text:
        pieces.append(text)


def _numbers(text: str) -> tuple[tuple[NormBox, ...], tuple[str, ...]] | None:
    """Return (boxes, lists that are none) of `[[..], [..]]` or `[..]`; None if there is no list of numbers."""
    lists = re.findall(_LIST, text)
    if not lists:
        return None
    boxes: list[NormBox] = []
    dropped: list[str] = []
    for one in lists:
        values = re.findall(_NUMBER, one)
        numbers = [int(v) for v in values] if all(re.fullmatch(r"\d{1,4}", v) for v in values) else []
        if _valid(numbers):
            boxes.append((numbers[0], numbers[1], numbers[2], numbers[3]))
        else:
            dropped.append(one)
    return tuple(boxes), tuple(dropped)


def plain(text: str) -> str:
    """Return an answer without tags and numbers of boxes; names stay.

    >>> plain("The <ref>liver</ref><box>[[1, 2, 3, 4]]</box> is large."), plain("liver[[1, 2, 3, 4]]: large")
    ('The liver is large.', 'liver: large')
    """
    joined = "".join(piece if isinstance(piece, str) else _spoken(piece) for piece in parse(text))
    return re.sub(r" {2,}", " ", joined).strip()


def _spoken(found: Found) -> str:
    """Return a place as it is read: its name, or what stood in a box that could not be parsed."""
    return found.name or " ".join(found.dropped if not found.boxes else ())


def grounded_items(text: str) -> list[Item]:
    """Return the items of a grounded report, raw or stripped; ASCII and full-width colons both end the places.

    Places follow each other with nothing but commas and "and" between. What is said after them is theirs as far as the
    next place behind a finished sentence; a place inside a sentence belongs to the item, and its name to the sentence.
    Text before the first place is an Item without places.

    >>> report = "a[[1, 2, 3, 4]], b[[1, 2, 3, 5]]: Clear. c[[1, 2, 3, 4]]: Large."
    >>> [([place.name for place in item.places], item.text) for item in grounded_items(report)]
    [(['a', 'b'], 'Clear.'), (['c'], 'Large.')]
    """
    items: list[Item] = []
    places: list[Found] = []
    said = ""

    def end_item() -> None:
        words = re.sub(r"^\s*[:：]?\s*", "", said).strip()
        if places or words:
            items.append(Item(tuple(places), words))

    for piece in parse(text):
        if isinstance(piece, str):
            said += piece
            continue
        if not places or _SENTENCE_END.search(said):
            end_item()
            places, said = [], ""
        elif _JOINER.fullmatch(said):
            said = ""
        else:
            said += piece.name
        places.append(piece)
    end_item()
    return items


# --- prompts ----------------------------------------------------------------------------------------------------------


class MedRegaText:
    """Prompts and answers over one tokenizer. Holds no state; safe to share.

    image_tokens: per tile, 256 for the released model. Raises BundleError if the tokenizer lacks a token of the family.
    """

    def __init__(self, tokens: PublishedTokens, image_tokens: int = 256) -> None:
        self.tokens = tokens
        self.image_tokens = image_tokens
        self.context_id = tokens.id_of("<IMG_CONTEXT>")
        self.stop_id = tokens.id_of("<|im_end|>")
        for name in ("<|im_start|>", "<img>", "</img>", "<ref>", "</ref>", "<box>", "</box>"):
            tokens.id_of(name)

    def expand(self, turn: str, tiles: Sequence[int]) -> str:
        """Return a turn with each `<image>` replaced by its tokens.

        tiles: how many tiles each image has, in order; several tiles stand in one `<img>` block.

        Raises InvalidInput if there are not as many `<image>` as images: a text-only question has neither.
        """
        found = turn.count(IMAGE)
        if found != len(tiles):
            raise InvalidInput(f"the question has {found} {IMAGE} and {len(tiles)} images; one for each was expected")
        for count in tiles:
            turn = turn.replace(IMAGE, f"<img>{'<IMG_CONTEXT>' * (self.image_tokens * count)}</img>", 1)
        return turn

    def conversation(self, turns: Sequence[tuple[str, str | None]]) -> str:
        """Return the template's text of (user, assistant) turns with images expanded; the last answer may be None.

        No newline follows `<|im_end|>`; an answer that is None leaves the header of the assistant open.
        """
        text = f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>"
        for user, answer in turns:
            text += f"<|im_start|>user\n{user}<|im_end|><|im_start|>assistant\n"
            text += "" if answer is None else f"{answer}<|im_end|>"
        return text

    def encode_prompt(
        self, question: str, *, tiles: Sequence[int] = (), history: Sequence[tuple[str, str]] = ()
    ) -> list[int]:
        """Return the ids to prefill with. Image row r goes to the r-th position whose id is `context_id`.

        question: the user's turn with one `<image>` per image (see `order`, `label_images`). tiles: tiles of each
        image of all turns. history: earlier (question, answer) turns, as they were asked, `<image>` included.

        Raises InvalidInput if `<image>` and images do not match.
        """
        turns: list[tuple[str, str | None]] = []
        left = list(tiles)
        for user, answer in (*history, (question, None)):
            count = user.count(IMAGE)
            turns.append((self.expand(user, left[:count]), answer))
            left = left[count:]
        if left:
            raise InvalidInput(f"{len(left)} images have no {IMAGE} in the question; one for each was expected")
        return self.tokens.encode(self.conversation(turns))

    def encode_training(
        self, turns: Sequence[tuple[str, str]], *, tiles: Sequence[int] = ()
    ) -> tuple[list[int], list[int]]:
        """Return (ids, labels) of finished turns; labels are IGNORED but for each answer and its `<|im_end|>`."""
        left = list(tiles)
        finished: list[tuple[str, str | None]] = []
        spans: list[tuple[int, int]] = []
        for user, answer in turns:
            count = user.count(IMAGE)
            turn = self.expand(user, left[:count])
            left = left[count:]
            start = len(self.tokens.encode(self.conversation([*finished, (turn, None)])))
            finished.append((turn, answer))
            spans.append((start, len(self.tokens.encode(self.conversation(finished)))))
        ids = self.tokens.encode(self.conversation(finished))
        labels = [IGNORED] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        return ids, labels

    def cut(self, ids: Sequence[int]) -> list[int]:
        """Return generated ids up to the first `<|im_end|>`, without a leading begin-of-sequence id.

        The published stack returns that id before the new ones; it is no part of the answer.
        """
        out = [int(i) for i in ids]
        if out and out[0] == self.tokens.role("bos_token"):
            out = out[1:]
        return out[: out.index(self.stop_id)] if self.stop_id in out else out

    def tagged(self, ids: Sequence[int]) -> str:
        """Return the answer with its tags, as the model wrote it; image tokens among the ids give nothing."""
        silent = {self.context_id, self.tokens.id_of("<img>"), self.tokens.id_of("</img>")}
        return self.tokens.decode_verbatim([i for i in self.cut(ids) if i not in silent]).strip()

    def stripped(self, ids: Sequence[int]) -> str:
        """Return the answer as the published code shows it: no special tokens, spaces as its decoder sets them."""
        return self.tokens.decode(self.cut(ids), skip_special=True).strip()
