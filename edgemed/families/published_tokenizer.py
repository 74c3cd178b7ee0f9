"""From a checkpoint's tokenizer folder to the one JSON text that `published_tokens` reads, at export.

Covers the SentencePiece model of type BPE or unigram and the configuration files of the slow Llama tokenizer around it,
without SentencePiece and without transformers. Does not cover encoding and decoding (`published_tokens`), models of
type WORD and CHAR, UNUSED pieces, or training a tokenizer.

Source: behaviour of transformers 4.31.0 and 4.37.2 (recorded in tests/reference); the SentencePiece model format.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgemed.errors import BundleError, CannotRead
from edgemed.families.published_tokens import BYTE, FORMAT, NORMAL, UNKNOWN, UNREACHABLE, UNUSED, AddedToken, Generation

__all__ = ["SentencePieceModel", "convert", "read_model"]

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
    """Return the model as a file of the tokenizers library; it sees text whose spaces are already written as U+2581."""
    names = [text if kind == NORMAL else f"{UNREACHABLE}{i}" for i, (text, _, kind) in enumerate(model.pieces)]
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
    except (OSError, ValueError, RecursionError) as error:
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
