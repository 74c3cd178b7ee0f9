"""The code table: every name of the families is in it, codes are real, and no two things are coded alike."""

from __future__ import annotations

from collections import Counter

import pydicom.sr._concepts_dict as pydicom_codes
import pytest

from edgemed.families.medrega_labels import label_lists
from edgemed.families.native_lexicon import GROUPS, STRUCTURES
from edgemed.terminology import CATEGORIES, SIDES, Code, find_concept, read_terms

NO_STRUCTURE = {
    "abnormal", "background", "benign", "malignant", "no finding", "none", "normal", "normal or benign", "other",
    "other disease", "regular",
}  # fmt: skip
"""Labels of classification that name no place or finding."""

FROM_TOTALSEGMENTATOR = {
    "47351003": "Infiltrate", "68455001": "Iliopsoas muscle", "74281007": "Myocardium",
    "244849004": "Deep muscle of back",
}  # fmt: skip
PYDICOM = {
    (code, meaning)
    for concepts in pydicom_codes.concepts["SCT"].values()
    for code, (meaning, *_) in concepts.items()
}  # fmt: skip


def all_codes() -> list[Code]:
    terms = [code for term in read_terms().values() for code in (term.code, term.site) if code is not None]
    return [*terms, *CATEGORIES.values(), *SIDES.values()]


@pytest.mark.parametrize("term", STRUCTURES, ids=lambda term: term.key)
def test_every_structure_of_the_native_family_is_found_by_all_its_names(term) -> None:
    concepts = {find_concept(name) for name in (*term.en, *term.zh)}

    assert len(concepts) == 1
    assert concepts.pop().key == term.key


def test_sided_structures_have_a_side_and_their_groups_have_none() -> None:
    for term in STRUCTURES:
        side = find_concept(term.en[0]).side
        expected = next((SIDES[s] for s in ("left", "right") if term.key.endswith(f"_{s}")), None)
        assert side == expected, term.key
    for group in GROUPS:
        assert find_concept(group.en[0]).side is None
        assert find_concept(group.en[0]).type == find_concept(STRUCTURES[group.members[0]].en[0]).type


def test_every_label_of_the_medrega_lists_is_known_but_those_that_name_nothing() -> None:
    labels = {label.casefold() for one in label_lists().values() for label in one.labels}

    unknown = {label for label in labels if find_concept(label).key.startswith("text:")}

    assert unknown == NO_STRUCTURE & labels


def test_names_without_a_code_are_counted() -> None:
    """The number may fall where a code is found and verified, and never grows unnoticed."""
    structures = [term.key for term in STRUCTURES if not find_concept(term.en[0]).is_coded]
    terms = [term for term in read_terms().values() if term.code is None]

    assert structures == ["white_blood_cell"]
    assert len(terms) == 93


def test_no_two_things_share_code_side_and_site() -> None:
    concepts = {}
    for term in read_terms().values():
        for label in (term.en[0], f"left {term.en[0]}", f"right {term.en[0]}", f"bilateral {term.en[0]}"):
            concept = find_concept(label)
            concepts[concept.key] = concept
    shared = Counter((c.type, c.side, c.site) for c in concepts.values() if c.is_coded)

    assert [key for key, count in shared.items() if count > 1] == []


def test_no_name_means_two_things() -> None:
    names = Counter(name.lower() for term in read_terms().values() for name in (*term.en, *term.zh))

    assert [name for name, count in names.items() if count > 1] == []


def test_every_code_is_one_that_dicom_lists_or_totalsegmentator_has() -> None:
    for code in all_codes():
        known = (code.value, code.meaning) in PYDICOM or FROM_TOTALSEGMENTATOR.get(code.value) == code.meaning
        assert known, code


# Verhoeff's dihedral tables. Source: J. Verhoeff, Error Detecting Decimal Codes, 1969; SNOMED CT technical guide.
MULTIPLY = [[(a + b) % 5 if b < 5 else (a + b) % 5 + 5 for b in range(10)] for a in range(5)] + [
    [(a - b) % 5 + 5 if b < 5 else (a - b) % 5 for b in range(10)] for a in range(5, 10)
]
PERMUTE = [list(range(10)), [1, 5, 7, 6, 2, 8, 3, 0, 9, 4]]
while len(PERMUTE) < 8:
    PERMUTE.append([PERMUTE[-1][PERMUTE[1][i]] for i in range(10)])


def check_digit_holds(code: str) -> bool:
    state = 0
    for position, digit in enumerate(reversed(code)):
        state = MULTIPLY[state][PERMUTE[position % 8][int(digit)]]
    return state == 0


def test_the_check_digit_finds_one_wrong_or_two_swapped_digits() -> None:
    assert check_digit_holds("10200004")
    assert not check_digit_holds("10200005")
    assert not check_digit_holds("12000004")


def test_every_snomed_code_has_a_right_check_digit() -> None:
    assert [code for code in all_codes() if not check_digit_holds(code.value)] == []


@pytest.mark.parametrize(
    ("label", "key"),
    [
        ("LEFT KIDNEY", "kidney_left"),
        ("kidney, right", "kidney_right"),
        ("kidney (left)", "kidney_left"),
        ("both lungs", "lung_both"),
        ("双侧胸腔积液", "pleural_effusion_both"),
        ("right-sided pleural effusion", "pleural_effusion_right"),
        ("left ventricle", "left_ventricle"),
        ("右心房", "right_atrium"),
        ("right liver", "text:right liver"),
        ("某种结构", "text:某种结构"),
        ("", "text:region"),
    ],
)
def test_a_side_is_read_as_people_write_it(label: str, key: str) -> None:
    assert find_concept(label).key == key


def test_names_come_in_both_languages() -> None:
    concept = find_concept("左肾")

    assert (concept.name("en"), concept.name("zh")) == ("left kidney", "左侧肾")
