"""Which series of several is meant: by its UID, by selection rules, or by what a volume needs.

The rules are the JSON of MONAI Deploy's series selector:

    {"selections": [{"name": "axial CT", "conditions": {
        "Modality": "(?i)CT",                    text: the same (any case), or a regular expression found in it
        "ImageType": ["PRIMARY", "!SECONDARY"],  several values: each word in one of them, with ! in none
        "SliceThickness": [2, 5],                number: a range, [2, ">"] (also >= < <= !=), a regular expression of
                                                 the whole number, or the number
        "ImageOrientationPatient": "Axial"}}]}   the nearest plane: Axial, Coronal or Sagittal

Of the selections the first that any series fits is taken, of the fitting series the one `preference` puts first. A
condition on an element that a series lacks is not met; one that is empty is met by all.

Source: github Project-MONAI/monai-deploy-app-sdk, dicom_series_selector_operator.py. Differs from it in that words of a
list are looked for in each value, not in all of them written as one text, and a plane needs no Patient Position.
"""

from __future__ import annotations

import json
import operator
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgemed.dicom.geometry_verdict import plane_of
from edgemed.dicom.series import Series
from edgemed.errors import CannotRead, EdgemedError, InvalidInput, NoInput

_ORIENTATION = "ImageOrientationPatient"
_PLANES = ("axial", "coronal", "sagittal")
_COMPARE: Mapping[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "!=": operator.ne,
}
_MAX_RULES_BYTES = 1 << 20


@dataclass(frozen=True)
class Selection:
    """One named set of conditions, DICOM keyword -> what the value must be; all of them must be met."""

    name: str
    conditions: Mapping[str, Any]

    def fits(self, series: Series) -> bool:
        """Return whether the series meets every condition."""
        return all(_met(wanted, keyword, series) for keyword, wanted in self.conditions.items() if wanted)


def read_rules(path: str | os.PathLike[str]) -> tuple[Selection, ...]:
    """Return the selections of a JSON file.

    Raises CannotRead, or InvalidInput if the file has another form, a keyword is none of DICOM, or a condition cannot
    be met by anything (a pattern that is none, a plane or comparison with another name).
    """
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_RULES_BYTES + 1)
    except OSError as error:
        raise CannotRead(f"cannot read {os.fspath(path)}: {error.strerror or 'refused'}") from error
    try:
        if len(text) > _MAX_RULES_BYTES:
            raise InvalidInput(f"the rules have more than {_MAX_RULES_BYTES >> 20} MiB")
        return parse_rules(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{os.fspath(path)} holds no JSON: {type(error).__name__}") from None
    except InvalidInput as error:
        raise InvalidInput(f"{os.fspath(path)}: {error}") from None


def parse_rules(rules: Any) -> tuple[Selection, ...]:
    """Return the selections of rules as JSON values. Raises InvalidInput as `read_rules`."""
    from pydicom.datadict import tag_for_keyword

    selections = rules.get("selections") if isinstance(rules, dict) else None
    if not isinstance(selections, list) or not selections:
        raise InvalidInput('the rules have no list "selections"')
    parsed: list[Selection] = []
    for number, item in enumerate(selections, 1):
        conditions = item.get("conditions") if isinstance(item, dict) else None
        if not isinstance(conditions, dict) or not conditions:
            raise InvalidInput(f'selection {number} has no "conditions"')
        for keyword, wanted in conditions.items():
            if tag_for_keyword(keyword) is None:
                raise InvalidInput(f"selection {number}: {keyword!r} is no DICOM keyword")
            _check(keyword, wanted, number)
        parsed.append(Selection(str(item.get("name", "")).strip() or f"selection {number}", dict(conditions)))
    return tuple(parsed)


def keywords_of(rules: Sequence[Selection]) -> tuple[str, ...]:
    """Return the keywords that the rules ask for, each once."""
    return tuple(dict.fromkeys(keyword for rule in rules for keyword in rule.conditions))


def _check(keyword: str, wanted: Any, number: int) -> None:
    problem = None
    words = wanted if isinstance(wanted, list) else [wanted]
    if any(isinstance(w, bool) or not isinstance(w, str | int | float) for w in words if w is not None):
        problem = "is neither text, number nor a list of those"
    elif keyword == _ORIENTATION and (not isinstance(wanted, str) or wanted.strip().lower() not in _PLANES):
        problem = "is no plane; Axial, Coronal or Sagittal was expected"
    elif _is_comparison(wanted) and wanted[1] not in _COMPARE:
        problem = f"compares with {wanted[1]!r}; one of {' '.join(_COMPARE)} was expected"
    elif isinstance(wanted, str):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)
                re.compile(wanted)
        except (re.error, RecursionError, OverflowError):
            problem = "is no regular expression"
        except (
            FutureWarning
        ):  # '[[', '--', '&&', '||' and '~~' inside of a set, which Python may read otherwise one day
            problem = "has a set with two meanings; put a \\ before its inner [ - & | or ~"
    if problem:
        raise InvalidInput(f"selection {number}: the condition on {keyword} {problem}")


def _is_comparison(wanted: Any) -> bool:
    """Return whether `wanted` is [number, text]."""
    return (
        isinstance(wanted, list)
        and len(wanted) == 2
        and isinstance(wanted[0], int | float)
        and isinstance(wanted[1], str)
    )


def _met(wanted: Any, keyword: str, series: Series) -> bool:
    if keyword == _ORIENTATION:
        place = series.slices[0].place
        return place.orientation is not None and plane_of(place) == wanted.strip().lower()
    value = series.modality if keyword == "Modality" else series.facts.get(keyword)
    if value is None or value == "":
        return False
    if isinstance(value, float):
        return _met_by_number(wanted, value)
    if isinstance(value, str) and isinstance(wanted, str):
        return value.casefold() == wanted.casefold() or re.search(wanted, value, re.IGNORECASE) is not None
    values = [_text(v).casefold() for v in (value if isinstance(value, list) else [value])]
    for word in (_text(w).casefold() for w in (wanted if isinstance(wanted, list) else [wanted])):
        banned, word = word.startswith("!"), word.removeprefix("!")
        if any(word in v for v in values) == banned:
            return False
    return True


def _met_by_number(wanted: Any, value: float) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, _text(value)) is not None or re.fullmatch(wanted, str(value)) is not None
    if isinstance(wanted, int | float):
        return bool(wanted == value)
    if _is_comparison(wanted):
        return _COMPARE[wanted[1]](value, float(wanted[0]))
    if len(wanted) == 2 and all(isinstance(w, int | float) for w in wanted):
        return bool(wanted[0] <= value <= wanted[1])
    return False


def _text(value: Any) -> str:
    """Return a value as a header would write it: 3.0 is 3."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def preference(series: Series) -> tuple[bool, bool, int]:
    """Return what a default choice is made by, smallest first: original pictures, evenly spaced, the most slices."""
    return (not series.is_original, series.verdict.kind != "uniform", -len(series.slices))


def choose(
    found: Sequence[Series], rules: Sequence[Selection] = (), uid: str | None = None
) -> tuple[Series, tuple[Series, ...]]:
    """Return (the series that is meant, the others, in order of preference).

    uid: a SeriesInstanceUID, or the name of one of its stacks (UID#2). Without it and without rules, `preference`
    decides.

    Raises NoInput if no series fits.
    """
    ordered = sorted(found, key=preference)
    if not ordered:
        raise NoInput("there is no series to choose from")
    fitting = ordered
    if uid is not None:
        fitting = [s for s in ordered if uid in (s.name, s.uid)]
        if not fitting:
            raise NoInput(f"no series has the UID {_uid(uid)}; there are: {', '.join(s.name for s in ordered[:8])}")
    if rules:
        matched = ([s for s in fitting if rule.fits(s)] for rule in rules)
        fitting = next((series for series in matched if series), [])
        if not fitting:
            raise NoInput(f"none of {len(ordered)} series fits a selection of the rules")
    if uid is None and not rules and not ordered[0].is_original and all(s.modality in _REPORTS for s in ordered):
        raise NoInput("no series holds pictures of a patient; pass --series UID to take one nevertheless")
    chosen = fitting[0]
    return chosen, tuple(s for s in ordered if s is not chosen)


_REPORTS = ("SEG", "RTDOSE", "PR", "KO", "SR")


def _uid(text: str) -> str:
    """Return a UID for a message. Raises EdgemedError (usage) if it has other letters than one."""
    if not re.fullmatch(r"[0-9.]{1,64}(#\d+)?|no-uid-\d+(#\d+)?", text):
        raise EdgemedError("--series was given something that is no UID; 'UID' or 'UID#NUMBER' was expected")
    return text
