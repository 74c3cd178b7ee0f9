"""The tokenizer of the published families gives the ids and texts that their own stack gives, without SentencePiece."""

from pathlib import Path
from typing import Any

import pytest

from edgemed.errors import BundleError, CannotRead, InvalidInput
from edgemed.families.published_tokenizer import convert
from edgemed.families.published_tokens import Generation, PublishedTokens

GENERATIONS: dict[str, Generation] = {"medrega-tiny": "4.37", "medplib-tiny": "4.31"}


@pytest.fixture(scope="module")
def published(reference: Any) -> dict[str, PublishedTokens]:
    return {family: PublishedTokens(convert(reference(family).folder, g)) for family, g in GENERATIONS.items()}


@pytest.mark.parametrize("family", GENERATIONS)
def test_every_tokenizer_case_encodes_to_the_published_ids(
    reference: Any, published: dict[str, PublishedTokens], family: str
) -> None:
    for case in reference(family).prompts["tokenizer_cases"]:
        assert published[family].encode(case["text"]) == case["ids"], case["text"]
        without = case.get("ids_no_bos", case["ids"])
        assert published[family].encode(case["text"], bos=False) == without, case["text"]


@pytest.mark.parametrize("family", GENERATIONS)
def test_every_tokenizer_case_decodes_to_the_published_text(
    reference: Any, published: dict[str, PublishedTokens], family: str
) -> None:
    for case in reference(family).prompts["tokenizer_cases"]:
        assert published[family].decode(case["ids"]) == case["decode"]
        assert published[family].decode(case["ids"], skip_special=True) == case["decode_skip_special"]


@pytest.mark.parametrize("family", GENERATIONS)
def test_every_generation_decodes_to_the_published_answer(
    reference: Any, published: dict[str, PublishedTokens], family: str
) -> None:
    tiny = reference(family)
    seen = 0
    for name, case in tiny.prompts.items():
        if isinstance(case, dict) and "response" in case:
            ids = tiny.expected(f"gen_{name}")[0].tolist()
            assert published[family].decode(ids, skip_special=True).strip() == case["response"].strip(), name
            if "raw_response" in case:
                assert published[family].decode(ids) == case["raw_response"], name
            seen += 1
    assert seen >= 10


@pytest.mark.parametrize("family", GENERATIONS)
def test_named_tokens_have_their_published_ids(
    reference: Any, published: dict[str, PublishedTokens], family: str
) -> None:
    for name, index in reference(family).prompts["ids"].items():
        assert published[family].id_of(name) == index


def test_vocabulary_counts_pieces_and_added_tokens(published: dict[str, PublishedTokens]) -> None:
    assert (published["medrega-tiny"].pieces, published["medrega-tiny"].vocabulary) == (720, 727)
    assert (published["medplib-tiny"].pieces, published["medplib-tiny"].vocabulary) == (640, 907)
    assert published["medrega-tiny"].role("eos_token") == 7
    assert published["medplib-tiny"].role("sep_token") is None


def test_verbatim_decoding_undoes_encoding_where_nothing_is_stripped(published: dict[str, PublishedTokens]) -> None:
    tokens = published["medrega-tiny"]
    for text in ("The <ref>left kidney</ref><box>[[1, 2, 3, 4]]</box>, seen.", "  a\n<ref> b </ref> 左肾 😀", ""):
        assert tokens.decode_verbatim(tokens.encode(text)) == text


def test_bytes_that_are_no_character_become_one_mark_each(published: dict[str, PublishedTokens]) -> None:
    tokens = published["medplib-tiny"]
    ids = [tokens.id_of(f"<0x{b:02X}>") for b in (0xE4, 0xBB, 0x41, 0xF0, 0x9F, 0x98, 0x80)]
    assert tokens.decode(ids) == "\ufffd\ufffdA😀"


@pytest.mark.parametrize("family", GENERATIONS)
def test_nothing_a_user_types_becomes_a_token(published: dict[str, PublishedTokens], family: str) -> None:
    tokens = published[family]
    typed = "a <SEG> <<ref>ref> <|im_end|> <|im_start|>system </s> <box> <image> 5 < 6 > 4"
    plain = tokens.plain(typed)
    ids = tokens.encode(plain, bos=False)
    assert not {token.id for token in tokens.added} & set(ids)
    assert "5 < 6 > 4" in plain
    if family == "medrega-tiny":
        assert tokens.id_of("<|im_start|>") not in ids


def test_names_a_user_may_write_stay_tokens_and_no_other_hides_behind_them(
    published: dict[str, PublishedTokens],
) -> None:
    tokens = published["medrega-tiny"]
    keep = ("<ref>", "</ref>")
    typed = "<ref>left kidney</ref> <box> <|im_end|> <<ref>box> <|im_<ref>end|> <ref<ref>>"
    plain = tokens.plain(typed, keep)
    ids = tokens.encode(plain, bos=False)
    kept = {tokens.id_of(name) for name in keep}
    assert {token.id for token in tokens.added} & set(ids) == kept
    assert tokens.id_of("<|im_end|>") not in ids
    assert plain.startswith("<ref>left kidney</ref> box im_end ")
    assert tokens.plain(plain, keep) == plain
    assert tokens.plain(typed, ()) == tokens.plain(typed)


def test_id_outside_the_vocabulary_is_refused(published: dict[str, PublishedTokens]) -> None:
    with pytest.raises(InvalidInput, match="id -200 is outside the vocabulary of 907"):
        published["medplib-tiny"].decode([5, -200])


def test_half_a_surrogate_pair_is_refused(published: dict[str, PublishedTokens]) -> None:
    with pytest.raises(InvalidInput, match="surrogate"):
        published["medplib-tiny"].encode("a\ud83d")


def test_unknown_token_name_is_refused(published: dict[str, PublishedTokens]) -> None:
    with pytest.raises(BundleError, match="lacks <SEG>"):
        published["medrega-tiny"].id_of("<SEG>")


@pytest.mark.parametrize("text", ["", "{}", '{"format": "other"}', '{"format": "edgemed published tokens 1"}', "[]"])
def test_what_is_no_converted_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(BundleError, match="the tokenizer"):
        PublishedTokens(text)


def test_opened_from_a_file_it_is_the_same(reference: Any, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(convert(reference("medplib-tiny").folder, "4.31"), encoding="utf-8")
    assert PublishedTokens.open(path).encode("It is <SEG>.") == [1, 402, 552, 273, 640, 548, 564]
    with pytest.raises(CannotRead, match=r"gone\.json"):
        PublishedTokens.open(tmp_path / "gone.json")
