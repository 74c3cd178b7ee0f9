"""Which language a text is in and which it asks for."""

from __future__ import annotations

import pytest

from edgemed.language import answer_language, language_of


@pytest.mark.parametrize(
    ("text", "language"), [("CT 上的肝脏", "zh"), ("Où est le foie?", "en"), ("", "en"), ("㐀", "zh")]
)
def test_one_han_character_makes_a_text_chinese(text: str, language: str) -> None:
    assert language_of(text) == language


def test_a_request_in_the_text_decides_the_language() -> None:
    assert answer_language("Where is the liver? Please answer in Chinese.") == "zh"
    assert answer_language("肝脏在哪里，用英语回答") == "en"
    assert answer_language("肝脏在哪里") == "zh"
    assert answer_language("Find the liver") == "en"
