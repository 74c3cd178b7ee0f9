"""The grammar as a table of what may follow what, and its properties on random walks, without and with known boxes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemed.box_grammar import BoxGrammar, BoxState, BoxTokens, FreeGrammar
from edgemed.errors import InvalidInput

PAD, EOS, REF, REF_END, BOX, BOX_END, SEG, FIRST = range(8)
BINS, VOCABULARY = 12, 26  # 0..6 special, 7..18 coordinates, 19..25 text
TEXT = set(range(FIRST + BINS, VOCABULARY))
TOKENS = BoxTokens(
    box=BOX,
    box_end=BOX_END,
    ref=REF,
    ref_end=REF_END,
    seg=SEG,
    eos=EOS,
    first_coordinate=FIRST,
    bins=BINS,
    never=(PAD,),
)
GRAMMAR = BoxGrammar(TOKENS, VOCABULARY)
Name = tuple[int, ...]
Bins = tuple[int, int, int, int]
BOXES: dict[Name, tuple[Bins, ...]] = {
    (20,): ((1, 2, 5, 9), (1, 2, 6, 8), (3, 0, 11, 11)),
    (20, 21): ((0, 0, 1, 1),),
    (22,): ((4, 4, 5, 5), (4, 4, 5, 5)),
}
KNOWING = GRAMMAR.knowing(BOXES)
NAMES = st.lists(st.integers(20, 22), min_size=1, max_size=3).map(tuple)


def after(*tokens: int, grammar: BoxGrammar = GRAMMAR) -> BoxState:
    state = grammar.start()
    for token in tokens:
        state = grammar.advance(state, token)
    return state


def written(grammar: BoxGrammar, state: BoxState, name: Name, scores: np.random.Generator) -> tuple[Bins, BoxState]:
    """The box that random logits write after a name, and the state after its end."""
    for token in (REF, *name, REF_END):
        state = grammar.advance(state, token)
    tokens: list[int] = []
    while BOX_END not in tokens:
        logits = np.where(grammar.allowed(state), scores.standard_normal(VOCABULARY), -np.inf)
        tokens.append(int(logits.argmax()))
        state = grammar.advance(state, tokens[-1])
    assert tokens[0] == BOX and len(tokens) == 6
    x0, y0, x1, y1 = (token - FIRST for token in tokens[1:5])
    return (x0, y0, x1, y1), state


def bins(*values: int) -> list[int]:
    return [FIRST + v for v in values]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((), TEXT | {REF, EOS}),
        ((20,), TEXT | {REF, EOS}),
        ((REF,), TEXT),
        ((REF, 20), TEXT | {REF_END}),
        ((REF, 20, 21, REF_END), {BOX}),
        ((REF, 20, REF_END, BOX), set(bins(*range(BINS - 1)))),
        ((REF, 20, REF_END, BOX, *bins(4)), set(bins(*range(BINS - 1)))),
        ((REF, 20, REF_END, BOX, *bins(4, 9)), set(bins(*range(5, BINS)))),
        ((REF, 20, REF_END, BOX, *bins(4, 9, 5)), set(bins(10, 11))),
        ((REF, 20, REF_END, BOX, *bins(4, 9, 5, 11)), {BOX_END}),
        ((REF, 20, REF_END, BOX, *bins(4, 9, 5, 11), BOX_END), TEXT | {REF, EOS, SEG}),
        ((REF, 20, REF_END, BOX, *bins(4, 9, 5, 11), BOX_END, SEG), TEXT | {REF, EOS}),
        ((REF, 20, REF_END, BOX, *bins(4, 9, 5, 11), BOX_END, REF), TEXT),
    ],
)
def test_what_may_follow(tokens: tuple[int, ...], expected: set[int]) -> None:
    assert set(np.flatnonzero(GRAMMAR.allowed(after(*tokens))).tolist()) == expected


@settings(deadline=None)
@given(st.sampled_from([GRAMMAR, KNOWING]), st.lists(st.integers(0, VOCABULARY - 1), max_size=60))
def test_every_walk_has_a_next_token_and_refuses_what_is_not_allowed(grammar: BoxGrammar, wishes: list[int]) -> None:
    state = grammar.start()
    for wish in wishes:
        allowed = grammar.allowed(state)
        assert allowed.any()
        assert not allowed[PAD]
        if not allowed[wish]:
            with pytest.raises(InvalidInput, match="may not follow"):
                grammar.advance(state, wish)
            wish = int(np.flatnonzero(allowed)[wish % allowed.sum()])
        state = grammar.advance(state, wish)


@settings(deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=5), st.integers(0, 2**32))
def test_after_a_known_name_random_logits_write_one_of_its_boxes(names: list[Name], seed: int) -> None:
    scores = np.random.default_rng(seed)
    state = KNOWING.start()
    for name in names:
        box, state = written(KNOWING, state, name, scores)
        assert box[0] < box[2] and box[1] < box[3]
        if name in BOXES:
            assert box in BOXES[name]


@pytest.mark.parametrize("name", BOXES)
def test_every_known_box_can_be_written_and_leaves_no_trace(name: Name) -> None:
    for box in BOXES[name]:
        place = (REF, *name, REF_END, BOX, *bins(*box), BOX_END)
        assert replace(after(*place, grammar=KNOWING), named=frozenset()) == after(*place)


def test_a_name_without_boxes_or_given_before_is_refused() -> None:
    grammar = GRAMMAR.knowing({(20,): ((1, 2, 3, 4),), (21,): ()})
    place = (REF, 20, REF_END, BOX, *bins(1, 2, 3, 4), BOX_END)
    assert not grammar.refuses(after(REF, 20, REF_END, grammar=grammar))
    assert grammar.refuses(after(*place, REF, 20, REF_END, grammar=grammar))
    assert grammar.refuses(after(REF, 21, REF_END, grammar=grammar))
    assert not grammar.refuses(after(REF, 22, REF_END, grammar=grammar))


@settings(deadline=None)
@given(
    NAMES.filter(lambda name: name not in BOXES),
    st.tuples(*[st.integers(0, BINS - 1)] * 4).filter(lambda b: b[0] < b[2] and b[1] < b[3]),
)
def test_after_an_unknown_name_the_choice_is_free(name: Name, box: Bins) -> None:
    tokens = (REF, *name, REF_END, BOX, *bins(*box), BOX_END)
    for count in range(len(tokens) + 1):
        known, free = after(*tokens[:count], grammar=KNOWING), after(*tokens[:count])
        np.testing.assert_array_equal(KNOWING.allowed(known), GRAMMAR.allowed(free))


def test_known_coordinates_depend_on_those_before() -> None:
    def choices(*tokens: int) -> list[int]:
        state = after(REF, 20, REF_END, BOX, *tokens, grammar=KNOWING)
        return np.flatnonzero(KNOWING.allowed(state)).tolist()  # type: ignore[no-any-return]

    assert choices() == bins(1, 3)
    assert choices(*bins(1)) == bins(2)
    assert choices(*bins(1, 2)) == bins(5, 6)
    assert choices(*bins(1, 2, 6)) == bins(8)
    assert choices(*bins(3)) == bins(0)


def test_knowing_boxes_leaves_the_grammar_it_was_made_from_free() -> None:
    place = (REF, 20, REF_END, BOX)
    assert set(np.flatnonzero(GRAMMAR.allowed(after(*place)))) == set(bins(*range(BINS - 1)))
    again = KNOWING.knowing({})
    np.testing.assert_array_equal(again.allowed(after(*place, grammar=again)), GRAMMAR.allowed(after(*place)))


def test_masks_cannot_be_changed_by_a_caller() -> None:
    for grammar in (GRAMMAR, KNOWING):
        for state in (after(grammar=grammar), after(REF, 20, REF_END, BOX, grammar=grammar)):
            with pytest.raises(ValueError, match="read-only"):
                grammar.allowed(state)[0] = True


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(InvalidInput, match="do not fit"):
        BoxGrammar(TOKENS, FIRST + BINS - 1)
    with pytest.raises(InvalidInput, match="no text token"):
        BoxGrammar(TOKENS, FIRST + BINS)
    for token in (-1, VOCABULARY):
        with pytest.raises(InvalidInput):
            GRAMMAR.advance(GRAMMAR.start(), token)
        with pytest.raises(InvalidInput):
            FreeGrammar(VOCABULARY).advance(0, token)


def test_the_free_grammar_allows_everything() -> None:
    free = FreeGrammar(VOCABULARY)
    assert free.allowed(free.advance(free.start(), PAD)).all()


def test_the_free_grammar_can_keep_one_token_from_the_start() -> None:
    free = FreeGrammar(VOCABULARY, not_first=EOS)
    assert set(np.flatnonzero(~free.allowed(free.start()))) == {EOS}
    assert free.allowed(free.advance(free.start(), 20)).all()
    assert free.allowed(free.advance(free.advance(free.start(), 20), EOS)).all()
    assert FreeGrammar(VOCABULARY).allowed(0).all()
    assert not FreeGrammar(VOCABULARY, not_first=0).allowed(0)[0]  # id 0 is a token as any other
    with pytest.raises(ValueError, match="read-only"):
        free.allowed(free.start())[EOS] = True


def test_what_may_not_come_first_may_come_later() -> None:
    grammar = GRAMMAR.knowing({}, never_first=(20, 21))
    start = grammar.start()
    assert not grammar.allowed(start)[[20, 21]].any()
    assert grammar.allowed(start)[22]
    assert grammar.allowed(grammar.advance(start, 22))[[20, 21]].all()
    assert GRAMMAR.allowed(GRAMMAR.start())[[20, 21]].all()
