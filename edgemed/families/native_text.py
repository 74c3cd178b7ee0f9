"""The text of the native family: prompt to token ids, token ids to tagged text, tagged text to places.

Covers the special tokens, the normal form of a prompt, encoding, decoding and parsing. Does not cover which token may
follow which (`box_grammar`), what the numbers of a box mean in pixels (`geometry`), or the wording (`training`).

A sequence is

    <bos> image rows <user> prompt text [region row <box> 4 bins </box>]... <assistant> answer <eos>

An image or region row is an id at or above the vocabulary size: row r of the projector's output is id size + r.

Tagged text is what the model writes: `The <ref>liver</ref><box><c120><c240><c560><c700></box><seg> is in ...`.

User text never becomes a special token. The tokenizer's vocabulary holds the special tokens only as plain entries that
no merge can reach, and this module alone puts their ids into a sequence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from edgemed.core import Language
from edgemed.errors import BundleError, InvalidInput
from edgemed.families.native_lexicon import STRUCTURES, structure_of
from edgemed.geometry import BINS
from edgemed.language import folded_text, language_of, request_in

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "SPECIAL_TOKENS",
    "SUFFIX",
    "NativeText",
    "Piece",
    "Place",
    "SpecialIds",
    "normal_form",
    "parse",
    "plain",
    "structure_of",
    "tag",
]

Bins = tuple[int, int, int, int]

STRUCTURE_TOKENS = (
    "<pad>",
    "<bos>",
    "<eos>",
    "<user>",
    "<assistant>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<seg>",
    "<region>",
)
SPECIAL_TOKENS: tuple[str, ...] = (*STRUCTURE_TOKENS, *(f"<c{i}>" for i in range(BINS)))
"""The first entries of the vocabulary; a token's place here is its id."""

SUFFIX: dict[Language, str] = {"en": " answer in english.", "zh": "请用中文回答。"}
"""What `encode_prompt` appends where the prompt's own words do not settle the language of the answer."""

_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_ABBREVIATIONS = frozenset({"ct", "mr", "mri", "x", "ivc", "b", "dr", "us"})
"""Latin words that are at home in a Chinese sentence."""

_SPECIAL = re.compile(r"</?(?:ref|box)>|<seg>|<c\d{1,3}>|<(?:pad|bos|eos|user|assistant|region)>")
_PLACEHOLDER = re.compile(r"<(image|region)>", re.IGNORECASE)


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens. Coordinate bin b is id first_coordinate + b; `never` may not be generated."""

    pad: int
    bos: int
    eos: int
    user: int
    assistant: int
    ref: int
    ref_end: int
    box: int
    box_end: int
    seg: int
    region: int
    first_coordinate: int
    bins: int
    never: tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """One named place of an answer.

    name: what stands between <ref> and </ref>; "" if there was a box without a name. bins: the box as coordinate bins,
    x0 < x1 and y0 < y1, or None if there is none or it is malformed. seg: a <seg> follows. seg_index: its number among
    all <seg> of the text, from 0 (the order of `Decoded.hidden`), or None.
    """

    name: str
    bins: Bins | None
    seg: bool
    seg_index: int | None


Piece = str | Place


def tag(name: str, bins: Bins, *, seg: bool = True) -> str:
    """Return a place as tagged text.

    >>> tag("liver", (1, 2, 3, 4))
    '<ref>liver</ref><box><c1><c2><c3><c4></box><seg>'
    """
    return f"<ref>{name}</ref><box>{''.join(f'<c{b}>' for b in bins)}</box>{'<seg>' if seg else ''}"


def normal_form(text: str) -> str:
    """Return `text` as the model reads it: NFKC, lower case, no control characters, single spaces, none beside Han.

    >>> normal_form("  Where is the LIVER ？ "), normal_form("请 分割 CT 图像中的肝脏")
    ('where is the liver?', '请分割ct图像中的肝脏')
    """
    folded = re.sub(rf"(?<=[{_HAN}，。、]) | (?=[{_HAN}，。、])", "", folded_text(text))
    return re.sub(r" (?=[?!.,;:])", "", folded)


def _settled_language(normal: str) -> Language | None:
    """Return the language a prompt in normal form is wholly written in; None if it mixes the two."""
    if language_of(normal) == "en":
        return "en"
    return "zh" if all(word in _ABBREVIATIONS for word in re.findall(r"[a-z]+", normal)) else None


def parse(tagged: str) -> list[Piece]:
    """Return the answer as plain strings and Places, in order. Never raises.

    A tag without its partner is dropped and its content kept as text; coordinates outside a box are dropped; a box
    without exactly four bins in order gives bins None.

    >>> parse("The <ref>liver</ref><box><c1><c2><c3><c4></box><seg> is here.")
    ['The ', Place(name='liver', bins=(1, 2, 3, 4), seg=True, seg_index=0), ' is here.']
    """
    place = re.compile(
        r"<ref>(?P<name>[^<]*)</ref>(?:<box>(?P<bins>(?:<c\d{1,3}>)*)(?:</box>)?)?(?P<seg><seg>)?"
        r"|<box>(?P<only>(?:<c\d{1,3}>)*)(?:</box>)?(?P<only_seg><seg>)?"
    )
    pieces: list[Piece] = []
    segs = 0
    at = 0
    for match in place.finditer(tagged):
        before = tagged[at : match.start()]
        segs += before.count("<seg>")
        _add_text(pieces, before)
        at = match.end()
        name = (match["name"] or "").strip()
        numbers = [int(n) for n in re.findall(r"\d+", match["bins"] or match["only"] or "")]
        seg = bool(match["seg"] or match["only_seg"])
        pieces.append(Place(name, _valid(numbers), seg, segs if seg else None))
        segs += seg
    _add_text(pieces, tagged[at:])
    return pieces


def _add_text(pieces: list[Piece], text: str) -> None:
    text = _SPECIAL.sub("", text)
    if text:
        pieces.append(text)


def _valid(numbers: list[int]) -> Bins | None:
    if len(numbers) != 4:
        return None
    x0, y0, x1, y1 = numbers
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 and max(numbers) < BINS else None


def plain(tagged: str) -> str:
    """Return the answer without tags, coordinates and <seg>; names stay.

    >>> plain("The <ref>liver</ref><box><c1><c2><c3><c4></box><seg> is here.")
    'The liver is here.'
    """
    text = "".join(piece if isinstance(piece, str) else piece.name for piece in parse(tagged))
    return re.sub(r" +", " ", text).strip()


class NativeText:
    """Encoder and decoder over one tokenizer file. Holds no state; safe to share.

    tokenizer_json: the bundle's tokenizer.json. Raises BundleError if it cannot be read or its first entries are not
    SPECIAL_TOKENS.
    """

    def __init__(self, tokenizer_json: Path | str) -> None:
        from tokenizers import Tokenizer

        path = Path(tokenizer_json)
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise BundleError(f"{path.name} is not a tokenizer this version reads: {error}") from error
        for index, token in ((i, SPECIAL_TOKENS[i]) for i in (*range(12), len(SPECIAL_TOKENS) - 1)):
            if self._tokenizer.token_to_id(token) != index:
                raise BundleError(f"{path.name} lacks {token} at id {index}; it belongs to another model")

    @cached_property
    def vocabulary(self) -> int:
        """Number of entries; ids from here on stand for image and region rows."""
        return int(self._tokenizer.get_vocab_size())

    def tokens(self) -> SpecialIds:
        """Return the ids of the special tokens."""
        i = {token: index for index, token in enumerate(STRUCTURE_TOKENS)}
        return SpecialIds(
            pad=i["<pad>"],
            bos=i["<bos>"],
            eos=i["<eos>"],
            user=i["<user>"],
            assistant=i["<assistant>"],
            ref=i["<ref>"],
            ref_end=i["</ref>"],
            box=i["<box>"],
            box_end=i["</box>"],
            seg=i["<seg>"],
            region=i["<region>"],
            first_coordinate=len(STRUCTURE_TOKENS),
            bins=BINS,
            never=(i["<pad>"], i["<bos>"], i["<user>"], i["<assistant>"], i["<region>"]),
        )

    def encode_prompt(
        self, text: str, *, image_rows: int, region_bins: Sequence[Bins] = (), language: Language = "en"
    ) -> list[int]:
        """Return the ids from <bos> to <assistant>.

        image_rows: number of image rows; region i's row id is vocabulary + image_rows + i.
        region_bins: the box of each region. Region i goes where the i-th `<region>` stands in `text`, the rest to the
        end; more `<region>` than regions are dropped, and so is `<image>`: the image always comes first.
        language: the answer's. A request in the text itself ("Answer in Chinese.") goes before it. SUFFIX is appended
        unless the text is wholly written in that language.
        """
        ids = self.tokens()
        rows = [
            [self.vocabulary + image_rows + i, ids.box, *self._coordinates(bins), ids.box_end]
            for i, bins in enumerate(region_bins)
        ]
        pieces = re.split(r"<region>", _PLACEHOLDER.sub(lambda m: "" if m[1].lower() == "image" else "<region>", text))
        joined = "\ufffc".join(piece.replace("\ufffc", "") for piece in pieces)
        requested, joined = request_in(folded_text(joined))
        language = requested or language
        normal = normal_form(joined)
        parts = normal.split("\ufffc")
        sequence = [ids.bos, *range(self.vocabulary, self.vocabulary + image_rows), ids.user]
        for i, part in enumerate(parts):
            sequence += self._plain_ids(part.strip())
            if i < len(parts) - 1 and i < len(rows):
                sequence += rows[i]
        for row in rows[len(parts) - 1 :]:
            sequence += row
        if _settled_language(normal.replace("\ufffc", "")) != language:
            sequence += self._tokenizer.encode(SUFFIX[language]).ids
        return [*sequence, ids.assistant]

    def encode_answer(self, tagged: str) -> list[int]:
        """Return the ids of a tagged answer and <eos>.

        The space before `<ref>` moves inside it, so that a name has the same ids wherever it stands. Raises
        InvalidInput if a space is missing there before a Latin name (it could not be told on decoding).
        """
        sequence: list[int] = []
        at = 0
        inside = False
        for match in _SPECIAL.finditer(tagged):
            text = tagged[at : match.start()]
            at = match.end()
            if match[0] == "<ref>" and _spaced(tagged[at : at + 1]):
                if text and not text.endswith((" ", "(", "\n")):
                    raise InvalidInput("a space is expected before <ref> where a Latin name follows")
                text = text.removesuffix(" ")
            sequence += self._encode(f" {text}" if inside and _spaced(text[:1]) else text)
            sequence.append(SPECIAL_TOKENS.index(match[0]) if match[0][1] != "c" else self._coordinate(match[0]))
            inside = match[0] == "<ref>"
        return [*sequence, *self._encode(tagged[at:]), self.tokens().eos]

    def beyond_ascii(self) -> tuple[int, ...]:
        """Return the ids of the tokens that write other than ASCII: an answer in English has none of them."""
        ids = range(len(SPECIAL_TOKENS), self.vocabulary)
        return tuple(i for i in ids if not self._tokenizer.decode([i], skip_special_tokens=False).isascii())

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Return the ids of words of an answer, with `<ref>` among them as its token; no place, no <eos>."""
        ref = self.tokens().ref
        parts = [self._encode(part.removesuffix(" ")) for part in text.split("<ref>")]
        return (*parts[0], *(i for part in parts[1:] for i in (ref, *part)))

    def encode_name(self, name: str) -> tuple[int, ...]:
        """Return the ids of a structure's name as they stand between <ref> and </ref> in an answer."""
        return tuple(self._encode(f" {name}" if _spaced(name[:1]) else name))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the tagged text of generated ids. <eos>, <pad> and other frame tokens and ids of rows give nothing."""
        special = self.tokens()
        silent = {*special.never, special.eos}
        out: list[str] = []
        run: list[int] = []
        after_ref = False

        def flush() -> None:
            nonlocal after_ref
            if run:
                text = self._tokenizer.decode(run, skip_special_tokens=False)
                if after_ref and text.startswith(" "):  # the space that encode_answer moved inside goes back out
                    before = "".join(out[:-1])
                    text = text[1:]
                    if before and not before.endswith((" ", "(", "\n")):
                        out.insert(len(out) - 1, " ")
                out.append(text)
                run.clear()
            after_ref = False

        for token in ids:
            if token >= self.vocabulary or token in silent:
                continue
            if token < len(SPECIAL_TOKENS):
                flush()
                out.append(SPECIAL_TOKENS[token])
                after_ref = token == special.ref
            else:
                run.append(int(token))
        flush()
        return "".join(out)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids) if text else []

    def _plain_ids(self, normal: str) -> list[int]:
        """Return the ids of prompt text; a Latin start takes a space, so that a word has one form everywhere."""
        return self._encode(f" {normal}" if _spaced(normal[:1]) else normal)

    def _coordinates(self, bins: Bins) -> list[int]:
        x0, y0, x1, y1 = bins
        if not (0 <= x0 < x1 < BINS and 0 <= y0 < y1 < BINS):
            raise InvalidInput(f"region bins are {bins}; 0 <= x0 < x1 < {BINS} and 0 <= y0 < y1 < {BINS} was expected")
        return [len(STRUCTURE_TOKENS) + b for b in bins]

    def _coordinate(self, token: str) -> int:
        return len(STRUCTURE_TOKENS) + int(token[2:-1])


def _spaced(first: str) -> bool:
    """Return whether a word that starts with this character is set off by a space: Latin letters and digits are."""
    return first.isascii() and first.isalnum()


def structure_names(language: Language) -> tuple[str, ...]:
    """Return the name each structure is answered with, in index order."""
    return tuple((term.en if language == "en" else term.zh)[0] for term in STRUCTURES)
