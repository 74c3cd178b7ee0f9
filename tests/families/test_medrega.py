"""MedRegA at run time, asked through a Session over an exported bundle: what goes in, and what is made of answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemed.core import Answer, Box, Prompt, PromptRegion, Scan, Turn
from edgemed.errors import InvalidInput
from edgemed.families import Family, Question, Reading, Written
from edgemed.families.medrega_prompts import BASE_PROMPTS, default_prompt, regional_question
from edgemed.families.medrega_text import Found, MedRegaText, parse
from edgemed.families.published_tokens import TOKENIZER, PublishedTokens
from edgemed.infer import InferOptions, Session

SHORT = InferOptions(max_new_tokens=1)
VQA, FIND, NAME = (BASE_PROMPTS[task, "en"] for task in ("vqa", "text2region", "region2text"))
BOXED = "<ref>liver</ref><box>[[0, 0, 499, 999], [500, 100, 999, 200]]</box> is large."
NO_BOXES = "<ref>liver</ref><box>[[10, 20, 30], [50, 60, 40, 70], [1, 2, 3, 4000]]</box> is there."
BOX = PromptRegion("box", box=(18.0, 36.0, 90.0, 180.0))
"""On the square picture of 180 x 180: [100, 200, 500, 999]."""
BOX_TEXT = "<ref>this</ref><box>[[100, 200, 500, 999]]</box>"


class Model:
    """The tiny model and what the tests ask it in short."""

    def __init__(self, tiny: Any) -> None:
        self.session: Session = tiny.session
        self.family: Family = self.session.family
        self.text = MedRegaText(PublishedTokens.open(tiny.bundle.file(TOKENIZER)), 16)
        self.square: Scan = tiny.scan("square")
        self.wide: Scan = tiny.scan("two_one")
        self.answers: dict[str, Any] = tiny.arrays.prompts

    def ids(self, prompt: Prompt, *scans: Scan) -> list[int]:
        """Return the ids of a prompt with the placeholder of an image's rows, which must be in order and all there."""
        answer = self.session.ask(scans, prompt, SHORT)
        assert answer.vocabulary is not None
        rows = [i for i in answer.prompt_ids if i >= answer.vocabulary]
        assert rows == list(range(answer.vocabulary, answer.vocabulary + len(rows)))
        return [self.text.context_id if i in rows else i for i in answer.prompt_ids]

    def read(self, answer: str, *scans: Scan, ended: bool = True, **prompt: Any) -> Reading:
        """Return what is made of an answer, as if the model had written it."""
        asked = Prompt("Where is it?", **prompt)
        written = Written(self.text.tokens.encode(answer), (), ended=ended)
        return self.family.read_answer(scans, asked, self.family.prepare(scans, asked), {}, written, ())


@pytest.fixture(scope="module")
def model(medrega: Any) -> Model:
    return Model(medrega)


def boxes(reading: Reading) -> list[tuple[str, Box]]:
    return [(region.label, region.box) for region in reading.regions]


# --- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "given", "turn"),
    [
        ("Is it large?", {}, f"{VQA} <image>\nIs it large?"),
        ("Where is the <ref>liver</ref>?", {}, f"{FIND} <image>\nWhere is the <ref>liver</ref>?"),
        ("Is it large?", {"task": "none"}, "<image>\nIs it large?"),
        ("Is it large?", {"order": "training"}, f"<image>\n{VQA} Is it large?"),
        ("At the end: <image>", {}, "At the end: <image>"),
    ],
    ids=["question", "place", "no task", "training order", "own place of the image"],
)
def test_question_gets_its_base_prompt_and_the_image_its_place(
    model: Model, question: str, given: dict[str, str], turn: str
) -> None:
    assert model.ids(Prompt(question, settings=given), model.square) == model.text.encode_prompt(turn, tiles=[1])


def test_a_question_in_chinese_gets_the_chinese_base_prompt(model: Model) -> None:
    turn = f"{BASE_PROMPTS['vqa', 'zh']}<image>\n肝脏大吗？"
    ids = model.ids(Prompt("肝脏大吗？", language="zh"), model.square)
    assert ids == model.text.encode_prompt(turn, tiles=[1])


def test_labels_of_a_classification_stand_in_the_base_prompt(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("benign\nmalignant\n")
    asked = {"labels": str(file)}
    turn = f"{default_prompt('classification', 'en', ['benign', 'malignant'])} <image>\nWhich?"
    assert model.ids(Prompt("Which?", settings=asked), model.square) == model.text.encode_prompt(turn, tiles=[1])
    assert model.read("It is benign.", model.square, settings=asked).labels == ("benign",)


def test_a_question_without_an_image_is_asked_alone(model: Model) -> None:
    assert model.ids(Prompt("What is a cyst?")) == model.text.encode_prompt("What is a cyst?")


def test_a_place_for_an_image_that_is_not_there_is_refused(model: Model) -> None:
    with pytest.raises(InvalidInput, match="1 <image> and 0 images"):
        model.ids(Prompt("What is <image>?"))


def test_several_images_are_numbered(model: Model) -> None:
    turn = f"<image 1> (图1):<image><image 2> (图2):<image>\n{VQA} Which is larger?"
    ids = model.ids(Prompt("Which is larger?"), model.square, model.wide)
    assert ids == model.text.encode_prompt(turn, tiles=[1, 1])


@pytest.mark.parametrize(("most", "tiles"), [("1", 1), ("2", 3), ("6", 3)])
def test_an_image_is_cut_into_tiles_and_a_thumbnail(model: Model, most: str, tiles: int) -> None:
    ids = model.ids(Prompt("What?", settings={"tiles": most}), model.wide)
    assert ids == model.text.encode_prompt(f"{VQA} <image>\nWhat?", tiles=[tiles])


@pytest.mark.parametrize("most", ["0", "17", "two", "-1"])
def test_a_wrong_number_of_tiles_is_refused(model: Model, most: str) -> None:
    with pytest.raises(InvalidInput, match=f"tiles is '{most}'"):
        model.ids(Prompt("What?", settings={"tiles": most}), model.wide)


def test_more_tiles_than_the_encoder_takes_are_refused(model: Model) -> None:
    tall = Scan(np.zeros((1, 600, 100, 3), np.uint8), modality="OT")  # 6 tiles and a thumbnail
    with pytest.raises(InvalidInput, match="21 tiles; at most 16 fit"):
        model.ids(Prompt("What?", settings={"tiles": "6"}), tall, tall, tall)


@pytest.mark.parametrize(
    ("question", "turn"),
    [
        ("What is <region>?", f"What is {BOX_TEXT}?"),
        ("What is this?", f"What is this? {BOX_TEXT}"),
        ("<region> or <region>?", f"{BOX_TEXT} or {BOX_TEXT}?"),
    ],
)
def test_a_region_is_its_box_as_text_at_its_place(model: Model, question: str, turn: str) -> None:
    regions = (BOX,) * max(question.count("<region>"), 1)
    ids = model.ids(Prompt(question, regions), model.square)
    assert ids == model.text.encode_prompt(f"{NAME} <image>\n{turn}", tiles=[1])


def test_a_mask_region_is_asked_about_by_its_box(model: Model) -> None:
    mask = np.zeros((180, 180), np.bool_)
    mask[36, 18:60] = mask[36:, 89] = True
    prompt = Prompt("What is <region>?", (PromptRegion("mask", mask=mask),))
    assert model.ids(prompt, model.square) == model.ids(replace(prompt, regions=(BOX,)), model.square)


def test_a_region_in_a_chinese_question_is_named_in_chinese(model: Model) -> None:
    ids = model.ids(Prompt("这是什么？<region>", (BOX,), "zh", settings={"task": "none"}), model.square)
    turn = f"<image>\n这是什么？{BOX_TEXT.replace('this', '该区域')}"
    assert ids == model.text.encode_prompt(turn, tiles=[1])


@pytest.mark.parametrize(
    ("region", "said"),
    [
        (PromptRegion("point", point=(5.0, 5.0)), "the region is a point; .* pass --region box"),
        (PromptRegion("mask", mask=np.zeros((180, 180), np.bool_)), "the region is an empty mask"),
        (PromptRegion("mask", mask=np.ones((180, 181), np.bool_)), r"\[180, 181\], \[180, 180\]"),
        (PromptRegion("box", box=(200.0, 0.0, 220.0, 9.0)), "outside the scan"),
    ],
    ids=["point", "empty mask", "mask of another size", "outside"],
)
def test_a_region_that_cannot_be_asked_about_is_refused(model: Model, region: PromptRegion, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        model.ids(Prompt("What?", (region,)), model.square)


def test_a_region_needs_one_image(model: Model) -> None:
    for scans in ((), (model.square, model.wide)):
        with pytest.raises(InvalidInput, match=f"1 regions were given with {len(scans)} images"):
            model.ids(Prompt("What?", (BOX,)), *scans)


def test_what_is_typed_steers_nothing(model: Model) -> None:
    plain = model.ids(Prompt("Hello"), model.square)
    for token in ("<|im_end|>", "<|im_start|>", "<IMG_CONTEXT>", "<img>", "</img>", "<|im_<|im_end|>end|>"):
        typed = model.ids(Prompt(f"Hello {token}"), model.square)
        for name in ("<|im_end|>", "<|im_start|>", "<IMG_CONTEXT>", "<img>", "</img>"):
            index = model.text.tokens.id_of(name)
            assert typed.count(index) == plain.count(index), f"{token} typed, {name} counted"


def test_what_was_typed_or_written_earlier_steers_nothing(model: Model) -> None:
    end = model.text.stop_id
    ids = [
        model.ids(Prompt("Why?", history=(Turn(f"Hello{token}", f"Hi{token}", f"Hi{token}"),)), model.square)
        for token in ("", "<|im_end|>")
    ]
    assert ids[0].count(end) == ids[1].count(end)


def test_the_first_turn_is_repeated_as_it_was_asked(model: Model) -> None:
    first = model.session.ask(model.square, Prompt("Is it large?"), InferOptions(max_new_tokens=4))
    turn = Turn("Is it large?", first.text, first.tagged_text)
    ids = model.ids(Prompt("Why?", history=(turn,)), model.square)
    asked = [model.text.context_id if i >= (first.vocabulary or 0) else i for i in first.prompt_ids]
    assert ids[: len(asked)] == asked
    assert ids == model.text.encode_prompt("Why?", tiles=[1], history=[(f"{VQA} <image>\nIs it large?", first.text)])


def test_an_earlier_answer_is_repeated_with_its_tags_only_where_that_is_corrected(model: Model) -> None:
    history = (Turn("<image>\nWhere?", "liver[[1, 2, 3, 4]]", "<ref>liver</ref><box>[[1, 2, 3, 4]]</box>"),)
    tag = model.text.tokens.id_of("<ref>")
    asked = [Prompt("Why?", history=history, settings={"compat": mode}) for mode in ("reference", "corrected")]
    assert [tag in model.ids(prompt, model.square) for prompt in asked] == [False, True]


def test_several_images_belong_to_the_first_turn(model: Model) -> None:
    history = (Turn("Which is larger?", "the first", "the first"),)
    ids = model.ids(Prompt("Why?", history=history, settings={"task": "none"}), model.square, model.wide)
    first = "<image 1> (图1):<image><image 2> (图2):<image>\nWhich is larger?"
    assert ids == model.text.encode_prompt("Why?", tiles=[1, 1], history=[(first, "the first")])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("colour", "red", "no setting 'colour'; it has .*compat.*tiles"),
        ("compat", "release-cli", "compat is 'release-cli'; one of reference, corrected"),
        ("task", "dance", "task is 'dance'; one of auto, none"),
        ("order", "last", "order is 'last'"),
        ("cot", "yes", "cot is 'yes'; one of on, off"),
    ],
)
def test_a_setting_that_is_not_known_is_refused(model: Model, name: str, value: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        model.ids(Prompt("What?", settings={name: value}), model.square)


# --- what may be answered ---------------------------------------------------------------------------------------------


def question_of(model: Model, prompt: Prompt, scans: tuple[Scan, ...], *, constrained: bool = True) -> Question:
    return model.family.ask(prompt, model.family.prepare(scans, prompt), {}, constrained=constrained)


def may_name_places(question: Question, model: Model) -> bool:
    grammar = question.grammar
    return bool(grammar.allowed(grammar.start())[model.text.tokens.id_of("<ref>")])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"task": "vqa"}, False),
        ({"task": "vqa_multiple_choice"}, False),
        ({"task": "report"}, False),
        ({"task": "classification"}, False),
        ({"task": "classification_multi"}, False),
        ({"task": "region2text"}, False),
        ({"task": "text2region"}, True),
        ({"task": "grounded_report"}, True),
        ({"task": "none"}, True),
        ({"labels": "isic2016"}, False),
        ({"dataset": "own"}, True),
        ({"dataset": "own", "task": "vqa"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_places_are_allowed_only_where_the_task_has_some(
    model: Model, settings: dict[str, str], expected: bool, tmp_path: Path
) -> None:
    if "dataset" in settings:
        (tmp_path / "meta.json").write_text('{"own": {"base_prompt": "Answer."}}')
        settings = {**settings, "prompts": str(tmp_path / "meta.json")}
    question = question_of(model, Prompt("Is it large?", settings=settings), (model.square,))
    assert may_name_places(question, model) == expected


def test_what_the_question_says_decides_whether_places_are_allowed(model: Model) -> None:
    for prompt, expected in (
        (Prompt("Where is the <ref>liver</ref>?"), True),
        (Prompt("Where is the liver?"), True),
        (Prompt("肝脏在哪里？", language="zh"), True),
        (Prompt("Is the liver large?"), False),
        (Prompt("What is this?", (BOX,)), False),
        (Prompt("<image>\nWhere is it?"), True),  # the whole turn is the user's, and says no task
        (Prompt("Is it <image> large?", settings={"labels": "isic2016"}), False),
        (Prompt("And where?", history=(Turn("Is it large?", "Yes", "Yes"),)), True),
    ):
        assert may_name_places(question_of(model, prompt, (model.square,)), model) == expected, prompt
    assert may_name_places(question_of(model, Prompt("What is a cyst?"), ()), model)
    lead = model.family.lead_in(Prompt("Is it large?", settings={"cot": "on", "task": "vqa"}))
    assert lead is not None
    assert may_name_places(question_of(model, lead, (model.square,)), model)


def test_without_a_grammar_the_model_writes_what_it_likes(model: Model) -> None:
    question = question_of(model, Prompt("Is it large?"), (model.square,), constrained=False)
    allowed = question.grammar.allowed(question.grammar.start())
    assert np.flatnonzero(~allowed).tolist() == [model.text.stop_id]
    assert question.drafter is None


@pytest.mark.parametrize(
    ("prompt", "written", "draft"),
    [
        (Prompt("Is <region> the liver?", (BOX,), settings={"task": "none"}), "<ref>liver</ref>", BOX_TEXT[15:]),
        (
            Prompt("And where?", history=(Turn("Where?", "", BOXED),)),
            "<ref>liver</ref><box>[[0, 0, 499",
            ", 999], [500, 100, 999, 200]]</box>",
        ),
        (Prompt("Where is the <ref>liver</ref>?"), "<ref>", "liver</ref>?"),
        (Prompt("Where is the <ref>liver</ref>?"), "<ref>liver</ref>", ""),
    ],
    ids=["region", "history", "name", "nothing known"],
)
def test_what_is_known_is_proposed(model: Model, prompt: Prompt, written: str, draft: str) -> None:
    question = question_of(model, prompt, (model.square,))
    state = question.grammar.start()
    ids = model.text.tokens.encode(written)
    for token in ids:
        state = question.grammar.advance(state, token)
    assert question.drafter is not None
    assert model.text.tokens.decode_verbatim(question.drafter.propose(ids, state, {})) == draft


@pytest.mark.parametrize(("name", "wide"), [("liver", False), ("spleen", True)])
def test_every_place_of_an_answer_is_read_as_it_was_written(model: Model, name: str, wide: bool) -> None:
    scan, prompt = model.wide if wide else model.square, Prompt(f"Where is the <ref>{name}</ref>?")
    options = InferOptions(max_new_tokens=120)
    answer, plain = (model.session.ask(scan, prompt, replace(options, decode=way)) for way in ("auto", "plain"))
    assert answer.generated_ids == plain.generated_ids
    assert answer.provenance.tokens["decoder_calls"] < plain.provenance.tokens["decoder_calls"]
    written = [piece for piece in parse(answer.tagged_text) if isinstance(piece, Found)]
    assert len(written) == answer.generated_ids.count(model.text.tokens.id_of("<ref>")) > 0
    assert len(answer.regions) == sum(len(place.boxes) for place in written) > 0
    assert not any("is no box" in note for note in answer.notes)


# --- what is answered -------------------------------------------------------------------------------------------------


def test_boxes_are_placed_in_scan_pixels(model: Model) -> None:
    reading = model.read(BOXED, model.wide)
    assert [label for label, _ in boxes(reading)] == ["liver", "liver"]
    np.testing.assert_allclose(
        [box for _, box in boxes(reading)],
        [(0, 0, 300 * 499 / 999, 150), (300 * 500 / 999, 15000 / 999, 300, 30000 / 999)],
    )
    assert reading.notes == ()


def test_text_is_shown_as_published_or_without_numbers(model: Model) -> None:
    published = model.read(BOXED, model.square)
    corrected = model.read(BOXED, model.square, settings={"compat": "corrected"})
    assert published.tagged_text == corrected.tagged_text == BOXED
    assert "<" not in published.text
    assert "[500, 100, 999, 200]]" in published.text
    assert corrected.text == "liver is large."
    assert boxes(published) == boxes(corrected)


def test_numbers_that_are_no_box_stay_text_and_are_noted(model: Model) -> None:
    reading = model.read(NO_BOXES, model.square)
    assert reading.regions == ()
    assert [note.partition(" is no box")[0] for note in reading.notes] == [
        "[10, 20, 30]", "[50, 60, 40, 70]", "[1, 2, 3, 4000]",
    ]  # fmt: skip
    assert all(numbers in reading.text for numbers in ("[10, 20, 30]", "[1, 2, 3, 4000]"))


@pytest.mark.parametrize(
    "answer",
    [
        "<box> nonsense </box>",
        "<ref>liver</ref> is there.",
        "<ref>liver<box>[[1, 2, 3",
        "</box></ref> 1, 2, 3, 4",
        "Nothing at 10, 20, 30, 40.",
        "",
    ],
)
def test_an_answer_without_a_box_gets_no_region(model: Model, answer: str) -> None:
    reading = model.read(answer, model.square)
    assert reading.regions == ()
    assert reading.tagged_text == answer


def test_an_answer_in_chinese_names_places_in_chinese(model: Model) -> None:
    reading = model.read("<box>[[0, 0, 999, 999]]</box>", model.square, language="zh")
    assert boxes(reading) == [("区域", (0.0, 0.0, 180.0, 180.0))]


def test_items_of_a_grounded_report_know_their_regions(model: Model) -> None:
    reading = model.read(
        "<ref>liver</ref><box>[[0, 0, 99, 99]]</box>: Clear. <ref>spine</ref><box>[[9, 9, 99, 99]]</box>: Bent.",
        model.square,
    )
    assert [(finding.text, finding.regions) for finding in reading.findings] == [("Clear.", (0,)), ("Bent.", (1,))]


def test_boxes_about_several_images_are_not_guessed_to_belong_to_one(model: Model) -> None:
    reading = model.read(BOXED, model.square, model.wide)
    assert reading.regions == ()
    assert len(reading.notes) == 1
    assert "2 images" in reading.notes[0]


def test_an_answer_that_was_cut_says_so(model: Model) -> None:
    assert model.read("Yes", model.square, ended=False).notes == ("the answer was cut at the token limit",)
    assert model.session.ask(model.square, Prompt("What?"), SHORT).notes == ("the answer was cut at the token limit",)


@pytest.mark.parametrize("case", ["vqa_en", "t2r_en", "text_only_en"])
def test_text_of_an_answer_is_the_authors(model: Model, case: str) -> None:
    asked = model.answers[case]
    scans = [] if asked["image"] is None else [model.square if asked["image"] == "square" else model.wide]
    prompt = Prompt(asked["question"], settings={"task": "none"})
    answer = model.session.ask(scans, prompt, InferOptions(max_new_tokens=24, grammar=False))
    assert answer.text == asked["response"]
    written = asked["raw_response"].removesuffix("<|im_end|>")  # its decoder puts spaces around tokens
    assert answer.tagged_text.replace(" ", "") == written.replace(" ", "")
    assert answer.regions == ()


# --- regional chain of thought ----------------------------------------------------------------------------------------


def first_answer(model: Model, tagged: str) -> Answer:
    answer = model.session.ask(model.square, Prompt("What?"), SHORT)
    return replace(answer, text="", tagged_text=tagged)


def test_chain_of_thought_asks_for_regions_first(model: Model) -> None:
    prompt = Prompt("Is it <image> large?", settings={"cot": "on", "compat": "corrected", "task": "report"})
    first = model.family.lead_in(prompt)
    assert first is not None
    assert first.text == regional_question("Is it  large?")
    assert first.settings == {"compat": "corrected", "task": "text2region"}
    assert model.family.lead_in(Prompt("Is it large?")) is None


def test_boxes_found_first_go_into_the_second_question(model: Model) -> None:
    prompt = Prompt("Is it large?", settings={"cot": "on"})
    second = model.family.follow_up(prompt, first_answer(model, f"<ref>no box</ref> {BOXED}"))
    head = BOXED.partition(" is large")[0]
    assert second.text == f"Regions found: {head}.\nIs it large?"
    assert model.family.lead_in(second) is None
    assert model.ids(second, model.square) == model.text.encode_prompt(f"{VQA} <image>\n{second.text}", tiles=[1])


def test_without_a_box_the_second_question_is_the_one_that_was_asked(model: Model) -> None:
    prompt = Prompt("Is it large?", settings={"cot": "on"})
    assert model.family.follow_up(prompt, first_answer(model, NO_BOXES)).text == "Is it large?"


def test_chain_of_thought_asks_twice_and_says_what_came_first(model: Model) -> None:
    options = InferOptions(max_new_tokens=3)
    prompt = Prompt("Is it large?", settings={"cot": "on"})
    answer = model.session.ask(model.square, prompt, options)
    lead = model.family.lead_in(prompt)
    assert lead is not None
    first = model.session.ask(model.square, lead, options)
    second = model.session.ask(model.square, model.family.follow_up(prompt, first), options)
    assert (answer.prompt_ids, answer.generated_ids) == (second.prompt_ids, second.generated_ids)
    assert answer.notes[0] == f"asked first: {first.tagged_text}"
