"""The model card says what it must, whatever the checkpoint says."""

from __future__ import annotations

import tomllib
from pathlib import Path

from edgemed.export.card import CREDITS, model_card, notice_text, sources_of
from edgemed.export.parity import Row
from edgemed.families.native_lexicon import BODY_PARTS, MODALITIES, STRUCTURES
from edgemed.training.sources import _RECORDS

ROW = Row("decoder", "logits (step)", 1e-5, 1e-6, 1.0)
CONFIG = {"training": {"recipe": "nano", "seed": 7, "samples": 1650, "sources": ["colin27", "US1_UNCR.dcm", "mine"]}}


def test_the_card_names_every_structure_and_is_not_for_diagnosis() -> None:
    card = model_card(CONFIG, [ROW], [], "TABLE\n")
    assert "Not a medical device, not for diagnosis" in card
    assert "demonstration model" in card
    for term in (*STRUCTURES, *MODALITIES, *BODY_PARTS):
        assert term.en[0] in card
    for said in ("Recipe `nano`, seed 7, 1650 augmented", "TABLE", "| decoder | logits (step) |"):
        assert said in card
    assert "int8 weights" not in card
    assert "int8 weights" in model_card(CONFIG, [ROW], [ROW], "")


def test_every_source_is_credited_with_its_licence() -> None:
    credited = dict(sources_of(CONFIG))
    assert credited == {
        CREDITS["colin27"][0]: "BSD-3-Clause",
        "Ultrasound frames of the Python packages pydicom-data 1.0.0 and deid-data 0.0.20": "MIT",
        "mine": "unknown",
    }
    notice = notice_text(CONFIG)
    assert all(text in notice and text in model_card(CONFIG, [], [], "") for text in credited)


def test_a_card_of_a_checkpoint_that_says_nothing_is_still_a_card() -> None:
    card = model_card({}, [], [ROW], "")
    assert "not for diagnosis" in card
    assert sources_of({}) == []


def test_everything_the_recipe_trains_on_has_a_credit() -> None:
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "nano.toml"
    groups = tomllib.loads(recipe.read_text(encoding="utf-8"))["data"]["plan"]
    assert {g for g in groups if g in _RECORDS} <= set(CREDITS)
    assert {"retina", "histo", "ihc"} <= set(groups) & set(CREDITS)


def test_sources_shared_by_several_groups_are_credited_once() -> None:
    assert len(sources_of({"training": {"sources": ["totalsegmentator-ct", "totalsegmentator-mr"]}})) == 1
