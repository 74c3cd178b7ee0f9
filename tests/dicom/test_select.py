"""Rules in the form of MONAI Deploy's selector, a UID, and what is chosen without either."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgemed.dicom.geometry_verdict import Kind, Place, Verdict
from edgemed.dicom.select import choose, keywords_of, parse_rules, preference, read_rules
from edgemed.dicom.series import Series, SliceHeader
from edgemed.errors import CannotRead, EdgemedError, InvalidInput, NoInput

AXIAL, CORONAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
FACTS: dict[str, Any] = {
    "SeriesDescription": "Abdomen portal venous 3.0",
    "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    "SliceThickness": 3.0,
    "ConvolutionKernel": ["Br38f", "3"],
}


def series(name: str = "1.2", count: int = 3, kind: Kind = "uniform", **facts: Any) -> Series:
    place = Place(8, 8, (1, 1), facts.pop("orientation", AXIAL), (0, 0, 0))
    modality = facts.pop("modality", "CT")
    slices = tuple(SliceHeader("x", k, place) for k in range(count))
    return Series(name, name.split("#")[0], modality, slices, Verdict(kind), facts={**FACTS, **facts})


def fits(conditions: dict[str, Any], item: Series | None = None) -> bool:
    (rule,) = parse_rules({"selections": [{"name": "n", "conditions": conditions}]})
    return rule.fits(item or series())


@pytest.mark.parametrize(
    "conditions",
    [
        {"Modality": "ct"},
        {"Modality": "(?i)^CT$"},
        {"SeriesDescription": "(?i)^(?!.*(cor|sag)).*$"},
        {"SeriesDescription": "PORTAL"},
        {"SeriesDescription": ""},
        {"ImageType": ["primary", "!SECONDARY"]},
        {"ImageType": "original"},
        {"ImageType": "!localizer"},
        {"SliceThickness": 3},
        {"SliceThickness": [2, 5]},
        {"SliceThickness": [2, ">"]},
        {"SliceThickness": [3, ">="]},
        {"SliceThickness": [3, "<="]},
        {"SliceThickness": [4, "!="]},
        {"SliceThickness": "[23]"},
        {"ConvolutionKernel": ["br38"]},
        {"ImageOrientationPatient": "axial"},
        {"Modality": "CT", "SliceThickness": [2, 5], "ImageType": ["AXIAL"]},
    ],
)
def test_conditions_that_are_met(conditions: dict[str, Any]) -> None:
    assert fits(conditions)


@pytest.mark.parametrize(
    "conditions",
    [
        {"Modality": "MR"},
        {"SeriesDescription": "(?i)^portal"},
        {"ImageType": ["PRIMARY", "!AXIAL"]},
        {"ImageType": "!axial"},
        {"ImageType": ["DERIVED"]},
        {"SliceThickness": 3.5},
        {"SliceThickness": [4, 5]},
        {"SliceThickness": [3, ">"]},
        {"SliceThickness": [3, "!="]},
        {"SliceThickness": "30"},
        {"ImageOrientationPatient": "Coronal"},
        {"BodyPartExamined": ".*"},
        {"Modality": "CT", "BodyPartExamined": "ABDOMEN"},
    ],
)
def test_conditions_that_are_not_met(conditions: dict[str, Any]) -> None:
    assert not fits(conditions)


def test_the_plane_is_that_of_the_slices() -> None:
    assert fits({"ImageOrientationPatient": "Coronal"}, series(orientation=CORONAL))


def test_the_first_selection_that_any_series_fits_is_taken() -> None:
    rules = parse_rules(
        {
            "selections": [
                {"conditions": {"Modality": "PT"}},
                {"conditions": {"SliceThickness": [0, 2]}},
                {"conditions": {"Modality": "CT"}},
            ]
        }
    )
    thin = series("1.3", 90, SliceThickness=1.0)
    chosen, others = choose([series(), thin], rules)
    assert (chosen.name, [s.name for s in others]) == ("1.3", ["1.2"])
    assert keywords_of(rules) == ("Modality", "SliceThickness")


def test_rules_that_fit_nothing_are_no_input() -> None:
    with pytest.raises(NoInput, match="none of 1 series fits"):
        choose([series()], parse_rules({"selections": [{"conditions": {"Modality": "PT"}}]}))


def test_the_largest_volume_of_original_pictures_is_the_default() -> None:
    ranked = [
        series("1.1", 40),
        series("1.2", 20),
        series("1.3", 90, "gaps"),
        series("1.4", 300, ImageType=["DERIVED", "SECONDARY"]),
        series("1.5", 3, "localizer", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        series("1.6", 400, modality="SEG"),
        series("1.7", 1, "single"),
    ]
    chosen, others = choose(ranked[::-1])
    assert chosen.name == "1.1"
    assert [s.name for s in others] == ["1.2", "1.3", "1.7", "1.6", "1.4", "1.5"]
    assert preference(ranked[0]) < preference(ranked[2]) < preference(ranked[3])


def test_a_uid_takes_its_series_and_a_stack_of_it() -> None:
    stacks = [series("1.2#1", 5), series("1.2#2", 4), series("1.3", 90)]
    assert choose(stacks, uid="1.2")[0].name == "1.2#1"
    assert choose(stacks, uid="1.2#2")[0].name == "1.2#2"


def test_a_uid_that_is_not_there_is_no_input_and_tells_those_that_are() -> None:
    with pytest.raises(NoInput, match=r"no series has the UID 9.9; there are: 1.2"):
        choose([series()], uid="9.9")


def test_what_is_no_uid_is_wrong_usage() -> None:
    with pytest.raises(EdgemedError, match="no UID"):
        choose([series()], uid="Doe^Jane")


def test_reports_alone_are_no_input() -> None:
    with pytest.raises(NoInput, match="no series holds pictures"):
        choose([series(modality="SEG"), series("1.4", modality="RTDOSE")])


def test_derived_pictures_are_taken_if_there_is_nothing_else() -> None:
    derived = series(ImageType=["DERIVED", "PRIMARY"])
    assert choose([derived])[0] is derived


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ([], "no list"),
        ({"selections": []}, "no list"),
        ({"selections": [{"name": "x"}]}, 'no "conditions"'),
        ({"selections": [{"conditions": {"Modalty": "CT"}}]}, "'Modalty' is no DICOM keyword"),
        ({"selections": [{"conditions": {"Modality": "("}}]}, "no regular expression"),
        ({"selections": [{"conditions": {"SliceThickness": [2, "=>"]}}]}, "compares with '=>'"),
        ({"selections": [{"conditions": {"ImageOrientationPatient": "Oblique"}}]}, "no plane"),
        ({"selections": [{"conditions": {"Modality": True}}]}, "neither text"),
        ({"selections": [{"conditions": {"Modality": {"is": "CT"}}}]}, "neither text"),
    ],
)
def test_rules_of_another_form_are_refused(tmp_path: Path, rules: Any, told: str) -> None:
    file = tmp_path / "rules.json"
    file.write_text(json.dumps(rules))
    with pytest.raises(InvalidInput, match=told):
        read_rules(file)


def test_rules_that_are_no_json_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rules.json").write_text("{")
    with pytest.raises(InvalidInput, match="no JSON"):
        read_rules(tmp_path / "rules.json")
    with pytest.raises(CannotRead, match="cannot read"):
        read_rules(tmp_path / "missing.json")


def test_a_series_without_positions_meets_no_plane() -> None:
    nowhere = series()
    slices = tuple(replace(s, place=Place(8, 8)) for s in nowhere.slices)
    assert not fits({"ImageOrientationPatient": "Axial"}, replace(nowhere, slices=slices))
