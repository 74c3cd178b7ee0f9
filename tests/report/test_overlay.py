"""The overlay's pixels: what is drawn is where it must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgemed.core import Answer, Prompt, PromptRegion, Region, Scan, Window
from edgemed.errors import CannotWrite, InvalidInput
from edgemed.report import render_overlay, write_overlay
from edgemed.report.overlay import shown_scale
from edgemed.report.style import ASKED, PALETTE, STRIP, STRIP_TEXT

MakeScan = Callable[..., Scan]


def near(image: np.ndarray, colour: tuple[int, int, int], tolerance: int = 12) -> np.ndarray:
    return np.asarray((np.abs(image.astype(int) - colour) <= tolerance).all(axis=-1))


def strip_of(image: np.ndarray) -> np.ndarray:
    """Return the notice strip: the rows whose first pixel has its colour."""
    return np.asarray(image[near(image[:, 0], STRIP, 0)])


def test_image_is_enlarged_to_768_and_its_pixels_are_the_windowed_ones(
    answer: Answer, make_scan: MakeScan, english_prompt: Prompt
) -> None:
    plain = replace(answer, regions=())
    image = render_overlay(plain, make_scan(), english_prompt, notice="")
    assert image.shape[0] == 768
    assert image.shape[1] > 1024
    # window 40/400: -100 HU -> 15 % and 80 HU -> 60 % of 255
    assert image[40, 40].tolist() == [38] * 3
    assert image[400, 560].tolist() == [153] * 3


def test_outline_lies_on_the_edge_of_the_mask(
    answer: Answer, make_scan: MakeScan, english_prompt: Prompt, disc: np.ndarray
) -> None:
    only = replace(answer, regions=(Region("liver", (0, 0, 128, 96), mask=disc),))
    image = render_overlay(only, make_scan(), english_prompt, notice="")
    scale = 8
    inside = near(image[:768, :1024], PALETTE[0])
    row = 50 * scale + scale // 2
    # the disc spans columns 50..90 in row 50; left out: the box at the border of the image
    at = [x for x in np.flatnonzero(inside[row]) if 20 < x < 1000]
    assert min(at) == pytest.approx(50 * scale, abs=3)
    assert max(at) == pytest.approx(91 * scale, abs=3)
    assert len(at) <= 8
    edge = disc & ~(np.roll(disc, 1, 0) & np.roll(disc, -1, 0) & np.roll(disc, 1, 1) & np.roll(disc, -1, 1))
    for y, x in np.argwhere(edge):
        assert inside[y * scale : (y + 1) * scale, x * scale : (x + 1) * scale].any()


def test_fill_tints_the_inside_only(answer: Answer, make_scan: MakeScan, english_prompt: Prompt) -> None:
    only = replace(answer, regions=answer.regions[:1])
    image = render_overlay(only, make_scan(), english_prompt, notice="")
    bare = render_overlay(replace(answer, regions=()), make_scan(), english_prompt, notice="")
    expected = bare[400, 560] * 0.9 + np.array(PALETTE[0]) * 0.1
    assert np.abs(image[400, 560] - expected).max() <= 1
    assert image[700, 900].tolist() == bare[700, 900].tolist()


def test_box_is_drawn_at_its_place(answer: Answer, make_scan: MakeScan, english_prompt: Prompt) -> None:
    only = replace(answer, regions=(Region("spleen", (10, 20, 60, 80)),))
    blue = near(render_overlay(only, make_scan(), english_prompt, notice="")[:768, :1024], PALETTE[0])
    assert np.flatnonzero(blue[400, :700]).tolist() == [80, 81, 478, 479]
    assert np.flatnonzero(blue[300:, 300]).tolist() == [338, 339]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_notice_is_on_the_strip_in_full(
    language: str, answer: Answer, make_scan: MakeScan, english_prompt: Prompt, notices: dict[str, str]
) -> None:
    short = strip_of(render_overlay(answer, make_scan(), english_prompt, notice=notices[language]))
    assert near(short, STRIP_TEXT).sum() > 200
    long = strip_of(render_overlay(answer, make_scan(), english_prompt, notice=" ".join([notices[language]] * 12)))
    assert long.shape[0] > short.shape[0]
    assert near(long, STRIP_TEXT).sum() > 11 * near(short, STRIP_TEXT).sum()


def test_chinese_legend_is_not_drawn_with_missing_glyphs(
    chinese: Answer, make_scan: MakeScan, chinese_prompt: Prompt
) -> None:
    # U+1F9E0 and U+1F9E1 are not in the font: two labels that differ must not look the same, those two would.
    def legend(label: str) -> np.ndarray:
        renamed = replace(chinese, regions=(replace(chinese.regions[0], label=label),))
        return render_overlay(renamed, make_scan(), chinese_prompt, notice="")[:, 1024:]

    assert not np.array_equal(legend("肝脏"), legend("脾脏"))
    assert np.array_equal(legend("\U0001f9e0"), legend("\U0001f9e1"))


def test_asked_regions_are_white_and_dashed(answer: Answer, make_scan: MakeScan, disc: np.ndarray) -> None:
    plain = replace(answer, regions=())
    regions = (PromptRegion("box", box=(10, 20, 40, 80)), PromptRegion("point", point=(100, 12)))
    image = render_overlay(plain, make_scan(), Prompt("What is this?", regions), notice="")[:768, :1024]
    white = near(image, ASKED)
    assert 0.3 < white[200:600, 80].mean() < 0.7
    assert not white[96, 800]  # the point itself stays free
    assert white[96, 806]
    masked = Prompt("What is this?", (PromptRegion("mask", mask=disc),))
    assert near(render_overlay(plain, make_scan(), masked, notice="")[:768, :1024], ASKED).sum() > 500


def test_pixels_that_are_not_square_are_shown_in_proportion(answer: Answer, english_prompt: Prompt) -> None:
    scan = Scan(np.zeros((1, 96, 128), np.float32), "MR", Window(0, 1), pixel_spacing_mm=(3.0, 1.0))
    scale_x, scale_y = shown_scale(scan)
    assert scale_y == pytest.approx(3 * scale_x)
    assert min(96 * scale_y, 128 * scale_x) == pytest.approx(768)
    only = replace(answer, regions=(Region("x", (32, 24, 64, 48)),))
    blue = near(render_overlay(only, scan, english_prompt, notice="")[:, :768], PALETTE[0])
    assert round(32 * scale_x) in np.flatnonzero(blue[round(36 * scale_y)])
    assert round(24 * scale_y) in np.flatnonzero(blue[:, round(60 * scale_x)])


@pytest.mark.parametrize(
    ("rows", "columns", "shown"),
    [(512, 512, 768), (1000, 1200, 1000), (3000, 2500, 2500 * 2048 / 3000), (10, 2000, 10 * 4096 / 2000)],
)
def test_short_side_is_enlarged_and_large_images_are_shrunk(rows: int, columns: int, shown: float) -> None:
    scan = Scan(np.zeros((1, rows, columns), np.float32), "DX", Window(0, 1))
    assert min(rows, columns) * shown_scale(scan)[0] == pytest.approx(shown)


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (20000, 3)])
def test_odd_shapes_are_rendered(shape: tuple[int, int], answer: Answer, english_prompt: Prompt) -> None:
    scan = Scan(np.zeros((1, *shape), np.float32), "OT", Window(0, 1))
    only = replace(answer, regions=(Region("all of it", (0, 0, shape[1], shape[0]), mask=np.ones(shape, bool)),))
    image = render_overlay(only, scan, english_prompt, notice="not for diagnosis")
    assert strip_of(image).size


def test_many_regions_make_a_legend_that_counts_the_rest(
    answer: Answer, make_scan: MakeScan, english_prompt: Prompt
) -> None:
    regions = tuple(Region(f"cell {i}", (i % 120, i % 90, i % 120 + 3, i % 90 + 3), score=0.5) for i in range(120))
    image = render_overlay(replace(answer, regions=regions), make_scan(), english_prompt, notice="n")
    assert 768 < image.shape[0] < 1700


def test_colour_frame_of_a_clip_is_the_one_that_was_asked_for(answer: Answer) -> None:
    pixels = np.zeros((2, 40, 40, 3), np.uint8)
    pixels[1] = (200, 30, 30)
    scan = Scan(pixels, "US", first_frame=5, total_frames=9)
    there = replace(answer, regions=(Region("a", (1, 1, 9, 9), frame=6), Region("b", (20, 20, 30, 30), frame=5)))
    image = render_overlay(there, scan, Prompt("x", frame=6), notice="")
    assert image[700, 700].tolist() == [200, 30, 30]
    assert not near(image[380:580, 380:580], PALETTE[1]).any()


def test_file_is_a_png_of_what_was_rendered(
    tmp_path: Path, answer: Answer, make_scan: MakeScan, english_prompt: Prompt, notices: dict[str, str]
) -> None:
    write_overlay(answer, make_scan(), english_prompt, tmp_path / "o.png", notice=notices["en"])
    with Image.open(tmp_path / "o.png") as written:
        assert written.format == "PNG"
        rendered = render_overlay(answer, make_scan(), english_prompt, notice=notices["en"])
        assert np.array_equal(np.asarray(written), rendered)


def test_failure_leaves_no_file(
    tmp_path: Path, answer: Answer, make_scan: MakeScan, english_prompt: Prompt, disc: np.ndarray
) -> None:
    with pytest.raises(CannotWrite):
        write_overlay(answer, make_scan(), english_prompt, tmp_path / "none" / "o.png", notice="")
    odd = replace(answer, regions=(Region("x", (0, 0, 1, 1), mask=disc[:-1]),))
    with pytest.raises(InvalidInput, match="mask"):
        write_overlay(odd, make_scan(), english_prompt, tmp_path / "o.png", notice="")
    assert list(tmp_path.iterdir()) == []


def test_file_holds_no_text_but_the_picture(
    tmp_path: Path, answer: Answer, make_scan: MakeScan, english_prompt: Prompt
) -> None:
    write_overlay(answer, make_scan(), english_prompt, tmp_path / "o.png", notice="")
    with Image.open(tmp_path / "o.png") as written:
        assert written.info == {}
