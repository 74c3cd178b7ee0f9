"""The names: unique, complete in both languages, found again."""

from collections import Counter

import pytest

from edgemed.families.native_lexicon import (
    BODY_PARTS,
    EN_PLURAL,
    GROUPS,
    MODALITIES,
    STRUCTURES,
    UNKNOWN_NAMES,
    Term,
    structure_of,
)


def test_structures_keep_their_places() -> None:
    keys = [term.key for term in STRUCTURES]
    assert keys[:4] == ["liver", "spleen", "stomach", "aorta"]
    assert keys.index("urinary_bladder") == 15
    assert keys.index("white_blood_cell") == 43


@pytest.mark.parametrize("terms", [STRUCTURES, MODALITIES, BODY_PARTS, UNKNOWN_NAMES])
def test_every_term_has_both_languages_and_a_key_of_its_own(terms: tuple[Term, ...]) -> None:
    assert len({term.key for term in terms}) == len(terms)
    for term in terms:
        assert term.en, term.key
        assert term.zh, term.key
        assert all(name == name.strip() and name for name in (*term.en, *term.zh))


def test_no_name_means_two_things() -> None:
    names = Counter(name.lower() for term in (*STRUCTURES, *GROUPS, *UNKNOWN_NAMES) for name in {*term.en, *term.zh})
    assert [name for name, count in names.items() if count > 1] == []


def test_every_name_finds_its_structure() -> None:
    for index, term in enumerate(STRUCTURES):
        for name in (*term.en, *term.zh):
            assert structure_of(name) == index
            assert structure_of(f" The {name.upper()} ") == index


def test_other_names_find_nothing() -> None:
    assert all(structure_of(name) is None for term in (*UNKNOWN_NAMES, *GROUPS) for name in (*term.en, *term.zh))


def test_plurals_are_structures() -> None:
    assert {term.key for term in STRUCTURES} >= EN_PLURAL
