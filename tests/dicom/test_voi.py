"""VOI windows: golden vectors from the standard's formulas, priorities, presets, VOI LUTs, defaults."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from edgemed.core import Window
from edgemed.dicom import PRESETS, Reader, parse_window
from edgemed.dicom.voi import lut_window
from edgemed.errors import EdgemedError

Write = Callable[..., Path]
VALUES = np.arange(-1200, 1200, 7, dtype=np.int16).reshape(1, -1)


def linear(x: float, c: float, w: float) -> float:
    """PS3.3 C.11.2.1.2.1 with y from 0 to 255."""
    if x <= c - 0.5 - (w - 1) / 2:
        return 0
    if x > c - 0.5 + (w - 1) / 2:
        return 255
    return ((x - (c - 0.5)) / (w - 1) + 0.5) * 255


def linear_exact(x: float, c: float, w: float) -> float:
    """PS3.3 C.11.2.1.3.2 with y from 0 to 255."""
    return 0 if x <= c - w / 2 else 255 if x > c + w / 2 else ((x - c) / w + 0.5) * 255


def sigmoid(x: float, c: float, w: float) -> float:
    """PS3.3 C.11.2.1.3.1 with y from 0 to 255."""
    return 255 / (1 + math.exp(-4 * (x - c) / w))


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT"])
@pytest.mark.parametrize(("center", "width"), [(40, 400), (0, 100), (-600, 1500), (10, 2), (10, 1), (2048, 4096)])
def test_header_window_shows_what_the_standard_says(
    reader: Reader, write_dicom: Write, function: str | None, center: int, width: int
) -> None:
    path = write_dicom(VALUES, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    formula = linear_exact if function == "LINEAR_EXACT" else linear
    expected = np.array([formula(float(x), center, width) for x in VALUES[0]])
    shown = reader.read(path).shown(0)[0, :, 0]
    np.testing.assert_allclose(shown, expected, atol=0.5001)  # rounded to whole grey levels


@pytest.mark.parametrize(
    ("x", "grey"),
    # PS3.3 C.11.2.1.2.1, note: c=2048 w=4096 is 0 at 0 and 255 at 4095; c=0 w=100 is 0 at -50, 255 at 49.
    [((2048, 4096, 0), 0), ((2048, 4096, 4095), 255), ((0, 100, -50), 0), ((0, 100, 49), 255), ((0, 1, -0.5), 0)],
)
def test_notes_of_the_standard_hold(x: tuple[float, float, float], grey: int) -> None:
    window = Window(x[0], x[1], exact=False)
    value = min(max((x[2] - window.low) * 255 / (window.high - window.low), 0), 255)
    assert value == pytest.approx(grey)


def test_sigmoid_is_followed_at_its_center(reader: Reader, write_dicom: Write) -> None:
    path = write_dicom(VALUES, WindowCenter=40, WindowWidth=400, VOILUTFunction="SIGMOID")
    expected = np.array([sigmoid(float(x), 40, 400) for x in VALUES[0]])
    shown = reader.read(path).shown(0)[0, :, 0].astype(float)
    near = np.abs(VALUES[0] - 40) < 50
    assert np.abs(shown - expected)[near].max() < 2
    assert np.abs(shown - expected).max() < 35  # the tails: 255 / (1 + e^2) = 30 where the line reaches 0


def test_users_window_wins_over_the_header(reader: Reader, write_dicom: Write) -> None:
    path = write_dicom(VALUES, WindowCenter=40, WindowWidth=400)
    assert reader.read(path, window="lung").window == Window(-600, 1500, exact=False)
    assert reader.read(path, window="10,20").window == Window(10, 20, exact=False)
    assert reader.read(path).window == Window(40, 400, exact=False)


def test_first_of_several_windows_is_taken_and_unusable_ones_are_not(reader: Reader, write_dicom: Write) -> None:
    path = write_dicom(VALUES, WindowCenter=[50, -600], WindowWidth=[350, 1500])
    assert reader.read(path).window == Window(50, 350, exact=False)
    path = write_dicom(VALUES, Modality="CT", WindowCenter=50, WindowWidth=0)
    assert reader.read(path).window == Window(40, 400, exact=False)


@pytest.mark.parametrize("name", [*PRESETS, "Soft Tissue", "soft_tissue", "soft", "LUNG"])
def test_every_preset_has_a_window(name: str) -> None:
    assert parse_window(name).width > 0


@pytest.mark.parametrize("text", ["", "lungs and bones", "40", "40,400,1", "a,b", "40,0", "40,-1", "nan,5", "40,inf"])
def test_other_words_are_a_usage_error(text: str) -> None:
    with pytest.raises(EdgemedError, match="preset") as caught:
        parse_window(text)
    assert caught.value.exit_code == 1


def voi_lut(first: int, data: list[int], bits: int = 16) -> Sequence:
    lut = Dataset()
    lut.LUTDescriptor = [len(data), first, bits]
    lut.add_new("LUTData", "US", data)
    return Sequence([lut])


def test_voi_lut_becomes_the_window_over_its_rise(reader: Reader, write_dicom: Write) -> None:
    data = [0] * 100 + list(range(0, 4000, 20)) + [4000] * 50
    window = reader.read(write_dicom(VALUES.astype(np.uint16), VOILUTSequence=voi_lut(1000, data))).window
    assert window is not None
    assert window.low == pytest.approx(1102, abs=4) and window.high == pytest.approx(1298, abs=4)


def test_header_window_wins_over_voi_lut(reader: Reader, write_dicom: Write) -> None:
    path = write_dicom(
        VALUES.astype(np.uint16), WindowCenter=40, WindowWidth=400, VOILUTSequence=voi_lut(0, [0, 5, 9, 90])
    )
    assert reader.read(path).window == Window(40, 400, exact=False)


def test_constant_lut_is_no_window_and_falling_lut_is_one() -> None:
    assert lut_window(np.full(9, 3.0), 0) is None
    rising, falling = np.linspace(0, 1, 101), np.linspace(1, 0, 101)
    for table in (rising, falling):
        window = lut_window(table, 10)
        assert window is not None and (window.low, window.high) == pytest.approx((11, 109), abs=1)


def test_ct_without_window_is_shown_as_soft_tissue(reader: Reader, write_dicom: Write) -> None:
    assert reader.read(write_dicom(VALUES, Modality="CT")).window == Window(40, 400, exact=False)


def padded(**elements: Any) -> dict[str, Any]:
    return {"Modality": "MR", **elements}


@pytest.mark.parametrize(
    "elements", [{"PixelPaddingValue": -2000}, {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1990}]
)
def test_padding_does_not_move_the_default_window(reader: Reader, write_dicom: Write, elements: dict[str, Any]) -> None:
    image = np.linspace(100, 300, 400).reshape(20, 20).astype(np.int16)
    image[:10] = -2000
    window = reader.read(write_dicom(image, **padded(**elements))).window
    assert window is not None and 195 <= window.low <= 205 and 295 <= window.high <= 300


def test_constant_image_gets_a_window(reader: Reader, write_dicom: Write) -> None:
    window = reader.read(write_dicom(np.full((4, 4), 7, np.int16), Modality="MR")).window
    assert window is not None and window.low < 7 < window.high


def test_eight_bit_picture_is_shown_over_its_whole_range(reader: Reader, write_dicom: Write) -> None:
    image = np.arange(100, 116, dtype=np.uint8).reshape(4, 4)
    assert np.array_equal(reader.read(write_dicom(image, Modality="US")).shown(0)[..., 0], image)
    window = reader.read(write_dicom(image, Modality="NM")).window
    assert window is not None and window.low >= 100  # counts, not a picture
