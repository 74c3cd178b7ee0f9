"""Widths, wrapping and shortening in both languages."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemed.report.fonts import open_font
from edgemed.report.words import WORDS, cells, shorten, wrap


@given(st.text(alphabet="ab ,。肝脏(", max_size=40), st.integers(4, 30))
def test_wrapping_loses_nothing_but_blanks(text: str, limit: int) -> None:
    assert "".join("".join(wrap(text, limit, cells)).split()) == "".join(text.split())


def test_closing_mark_never_begins_a_line() -> None:
    lines = wrap("仅供演示用途。不可用于诊断。", 12, cells)
    assert lines == ["仅供演示用", "途。不可用于", "诊断。"]


def test_english_breaks_at_blanks() -> None:
    assert wrap("a demonstration model, not for diagnosis", 22, cells) == [
        "a demonstration model,",
        "not for diagnosis",
    ]


@pytest.mark.parametrize("limit", range(3, 24))
def test_shortened_text_fits(limit: int) -> None:
    assert cells(shorten("左肾上腺 left adrenal", limit, cells)) <= limit


def test_both_languages_have_every_word() -> None:
    for field in fields(WORDS["en"]):
        assert getattr(WORDS["en"], field.name)
        assert getattr(WORDS["zh"], field.name)
    assert WORDS["en"].kinds.keys() == WORDS["zh"].kinds.keys()


def test_shipped_font_measures_chinese_wider_than_latin() -> None:
    font = open_font(20)
    assert font.getlength("肝脏") == 40
    assert 0 < font.getlength("li") < 20
