"""Which token may follow where boxes are written as text, whatever the vocabulary.

Covers free text, named places of the form

    <ref>left kidney</ref><box>[[120, 300, 260, 480], [700, 310, 820, 500]]</box>

and what known boxes let one expect. The tags are tokens; names, digits, brackets and commas are pieces of an arbitrary
vocabulary, in which a number may be one token or several and brackets may be joined: how a box is spelled is learned
from the tokenizer. Does not cover the tokenizer, prompts, or reading answers. Pure NumPy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from edgemed.errors import InvalidInput

__all__ = ["KnownPlace", "TextBoxGrammar", "TextBoxState", "TextBoxTokens", "TextGrammar", "text_bytes"]

Allowed = npt.NDArray[np.bool_]
Encode = Callable[[str], Sequence[int]]
Box = tuple[int, int, int, int]

HIGHEST = 999
"""Numbers of a box are 0 to this, its right and bottom edge included."""
MOST_BOXES = 32
"""Boxes of one place."""
MOST_NAME_TOKENS = 48

_FIRST_CORNER = (1 << HIGHEST) - 1
"""Bit n: the number n is allowed. A first corner is at most 998, so that there is room for the other."""
_ALL = (1 << HIGHEST + 1) - 1
_GO_ON = HIGHEST + 1
"""Added to the bit of a box's last number where another box follows."""

_SPELLED = re.compile(rb"</?(?:ref|box|quad)>|\[[\x00-\x20\x80-\xff]*\[")
"""What free text may not spell: a tag letter by letter, or the start of a list of boxes. Bytes of blanks beyond ASCII
are not told from other such bytes, so that "[", anything but ASCII, "[" is refused as well."""
_BEGUN = re.compile(rb"(?:<(?:/?(?:r(?:ef?)?|b(?:ox?)?|q(?:u(?:ad?)?)?)?)?|\[[\x00-\x20\x80-\xff]*)\Z")
"""The end of a text that may become one of those."""


def text_bytes(decode: Callable[[Sequence[int]], str], vocabulary: int, reserved: Collection[int]) -> tuple[bytes, ...]:
    """Return each token's text in UTF-8; empty for what is not text: `reserved` ids, and those that show nothing.

    What looks like a tag (`<|im_start|>`, `<fim_prefix>`) is not text either. decode: text of ids as they stand.

    >>> text_bytes(lambda ids: ["", "<s>", "a", "<"][ids[0]], 4, reserved=())
    (b'', b'', b'a', b'<')
    """
    texts = ("" if i in reserved else decode((i,)) for i in range(vocabulary))
    return tuple(b"" if len(t) > 2 and t[0] == "<" and t[-1] == ">" else t.encode() for t in texts)


class TextGrammar:
    """Free text: the `allowed` tokens in any order, but never one of `not_first` at the beginning.

    The state is 0 before the first token, then 1.

    >>> grammar = TextGrammar(4, allowed=[1, 2], not_first=[1])
    >>> grammar.allowed(0).tolist(), grammar.allowed(1).tolist()
    ([False, False, True, False], [False, True, True, False])
    """

    def __init__(self, vocabulary: int, allowed: Sequence[int], not_first: Sequence[int] = ()) -> None:
        self._masks = (_mask(vocabulary, set(allowed) - set(not_first)), _mask(vocabulary, allowed))
        if not self._masks[0].any():
            raise InvalidInput(f"a vocabulary of {vocabulary} has no token that an answer may begin with")

    def start(self) -> int:
        """Return the state before the first token of an answer."""
        return 0

    def allowed(self, state: int) -> Allowed:
        """Return bool [vocabulary], read-only: which tokens may come next."""
        return self._masks[state]

    def advance(self, state: int, token: int) -> int:
        """Return 1. Raises InvalidInput if `token` is not allowed in `state`."""
        mask = self._masks[state]
        if not (0 <= token < len(mask) and mask[token]):
            raise InvalidInput(f"token {token} may not follow in free text")
        return 1

    def refuses(self, state: int) -> bool:
        """Return False."""
        return False


@dataclass(frozen=True)
class TextBoxTokens:
    """The ids of the tags and of the end of an answer."""

    ref: int
    ref_end: int
    box: int
    box_end: int
    eos: int


@dataclass(frozen=True)
class KnownPlace:
    """Boxes that an answer may repeat: the tokens of their name, and their numbers, four for each."""

    name: tuple[int, ...]
    numbers: tuple[int, ...]


@dataclass(eq=False)
class _Node:
    """A token of a number with what is written around it; `leaves` has a bit for each number that can come of it."""

    next: dict[int, _Node] = field(default_factory=dict)
    leaves: int = 0


class _Place(IntEnum):
    START = 0  # nothing is there yet; else as TEXT
    TEXT = 1
    NAME_START = 2  # just after <ref>
    NAME = 3
    NAME_FULL = 4
    NAMED = 5  # just after </ref>
    NUMBER = 6  # inside <box>
    LISTED = 7  # the list of boxes is closed


@dataclass(frozen=True, slots=True)
class TextBoxState:
    """A place in an answer.

    begun: the end of the text that may become a tag. name, numbers: of the place that is being written; node: how far
    the number that comes next is written. given: the places that were finished.
    """

    place: _Place
    begun: bytes = b""
    name: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    node: _Node | None = field(default=None, repr=False)
    given: tuple[KnownPlace, ...] = ()

    @property
    def in_box(self) -> bool:
        """Whether a number comes next, or what begins the first one."""
        return self.place in (_Place.NAMED, _Place.NUMBER)


class TextBoxGrammar:
    """The grammar of answers in which boxes are text.

    - Free text is any text token. It never spells a tag, nor the start of a list of boxes, which a reader of answers
      would take for a place.
    - `<ref>`, then 1 to 48 text tokens, then `</ref><box>`, and `<box>` nowhere else.
    - Inside, 1 to 32 boxes as the tokenizer spells them: `[[`, four numbers with `, ` between, `], [` or `]]`. Numbers
      have no leading zeros, 0 <= x0 < x1 <= 999 and the same for y: a token is allowed only if such a box can follow.
    - `</box>`, then free text. The end of the answer only in free text, and not as its first token.

    encode: text to ids; the name of a tag inside the text is that tag, and a begin token always comes first or never.
    texts: as `text_bytes` returns them; tokens beyond them are never allowed.

    Raises InvalidInput where the vocabulary cannot spell the boxes, or joins what belongs to two numbers.
    """

    def __init__(self, tokens: TextBoxTokens, encode: Encode, texts: Sequence[bytes], vocabulary: int) -> None:
        if not all(0 <= i < vocabulary for i in (tokens.ref, tokens.ref_end, tokens.box, tokens.box_end, tokens.eos)):
            raise InvalidInput(f"grammar tokens {tokens} do not fit a vocabulary of {vocabulary}")
        self.tokens = tokens
        self.vocabulary = vocabulary
        self._texts = texts
        self._known: tuple[KnownPlace, ...] = ()
        self._places = True
        closing = [i for i, text in enumerate(texts) if b">" in text or b"[" in text]
        spelled = {i for i in closing if _SPELLED.search(texts[i])}
        words = [i for i, text in enumerate(texts) if text and i not in spelled]
        self._closing = [i for i in closing if texts[i] and i not in spelled]
        if len(words) == len(self._closing):
            raise InvalidInput(f"a vocabulary of {vocabulary} has no text token beside tags and brackets")
        self._words = _mask(vocabulary, words)
        self._masks: dict[tuple[_Place, bytes, bool], Allowed] = {}
        self._first, self._inner, self._next, self._last = (_Node() for _ in range(4))
        for node, before, form, more in (
            (self._first, "<box>", "[[{},", 0),
            (self._inner, "<box>[[0,", " {},", 0),
            (self._next, "<box>[[0, 0, 1, 1],", " [{},", 0),
            (self._last, "<box>[[0, 0, 1,", " {}]]", 0),
            (self._last, "<box>[[0, 0, 1,", " {}],", _GO_ON),
        ):
            head = list(encode(before))
            for number in range(HIGHEST + 1):
                self._learn(node, number + more, list(encode(before + form.format(number))), head, form.format(number))

    def _learn(self, node: _Node, leaf: int, ids: list[int], head: list[int], text: str) -> None:
        """Add the spelling of one number with what is around it; blanks are the tokenizer's to set."""
        own = ids[len(head) :]
        spelled = b"".join(self._texts[i] for i in own)
        if ids[: len(head)] != head or spelled.replace(b" ", b"") != text.replace(" ", "").encode():
            raise InvalidInput(f"the tokenizer has no tokens of their own for {text!r} in a list of boxes")
        node.leaves |= 1 << leaf
        for token in own:
            node = node.next.setdefault(token, _Node())
            node.leaves |= 1 << leaf

    def knowing(self, places: Sequence[KnownPlace]) -> TextBoxGrammar:
        """Return this grammar with places for `draft`, the likeliest first; what is allowed stays the same."""
        grammar = copy(self)
        grammar._known = tuple(KnownPlace(place.name, place.numbers[: 4 * MOST_BOXES]) for place in places)
        return grammar

    def without_places(self) -> TextBoxGrammar:
        """Return this grammar without `<ref>`: free text alone."""
        grammar = copy(self)
        grammar._places = False
        return grammar

    def start(self) -> TextBoxState:
        """Return the state before the first token of an answer."""
        return TextBoxState(_Place.START)

    def allowed(self, state: TextBoxState) -> Allowed:
        """Return bool [vocabulary], read-only: which tokens may come next."""
        if state.node is not None:
            leaves = _leaves(state.numbers)
            return _mask(self.vocabulary, [t for t, node in state.node.next.items() if node.leaves & leaves])
        key = (state.place, state.begun, self._places)
        if key not in self._masks:  # at most a few dozen: what is begun is a prefix of a tag
            self._masks[key] = self._text_mask(state.place, state.begun)
        return self._masks[key]

    def advance(self, state: TextBoxState, token: int) -> TextBoxState:
        """Return the state after `token`. Raises InvalidInput if `token` is not allowed in `state`."""
        if state.node is not None:
            return self._advance_number(state, state.node, token)
        if not (0 <= token < self.vocabulary and self.allowed(state)[token]):
            raise InvalidInput(f"token {token} may not follow at {state.place.name}")
        t, given = self.tokens, state.given
        match state.place:
            case _Place.START | _Place.TEXT:
                if token == t.ref:
                    return TextBoxState(_Place.NAME_START, given=given)
                return TextBoxState(_Place.TEXT, self._begun(state, token), given=given)
            case _Place.NAME_START | _Place.NAME | _Place.NAME_FULL:
                if token == t.ref_end:
                    return TextBoxState(_Place.NAMED, name=state.name, given=given)
                name = (*state.name, token)
                if len(name) == MOST_NAME_TOKENS:
                    return TextBoxState(_Place.NAME_FULL, name=name, given=given)
                return TextBoxState(_Place.NAME, self._begun(state, token), name, given=given)
            case _Place.NAMED:
                return TextBoxState(_Place.NUMBER, name=state.name, node=self._first, given=given)
            case _:  # LISTED
                return TextBoxState(_Place.TEXT, given=(*given, KnownPlace(state.name, state.numbers)))

    def refuses(self, state: TextBoxState) -> bool:
        """Return False."""
        return False

    def draft(self, state: TextBoxState) -> tuple[int, ...]:
        """Return the rest of the first known list of boxes that what is written agrees with, `</box>` included.

        Places of the same name come first, then those of this answer, the latest first, then those of `knowing`; a list
        that agrees as a whole comes before a single box of one. () outside of lists, or where nothing agrees.
        """
        match state.place:
            case _Place.NAMED:
                ids, node = [self.tokens.box], self._first
            case _Place.NUMBER if state.node is not None:
                ids, node = [], state.node
            case _:
                return ()
        known = sorted((*reversed(state.given), *self._known), key=lambda place: place.name != state.name)
        count = len(state.numbers)
        for numbers in _continuations(known, state.numbers):
            if not node.leaves >> _leaf(numbers, count) & 1:
                continue
            for at in range(count, len(numbers)):
                leaf = _leaf(numbers, at)
                while node.next:
                    token, node = next((t, n) for t, n in node.next.items() if n.leaves >> leaf & 1)
                    ids.append(token)
                node = self._root(at + 1)
            return (*ids, self.tokens.box_end)
        return ()

    def _advance_number(self, state: TextBoxState, node: _Node, token: int) -> TextBoxState:
        after = node.next.get(token)
        if after is None or not after.leaves & _leaves(state.numbers):
            raise InvalidInput(f"token {token} may not follow at {state.place.name}")
        if after.next:
            return TextBoxState(_Place.NUMBER, b"", state.name, state.numbers, after, state.given)
        leaf = after.leaves.bit_length() - 1
        numbers = (*state.numbers, leaf % _GO_ON)
        if len(numbers) % 4 == 0 and leaf < _GO_ON:
            return TextBoxState(_Place.LISTED, b"", state.name, numbers, None, state.given)
        return TextBoxState(_Place.NUMBER, b"", state.name, numbers, self._root(len(numbers)), state.given)

    def _root(self, count: int) -> _Node:
        """Return where the number begins that comes after `count` numbers, of which there are some."""
        return (self._next, self._inner, self._inner, self._last)[count % 4]

    def _begun(self, state: TextBoxState, token: int) -> bytes:
        """Return the end of the text, once `token` is there, that may become a tag."""
        match = _BEGUN.search(state.begun + self._texts[token])
        return b"" if match is None else b"[" if match[0].startswith(b"[") else match[0]

    def _text_mask(self, place: _Place, begun: bytes) -> Allowed:
        t = self.tokens
        match place:
            case _Place.NAME_FULL:
                return _mask(self.vocabulary, [t.ref_end])
            case _Place.NAMED:
                return _mask(self.vocabulary, [t.box])
            case _Place.LISTED:
                return _mask(self.vocabulary, [t.box_end])
        mask = self._words.copy()
        if begun:
            mask[[i for i in self._closing if _SPELLED.search(begun + self._texts[i])]] = False
        mask[t.ref_end] = place == _Place.NAME
        mask[t.eos] = place == _Place.TEXT
        mask[t.ref] = self._places and place in (_Place.START, _Place.TEXT)
        mask.flags.writeable = False
        return mask


def _leaves(numbers: Sequence[int]) -> int:
    """Return the bits of what may come after `numbers`: of numbers, and of going on after a box."""
    at = len(numbers) % 4
    if at < 2:
        return _FIRST_CORNER
    bits = _ALL >> numbers[-2] + 1 << numbers[-2] + 1
    return bits | bits << _GO_ON if at == 3 and len(numbers) < 4 * MOST_BOXES - 1 else bits


def _leaf(numbers: Sequence[int], at: int) -> int:
    """Return the bit of numbers[at]."""
    return numbers[at] + (_GO_ON if at % 4 == 3 and at + 1 < len(numbers) else 0)


def _continuations(known: Sequence[KnownPlace], written: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield lists that begin with `written` and say more: known ones, then what is written and one known box.

    A box that stands in the list already is not repeated.
    """
    count = len(written)
    whole = count - count % 4
    for place in known:
        if len(place.numbers) > count and place.numbers[:count] == written:
            yield place.numbers
    there = {written[i : i + 4] for i in range(0, whole, 4)}
    for place in known:
        for i in range(0, len(place.numbers), 4):
            box = place.numbers[i : i + 4]
            if box[: count - whole] == written[whole:] and box not in there:
                yield (*written[:whole], *box)


def _mask(vocabulary: int, tokens: Collection[int]) -> Allowed:
    """Return a read-only bool [vocabulary] that is True at `tokens`."""
    mask = np.zeros(vocabulary, np.bool_)
    mask[list(tokens)] = True
    mask.flags.writeable = False
    return mask
