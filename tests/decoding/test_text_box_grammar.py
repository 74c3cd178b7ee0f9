"""Boxes as text: what may follow what, and its properties over the tiny vocabulary and one whose numbers are merged."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from edgemed.decoding import Decoded, DecodeOptions, decode
from edgemed.errors import InvalidInput
from edgemed.families.medrega_text import Found, boxes_text, parse, place_text
from edgemed.families.published_tokenizer import convert
from edgemed.families.published_tokens import PublishedTokens
from edgemed.text_box_grammar import (
    HIGHEST,
    MOST_BOXES,
    MOST_NAME_TOKENS,
    KnownPlace,
    TextBoxGrammar,
    TextBoxState,
    TextBoxTokens,
    TextGrammar,
    text_bytes,
)

COMPACT = Path(__file__).resolve().parents[1] / "reference"
TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<|im_end|>")
NAMES = ("liver", "left kidney", "肝脏", "a < b")
Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer with its grammar."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    texts: tuple[bytes, ...]
    grammar: TextBoxGrammar

    @property
    def tokens(self) -> TextBoxTokens:
        return self.grammar.tokens

    def after(self, text: str, grammar: TextBoxGrammar | None = None) -> TextBoxState:
        grammar = grammar or self.grammar
        state = grammar.start()
        for token in self.encode(text):
            state = grammar.advance(state, token)
        return state

    def choices(self, text: str) -> set[int]:
        """Return what may follow a text."""
        return set(np.flatnonzero(self.grammar.allowed(self.after(text))).tolist())

    def known(self, name: str, *boxes: Box) -> KnownPlace:
        ids = self.encode(f"<ref>{name}</ref>")[1:-1]
        return KnownPlace(tuple(ids), tuple(itertools.chain(*boxes)))

    def drafted(self, text: str, *known: KnownPlace) -> str:
        """Return the draft after a text, as text."""
        grammar = self.grammar.knowing(known)
        return self.decode(grammar.draft(self.after(text, grammar)))


def grammar_of(encode: Any, decode: Any, tokens: TextBoxTokens, known: int, vocabulary: int) -> Vocabulary:
    texts = text_bytes(decode, known, reserved={*vars(tokens).values()})
    return Vocabulary(encode, decode, texts, TextBoxGrammar(tokens, encode, texts, vocabulary))


def published() -> Vocabulary:
    """The tiny vocabulary: digits are tokens, brackets are bytes; three ids that the decoder has and it lacks."""
    tokens = PublishedTokens(convert(COMPACT / "medrega-tiny", "4.37"))
    reserved = {token.id for token in tokens.added}
    texts = text_bytes(tokens.decode_verbatim, tokens.vocabulary, reserved)
    ids = TextBoxTokens(*map(tokens.id_of, TAGS))
    grammar = TextBoxGrammar(ids, tokens.encode, texts, tokens.vocabulary + 3)
    return Vocabulary(tokens.encode, tokens.decode_verbatim, texts, grammar)


def merged() -> Vocabulary:
    """A vocabulary trained on boxes: numbers are one to three tokens, often joined with the marks around them."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, HIGHEST + 2)  # some numbers are common and get a token of their own
    numbers = rng.choice(HIGHEST + 1, (3000, 8), p=weights / weights.sum())
    lines = ["[[{}, {}, {}, {}], [{}, {}, {}, {}]] liver < >".format(*row) for row in numbers]
    space = "\u2581"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=space, prepend_scheme="never")
    alphabet = [*"0123456789[],<>/abcdefghijklmnopqrstuvwxyz", space, *"肝脏左肾"]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=list(TAGS), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(lines, trainer)
    pieces = [str(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]
    assert any(re.fullmatch(f"{space}\\d\\d,", piece) for piece in pieces), "numbers with marks in one token"

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def read(ids: Sequence[int]) -> str:
        return "".join(pieces[i] for i in ids).replace(space, " ")

    tokens = TextBoxTokens(*(pieces.index(tag) for tag in TAGS))
    return grammar_of(encode, read, tokens, len(pieces), len(pieces))


@pytest.fixture(scope="module", params=[published, merged], ids=["published", "merged"])
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    made: Vocabulary = request.param()
    return made


@pytest.fixture(scope="module")
def tiny() -> Vocabulary:
    return published()


def boxes(draw: st.DrawFn) -> Box:
    x0, x1 = sorted(draw(st.lists(st.integers(0, HIGHEST), min_size=2, max_size=2, unique=True)))
    y0, y1 = sorted(draw(st.lists(st.integers(0, HIGHEST), min_size=2, max_size=2, unique=True)))
    return x0, y0, x1, y1


BOXES = st.composite(boxes)()


# --- what may follow what ---------------------------------------------------------------------------------------------


def test_free_text_has_a_name_to_begin_but_no_other_tag(vocabulary: Vocabulary) -> None:
    t = vocabulary.tokens
    for text in ("", "a", "<ref>a</ref><box>[[1, 2, 3, 4]]</box>"):
        choices = vocabulary.choices(text)
        assert t.ref in choices
        assert (t.eos in choices) == bool(text)
        assert not choices & {t.ref_end, t.box, t.box_end}
        assert {*vocabulary.encode("a"), *vocabulary.encode("肝")} <= choices


def test_no_id_that_is_not_text_is_ever_allowed(vocabulary: Vocabulary) -> None:
    t = vocabulary.tokens
    silent = {i for i, text in enumerate(vocabulary.texts) if not text} - {*vars(t).values()}
    above = set(range(len(vocabulary.texts), vocabulary.grammar.vocabulary))
    for text in ("", "a", "<ref>", "<ref>a", "<ref>a</ref>", "<ref>a</ref><box>[[1,"):
        assert not vocabulary.choices(text) & (silent | above)


def test_without_places_there_is_free_text_alone(vocabulary: Vocabulary) -> None:
    grammar = vocabulary.grammar.without_places()
    for text in ("", "a"):
        without = vocabulary.grammar.allowed(vocabulary.after(text)).copy()
        without[vocabulary.tokens.ref] = False
        np.testing.assert_array_equal(grammar.allowed(vocabulary.after(text, grammar)), without)


def test_a_name_is_1_to_48_tokens_and_its_box_follows(vocabulary: Vocabulary) -> None:
    t, (letter,) = vocabulary.tokens, vocabulary.encode("a")
    assert not vocabulary.choices("<ref>") & {*vars(t).values()}
    state = vocabulary.after("<ref>")
    for _ in range(MOST_NAME_TOKENS):
        state = vocabulary.grammar.advance(state, letter)
    assert np.flatnonzero(vocabulary.grammar.allowed(state)).tolist() == [t.ref_end]
    assert vocabulary.choices("<ref>a") & {*vars(t).values()} == {t.ref_end}
    assert vocabulary.choices("<ref>a</ref>") == {t.box}
    assert vocabulary.choices("<ref>a</ref><box>[[1, 2, 3, 4]]") == {t.box_end}


def test_a_list_ends_after_32_boxes(vocabulary: Vocabulary) -> None:
    numbers = [(1, 2, 3, 4)] * MOST_BOXES
    vocabulary.after(place_text("a", numbers))
    with pytest.raises(InvalidInput, match="may not follow"):
        vocabulary.after(place_text("a", [*numbers, (1, 2, 3, 4)]))


@settings(deadline=None, max_examples=200)
@given(name=st.sampled_from(NAMES), listed=st.lists(BOXES, min_size=1, max_size=4), said=st.sampled_from(["", ", a"]))
def test_every_place_can_be_written_as_the_tokenizer_spells_it(
    vocabulary: Vocabulary, name: str, listed: list[Box], said: str
) -> None:
    assert vocabulary.grammar.allowed(vocabulary.after(place_text(name, listed) + said))[vocabulary.tokens.eos]


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("[[0, 1, 2, 3]]", "[[00, 1, 2, 3]]"),
        ("[[998, 0, 999, 1]]", "[[999, 0, 999, 1]]"),
        ("[[0, 998, 1, 999]]", "[[0, 999, 1, 999]]"),
        ("[[50, 0, 51, 1]]", "[[50, 0, 50, 1]]"),
        ("[[50, 0, 500, 1]]", "[[50, 0, 5, 1]]"),
        ("[[0, 199, 1, 200]]", "[[0, 199, 1, 199]]"),
        ("[[0, 199, 1, 200]]", "[[0, 199, 1, 20]]"),
        ("[[0, 1, 2, 3]]", "[[0, 1, 2, 1000]]"),
        ("[[0, 1, 2, 3]]", "[[0, 1, 2]]"),
        ("[[0, 1, 2, 3]]", "[[0,1,2,3]]"),
        ("[[0, 1, 2, 3], [4, 5, 6, 7]]", "[[0, 1, 2, 3],[4, 5, 6, 7]]"),
        ("[[0, 1, 2, 3]]", "[[0, 1, 2, 3, 4]]"),
    ],
)
def test_a_box_that_is_none_cannot_be_written(vocabulary: Vocabulary, good: str, bad: str) -> None:
    vocabulary.after(f"<ref>a</ref><box>{good}</box>")
    with pytest.raises(InvalidInput, match="may not follow"):
        vocabulary.after(f"<ref>a</ref><box>{bad}</box>")


def test_a_digit_is_allowed_only_where_a_box_can_come_of_it(tiny: Vocabulary) -> None:
    def digits(text: str) -> str:
        return "".join(sorted(tiny.decode([i]) for i in tiny.choices(f"<ref>a</ref><box>{text}")))

    assert digits("[[") == "0123456789"
    assert digits("[[9") == ",0123456789"
    assert digits("[[99") == ",012345678"
    assert digits("[[0") == ","
    assert digits("[[997, 0, ") == "9"
    assert digits("[[997, 0, 9") == "9"
    assert digits("[[997, 0, 99") == "89"
    assert digits("[[40, 700, 50, ") == "789"
    assert digits("[[40, 700, 50, 7") == "0123456789"
    assert digits("[[40, 700, 50, 70") == "123456789"
    assert digits("[[40, 700, 50, 701") == "]"


@pytest.mark.parametrize("tag", ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"])
def test_a_tag_is_not_spelled_letter_by_letter(vocabulary: Vocabulary, tag: str) -> None:
    letters = [vocabulary.encode(letter)[0] for letter in tag]
    for before in ([], vocabulary.encode("a<")):
        for start in ([], vocabulary.encode("<ref>a")):
            state = vocabulary.grammar.start()
            for token in (*start, *before, *letters[:-1]):
                state = vocabulary.grammar.advance(state, token)
            assert not vocabulary.grammar.allowed(state)[letters[-1]]
            state = vocabulary.grammar.advance(state, vocabulary.encode("a")[0])
            assert vocabulary.grammar.allowed(state)[letters[-1]]


def test_boxes_are_not_spelled_outside_of_tags(vocabulary: Vocabulary) -> None:
    (bracket,) = set(vocabulary.encode("[")) - set(vocabulary.encode(" "))
    for text, allowed in (("a", True), ("a[", False), ("a[ ", False), ("a[a", True), ("[肝", False)):
        assert vocabulary.grammar.allowed(vocabulary.after(text))[bracket] == allowed, text


@pytest.mark.parametrize("token", [-1, 10**6])
@pytest.mark.parametrize("text", ["", "<ref>a</ref><box>[[1,"])
def test_an_id_outside_the_vocabulary_is_refused(vocabulary: Vocabulary, text: str, token: int) -> None:
    with pytest.raises(InvalidInput, match="may not follow"):
        vocabulary.grammar.advance(vocabulary.after(text), token)


# --- vocabularies -----------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of a few tags and single characters; `joined` are more pieces, the longest match counts."""

    def __init__(self, *joined: str, without: str = "") -> None:
        self.pieces = [*TAGS, *(c for c in "0123456789[],abc <>" if c not in without), "", *joined]
        self.pattern = re.compile("|".join(re.escape(p) for p in sorted(self.pieces, key=len, reverse=True) if p))

    def encode(self, text: str) -> list[int]:
        unknown = re.sub(self.pattern, "", text)
        return [self.pieces.index(p) for p in self.pattern.findall(text)] + [self.pieces.index("")] * len(unknown)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids)

    def grammar(self) -> Vocabulary:
        return grammar_of(self.encode, self.decode, TextBoxTokens(0, 1, 2, 3, 4), len(self.pieces), len(self.pieces))


def test_joined_marks_are_one_token() -> None:
    letters = Letters("[[", "]]", "],", ", ", " [")
    with pytest.raises(InvalidInput, match="no tokens of their own"):
        letters.grammar()
    made = Letters("[[", "]]", "],", " [").grammar()
    assert not {made.decode([i]) for i in made.choices("a")} & {"[["}, "free text begins no list of boxes"
    assert {made.decode([i]) for i in made.choices("<ref>a</ref><box>[[1, 2, 3, 45")} == {*"0123456789", "]]", "],"}
    made.after("<ref>a</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>")


def test_a_vocabulary_that_cannot_spell_boxes_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no tokens of their own"):
        Letters(without="]").grammar()
    with pytest.raises(InvalidInput, match="no text token"):
        TextBoxGrammar(TextBoxTokens(0, 1, 2, 3, 4), lambda text: [], [b"", b">"], 10)
    with pytest.raises(InvalidInput, match="do not fit"):
        TextBoxGrammar(TextBoxTokens(0, 1, 2, 3, 4), lambda text: [], [b"a"], 4)


# --- drafts -----------------------------------------------------------------------------------------------------------

ONE, TWO, THREE = (10, 20, 300, 400), (10, 25, 300, 400), (7, 8, 9, 10)


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ("", ""),
        ("a", ""),
        ("<ref>liver", ""),
        ("<ref>liver</ref>", f"<box>{boxes_text([ONE, THREE])}</box>"),
        ("<ref>spleen</ref>", f"<box>{boxes_text([TWO])}</box>"),
        ("<ref>a</ref>", f"<box>{boxes_text([TWO])}</box>"),
        ("<ref>a</ref><box>[[10, 20,", " 300, 400], [7, 8, 9, 10]]</box>"),
        ("<ref>liver</ref><box>[[10, 25,", " 300, 400]]</box>"),
        ("<ref>a</ref><box>[[7,", " 8, 9, 10]]</box>"),
        ("<ref>a</ref><box>[[8,", ""),
        ("<ref>a</ref><box>[[1, 2, 3, 4],", " [10, 25, 300, 400]]</box>"),
        ("<ref>a</ref><box>[[10, 25, 300, 400],", " [10, 20, 300, 400]]</box>"),
        ("<ref>a</ref><box>[[10, 20, 300, 400],", " [7, 8, 9, 10]]</box>"),
        ("<ref>a</ref><box>[[1, 2, 3, 4]]", ""),
        ("<ref>a</ref><box>[[1, 2, 3, 4]]</box>, <ref>b</ref>", "<box>[[1, 2, 3, 4]]</box>"),
        ("<ref>a</ref><box>[[1, 2, 3, 4]]</box>, <ref>liver</ref>", f"<box>{boxes_text([ONE, THREE])}</box>"),
    ],
)
def test_a_known_box_is_proposed_where_it_agrees(vocabulary: Vocabulary, text: str, draft: str) -> None:
    known = vocabulary.known("spleen", TWO), vocabulary.known("liver", ONE, THREE)
    assert vocabulary.drafted(text, *known) == draft


def test_a_number_is_finished_as_it_was_begun(tiny: Vocabulary) -> None:
    known = tiny.known("liver", (123, 45, 678, 901))
    ids = tiny.encode(place_text("a", [(123, 45, 678, 901)]))
    named = len(tiny.encode("<ref>a</ref>"))
    for count in range(named, len(ids) - 1):
        assert tiny.drafted(tiny.decode(ids[:count]), known) == tiny.decode(ids[count:])
    assert tiny.drafted("<ref>a</ref><box>[[123, 5", known) == ""


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.lists(BOXES, min_size=1, max_size=3), min_size=1, max_size=3), st.lists(BOXES, max_size=2), st.data()
)
def test_a_draft_is_always_allowed_and_ends_the_list(
    vocabulary: Vocabulary, known: list[list[Box]], written: list[Box], data: st.DataObject
) -> None:
    places = [vocabulary.known("b", *listed) for listed in known]
    ids = vocabulary.encode(place_text("a", [*written, known[0][0]]))
    count = data.draw(st.integers(0, len(ids)))
    grammar = vocabulary.grammar.knowing(places)
    state = grammar.start()
    for token in ids[:count]:
        state = grammar.advance(state, token)
    draft = grammar.draft(state)
    for token in draft:
        state = grammar.advance(state, token)
    assert not draft or draft[-1] == vocabulary.tokens.box_end


# --- whole answers from random logits ---------------------------------------------------------------------------------


class Noise:
    """A decoder of random logits, which depend on the position alone; some tokens come more often."""

    backend, device = "fake", "none"

    def __init__(self, table: npt.NDArray[np.float32]) -> None:
        self.table = table
        self.seed = 0

    def run(self, feeds: Any) -> dict[str, npt.NDArray[Any]]:
        past, start = int(feeds["past_length"][0]), int(feeds["logits_from"][0])
        rows = (np.arange(past + start, past + feeds["input_ids"].shape[1]) * 31 + self.seed * 97) % len(self.table)
        return {"logits": self.table[rows][None], "hidden": np.zeros((1, len(rows), 1), np.float32)}


def noise(vocabulary: Vocabulary) -> Noise:
    t = vocabulary.tokens
    table = np.random.default_rng(5).normal(0, 3, (1499, vocabulary.grammar.vocabulary)).astype(np.float32)
    table[:, [t.ref, t.ref_end]] += 5  # else an answer would hardly have a place
    table[:, t.eos] += 2
    return Noise(table)


def answer(vocabulary: Vocabulary, runner: Noise, seed: int) -> Decoded:
    runner.seed = seed
    options = DecodeOptions(eos_id=vocabulary.tokens.eos, max_new_tokens=80, seed=seed, temperature=seed % 2)
    return decode(runner, [0], {}, vocabulary.grammar, options)  # type: ignore[arg-type]


def places_of(vocabulary: Vocabulary, ids: Sequence[int]) -> list[str]:
    """Return the lists of boxes between the tags, read from the ids alone."""
    t = vocabulary.tokens
    starts = [i for i, token in enumerate(ids) if token == t.box]
    return [vocabulary.decode(ids[i + 1 : ids.index(t.box_end, i)]) for i in starts]


def check_answers(vocabulary: Vocabulary, count: int) -> None:
    runner = noise(vocabulary)
    seen = 0
    for seed in range(count):
        ids = answer(vocabulary, runner, seed).ids
        found = [piece for piece in parse(vocabulary.decode(ids)) if isinstance(piece, Found)]
        assert not any(place.dropped for place in found)
        assert [boxes_text(place.boxes) for place in found] == places_of(vocabulary, ids)
        seen += len(found)
    assert seen > count / 2


def test_random_logits_write_boxes_that_are_read_as_they_were_written(vocabulary: Vocabulary) -> None:
    check_answers(vocabulary, 1000)


@pytest.mark.slow
def test_ten_thousand_answers_are_read_as_they_were_written(vocabulary: Vocabulary) -> None:
    check_answers(vocabulary, 10_000)


class Known:
    """Proposes what the grammar drafts."""

    def __init__(self, grammar: TextBoxGrammar) -> None:
        self.grammar = grammar

    def propose(self, ids: Sequence[int], state: TextBoxState, guesses: Any) -> tuple[int, ...]:
        return self.grammar.draft(state)


def test_drafts_and_forced_tokens_change_calls_and_not_the_answer(vocabulary: Vocabulary) -> None:
    runner = noise(vocabulary)
    calls = [0, 0]
    for seed in range(100):
        runner.seed = seed
        grammar = vocabulary.grammar.knowing([vocabulary.known("a", (seed, 2, 800, 900))])
        options = DecodeOptions(eos_id=vocabulary.tokens.eos, max_new_tokens=80, seed=seed, temperature=seed % 2)
        plain = decode(runner, [0], {}, grammar, options)  # type: ignore[arg-type]
        fast = decode(runner, [0], {}, grammar, options, Known(grammar))  # type: ignore[arg-type]
        assert fast.ids == plain.ids
        calls = [calls[0] + plain.decoder_calls, calls[1] + fast.decoder_calls]
    assert calls[1] < calls[0]


# --- free text --------------------------------------------------------------------------------------------------------


def test_free_text_is_what_is_allowed_in_any_order() -> None:
    grammar = TextGrammar(5, allowed=[1, 2, 3], not_first=[3])
    state = grammar.start()
    assert np.flatnonzero(grammar.allowed(state)).tolist() == [1, 2]
    for token in (1, 3, 2, 3):
        state = grammar.advance(state, token)
        assert np.flatnonzero(grammar.allowed(state)).tolist() == [1, 2, 3]
        assert not grammar.refuses(state)
    for token in (0, 4, 5, -1):
        with pytest.raises(InvalidInput, match="may not follow"):
            grammar.advance(state, token)
    with pytest.raises(InvalidInput, match="may begin with"):
        TextGrammar(5, allowed=[3], not_first=[3])
