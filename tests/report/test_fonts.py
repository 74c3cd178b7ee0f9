"""The shipped font draws what answers are made of."""

from __future__ import annotations

from importlib import resources

import pytest

from edgemed.report.fonts import open_font
from edgemed.report.words import WORDS

# Anatomy beyond the 3,755 common characters of GB 2312 level 1 is here on purpose.
SAMPLES = (
    "肝脏脾脏胃主动脉下腔静脉膀胱胰腺肾上腺胆囊十二指肠食管气管前列腺"
    "髋髂骶椎颞枕额胼胝眶颌蝶窦胛桡腓胫跖趾踝髌锁骨肱尺股骨臀肌竖脊肌海马丘脑脑干肺叶心房心室"
    "abcxyz ABC 0123456789 .,;:!?()[]<>%+-/=_ mm² µ ± × ≥ ≤ α β ·，。、；：！？（）《》“”‘’"
)


def drawn(character: str) -> bytes:
    mask = open_font(24).getmask(character)
    return bytes(mask) + bytes(mask.size)


@pytest.mark.parametrize(
    "character", sorted({*SAMPLES, *"".join(v for v in vars(WORDS["zh"]).values() if isinstance(v, str))})
)
def test_character_is_not_the_box_of_a_missing_glyph(character: str) -> None:
    missing = drawn("\U0001f9e0")
    assert drawn(character) != missing


def test_missing_glyph_is_visible() -> None:
    assert any(drawn("\U0001f9e0")[:-2])


def test_licence_lies_beside_the_font_and_the_font_has_its_own_name() -> None:
    licence = resources.files("edgemed.report").joinpath("fonts/OFL.txt").read_text("utf-8")
    assert "SIL OPEN FONT LICENSE Version 1.1" in licence
    assert "Copyright 2014-2021 Adobe" in licence
    assert open_font(20).getname() == ("edgemed Sans", "Regular")


def test_font_is_small_enough_to_ship() -> None:
    assert len(resources.files("edgemed.report").joinpath("fonts/edgemed-sans.otf").read_bytes()) < 2_000_000
