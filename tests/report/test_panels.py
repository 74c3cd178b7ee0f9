"""The three panels' pixels: the frame, its masks in white, the frame under light blue; and the notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgemed.core import Answer, Prompt, PromptRegion, Region, Scan, Window
from edgemed.errors import CannotWrite, InvalidInput
from edgemed.report import render_panels, write_panels
from edgemed.report.panels import FILL_ALPHA, LIGHT_BLUE
from edgemed.report.style import BACKGROUND, STRIP, STRIP_TEXT, Style

MakeScan = Callable[..., Scan]
SCALE = 8
WIDTH, HEIGHT, GAP = 128 * SCALE, 96 * SCALE, Style.of(768).gap


def near(image: np.ndarray, colour: tuple[int, int, int], tolerance: int = 12) -> np.ndarray:
    return np.asarray((np.abs(image.astype(int) - colour) <= tolerance).all(axis=-1))


def split(image: np.ndarray) -> list[np.ndarray]:
    """Return the panels of the 96 x 128 scan, without captions; `image` has no notice."""
    assert image.shape[1] == 3 * WIDTH + 2 * GAP
    top = image.shape[0] - HEIGHT
    return [image[top:, i * (WIDTH + GAP) :][:, :WIDTH] for i in range(3)]


def strip_of(image: np.ndarray) -> np.ndarray:
    """Return the notice strip: the rows whose first pixel has its colour."""
    return np.asarray(image[near(image[:, 0], STRIP, 0)])


def large(mask: np.ndarray) -> np.ndarray:
    return np.asarray(mask.repeat(SCALE, 0).repeat(SCALE, 1))


def test_panels_are_frame_mask_and_light_blue_overlay(
    answer: Answer, make_scan: MakeScan, english_prompt: Prompt, disc: np.ndarray
) -> None:
    only = replace(answer, regions=answer.regions[:1])
    image, mask, overlay = split(render_panels(only, make_scan(), english_prompt, notice=""))
    # window 40/400: -100 HU -> 15 % and 80 HU -> 60 % of 255
    assert image[40, 40].tolist() == [38] * 3
    assert image[400, 560].tolist() == [153] * 3
    assert 0.45 <= FILL_ALPHA <= 0.55
    assert np.abs(overlay[400, 560] - (153 * (1 - FILL_ALPHA) + np.array(LIGHT_BLUE) * FILL_ALPHA)).max() <= 1
    assert overlay[40, 40].tolist() == [38] * 3
    white = (mask == 255).all(axis=-1)
    assert ((mask == 0).all(axis=-1) | white).mean() > 0.99
    assert (white == large(disc)).mean() > 0.99


def test_middle_panel_is_the_union_of_all_masks_and_none_is_filled_twice(
    answer: Answer, make_scan: MakeScan, english_prompt: Prompt, disc: np.ndarray
) -> None:
    dot = np.zeros_like(disc)
    dot[5, 5] = True
    regions = tuple(Region(f"r{i}", (0, 0, 128, 96), mask=m) for i, m in enumerate((disc, disc, dot)))
    _, mask, overlay = split(render_panels(replace(answer, regions=regions), make_scan(), english_prompt, notice=""))
    once = replace(answer, regions=(Region("r", (0, 0, 128, 96), mask=disc | dot),))
    _, mask_once, overlay_once = split(render_panels(once, make_scan(), english_prompt, notice=""))
    assert np.array_equal(mask, mask_once)
    assert np.array_equal(overlay, overlay_once)
    assert mask[44, 44].tolist() == [255] * 3


def test_box_is_an_outline_of_the_third_panel_only(answer: Answer, make_scan: MakeScan, english_prompt: Prompt) -> None:
    only = replace(answer, regions=(Region("spleen", (10, 20, 60, 80)),))
    image, mask, overlay = split(render_panels(only, make_scan(), english_prompt, notice=""))
    assert np.flatnonzero(near(overlay, LIGHT_BLUE, 0)[400, :700]).tolist() == [80, 81, 478, 479]
    assert not near(image, LIGHT_BLUE, 0).any()
    assert not mask.any()


def test_answer_without_regions_has_a_black_mask_and_the_bare_frame_twice(
    answer: Answer, make_scan: MakeScan, english_prompt: Prompt
) -> None:
    image, mask, overlay = split(render_panels(replace(answer, regions=()), make_scan(), english_prompt, notice=""))
    assert not mask.any()
    assert np.array_equal(image, overlay)


def test_what_was_asked_about_is_not_drawn(answer: Answer, make_scan: MakeScan, disc: np.ndarray) -> None:
    plain = replace(answer, regions=())
    asked = Prompt("What is this?", (PromptRegion("box", box=(10, 20, 40, 80)), PromptRegion("mask", mask=disc)))
    with_them = render_panels(plain, make_scan(), asked, notice="")
    assert np.array_equal(with_them, render_panels(plain, make_scan(), Prompt("What is this?"), notice=""))


def test_each_panel_has_its_caption_in_the_language_of_the_answer(
    answer: Answer, make_scan: MakeScan, english_prompt: Prompt, chinese_prompt: Prompt
) -> None:
    english, chinese = (
        render_panels(answer, make_scan(), prompt, notice="") for prompt in (english_prompt, chinese_prompt)
    )
    top = english.shape[0] - HEIGHT
    for i in range(3):
        at = slice(i * (WIDTH + GAP), i * (WIDTH + GAP) + WIDTH)
        first, second = (~near(image[:top, at], BACKGROUND, 0) for image in (english, chinese))
        assert first.any()
        assert second.any()
        assert not np.array_equal(first, second)
    assert np.array_equal(english[top:], chinese[top:])


@pytest.mark.parametrize("language", ["en", "zh"])
def test_notice_is_on_the_strip_in_full(
    language: str, answer: Answer, make_scan: MakeScan, english_prompt: Prompt, notices: dict[str, str]
) -> None:
    short = strip_of(render_panels(answer, make_scan(), english_prompt, notice=notices[language]))
    assert near(short, STRIP_TEXT).sum() > 200
    long = strip_of(render_panels(answer, make_scan(), english_prompt, notice=" ".join([notices[language]] * 20)))
    assert long.shape[0] > short.shape[0]
    assert near(long, STRIP_TEXT).sum() > 19 * near(short, STRIP_TEXT).sum()


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (20000, 3)])
def test_odd_shapes_are_rendered_with_room_for_captions_and_notice(
    shape: tuple[int, int], answer: Answer, english_prompt: Prompt
) -> None:
    scan = Scan(np.zeros((1, *shape), np.float32), "OT", Window(0, 1))
    only = replace(answer, regions=(Region("all of it", (0, 0, shape[1], shape[0]), mask=np.ones(shape, bool)),))
    image = render_panels(only, scan, english_prompt, notice="not for diagnosis")
    assert strip_of(image).size
    assert image.shape[1] > 100


def test_regions_of_other_frames_are_left_out(answer: Answer) -> None:
    pixels = np.zeros((2, 96, 128, 3), np.uint8)
    pixels[1] = (200, 30, 30)
    scan = Scan(pixels, "US", first_frame=5, total_frames=9)
    there = replace(answer, regions=(Region("b", (20, 20, 30, 30), frame=5, mask=np.ones((96, 128), bool)),))
    image, mask, overlay = split(render_panels(there, scan, Prompt("x", frame=6), notice=""))
    assert (image == (200, 30, 30)).all()
    assert not mask.any()
    assert np.array_equal(image, overlay)


def test_file_is_a_png_of_what_was_rendered_and_holds_no_text(
    tmp_path: Path, answer: Answer, make_scan: MakeScan, english_prompt: Prompt, notices: dict[str, str]
) -> None:
    write_panels(answer, make_scan(), english_prompt, tmp_path / "p.png", notice=notices["en"])
    with Image.open(tmp_path / "p.png") as written:
        assert written.format == "PNG"
        assert written.info == {}
        rendered = render_panels(answer, make_scan(), english_prompt, notice=notices["en"])
        assert np.array_equal(np.asarray(written), rendered)


def test_failure_leaves_no_file(
    tmp_path: Path, answer: Answer, make_scan: MakeScan, english_prompt: Prompt, disc: np.ndarray
) -> None:
    with pytest.raises(CannotWrite):
        write_panels(answer, make_scan(), english_prompt, tmp_path / "none" / "p.png", notice="")
    odd = replace(answer, regions=(Region("x", (0, 0, 1, 1), mask=disc[:-1]),))
    with pytest.raises(InvalidInput, match="mask"):
        write_panels(odd, make_scan(), english_prompt, tmp_path / "p.png", notice="")
    assert list(tmp_path.iterdir()) == []
