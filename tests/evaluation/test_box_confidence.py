"""From sides to a score that is true: the fit, the table behind the plot, what a bundle brings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgemed.box_confidence import (
    BoxConfidence,
    calibration_error,
    confidence_of,
    fit,
    held_out_scores,
    ranking,
    raw_score,
    reliability,
)
from edgemed.core import Side
from edgemed.errors import BundleError, InvalidInput

TRUE = BoxConfidence(1.7, 2.0)


def boxes(count: int = 4000, seed: int = 0) -> tuple[list[float], list[bool]]:
    """Raw scores, and boxes that are right as often as TRUE says."""
    rng = np.random.default_rng(seed)
    raw = rng.uniform(0.01, 1, count)
    return list(raw), [bool(rng.random() < TRUE.of(float(r))) for r in raw]


def test_a_fit_finds_what_made_the_boxes() -> None:
    found = fit(*boxes())
    assert (found.slope, found.offset) == (pytest.approx(1.7, abs=0.2), pytest.approx(2.0, abs=0.2))


def test_scores_that_part_right_from_wrong_without_error_are_fitted_all_the_same() -> None:
    found = fit([0.1, 0.2, 0.8, 0.9], [False, False, True, True])
    assert 0 < found.of(0.1) < 0.5 < found.of(0.9) < 1


@pytest.mark.parametrize("right", [[True, True], [False, False], []])
def test_boxes_of_one_kind_teach_nothing(right: list[bool]) -> None:
    with pytest.raises(InvalidInput, match="some of both are needed"):
        fit([0.5] * len(right), right)


def test_the_fit_makes_scores_true() -> None:
    raw, right = boxes()
    before = calibration_error(reliability(raw, right))
    after = calibration_error(reliability([TRUE.of(r) for r in raw], right))
    assert before > 0.2
    assert after < 0.03
    assert ranking([TRUE.of(r) for r in raw], right) == pytest.approx(ranking(raw, right))


def test_a_patient_is_scored_by_a_fit_that_never_saw_him() -> None:
    raw, right = boxes(300)
    patients = [str(i % 3) for i in range(300)]
    scores = held_out_scores(raw, right, patients)
    others = [i for i in range(300) if patients[i] != "1"]
    expected = fit([raw[i] for i in others], [right[i] for i in others])
    own = [i for i in range(300) if patients[i] == "1"]
    np.testing.assert_allclose(scores[own], [expected.of(raw[i]) for i in own])


def test_parts_hold_every_box_once_in_the_order_of_their_scores() -> None:
    raw, right = boxes(47)
    parts = reliability(raw, right, parts=10)
    assert [p.count for p in parts] == [5] * 7 + [4] * 3
    assert [p.score for p in parts] == sorted(p.score for p in parts)
    assert sum(p.count * p.right for p in parts) == pytest.approx(sum(right))


def test_the_raw_score_is_the_geometric_mean_and_no_side_alone_makes_it_nothing() -> None:
    sides = (Side(0.5), Side(0.5), Side(0.5), Side(0.5))
    assert raw_score(sides) == pytest.approx(0.5)
    assert raw_score((*sides[:3], Side(0.0))) == pytest.approx((0.125 * 1e-4) ** 0.25)


def test_a_bundle_without_the_setting_has_none() -> None:
    assert confidence_of({}) is None
    assert confidence_of({"box_confidence": {"slope": 1, "offset": 0.5}}) == BoxConfidence(1.0, 0.5)


@pytest.mark.parametrize(
    "setting", [3, {"slope": 1.0}, {"slope": "1", "offset": 0.0}, {"slope": float("nan"), "offset": 1}]
)
def test_a_setting_that_is_no_two_numbers_is_refused(setting: Any) -> None:
    with pytest.raises(BundleError, match="has no finite slope and offset"):
        confidence_of({"box_confidence": setting})
