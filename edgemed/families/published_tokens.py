"""Text to ids and back, with the tokenizer of both published families: slow SentencePiece Llama plus added tokens.

Covers encoding and decoding with the JSON text that `published_tokenizer` makes of a checkpoint's files, at run time,
without SentencePiece and without transformers. BPE and unigram models; byte fallback; models with and without a dummy
prefix. Does not cover reading a checkpoint's own files (`published_tokenizer`), templates (`medrega_text`,
`medplib_text`), or sampling.

Two generations of the slow tokenizer differ, and ids differ with them:

    4.31 (MedPLIB)   text beside an added token loses its white space on that side; added tokens are not "special" after
                     a reload, so they stay when special tokens are skipped
    4.37 (MedRegA)   text beside an added token stays as it is, unless the token itself says lstrip or rstrip

Where the model has a dummy prefix, every stretch of text between two added tokens gets one (`legacy` true), or only the
first stretch (`legacy` false).

Source: behaviour of transformers 4.31.0 and 4.37.2 (recorded in tests/reference).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgemed.errors import BundleError, CannotRead, InvalidInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["AddedToken", "Generation", "PublishedTokens"]

Generation = Literal["4.31", "4.37"]

SPACE = "\u2581"
"""How SentencePiece writes a space inside a piece."""

TOKENIZER = "tokenizer/published.json"
"""Where a bundle of a published family has its tokenizer."""
FORMAT = "edgemed published tokens 1"

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of a SentencePiece piece, numbered as its files number them."""
UNREACHABLE = "\ufdd0"
"""A noncharacter. Pieces that text may not match stand in the vocabulary as this and their id."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before SentencePiece sees it.

    special: `decode(skip_special=True)` leaves it out. apart: decoding sets it off from its neighbours by a space.
    lstrip, rstrip: white space before, after it is dropped on encoding.
    """

    content: str
    id: int
    special: bool
    apart: bool
    lstrip: bool
    rstrip: bool


def _one_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that finds any of `texts`, the longest where several start; None if there are none."""
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _cut(pattern: re.Pattern[str] | None, text: str) -> Iterator[tuple[bool, str]]:
    """Yield the stretches of `text` in order, True for those that the pattern matches; no empty ones."""
    at = 0
    for match in pattern.finditer(text) if pattern else ():
        if match.start() > at:
            yield False, text[at : match.start()]
        yield True, match[0]
        at = match.end()
    if at < len(text):
        yield False, text[at:]


class PublishedTokens:
    """Encoder and decoder over one converted tokenizer. Holds no state that changes; safe to share.

    text: what `published_tokenizer.convert` returned. Raises BundleError if it is something else.
    """

    def __init__(self, text: str) -> None:
        from tokenizers import Tokenizer

        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise BundleError(f"the tokenizer has format {data['format']!r}, {FORMAT!r} was expected")
            self._tokenizer: Tokenizer = Tokenizer.from_str(json.dumps(data["tokenizer"]))
            self.added = tuple(AddedToken(*entry) for entry in data["added"])
            self._reserved = {int(i): (str(name), int(kind)) for i, name, kind in data["reserved"]}
            self.roles: Mapping[str, str] = data["roles"]
            self.generation: Generation = data["generation"]
            self.legacy, self.add_bos = bool(data["legacy"]), bool(data["add_bos"])
            self._byte_fallback = bool(data["byte_fallback"])
            self._prefix = bool(data["add_dummy_prefix"])
            self._squeeze = bool(data["remove_extra_whitespaces"])
            self._escape = bool(data["escape_whitespaces"])
            self._unknown_surface = str(data["unknown_surface"])
        except BundleError:
            raise
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise BundleError(f"the tokenizer is not one this version reads: {error}") from error
        self._by_content = {token.content: token for token in self.added}
        self._added_pattern = _one_of(self._by_content)
        self._user = {name: i for i, (name, kind) in self._reserved.items() if kind == USER}
        tags = (name for name in self._user if name.startswith("<") and name.endswith(">"))
        self._tag_pattern = _one_of((*self._by_content, *tags))
        self._user_pattern = _one_of((*self._user, UNREACHABLE))
        self._bytes = {int(name[3:5], 16): i for i, (name, kind) in self._reserved.items() if kind == BYTE}
        self._unknown = next(i for i, (_, kind) in self._reserved.items() if kind == UNKNOWN)

    @classmethod
    def open(cls, path: Path) -> PublishedTokens:
        """Return the tokenizer of a bundle's file. Raises CannotRead or BundleError."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CannotRead(f"{path.name} cannot be read: {error}") from error
        return cls(text)

    @cached_property
    def pieces(self) -> int:
        """Number of SentencePiece pieces; added tokens that are no piece follow."""
        return int(self._tokenizer.get_vocab_size())

    @cached_property
    def vocabulary(self) -> int:
        """Number of ids, added tokens included."""
        return max(self.pieces, *(token.id + 1 for token in self.added)) if self.added else self.pieces

    @cached_property
    def _names(self) -> tuple[str, ...]:
        names = [self._reserved.get(i, (str(self._tokenizer.id_to_token(i)), 0))[0] for i in range(self.pieces)]
        above = sorted((token for token in self.added if token.id >= self.pieces), key=lambda token: token.id)
        return (*names, *(token.content for token in above))

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self._names)}

    def id_of(self, token: str) -> int:
        """Return the id of a piece or an added token. Raises BundleError if the vocabulary lacks it."""
        if token not in self._ids:
            raise BundleError(f"the tokenizer lacks {token}; the checkpoint belongs to another model")
        return self._ids[token]

    def role(self, name: str) -> int | None:
        """Return the id of the token with a role ("bos_token", "eos_token", ...), or None if none has it."""
        return self.id_of(self.roles[name]) if name in self.roles else None

    # --- text to ids ---

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
        """Return the ids of `text`. bos: whether the first is the begin-of-sequence id; None: as the checkpoint says.

        A token's name inside the text is that token: escape what a user types with `plain` before it goes in here.

        Raises InvalidInput if the text is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput("the text holds half a surrogate pair; valid Unicode was expected") from error
        ids: list[int] = []
        if bos if bos is not None else self.add_bos:
            ids.append(self.id_of(self.roles["bos_token"]))
        start = len(ids)
        if text and not self.legacy:
            text = SPACE + text.replace(SPACE, " ")
        for is_token, part in self._stripped(text):
            ids += [self._by_content[part].id] if is_token else self._stretch(part)
        if not self.legacy and self.generation == "4.37" and len(ids) > start + 1:
            after = self._names[ids[start + 1]]
            if self._names[ids[start]] == SPACE and after in self._by_content and self._by_content[after].special:
                del ids[start]
        return ids

    def plain(self, text: str, keep: Collection[str] = ()) -> str:
        """Return `text` without the names of added tokens and tags of the vocabulary: nothing typed becomes one.

        The brackets fall away and the word stays: `<SEG>` becomes `SEG`. Repeated until no name is left. keep: names
        that a user may write.
        """

        def bare(match: re.Match[str]) -> str:
            return match[0] if match[0] in keep else re.sub(r"[<>|/]", "", match[0])

        while self._tag_pattern and (changed := self._tag_pattern.sub(bare, text)) != text:
            text = changed
        return text

    def _stripped(self, text: str) -> Iterator[tuple[bool, str]]:
        """Yield the stretches between added tokens with white space dropped where a token asks for it."""
        parts = list(_cut(self._added_pattern, text))
        for i, (is_token, part) in enumerate(parts):
            if is_token:
                yield True, part
                continue
            if i > 0 and self._by_content[parts[i - 1][1]].rstrip:
                part = part.lstrip()
            if i + 1 < len(parts) and self._by_content[parts[i + 1][1]].lstrip:
                part = part.rstrip()
            if part:
                yield False, part

    def _stretch(self, text: str) -> list[int]:
        """Return the ids of a stretch of text between added tokens."""
        if self.legacy:
            return self._sentencepiece(text, self._prefix)
        if self.generation == "4.37":  # SPACE was put before the first stretch; the model adds none
            return self._sentencepiece(text, False)
        first = text.startswith(SPACE)
        text = text[1:] if first else text
        ids = self._sentencepiece(text, self._prefix)
        if not first and not text.startswith(" ") and ids and self._names[ids[0]].startswith(SPACE):
            rest = self._names[ids[0]][1:]
            ids = ([self._ids.get(rest, self._unknown)] if rest else []) + ids[1:]
        return ids

    def _sentencepiece(self, text: str, prefix: bool) -> list[int]:
        """Return the ids of one SentencePiece call."""
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        if self._squeeze:
            text = re.sub(" +", " ", text).strip(" ")
        if not text:
            return []
        text = f" {text}" if prefix else text
        ids: list[int] = []
        for is_user, part in _cut(self._user_pattern, text.replace(" ", SPACE) if self._escape else text):
            if not is_user:
                ids += self._model_ids(part)
            else:
                ids += [self._user[part]] if part in self._user else self._fallback(part.encode())
        return ids

    def _model_ids(self, text: str) -> Iterator[int]:
        data = text.encode()
        for token in self._tokenizer.model.tokenize(text):
            if token.id == self._unknown:
                yield from self._fallback(data[token.offsets[0] : token.offsets[1]])
            else:
                yield token.id

    def _fallback(self, data: bytes) -> list[int]:
        """Return the ids of characters that no piece holds."""
        return [self._bytes[byte] for byte in data] if self._byte_fallback else [self._unknown]

    # --- ids to text ---

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Return the text of ids as the model's own generation of transformers shows it.

        Added tokens are set off by spaces. skip_special: leave out special tokens (role tokens and declared additional
        ones; MedPLIB's own tokens stay, MedRegA's tags vanish).

        Raises InvalidInput for an id outside the vocabulary.
        """
        out: list[str] = []
        run: list[str] = []
        for name in self._visible(ids, skip_special):
            token = self._by_content.get(name)
            if token is not None and token.apart:
                self._end_run(run, out)
                out.append(name)
            else:
                run.append(name)
        self._end_run(run, out)
        return " ".join(out)

    def decode_verbatim(self, ids: Sequence[int]) -> str:
        """Return the text of ids with every added token in its place and no space put in or taken away.

        For a model without a dummy prefix and without stripping (MedRegA) this undoes `encode`; with one, the prefix of
        each stretch shows as a space. Raises InvalidInput for an id outside the vocabulary.
        """
        out: list[str] = []
        run: list[str] = []
        for name in self._visible(ids, False):
            if name in self._by_content:
                out += [self._pieces_text(run, False), name]
                run = []
            else:
                run.append(name)
        return "".join((*out, self._pieces_text(run, False)))

    def _visible(self, ids: Sequence[int], skip_special: bool) -> Iterator[str]:
        for index in ids:
            if not 0 <= index < self.vocabulary:
                raise InvalidInput(f"id {index} is outside the vocabulary of {self.vocabulary}")
            name = self._names[index]
            if not (skip_special and name in self._by_content and self._by_content[name].special):
                yield name

    def _end_run(self, run: list[str], out: list[str]) -> None:
        """Move the pieces of `run` to `out` as one string, role tokens among them as their names."""
        if not run:
            return
        new = self.generation == "4.37"
        if new and run[0].startswith(SPACE):
            run[0] = run[0][1:]
        trim = self._prefix and not (new and not self.legacy)
        text = ""
        pieces: list[str] = []
        after_token = False
        for i, name in enumerate(run):
            if name in self._by_content and self._by_content[name].special:
                gap = " " if not after_token and i and (self.legacy or not new) else ""
                text += gap + self._pieces_text(pieces, trim) + name
                pieces = []
                after_token = True
            else:
                pieces.append(name)
                after_token = False
        text += self._pieces_text(pieces, trim)
        run.clear()
        if text or not new:
            out.append(text)

    def _pieces_text(self, names: Sequence[str], trim: bool) -> str:
        """Return the text of pieces as SentencePiece decodes them. trim: the first space is the dummy prefix."""
        text = ""
        data = bytearray()
        at_start = True
        for name in names:
            index = self._ids.get(name)
            known, kind = self._reserved.get(index, (name, NORMAL)) if index is not None else (name, None)
            if kind == BYTE:
                data.append(int(known[3:5], 16))
                continue
            text += _utf8(data)
            data.clear()
            at_start = at_start and not text
            if kind == CONTROL:
                continue
            if kind == UNKNOWN:
                text += self._unknown_surface
            elif kind is None:
                text += name
            else:
                if at_start and (trim or self._squeeze) and name.startswith(SPACE):
                    name = name[1:]
                    at_start = self._squeeze
                text += name.replace(SPACE, " ")
        return text + _utf8(data)


def _utf8(data: bytes | bytearray) -> str:
    """Return bytes as text, one U+FFFD for every byte that is part of no character.

    >>> _utf8(bytes([0xE4, 0xBB, 0x41]))
    '\ufffd\ufffdA'
    """
    text = ""
    at = 0
    while at < len(data):
        for size in (1, 2, 3, 4):
            try:
                text += bytes(data[at : at + size]).decode()
            except UnicodeDecodeError:
                continue
            at += size
            break
        else:
            text += "\ufffd"
            at += 1
    return text
