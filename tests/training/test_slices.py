"""Random changes keep labels and boxes on what they mark, and stay within what they promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from edgemed.core import Window
from edgemed.families.native_lexicon import STRUCTURES
from edgemed.geometry import box_iou, box_of
from edgemed.training.slices import (
    INDEX,
    LabelledSlice,
    add_surroundings,
    paint,
    roughen,
    shift_contrast,
    show,
    tint,
    warp,
)

LIVER = INDEX["liver"]


def overlap(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("rows", "columns"), [(320, 320), (45, 60)], ids=["enlarged", "shrunk"])
def test_a_labelled_bright_square_stays_on_itself(phantom: LabelledSlice, seed: int, rows: int, columns: int) -> None:
    warped = warp(phantom, np.random.default_rng(seed), rows, columns, strength=1.0)
    assert warped.image.shape == warped.labels.shape == (rows, columns)
    # 170 HU lies half-way between the square and the tissue around it
    assert overlap(warped.image > 170, warped.labels == LIVER + 1) > (0.93 if rows > 100 else 0.8)
    assert set(np.unique(warped.labels)) <= set(np.unique(phantom.labels))


@pytest.mark.parametrize("seed", range(4))
def test_a_box_follows_what_it_is_around(phantom: LabelledSlice, seed: int) -> None:
    box = box_of(phantom.labels == LIVER + 1)
    assert box is not None
    warped = warp(replace(phantom, boxes=((LIVER, box),)), np.random.default_rng(seed), 300, 320, strength=1.0)
    now = box_of(warped.labels == LIVER + 1)
    assert now is not None
    assert [s for s, _ in warped.boxes] == [LIVER]
    assert box_iou(warped.boxes[0][1], now) > 0.93


def test_a_box_that_leaves_the_picture_is_dropped(phantom: LabelledSlice) -> None:
    corner = replace(phantom, boxes=((LIVER, (0.0, 0.0, 1.0, 1.0)),))
    assert warp(corner, np.random.default_rng(0), 45, 60, strength=0.0).boxes == ()


def test_without_strength_only_the_size_and_the_aspect_change(phantom: LabelledSlice) -> None:
    # 90 rows of 2 mm and 120 columns of 1 mm: 180 x 120 mm, so the canvas of 240 x 160 pixels is filled
    tall = warp(replace(phantom, spacing=(2.0, 1.0)), np.random.default_rng(0), 240, 160, strength=0.0)
    assert tall.spacing == (0.75, 0.75)
    before, after = (box_of(p.labels == LIVER + 1) for p in (phantom, tall))
    assert before is not None
    assert after is not None
    assert np.allclose(after, np.array(before) * (160 / 120, 240 / 90, 160 / 120, 240 / 90), atol=2)


def test_colour_stays_colour() -> None:
    rng = np.random.default_rng(0)
    known = np.ones(len(STRUCTURES), bool)
    image = rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)
    photo = LabelledSlice(image, np.zeros((40, 50), np.uint8), known, 0, 0, "s", "p")
    warped = warp(photo, rng, 80, 100, strength=1.0)
    assert (warped.image.dtype, warped.image.shape) == (np.uint8, (80, 100, 3))
    tinted = tint(warped.image, rng)
    assert (tinted.dtype, tinted.shape) == (np.uint8, (80, 100, 3))


def test_contrast_changes_labelled_structures_alone(phantom: LabelledSlice) -> None:
    changed = shift_contrast(phantom, np.random.default_rng(3))
    far = np.ones(phantom.labels.shape, bool)
    ys, xs = np.nonzero(phantom.labels)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            far[ys + dy, xs + dx] = False
    assert np.array_equal(changed.image[far], phantom.image[far])
    inner = changed.image[40, 40] - phantom.image[40, 40]
    assert -45 <= inner <= 50


def test_a_painted_slice_keeps_air_and_gives_organs_new_values(phantom: LabelledSlice) -> None:
    painted = paint(phantom, np.random.default_rng(0))
    air = phantom.image == -1000
    assert np.array_equal(painted.image[air & (phantom.labels == 0)], phantom.image[air & (phantom.labels == 0)])
    assert abs(painted.image[40, 40] - phantom.image[40, 40]) > 20
    assert np.array_equal(painted.labels, phantom.labels)


def test_surroundings_are_never_labelled_and_never_cover_the_body(phantom: LabelledSlice) -> None:
    grown = 0
    phantom = replace(phantom, boxes=((3, (10.0, 20.0, 30.0, 40.0)),))
    for seed in range(20):
        piece = add_surroundings(phantom, np.random.default_rng(seed))
        assert piece.image.shape == piece.labels.shape
        room = (piece.labels.shape[1] - phantom.labels.shape[1]) // 2
        grown += room > 0
        assert piece.boxes == ((3, (10.0 + room, 20.0, 30.0 + room, 40.0)),)
        inner = slice(room, room + phantom.labels.shape[1])
        assert np.array_equal(piece.labels[:, inner], phantom.labels)
        assert piece.labels.sum() == phantom.labels.sum()
        assert np.array_equal(piece.image[:, inner][phantom.labels > 0], phantom.image[phantom.labels > 0])
    assert 0 < grown < 20


def test_a_window_shows_its_lower_end_black_and_its_upper_end_white() -> None:
    image = np.array([[-500.0, -160.0, 40.0, 240.0, 900.0]], np.float32)
    shown = show(image, Window(40, 400), None)
    assert shown[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert np.array_equal(shown[..., 0], shown[..., 2])


def test_noise_grows_with_its_strength(phantom: LabelledSlice) -> None:
    flat = np.zeros((64, 64), np.float32)
    spread = [roughen(flat, np.random.default_rng(1), strength).std() for strength in (0.0, 1.0, 10.0)]
    assert spread[0] == 0
    assert spread[2] == pytest.approx(10 * spread[1], rel=1e-4)


def test_the_same_generator_gives_the_same_slice(phantom: LabelledSlice) -> None:
    one, other = (
        add_surroundings(warp(paint(phantom, rng), rng, 100, 130, 1.0), rng)
        for rng in (np.random.default_rng(9), np.random.default_rng(9))
    )
    assert np.array_equal(one.image, other.image)
    assert np.array_equal(one.labels, other.labels)
