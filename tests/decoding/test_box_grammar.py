"""The grammar as a table of what may follow what, and its properties on random walks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
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


def after(*tokens: int) -> BoxState:
    state = GRAMMAR.start()
    for token in tokens:
        state = GRAMMAR.advance(state, token)
    return state


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


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=60))
def test_every_walk_has_a_next_token_and_refuses_what_is_not_allowed(wishes: list[int]) -> None:
    state = GRAMMAR.start()
    for wish in wishes:
        allowed = GRAMMAR.allowed(state)
        assert allowed.any()
        assert not allowed[PAD]
        if not allowed[wish]:
            with pytest.raises(InvalidInput, match="may not follow"):
                GRAMMAR.advance(state, wish)
            wish = int(np.flatnonzero(allowed)[wish % allowed.sum()])
        state = GRAMMAR.advance(state, wish)


def test_masks_cannot_be_changed_by_a_caller() -> None:
    for state in (after(), after(REF, 20, REF_END, BOX)):
        with pytest.raises(ValueError, match="read-only"):
            GRAMMAR.allowed(state)[0] = True


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
