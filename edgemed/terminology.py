"""What the names of structures and findings mean: SNOMED CT codes with category, site and side, English, Chinese.

Covers every name that a family is known to give and the usual ways of saying a side. A name that is not in the table
keeps its words and gets the generic code of its category; no code is ever made up. Does not cover which names a family
may answer with (`families`).

Source of codes: DICOM PS3.16 as pydicom lists it, and TotalSegmentator's SNOMED table (Apache-2.0).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Literal

from edgemed.core import Language
from edgemed.language import folded_text

Side = Literal["left", "right", "both"]


@dataclass(frozen=True)
class Code:
    """A coded concept; scheme is DICOM's designator (SCT, DCM, UCUM)."""

    value: str
    meaning: str
    scheme: str = "SCT"


CATEGORIES: Mapping[str, Code] = MappingProxyType(
    {
        "anatomy": Code("91723000", "Anatomical Structure"),
        "abnormal": Code("49755003", "Morphologically Abnormal Structure"),
        "tissue": Code("85756007", "Tissue"),
        "substance": Code("91720002", "Body Substance"),
        "object": Code("260787004", "Physical object"),
    }
)
"""Category -> its code, which is also the type of a name that has no code of its own (PS3.16 CID 7150)."""

SIDES: Mapping[Side, Code] = MappingProxyType(
    {
        "left": Code("7771000", "Left"),
        "right": Code("24028007", "Right"),
        "both": Code("51440002", "Bilateral"),
    }
)
"""Laterality (PS3.16 CID 244)."""


@dataclass(frozen=True)
class Term:
    """A row of the table: what one name without a side means. `code` is None where no code is known."""

    key: str
    category: str
    code: Code | None
    site: Code | None
    paired: bool
    en: tuple[str, ...]
    zh: tuple[str, ...]


@dataclass(frozen=True)
class Concept:
    """What a label means. `key` is stable, equal for all names of one thing, and differs between sides.

    type: the structure or finding. site: where a finding is; for anatomy, None but where `type` alone is not the place.
    is_coded: False where `type` is only the generic code of its category.
    """

    key: str
    category: Code
    type: Code
    side: Code | None
    site: Code | None
    is_coded: bool
    en: str
    zh: str

    def name(self, language: Language) -> str:
        """Return the name in `language`."""
        return self.zh if language == "zh" else self.en

    @property
    def is_anatomy(self) -> bool:
        return self.category == CATEGORIES["anatomy"]


@cache
def read_terms() -> Mapping[str, Term]:
    """Return the table, key -> Term."""
    data = tomllib.loads(files("edgemed").joinpath("terminology.toml").read_text(encoding="utf-8"))
    return MappingProxyType({key: _term(key, row) for key, row in data.items()})


def find_concept(label: str) -> Concept:
    """Return what `label` means, in either language, any letter case, with or without a side.

    >>> find_concept("the left kidney").key, find_concept("左肾").side.meaning, find_concept("Right Lung").zh
    ('kidney_left', 'Left', '右侧肺')
    >>> find_concept("spiculated thing").type.meaning, find_concept("spiculated thing").is_coded
    ('Anatomical Structure', False)
    """
    name = folded_text(label).removeprefix("the ").strip(" .。")
    found = _names().get(name)
    if found is not None:
        return _concept(found, None)
    side, rest = _split_side(name)
    found = _names().get(rest) if side else None
    if found is not None and found.paired:
        return _concept(found, side)
    words = " ".join(label.split()) or "region"
    generic = CATEGORIES["anatomy"]
    return Concept(f"text:{name or 'region'}", generic, generic, None, None, False, words, words)


def _term(key: str, row: Mapping[str, object]) -> Term:
    def code(value: str, meaning: str) -> Code | None:
        return Code(str(row[value]), str(row[meaning])) if value in row else None

    def names(language: str) -> tuple[str, ...]:
        value = row[language]
        assert isinstance(value, list)
        return tuple(value)

    site, own = code("site", "site_meaning"), code("code", "meaning")
    return Term(key, str(row["category"]), own, site, row.get("paired") is True, names("en"), names("zh"))


@cache
def _names() -> Mapping[str, Term]:
    return {folded_text(name): term for term in read_terms().values() for name in (*term.en, *term.zh)}


_SIDE_WORDS: Mapping[str, Side] = {
    "left": "left", "right": "right", "both": "both", "bilateral": "both", "左": "left", "右": "right", "双": "both",
}  # fmt: skip
_SIDED = (
    re.compile(r"(?P<side>left|right|both|bilateral)(?:[- ]sided?)? (?P<name>.+)"),
    re.compile(r"(?P<name>.+?),? \(?(?P<side>left|right|bilateral)\)?"),
    re.compile(r"(?P<side>[左右双])[侧边]?(?P<name>.+)"),
)


def _split_side(name: str) -> tuple[Side | None, str]:
    for pattern in _SIDED:
        match = pattern.fullmatch(name)
        if match:
            return _SIDE_WORDS[match["side"]], match["name"]
    return None, name


def _concept(term: Term, side: Side | None) -> Concept:
    category = CATEGORIES[term.category]
    en, zh = term.en[0], term.zh[0]
    if side is not None:
        en = f"{side} {en}" if side != "both" else f"bilateral {en}"
        zh = {"left": "左侧", "right": "右侧", "both": "双侧"}[side] + zh
    return Concept(
        key=term.key if side is None else f"{term.key}_{side}",
        category=category,
        type=term.code or category,
        side=None if side is None else SIDES[side],
        site=term.site,
        is_coded=term.code is not None,
        en=en,
        zh=zh,
    )
