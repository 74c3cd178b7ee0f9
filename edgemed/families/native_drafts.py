"""What a native answer is likely to go on with, to be checked several tokens at a time; see `drafts.Drafter`.

Covers names in the order in which answers give them, boxes as the decoder's box head guesses them, `<seg>` after a box,
and the sentences of the answers. What is wrong here costs time, never an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgemed.box_grammar import BoxState, BoxTokens, Place
from edgemed.core import Language
from edgemed.drafts import Guess, PhraseDrafts
from edgemed.families.native_lexicon import position

Ids = tuple[int, ...]

_BEGINNINGS: Mapping[Language, tuple[str, ...]] = {
    "en": (
        "The <ref>", "Visible structures: <ref>", "This is a CT image of the abdomen.",
        "This is an MR image of the head.", "This is an X-ray image of the chest.",
        "This region shows the <ref>", "This image shows the abdomen.",
        "The structure is not visible in this image.", "The structure are not visible in this image.",
    ),
    "zh": (
        "可见结构：<ref>", "这是一幅CT图像，部位是腹部。", "该区域是<ref>", "图像部位是腹部。", "在该图像中不可见。",
    ),
}  # fmt: skip
"""How answers begin, as the model was taught them."""

_JOINERS: Mapping[Language, str] = {"en": ",", "zh": "、"}
_MOST_LISTED = 10
_MOST_DESCRIBED = 4
_CORNERS = tuple((x, y, x + 200, y + 200) for y in (0, 400, 800) for x in (0, 400, 800))

_OUTLINE = ("segment", "outline", "contour", "mask", "delineate", "分割", "勾画", "轮廓", "描出")


@dataclass(frozen=True)
class KnownPlace:
    """A structure that an answer may name: the ids of its name, its box in bins; asked: the question names it."""

    name: Ids
    box: tuple[int, int, int, int]
    plural: bool
    asked: bool = False


@dataclass(frozen=True)
class Absent:
    """A structure that the question names and that is not there.

    text, name: its name, and the ids of that within a place. begun: the model is likely to begin a place for it, which
    the grammar then takes back.
    """

    text: str
    name: Ids
    plural: bool
    begun: bool


class NativeDrafts:
    """Drafts for one question.

    encode: text -> ids as they stand in an answer. places: what may be named, the likeliest first. extent: bins that
    the image fills, (x, y).
    """

    def __init__(
        self,
        tokens: BoxTokens,
        encode: Callable[[str], Sequence[int]],
        language: Language,
        question: str,
        places: Sequence[KnownPlace],
        extent: tuple[int, int],
        absent: Sequence[Absent] = (),
    ) -> None:
        self._tokens = tokens
        self._encode = encode
        self._language: Language = language
        self._places = places
        asked = [place.name for place in places if place.asked]
        others = [place.name for place in places if not place.asked]
        # What is not there is named, too, before the grammar refuses it.
        self._names = (*asked, *(structure.name for structure in absent), *others)
        self._extent = extent
        self._stop = tuple(encode("。" if language == "zh" else "."))
        self._outlines = any(word in question.lower() for word in _OUTLINE)
        places_said = (self._where(corner, verb) for corner in _CORNERS for verb in (" is", " are"))
        zh = language == "zh"
        not_there = [
            f"{a.text}在该图像中不可见。"
            if zh
            else f"The {a.text} {'are' if a.plural else 'is'} not visible in this image."
            for a in absent
        ]
        phrases = [self._encode(text) for text in (*not_there, *_BEGINNINGS[language], *places_said)]
        self._phrases = PhraseDrafts(phrases, most=10)
        self._first = self._beginning(not_there, bool(asked) or any(a.begun for a in absent[:1]))
        self._lists = self._encode(_BEGINNINGS[language][language == "en"])[:1]
        self._describes = self._encode(_BEGINNINGS[language][2 if language == "en" else 1])[:1]

    def _beginning(self, not_there: Sequence[str], place: bool) -> Sequence[int]:
        """Return how the answer begins, where the question tells it. place: with one."""
        if place:
            return self._encode("The <ref>" if self._language == "en" else "<ref>")
        return self._encode(not_there[0]) if not_there else ()

    def propose(self, ids: Sequence[int], state: BoxState, guesses: Mapping[int, Guess]) -> Sequence[int]:
        """Return the likeliest next tokens; see `drafts.Drafter`."""
        t = self._tokens
        match state.place:
            case Place.NAME_START | Place.NAME:
                begun = tuple(ids[_last(ids, t.ref) + 1 :])
                for name in self._names:
                    if name not in state.named and name[: len(begun)] == begun:
                        return (*name[len(begun) :], t.ref_end)
                return ()
            case Place.X0 | Place.Y0 | Place.X1 | Place.Y1:
                at = _last(ids, t.box)
                sides = guesses.get(at, ())[len(ids) - at - 1 :]
                return tuple(t.first_coordinate + side for side in sides)
            case Place.BOXED:
                return (t.seg,)
            case _:
                if not ids:
                    return self._first
                if ids[-1] == t.seg:
                    return self._after_place(ids)
                if self._written(ids) and self._ends(ids):
                    return self._next_sentence(ids, state)
                return self._phrases.propose(ids)

    def _after_place(self, ids: Sequence[int]) -> Sequence[int]:
        """Return what is said of the place that was just written."""
        if tuple(ids[:1]) == self._lists:
            more = self._written(ids) < min(len(self._places), _MOST_LISTED)
            return self._encode(f"{_JOINERS[self._language]}<ref>") if more else ()
        box = tuple(i - self._tokens.first_coordinate for i in ids[len(ids) - 6 : len(ids) - 2])
        if len(box) < 4 or min(box) < 0:
            return ()
        name = tuple(ids[_last(ids, self._tokens.ref) + 1 : _last(ids, self._tokens.ref_end)])
        verb = " are" if any(place.plural for place in self._places if place.name == name) else " is"
        if self._outlines:
            return self._encode("已勾画。" if self._language == "zh" else f"{verb} outlined.")
        return self._encode(self._where((box[0], box[1], box[2], box[3]), verb))

    def _where(self, box: tuple[int, int, int, int], verb: str) -> str:
        where = position(box, self._language, self._extent)
        return f"位于图像{where}。" if self._language == "zh" else f"{verb} in the {where} part of the image."

    def _written(self, ids: Sequence[int]) -> int:
        """Return how many places the answer has so far."""
        return sum(index == self._tokens.box_end for index in ids)

    def _ends(self, ids: Sequence[int]) -> bool:
        return tuple(ids[-1:]) == self._stop

    def _next_sentence(self, ids: Sequence[int], state: BoxState) -> Sequence[int]:
        """Return how the sentence after a place's begins, if there is more to say."""
        described = tuple(ids[:1]) == self._describes and self._written(ids) < _MOST_DESCRIBED
        asked = any(place.asked and place.name not in state.named for place in self._places)
        if not (asked or described):
            return ()
        return self._encode(" The <ref>" if self._language == "en" else "<ref>")


def _last(ids: Sequence[int], token: int) -> int:
    """Return the index of the last `token` in `ids`, or -1."""
    return max((i for i, index in enumerate(ids) if index == token), default=-1)
