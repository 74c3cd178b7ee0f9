"""Questions and answers: every template fills, every answer parses, both languages cover the same tasks."""

import re
from collections import defaultdict

import numpy as np
import pytest

from edgemed.core import Language
from edgemed.families.native_lexicon import BODY_PARTS, MODALITIES, STRUCTURES, position, structure_of
from edgemed.families.native_text import Bins, Place, normal_form, parse, plain
from edgemed.language import language_of
from edgemed.training.answers import (
    DESCRIBE_LENGTH,
    LIST_LENGTH,
    MARKED_REGION,
    SENTENCES,
    by_size,
    say_image,
    say_list,
)
from edgemed.training.facts import ImageFacts, RegionFact
from edgemed.training.questions import around, templates
from edgemed.training.tasks import TASKS, Turn, make_turns, turn_of, yes_or_no

LIVER, BLADDER, POLYP = 0, 15, 41
FACTS = ImageFacts(
    0,
    0,
    {
        LIVER: (100, 200, 500, 700),
        1: (700, 300, 850, 600),
        3: (480, 500, 560, 580),
        9: (200, 600, 300, 750),
        10: (700, 600, 800, 720),
        21: (450, 500, 580, 800),
    },
    (2, BLADDER, 19, 37, 40, POLYP),
    (
        RegionFact("box", LIVER, (90, 190, 500, 700), (100, 200, 500, 700)),
        RegionFact("point", None, (500, 100, 580, 180), None),
        RegionFact("mask", 1, (700, 300, 850, 600), (700, 300, 850, 600)),
    ),
)
EMPTY = ImageFacts(2, 1, {}, (LIVER,))
LANGUAGES: tuple[Language, ...] = ("en", "zh")


def many(facts: ImageFacts, count: int = 3000, seed: int = 3) -> list[Turn]:
    return make_turns(facts, np.random.default_rng(seed), count)


def places(turn: Turn) -> list[Place]:
    return [piece for piece in parse(turn.answer) if isinstance(piece, Place)]


def test_the_same_generator_gives_the_same_turns() -> None:
    assert many(FACTS, 200) == many(FACTS, 200)
    assert many(FACTS, 200) != many(FACTS, 200, seed=4)


def test_both_languages_have_the_same_tasks_and_dozens_of_ways_to_ask() -> None:
    assert set(templates("en")) == set(templates("zh"))
    assert set(around("en")) == set(around("zh"))
    for language in LANGUAGES:
        for task, kinds in templates(language).items():
            assert set(kinds) == {"do", "ask"}
            count = len({*kinds["do"], *kinds["ask"]})
            assert count >= (40 if task in ("where", "segment") else 10), (language, task, count)


def test_templates_name_only_fields_that_are_filled() -> None:
    for language in LANGUAGES:
        for task, kinds in templates(language).items():
            for template in (*kinds["do"], *kinds["ask"]):
                assert set(re.findall(r"\{\w*\}", template)) <= {
                    "{x}",
                    "{a}",
                    "{bare}",
                    "{is}",
                    "{img}",
                    "{reg}",
                    "{at}",
                }
                assert "{at} {reg}" in template or "{at}" not in template
                if task in ("where", "segment", "visible", "check_region", "judge_of"):
                    assert re.search(r"\{(x|a|bare)\}", template)


def test_every_task_comes_in_both_languages() -> None:
    seen = {(turn.task, language_of(turn.prompt)) for turn in many(FACTS)}
    assert seen == {(task, language) for task in TASKS for language in LANGUAGES}


@pytest.mark.parametrize("facts", [FACTS, EMPTY], ids=["full", "empty"])
def test_every_turn_is_filled_and_its_answer_parses(facts: ImageFacts) -> None:
    for turn in many(facts):
        assert turn.prompt.strip()
        assert "{" not in turn.prompt + turn.answer
        assert "  " not in turn.prompt
        assert turn.answer == turn.answer.strip() != ""
        assert all(turn.answer.count(f"<{t}>") == turn.answer.count(f"</{t}>") for t in ("ref", "box"))
        assert "<" not in plain(turn.answer)
        assert language_of(plain(turn.answer)) == turn.language
        for place in places(turn):
            assert place.seg
            assert place.bins is not None
            structure = structure_of(place.name)
            if structure is None:
                assert turn.task == "segment_region"
                assert place.name == MARKED_REGION[turn.language]
                assert place.bins == facts.regions[turn.regions[0]].box_bins
                continue
            assert place.name == (STRUCTURES[structure].en if turn.language == "en" else STRUCTURES[structure].zh)[0]
            assert place.bins == facts.visible[structure]


def test_one_question_has_one_answer() -> None:
    answers: dict[tuple[str, str, tuple[int, ...]], set[str]] = defaultdict(set)
    for turn in many(FACTS, 8000):
        answers[normal_form(turn.prompt).rstrip("?.!。"), turn.language, turn.regions].add(turn.answer)
    assert [question for question, several in answers.items() if len(several) > 1] == []


def test_what_is_absent_gets_no_box() -> None:
    for turn in many(EMPTY):
        assert places(turn) == []


def test_regions_are_only_given_to_questions_and_exist() -> None:
    turns = many(FACTS)
    for turn in turns:
        assert all(0 <= i < len(FACTS.regions) for i in turn.regions)
        if turn.task in ("region", "segment_region", "check_region"):
            assert turn.regions
            regions = [FACTS.regions[i] for i in turn.regions]
            boxes = [r.target_bins for r in regions if r.target_bins is not None]
            if turn.task == "segment_region" and not boxes:  # nothing known is there: what was pointed at is outlined
                boxes = [regions[0].box_bins]
            assert [p.bins for p in places(turn)] == boxes
        assert turn.prompt.count("<region>") <= len(turn.regions)
    assert any("<region>" in turn.prompt for turn in turns)


def test_without_regions_nothing_is_asked_about_one() -> None:
    assert not {turn.task for turn in many(EMPTY)} & {"region", "segment_region", "check_region"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_unknown_names_are_refused_in_words(language: Language) -> None:
    rng = np.random.default_rng(0)
    turns = [turn_of("unknown", EMPTY, rng, language) for _ in range(300)]
    for turn in turns:
        assert turn is not None
        assert SENTENCES["unknown"][turn.language] in turn.answer


def test_pairs_are_answered_one_by_one() -> None:
    found = [t for t in many(FACTS, 4000) if t.task == "where" and re.search(r"\bkidneys\b", t.prompt.lower())]
    assert found
    for turn in found:
        if turn.language == "en" and "liver" not in turn.answer:
            assert [p.name for p in places(turn)] == ["right kidney", "left kidney"]


def test_questions_of_judgement_end_in_the_honest_sentence() -> None:
    for turn in many(FACTS):
        if turn.task == "judge":
            assert turn.answer.endswith(SENTENCES["judge"][turn.language])


def test_list_is_by_size_and_bounded() -> None:
    boxes = {i: (0, 0, 10 + i, 10 + i) for i in range(20)}
    facts = ImageFacts(0, 0, boxes)
    assert by_size(boxes)[:3] == [19, 18, 17]
    listed = [p for p in parse(say_list(facts, "en")) if isinstance(p, Place)]
    assert len(listed) == LIST_LENGTH
    described = [t for t in many(facts, 500) if t.task == "describe"]
    assert {len(places(t)) for t in described} == {DESCRIBE_LENGTH}


def test_every_modality_and_body_part_has_its_sentence() -> None:
    for m, modality in enumerate(MODALITIES):
        for b, part in enumerate(BODY_PARTS):
            facts = ImageFacts(m, b, {})
            assert part.en[0] in say_image(facts, "en")
            assert modality.en[0].split()[0] in say_image(facts, "en")
            assert modality.zh[0] in say_image(facts, "zh")
            assert part.zh[0] in say_image(facts, "zh")
    assert say_image(ImageFacts(0, None, {}), "en") == "This is a CT image."
    assert say_image(ImageFacts(None, 0, {}), "zh") == "图像部位是腹部。"
    assert say_image(ImageFacts(None, None, {}), "en") == ""


def test_positions_are_of_the_image_as_shown() -> None:
    assert position((0, 0, 100, 100), "en") == "upper left"
    assert position((450, 450, 550, 550), "zh") == "中央"
    assert position((900, 900, 999, 999), "en") == "lower right"
    assert position((450, 0, 499, 100), "en", extent=(500, 1000)) == "upper right"


def test_yes_and_no_keep_the_sentence() -> None:
    assert yes_or_no(True, "The liver is here.", "en") == "Yes, the liver is here."
    assert yes_or_no(False, "心脏在该图像中不可见。", "zh") == "否，心脏在该图像中不可见。"


def test_plain_test_questions_are_among_what_is_learnt() -> None:
    facts = ImageFacts(0, 0, dict.fromkeys((LIVER, 1, 2), FACTS.visible[1]), (BLADDER,), FACTS.regions[:1])
    asked = {normal_form(turn.prompt).rstrip("?.!。") for turn in many(facts, 20000)}
    for question in (  # the ways most people ask
        "Where is the liver?",
        "Segment the spleen.",
        "Find the stomach",
        "肝脏在哪里?",
        "请分割脾脏",
        "Where is the liver, and is it normal?",
        "List the visible structures",
        "What is in this region?",
        "What modality is this?",
        "这是什么检查?",
        "Describe this image",
        "Is the bladder visible?",
    ):
        assert normal_form(question).rstrip("?.!。") in asked, question


def test_a_region_needs_both_structure_and_box() -> None:
    with pytest.raises(ValueError, match="neither"):
        RegionFact("box", 0, (1, 2, 3, 4), None)


@pytest.mark.parametrize("visible", [{}, {LIVER: (1, 2, 3, 4)}, {LIVER: (1, 2, 3, 4), 1: (5, 6, 7, 8)}])
@pytest.mark.parametrize("absent", [(), (BLADDER,), (BLADDER, 9, 10)])
def test_any_facts_give_turns(visible: dict[int, Bins], absent: tuple[int, ...]) -> None:
    assert len(many(ImageFacts(None, None, visible, absent), 500)) == 500
