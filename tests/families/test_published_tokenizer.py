"""What a checkpoint's tokenizer files say is kept: models written by the test, with what the tiny checkpoints lack."""

import json
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edgemed.errors import BundleError, CannotRead
from edgemed.families.published_tokenizer import convert, read_model
from edgemed.families.published_tokens import Generation, PublishedTokens


def field(number: int, value: int | bytes | float) -> bytes:
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    head = varint(number << 3 | (2 if isinstance(value, bytes) else 0))
    return head + (varint(len(value)) + value if isinstance(value, bytes) else varint(value))


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def model(
    pieces: Sequence[tuple[str, float, int]], *, algorithm: int, trainer: bytes = b"", normalizer: bytes = b""
) -> bytes:
    """Return a tokenizer.model; piece types: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""
    out = b"".join(field(1, field(1, text.encode()) + field(2, score) + field(3, kind)) for text, score, kind in pieces)
    return out + field(2, field(3, algorithm) + trainer) + field(3, normalizer)


HEAD: list[tuple[str, float, int]] = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
LETTERS: list[tuple[str, float, int]] = [(c, -8.0 - i / 10, 1) for i, c in enumerate("▁abcx0<>")]
KEEP_SPACES = field(4, 0)
NO_PREFIX = field(3, 0)


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """Return a maker of tokenizers: made(model bytes, generation, **config files)."""

    def make(data: bytes, generation: Generation = "4.37", **files: Any) -> PublishedTokens:
        (tmp_path / "tokenizer.model").write_bytes(data)
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return PublishedTokens(convert(tmp_path, generation))

    return make


def names(tokens: PublishedTokens, text: str) -> list[str]:
    return [tokens._names[i] for i in tokens.encode(text, bos=False)]


def test_bpe_joins_the_best_pair_first(made: Any) -> None:
    pieces = [*HEAD, *LETTERS, ("bc", -1.0, 1), ("ab", -2.0, 1), ("abc", -3.0, 1), ("▁a", -4.0, 1)]
    tokens = made(model(pieces, algorithm=2, normalizer=KEEP_SPACES))
    assert names(tokens, "abc") == ["▁", "abc"]  # bc first, then a + bc
    assert names(tokens, "aba") == ["▁", "ab", "a"]
    assert names(tokens, "a  a") == ["▁a", "▁", "▁a"]


def test_unigram_takes_the_likeliest_path(made: Any) -> None:
    pieces = [*HEAD, *LETTERS, ("▁ab", -5.0, 1), ("bc", -2.0, 1), ("▁a", -3.5, 1)]
    tokens = made(model(pieces, algorithm=1, normalizer=KEEP_SPACES))
    assert names(tokens, "abc") == ["▁a", "bc"]  # -5.5 against -13.3
    assert names(tokens, "ab") == ["▁ab"]


@pytest.mark.parametrize("algorithm", [1, 2])
def test_characters_without_a_piece_are_one_unknown_in_a_row(made: Any, algorithm: int) -> None:
    tokens = made(model([*HEAD, *LETTERS], algorithm=algorithm, normalizer=KEEP_SPACES))
    assert names(tokens, "a龘😀b") == ["▁", "a", "<unk>", "b"]
    assert tokens.decode(tokens.encode("a龘", bos=False)) == " a<unk>"  # a role token takes a space before its text


@pytest.mark.parametrize("algorithm", [1, 2])
def test_text_that_spells_a_control_or_byte_piece_is_text(made: Any, algorithm: int) -> None:
    byte_pieces = [(f"<0x{b:02X}>", 0.0, 6) for b in range(256)]
    trainer = field(35, 1)
    tokens = made(model([*HEAD, *byte_pieces, *LETTERS], algorithm=algorithm, trainer=trainer, normalizer=KEEP_SPACES))
    assert names(tokens, "<0x00>") == ["▁", "<", "0", "x", "0", "0", ">"]
    assert names(tokens, "\ufdd07") == ["▁", "<0xEF>", "<0xB7>", "<0x90>", "<0x37>"]


def test_user_defined_pieces_stay_whole_the_longest_first(made: Any) -> None:
    pieces = [*HEAD, *LETTERS, ("ab", -1.0, 1), ("<x>", 0.0, 4), ("<x>a", 0.0, 4)]
    tokens = made(model(pieces, algorithm=2, normalizer=KEEP_SPACES + NO_PREFIX))
    assert names(tokens, "b<x>abc") == ["b", "<x>a", "b", "c"]
    assert names(tokens, "<x>bc") == ["<x>", "b", "c"]


def test_extra_spaces_are_removed_where_the_model_says_so(made: Any) -> None:
    tokens = made(model([*HEAD, *LETTERS], algorithm=1))
    assert names(tokens, "  a   b ") == ["▁", "a", "▁", "b"]
    assert names(tokens, "   ") == []
    assert tokens.decode(tokens.encode("  a   b ", bos=False)) == "a b"


ADDED = {"added_tokens": {"<new>": 11}, "tokenizer_config": {"add_bos_token": True}}


def test_old_generation_strips_beside_added_tokens_and_the_new_one_does_not(made: Any) -> None:
    data = model([*HEAD, *LETTERS], algorithm=1, normalizer=KEEP_SPACES)
    assert names(made(data, "4.31", **ADDED), "a \n<new> b") == ["▁", "a", "<new>", "▁", "b"]
    assert names(made(data, "4.37", **ADDED), "a <new> b") == ["▁", "a", "▁", "<new>", "▁", "▁", "b"]


def test_flags_of_an_added_token_are_kept(made: Any) -> None:
    entry = {"content": "<new>", "lstrip": True, "rstrip": False, "single_word": False, "special": True}
    config = {"added_tokens_decoder": {"11": entry}, "additional_special_tokens": ["<new>"]}
    tokens = made(model([*HEAD, *LETTERS], algorithm=1, normalizer=KEEP_SPACES), tokenizer_config=config)
    assert names(tokens, "a  <new> b") == ["▁", "a", "<new>", "▁", "▁", "b"]


@pytest.mark.parametrize("generation", ["4.31", "4.37"])
def test_without_legacy_only_the_first_stretch_has_a_dummy_prefix(made: Any, generation: Generation) -> None:
    config = {"legacy": False, "additional_special_tokens": ["<new>"]}
    tokens = made(
        model([*HEAD, *LETTERS], algorithm=1, normalizer=KEEP_SPACES),
        generation,
        added_tokens={"<new>": 11},
        tokenizer_config=config,
    )
    assert names(tokens, "a<new>b") == ["▁", "a", "<new>", "b"]
    assert names(tokens, "<new>b") == ["<new>", "b"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not a model", "is not a SentencePiece model"),
        (b"", "has no pieces"),
        (model([*HEAD, *LETTERS], algorithm=2)[:-3], "is not a SentencePiece model"),
        (model([*HEAD, *LETTERS], algorithm=4), "has model_type 4"),
        (model([*HEAD, ("a", 0.0, 5)], algorithm=2), "of type UNUSED"),
        (model(LETTERS, algorithm=2), "0 pieces of type UNKNOWN"),
        (model([*HEAD, *LETTERS, LETTERS[0]], algorithm=2), "the same piece twice"),
        (model([*HEAD, *LETTERS], algorithm=2, trainer=field(35, 1)), "lacks 256 byte pieces, first <0x00>"),
        (model([*HEAD, *LETTERS], algorithm=2, trainer=field(24, 1)), "treat_whitespace_as_suffix"),
    ],
)
def test_what_cannot_be_converted_is_refused(made: Any, data: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        made(data)


def test_missing_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotRead, match=r"tokenizer\.model cannot be read"):
        read_model(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"<new>": 12}, "must follow id 11"),
        ({"<new>": 4}, "gives <new> the id 4 of a"),
        ({"<s>": 2}, "the id 2 of </s>"),
    ],
)
def test_added_tokens_that_do_not_fit_the_model_are_refused(made: Any, added: dict[str, int], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        made(model([*HEAD, *LETTERS], algorithm=1), added_tokens=added)


def test_special_token_without_an_id_is_refused(made: Any) -> None:
    with pytest.raises(BundleError, match="<gone> has no id"):
        made(model([*HEAD, *LETTERS], algorithm=1), special_tokens_map={"pad_token": "<gone>"})


def test_configuration_that_is_no_json_is_refused(reference: Any, tmp_path: Path) -> None:
    shutil.copy(reference("medplib-tiny") / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text("{")
    with pytest.raises(CannotRead, match=r"added_tokens\.json"):
        convert(tmp_path, "4.31")


def test_conversion_does_not_depend_on_the_run(reference: Any) -> None:
    folder = reference("medplib-tiny").folder
    assert convert(folder, "4.31") == convert(folder, "4.31")
