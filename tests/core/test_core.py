"""The nouns are checked when they are made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgemed.core import Example, Prompt, PromptRegion, Region, Scan, Window
from edgemed.errors import InvalidInput

GREY = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def test_a_window_has_its_ends_where_the_standard_puts_them() -> None:
    assert (Window(40, 400).low, Window(40, 400).high) == (-160, 240)
    assert (Window(128, 256, exact=False).low, Window(128, 256, exact=False).high) == (0, 255)
    step = Window(10, 1, exact=False)
    assert step.high > step.low
    for width in (0, -3, float("nan")):
        with pytest.raises(InvalidInput, match="window width"):
            Window(0, width)


def test_a_scan_shows_its_frames_through_the_window() -> None:
    scan = Scan(GREY.copy(), "CT", Window(12, 24), first_frame=5, total_frames=9)
    assert (scan.frames, scan.rows, scan.columns, scan.is_colour) == (9, 3, 4, False)
    shown = scan.shown(6)
    assert (shown.dtype, shown.shape) == (np.uint8, (3, 4, 3))
    assert shown[0, 0].tolist() == [128, 128, 128]  # value 12 is the middle
    for frame in (4, 7):
        with pytest.raises(InvalidInput, match="frames 5 to 6 were read"):
            scan.shown(frame)
    assert Scan(GREY.copy(), "CT", Window(12, 24)).frames == 2
    with pytest.raises(ValueError, match="read-only"):
        scan.pixels[0, 0, 0] = 1


def test_a_colour_scan_is_shown_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 4, 3)).astype(np.uint8)
    scan = Scan(pixels, "photograph")
    assert scan.is_colour
    assert np.array_equal(scan.shown(0), pixels[0])


@pytest.mark.parametrize(
    ("pixels", "facts", "told"),
    [
        (GREY, {}, "need a window"),
        (GREY.astype(np.float64), {"window": Window(0, 1)}, "float64"),
        (GREY[0], {"window": Window(0, 1)}, r"\[3, 4\]"),
        (GREY[:0], {"window": Window(0, 1)}, r"\[0, 3, 4\]"),
        (np.zeros((1, 2, 2, 4), np.uint8), {}, r"\[1, 2, 2, 4\]"),
        (GREY, {"window": Window(0, 1), "pixel_spacing_mm": (0.0, 1.0)}, "pixel spacing"),
    ],
)
def test_pixels_of_another_kind_are_refused(pixels: Any, facts: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        Scan(pixels.copy(), "CT", **facts)


@pytest.mark.parametrize("box", [(5, 0, 5, 9), (0, 9, 5, 9), (-1, 0, 5, 9), (0, 0, float("nan"), 9)])
def test_an_empty_box_is_no_region(box: Any) -> None:
    with pytest.raises(InvalidInput, match="empty or outside"):
        Region("liver", box)


def test_a_region_mask_is_a_bool_image() -> None:
    Region("liver", (0, 0, 1, 1), mask=np.zeros((3, 4), bool))
    for mask in (np.zeros((3, 4)), np.zeros((1, 3, 4), bool)):
        with pytest.raises(InvalidInput, match="mask is"):
            Region("liver", (0, 0, 1, 1), mask=mask)


def test_a_prompt_region_is_one_of_its_kind() -> None:
    assert PromptRegion("point", point=(1, 2)).point == (1, 2)
    with pytest.raises(InvalidInput, match="exactly its box"):
        PromptRegion("box")
    with pytest.raises(InvalidInput, match="exactly its point"):
        PromptRegion("point", point=(1, 2), box=(0, 0, 1, 1))
    with pytest.raises(InvalidInput, match="is empty"):
        PromptRegion("box", box=(3, 0, 3, 1))


def test_the_mask_of_an_example_lies_on_its_image() -> None:
    scan = Scan(GREY.copy(), "CT", Window(12, 24))
    assert Example(scan, np.eye(3, 4, dtype=bool), 1).frame == 1
    for mask in (np.ones((4, 3), bool), np.ones((3, 4)), np.ones((2, 3, 4), bool)):
        with pytest.raises(InvalidInput, match=r"bool \[3, 4\] as its image was expected"):
            Example(scan, mask)
    with pytest.raises(InvalidInput, match="mask of an example is empty"):
        Example(scan, np.zeros((3, 4), bool))


def test_a_prompt_has_words() -> None:
    assert Prompt("Where?").language == "en"
    with pytest.raises(InvalidInput, match="prompt is empty"):
        Prompt(" \n")
