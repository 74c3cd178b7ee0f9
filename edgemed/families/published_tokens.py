"""The tokenizer that both published families were trained with: a slow SentencePiece Llama tokenizer plus added tokens.

Covers reading a checkpoint's tokenizer folder into one JSON text (`convert`, at export) and encoding and decoding with
that text (`PublishedTokens`, at run time), without SentencePiece and without transformers. BPE and unigram models; byte
fallback; models with and without a dummy prefix. Does not cover templates (`medrega_text`, `medplib_text`), sampling,
models of type WORD and CHAR, UNUSED pieces, or training a tokenizer.

Two generations of the slow tokenizer differ, and ids differ with them:

    4.31 (MedPLIB)   text beside an added token loses its white space on that side; added tokens are not "special" after
                     a reload, so they stay when special tokens are skipped
    4.37 (MedRegA)   text beside an added token stays as it is, unless the token itself says lstrip or rstrip

Where the model has a dummy prefix, every stretch of text between two added tokens gets one (`legacy` true), or only the
first stretch (`legacy` false).

Source: behaviour of transformers 4.31.0 and 4.37.2 (recorded in tests/reference); the SentencePiece model format.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgemed.errors import BundleError, CannotRead, InvalidInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["AddedToken", "Generation", "PublishedTokens", "SentencePieceModel", "convert", "read_model"]

Generation = Literal["4.31", "4.37"]

SPACE = "\u2581"
"""How SentencePiece writes a space inside a piece."""

FORMAT = "edgemed published tokens 1"

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_UNREACHABLE = "\ufdd0"
"""A noncharacter. Pieces that text may not match stand in the vocabulary as this and their id."""

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says: pieces as (text, score, type) in id order, the algorithm and the normalisation.

    charsmap: the compiled character map, empty for identity. unknown_surface: what the unknown id decodes to.
    """

    pieces: tuple[tuple[str, float, int], ...]
    algorithm: Literal["bpe", "unigram"]
    byte_fallback: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    charsmap: bytes
    unknown_surface: str


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


# --- reading a checkpoint's tokenizer ---------------------------------------------------------------------------------


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of one protobuf message; fixed32 and length-delimited values come as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire}")
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if at + size > len(data):
            raise ValueError("it ends inside a field")
        yield number, data[at : at + size]
        at += size


def _piece(message: bytes) -> tuple[str, float, int]:
    fields = dict(_fields(message))
    score = fields.get(2, b"\0\0\0\0")
    return (_bytes(fields[1]).decode(), struct.unpack("<f", _bytes(score))[0], _number(fields.get(3, NORMAL)))


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number stands where bytes belong")
    return value


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise TypeError("bytes stand where a number belongs")
    return value


def read_model(path: Path) -> SentencePieceModel:
    """Return what a SentencePiece tokenizer.model holds.

    Raises CannotRead if the file cannot be opened, BundleError if it is no such model or uses what is not supported
    (WORD and CHAR models, UNUSED pieces, a space written as a suffix).
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CannotRead(f"{path.name} cannot be read: {error.strerror}; the checkpoint folder must hold it") from error
    try:
        messages = list(_fields(data))
        pieces = tuple(_piece(_bytes(value)) for number, value in messages if number == 1)
        trainer = dict(_fields(b"".join(_bytes(value) for number, value in messages if number == 2)))
        normalizer = dict(_fields(b"".join(_bytes(value) for number, value in messages if number == 3)))
        surface = _bytes(trainer.get(44, " \u2047 ".encode())).decode()
        charsmap = _bytes(normalizer.get(2, b""))
    except (ValueError, IndexError, KeyError, TypeError, struct.error) as error:
        raise BundleError(f"{path.name} is not a SentencePiece model: {error}") from error
    if not pieces:
        raise BundleError(f"{path.name} is not a SentencePiece model: it has no pieces")
    _check_model(path.name, pieces, trainer)
    return SentencePieceModel(
        pieces=pieces,
        algorithm="bpe" if trainer.get(3, 1) == 2 else "unigram",
        byte_fallback=bool(trainer.get(35, 0)),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        charsmap=charsmap,
        unknown_surface=surface,
    )


def _check_model(name: str, pieces: Sequence[tuple[str, float, int]], trainer: Mapping[int, int | bytes]) -> None:
    if trainer.get(3, 1) not in (1, 2):
        raise BundleError(f"{name} has model_type {trainer[3]!r}; 1 (unigram) or 2 (BPE) was expected")
    if trainer.get(24, 0):
        raise BundleError(f"{name} writes spaces as a suffix (treat_whitespace_as_suffix), which is not supported")
    kinds = [kind for _, _, kind in pieces]
    if UNUSED in kinds:
        raise BundleError(f"{name} has {kinds.count(UNUSED)} pieces of type UNUSED, which are not supported")
    if kinds.count(UNKNOWN) != 1:
        raise BundleError(f"{name} has {kinds.count(UNKNOWN)} pieces of type UNKNOWN, 1 was expected")
    if len({text for text, _, _ in pieces}) != len(pieces):
        raise BundleError(f"{name} has the same piece twice")
    missing = {f"<0x{b:02X}>" for b in range(256)} - {text for text, _, kind in pieces if kind == BYTE}
    if trainer.get(35, 0) and missing:
        raise BundleError(f"{name} has byte_fallback but lacks {len(missing)} byte pieces, first {min(missing)}")


def _merges(pieces: Sequence[tuple[str, float, int]]) -> list[list[str]]:
    """Return every pair of pieces that makes a piece, the pair that SentencePiece would join first at the front."""
    normal = {text: score for text, score, kind in pieces if kind == NORMAL}
    ranked = []
    for index, (text, score, kind) in enumerate(pieces):
        if kind == NORMAL:
            cuts = (i for i in range(1, len(text)) if text[:i] in normal and text[i:] in normal)
            ranked += [(-score, index, i, text) for i in cuts]
    return [[text[:i], text[i:]] for _, _, i, text in sorted(ranked)]


def _tokenizer_json(model: SentencePieceModel) -> dict[str, Any]:
    """Return the model as a file of the tokenizers library; it sees text whose spaces are already written as SPACE."""
    names = [text if kind == NORMAL else f"{_UNREACHABLE}{i}" for i, (text, _, kind) in enumerate(model.pieces)]
    unknown = next(i for i, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN)
    inner: dict[str, Any]
    if model.algorithm == "bpe":
        inner = {
            "type": "BPE",
            "dropout": None,
            "unk_token": names[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": _merges(model.pieces),
        }
    else:
        top = max((score for _, score, kind in model.pieces if kind == NORMAL), default=0.0)
        scores = [score if kind == NORMAL else top for _, score, kind in model.pieces]
        vocab = [[name, score] for name, score in zip(names, scores, strict=True)]
        inner = {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": False}
    charsmap = base64.b64encode(model.charsmap).decode()
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap} if model.charsmap else None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": inner,
    }


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, or an empty one if the file is not there."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CannotRead(f"{path.name} of the checkpoint is not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise BundleError(f"{path.name} holds a {type(value).__name__}, a JSON object was expected")
    return value


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


@dataclass(frozen=True)
class _Declared:
    """Tokens as the configuration files name them: by role, additional ones, and all with their JSON entry."""

    roles: dict[str, str]
    additional: tuple[str, ...]
    entries: dict[str, Any]


def _declared(config: Mapping[str, Any], special_map: Mapping[str, Any], generation: Generation) -> _Declared:
    """Return the declared special tokens; which of the two files wins depends on the generation."""
    sources = [config, special_map]
    if generation == "4.37" and "added_tokens_decoder" in config:
        sources.reverse()
    merged: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for source in sources:
        keys = (*_ROLES, "additional_special_tokens")
        merged.update({key: source[key] for key in keys if source.get(key) is not None})
    additional = merged.pop("additional_special_tokens", [])
    entries: dict[str, Any] = {}
    for token in (*merged.values(), *additional):
        if isinstance(token, dict) or _content(token) not in entries:
            entries[_content(token)] = token
    return _Declared({k: _content(v) for k, v in merged.items()}, tuple(map(_content, additional)), entries)


def _added_tokens(
    model: SentencePieceModel, declared: _Declared, ids: Mapping[str, int], entries: Mapping[str, Any], old: bool
) -> Iterator[AddedToken]:
    """Yield every token that is cut out of the text. old: generation 4.31.

    Raises BundleError for a token without an id, or with the id of another piece.
    """
    base = {text: i for i, (text, _, _) in enumerate(model.pieces)}
    for content in dict.fromkeys((*declared.entries, *ids)):
        index = ids.get(content, base.get(content))
        if index is None:
            raise BundleError(f"the special token {content} has no id in tokenizer.model or added_tokens.json")
        if index < len(base) and base.get(content) != index:
            raise BundleError(f"added_tokens.json gives {content} the id {index} of {model.pieces[index][0]}")
        entry = entries.get(content, declared.entries.get(content))
        flags = entry if isinstance(entry, dict) else {}
        if flags.get("single_word"):
            raise BundleError(f"the added token {content} has single_word, which is not supported")
        special = content in declared.entries
        strip = old and not (special and flags)
        yield AddedToken(
            content,
            index,
            special,
            # 4.37 treats an additional special token of the base vocabulary as a role token.
            index >= len(base) if old else not special or (content in declared.additional and index >= len(base)),
            bool(flags.get("lstrip", False)) or strip,
            bool(flags.get("rstrip", False)) or strip,
        )


def convert(folder: Path, generation: Generation) -> str:
    """Return the JSON text that `PublishedTokens` reads, made from a checkpoint's tokenizer files.

    folder: holds tokenizer.model and, where the checkpoint has them, added_tokens.json, tokenizer_config.json and
    special_tokens_map.json. generation: the transformers generation whose behaviour the model was trained with.

    Raises CannotRead if a file cannot be read, BundleError if the files do not fit together.
    """
    model = read_model(folder / "tokenizer.model")
    config = _read_json(folder / "tokenizer_config.json")
    declared = _declared(config, _read_json(folder / "special_tokens_map.json"), generation)
    ids = {str(k): int(v) for k, v in _read_json(folder / "added_tokens.json").items()}
    entries: dict[str, Any] = {}
    if generation == "4.37":
        for index, entry in config.get("added_tokens_decoder", {}).items():
            ids[_content(entry)] = int(index)
            entries[_content(entry)] = entry
    added = sorted(_added_tokens(model, declared, ids, entries, generation == "4.31"), key=lambda token: token.id)
    above = sorted({token.id for token in added if token.id >= len(model.pieces)})
    if above != list(range(len(model.pieces), len(model.pieces) + len(above))):
        raise BundleError(f"added token ids start at {above[0]} or have gaps; they must follow id {len(model.pieces)}")
    reserved = [[i, text, kind] for i, (text, _, kind) in enumerate(model.pieces) if kind != NORMAL]
    return json.dumps(
        {
            "format": FORMAT,
            "generation": generation,
            "legacy": config.get("legacy") is not False,
            "add_bos": config.get("add_bos_token", True) is not False,
            "roles": declared.roles,
            "byte_fallback": model.byte_fallback,
            "add_dummy_prefix": model.add_dummy_prefix,
            "remove_extra_whitespaces": model.remove_extra_whitespaces,
            "escape_whitespaces": model.escape_whitespaces,
            "unknown_surface": model.unknown_surface,
            "reserved": reserved,
            "added": [[t.content, t.id, t.special, t.apart, t.lstrip, t.rstrip] for t in added],
            "tokenizer": _tokenizer_json(model),
        },
        ensure_ascii=False,
        separators=(",", ":"),
    )


# --- run time ---------------------------------------------------------------------------------------------------------


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

    text: what `convert` returned. Raises BundleError if it is something else.
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
        self._user_pattern = _one_of((*self._user, _UNREACHABLE))
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

    def plain(self, text: str) -> str:
        """Return `text` without the names of added tokens and tags of the vocabulary: nothing typed becomes one.

        The brackets fall away and the word stays: `<SEG>` becomes `SEG`. Repeated until no name is left.
        """
        while self._tag_pattern and self._tag_pattern.search(text):
            text = self._tag_pattern.sub(lambda match: re.sub(r"[<>|/]", "", match[0]), text)
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
