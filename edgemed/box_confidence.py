"""How sure a box is: from the probabilities of its sides to the probability that it is right, and how true that is.

The raw score of a box is the geometric mean of the probabilities of its sides. A bundle may bring two numbers, fitted
on boxes that no training saw, that turn its log-odds into the probability that the box meets the true one with an IoU
of `RIGHT` or more. Covers the fit, the table behind a reliability plot and the calibration error. Does not cover where
sides and true boxes come from (the families, `evaluation`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgemed.core import Sides
from edgemed.errors import BundleError, InvalidInput

SETTING = "box_confidence"
"""The setting of a bundle that holds `slope` and `offset`."""
RIGHT = 0.5
"""From this IoU with the true box on, a box counts as right."""
_LEAST = 1e-4  # a probability nearer to 0 or 1 counts as this far away: one side must not decide alone
_STEPS = 50

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BoxConfidence:
    """Turns a raw score into a probability: 1 / (1 + exp(-(slope * log(raw / (1 - raw)) + offset)))."""

    slope: float
    offset: float

    def of(self, raw: float) -> float:
        """Return the probability that a box of this raw score is right.

        >>> round(BoxConfidence(2.0, 1.0).of(0.5), 3), round(BoxConfidence(1.0, 0.0).of(0.8), 3)
        (0.731, 0.8)
        """
        return 1 / (1 + math.exp(-(self.slope * float(_log_odds([raw])[0]) + self.offset)))


@dataclass(frozen=True)
class Part:
    """Boxes of neighbouring scores: how many, their mean score, the share of them that is right."""

    count: int
    score: float
    right: float


def raw_score(sides: Sides) -> float:
    """Return the geometric mean of the probabilities of the sides, 0..1."""
    return math.exp(math.fsum(math.log(min(max(side.probability, _LEAST), 1.0)) for side in sides) / len(sides))


def confidence_of(settings: Mapping[str, Any]) -> BoxConfidence | None:
    """Return what a bundle's settings bring, or None. Raises BundleError where it is not two finite numbers."""
    found = settings.get(SETTING)
    if found is None:
        return None
    given: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    slope, offset = (
        float(v) if isinstance(v := given.get(name), int | float) else math.nan for name in ("slope", "offset")
    )
    if not (math.isfinite(slope) and math.isfinite(offset)):
        raise BundleError(f"the bundle's setting {SETTING} has no finite slope and offset; get the bundle again")
    return BoxConfidence(slope, offset)


def fit(raw: Sequence[float], right: Sequence[bool]) -> BoxConfidence:
    """Return the two numbers under which `right` is likeliest (Platt's scaling of the log-odds, with his targets).

    The targets keep the fit finite where scores part right from wrong without an error. Raises InvalidInput where there
    are no right or no wrong boxes: a probability cannot be learned from one kind. Source: Platt, "Probabilistic outputs
    for support vector machines", 1999.
    """
    yes = sum(right)
    no = len(right) - yes
    if not yes or not no or len(raw) != len(right):
        raise InvalidInput(f"{yes} right and {no} wrong boxes were found; some of both are needed to fit a confidence")
    x = np.stack([_log_odds(raw), np.ones(len(raw))], axis=1)
    wanted = np.where(np.array(right), (yes + 1) / (yes + 2), 1 / (no + 2))
    weights = np.zeros(2)
    for _ in range(_STEPS):  # Newton's method on a convex loss
        p = 1 / (1 + np.exp(-(x @ weights)))
        curvature = (x * (p * (1 - p))[:, None]).T @ x + 1e-9 * np.eye(2)
        weights -= np.linalg.solve(curvature, x.T @ (p - wanted))
    return BoxConfidence(float(weights[0]), float(weights[1]))


def _log_odds(raw: Sequence[float]) -> Floats:
    clipped = np.clip(np.array(raw, np.float64), _LEAST, 1 - _LEAST)
    return np.asarray(np.log(clipped / (1 - clipped)))


def held_out_scores(raw: Sequence[float], right: Sequence[bool], patients: Sequence[str]) -> Floats:
    """Return each box's probability from a fit on the boxes of all other patients. Raises what `fit` raises."""
    groups = np.array(patients)
    scores = np.empty(len(raw))
    for patient in dict.fromkeys(patients):
        own = groups == patient
        others = [i for i in range(len(raw)) if not own[i]]
        fitted = fit([raw[i] for i in others], [right[i] for i in others])
        scores[own] = [fitted.of(score) for score, mine in zip(raw, own, strict=True) if mine]
    return scores


def reliability(scores: Sequence[float] | Floats, right: Sequence[bool], parts: int = 10) -> list[Part]:
    """Return the boxes in `parts` parts of the same size by score, lowest first."""
    order = np.argsort(np.array(scores), kind="stable")
    values, truth = np.array(scores, np.float64), np.array(right, np.float64)
    groups = [group for group in np.array_split(order, parts) if len(group)]
    return [Part(len(g), float(values[g].mean()), float(truth[g].mean())) for g in groups]


def calibration_error(parts: Sequence[Part]) -> float:
    """Return the mean distance between score and share of right boxes, each part by its size, 0..1.

    >>> calibration_error([Part(3, 0.2, 0.0), Part(1, 0.8, 1.0)])
    0.2
    """
    return sum(part.count * abs(part.score - part.right) for part in parts) / sum(part.count for part in parts)


def ranking(scores: Sequence[float] | Floats, right: Sequence[bool]) -> float:
    """Return how often a right box scores above a wrong one (area under the ROC curve); a tie counts half.

    >>> ranking([0.9, 0.4, 0.6], [True, False, False])
    1.0
    """
    values, truth = np.array(scores, np.float64), np.array(right, bool)
    above = values[truth][:, None] - values[~truth][None, :]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def to_markdown(found: Mapping[str, Any]) -> str:
    """Return the tables of what `box_evaluation.to_json` gives."""
    lines = [
        f"{found['boxes']} boxes of {found['patients']} patients that no training saw; {100 * found['right']:.0f} % "
        f"are right (IoU of {found['right_from_iou']:g} or more with the true box). Fitted: on the other patients.",
        "",
        "| score | calibration error | a right box scores above a wrong one |",
        "|---|--:|--:|",
    ]
    names = {"before": "as the sides say", "after": "fitted"}
    lines += [f"| {names[k]} | {found[k]['error']:.3f} | {found[k]['ranking']:.3f} |" for k in names]
    lines += ["", "| fitted score, tenth by tenth | boxes | right |", "|--:|--:|--:|"]
    lines += [f"| {part['score']:.2f} | {part['count']} | {part['right']:.2f} |" for part in found["after"]["parts"]]
    return "\n".join(lines) + "\n"
