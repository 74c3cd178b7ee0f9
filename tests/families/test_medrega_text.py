"""MedRegA's prompts have the published ids, and its answers are read in every form they come in."""

from typing import Any

import numpy as np
import pytest

from edgemed.errors import BundleError, InvalidInput
from edgemed.families.medrega_text import (
    Found,
    Item,
    MedRegaText,
    boxes_text,
    grounded_items,
    label_images,
    order,
    parse,
    place_text,
    plain,
)
from edgemed.families.published_tokenizer import convert
from edgemed.families.published_tokens import PublishedTokens

ONE_IMAGE = ("vqa_en", "vqa_zh", "r2t_en", "r2t_zh", "t2r_en", "t2r_zh", "t2r_en_train_order")
ONE_IMAGE += ("report_zh_empty_turn", "odd_text")
BOX = (1, 2, 3, 4)
BOX2 = (50, 60, 700, 800)


@pytest.fixture(scope="module")
def text(reference: Any) -> MedRegaText:
    tiny = reference("medrega-tiny")
    return MedRegaText(PublishedTokens(convert(tiny.folder, "4.37")), tiny.prompts["num_image_token"])


def ids_of(tiny: Any, name: str) -> list[int]:
    return list(map(int, tiny.input(name)[0]))


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ONE_IMAGE)
def test_prompt_about_one_image_has_the_published_text_and_ids(reference: Any, text: MedRegaText, case: str) -> None:
    tiny = reference("medrega-tiny")
    question = tiny.prompts[case]["question"]
    assert text.conversation([(text.expand(question, [1]), None)]) == tiny.prompts[case]["query"]
    assert text.encode_prompt(question, tiles=[1]) == ids_of(tiny, f"input_ids_{case}")


def test_prompt_without_an_image_has_the_published_ids(reference: Any, text: MedRegaText) -> None:
    tiny = reference("medrega-tiny")
    ids = text.encode_prompt(tiny.prompts["text_only_en"]["question"])
    assert ids == ids_of(tiny, "input_ids_text_only_en")
    assert text.context_id not in ids


def test_second_turn_replays_the_first(reference: Any, text: MedRegaText) -> None:
    tiny = reference("medrega-tiny")
    first = (tiny.prompts["vqa_en"]["question"], tiny.prompts["vqa_en"]["response"])
    ids = text.encode_prompt(tiny.prompts["history_en"]["question"], tiles=[1], history=[first])
    assert ids == ids_of(tiny, "input_ids_history_en")


def test_tiles_stand_in_one_image_block(reference: Any, text: MedRegaText) -> None:
    tiny = reference("medrega-tiny")
    case = tiny.prompts["tiles_t2r_en"]
    ids = text.encode_prompt(case["question"], tiles=[case["tiles"]])
    assert ids == ids_of(tiny, "input_ids_tiles_t2r_en")
    assert ids.count(text.context_id) == 3 * 16


def test_several_images_are_labelled_in_both_languages(reference: Any, text: MedRegaText) -> None:
    tiny = reference("medrega-tiny")
    question = label_images(tiny.prompts["multi_image"]["question"], 2)
    assert text.encode_prompt(question, tiles=[1, 1]) == ids_of(tiny, "input_ids_multi_image")


def test_training_ids_and_labels_are_the_published_ones(reference: Any, text: MedRegaText) -> None:
    tiny = reference("medrega-tiny")
    human, model = (turn["value"] for turn in tiny.prompts["train"]["conversation"])
    ids, labels = text.encode_training([(human, model)], tiles=[1])
    np.testing.assert_array_equal([ids], tiny.input("train_input_ids"))
    np.testing.assert_array_equal([labels], tiny.expected("train_labels"))


def test_training_over_two_turns_targets_both_answers(text: MedRegaText) -> None:
    ids, labels = text.encode_training([("<image>\nWhere?", "Here."), ("Why?", "So.")], tiles=[1])
    assert ids == text.tokens.encode(
        text.conversation([(text.expand("<image>\nWhere?", [1]), "Here."), ("Why?", "So.")])
    )
    targets = [label for label in labels if label != -100]
    assert text.tokens.decode_verbatim(targets) == "Here.<|im_end|>So.<|im_end|>"


@pytest.mark.parametrize(
    ("case", "base", "question", "which"),
    [
        ("vqa_zh", "请根据医学图像回答问题。", "图像里包含的区域属于身体哪个部分?请用词或短语回答问题。", "demo"),
        (
            "t2r_en_train_order",
            "Your task is detection. The region is a bounding box, [x1, y1, x2, y2], with integers from 0 to 999.",
            "Please locate <ref>left kidney</ref> in this CT scan.",
            "training",
        ),
        (
            "vqa_en",
            "Please answer from the image.",
            "What organ is shown in this image? Answer the question using a single word or phrase.",
            "demo",
        ),
        ("report_zh_empty_turn", "你的任务是描述影像。", "", "demo"),
    ],
)
def test_both_orders_give_the_published_turn(reference: Any, case: str, base: str, question: str, which: Any) -> None:
    assert order(base, question, which) == reference("medrega-tiny").prompts[case]["question"]


@pytest.mark.parametrize(("question", "tiles"), [("What?", [1]), ("<image>\nWhat?", []), ("<image><image>", [1])])
def test_images_and_placeholders_must_match(text: MedRegaText, question: str, tiles: list[int]) -> None:
    with pytest.raises(InvalidInput, match="one for each was expected"):
        text.encode_prompt(question, tiles=tiles)


def test_released_model_takes_256_tokens_an_image(text: MedRegaText) -> None:
    released = MedRegaText(text.tokens)
    assert released.encode_prompt("<image>\nWhat?", tiles=[1]).count(released.context_id) == 256


def test_tokenizer_of_another_family_is_refused(reference: Any) -> None:
    with pytest.raises(BundleError, match="lacks <IMG_CONTEXT>"):
        MedRegaText(PublishedTokens(convert(reference("medplib-tiny").folder, "4.31")))


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*ONE_IMAGE, "text_only_en", "history_en", "tiles_t2r_en", "multi_image"])
def test_stripped_answer_is_the_published_one(reference: Any, text: MedRegaText, case: str) -> None:
    tiny = reference("medrega-tiny")
    ids = tiny.expected(f"gen_{case}")[0].tolist()
    assert text.stripped(ids) == tiny.prompts[case]["response"].strip()


def test_answer_ends_at_the_stop_token_and_loses_the_stacks_extra_id(text: MedRegaText) -> None:
    ids = text.tokens.encode("<ref>liver</ref><box>[[1, 2, 3, 4]]</box>")
    assert text.cut([1, *ids, 7, 5, 5]) == ids
    assert text.tagged([1, *ids, 7, 5, 5]) == "<ref>liver</ref><box>[[1, 2, 3, 4]]</box>"
    assert text.stripped([1, *ids, 7, 5, 5]) == "liver[[1, 2, 3, 4]]"
    assert text.tagged([*ids, 12, 720, 13]) == "<ref>liver</ref><box>[[1, 2, 3, 4]]</box>"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (place_text("liver", [BOX]), [Found("liver", (BOX,))]),
        (place_text("nodule", [BOX, BOX2]), [Found("nodule", (BOX, BOX2))]),
        (
            f"{place_text('a b', [BOX])}, {place_text('c', [BOX, BOX2])}",
            [Found("a b", (BOX,)), ", ", Found("c", (BOX, BOX2))],
        ),
        ("<ref> left </ref> <box> [[1, 2, 3, 4]] </box>", [Found("left", (BOX,))]),
        ("<ref>左肾</ref><box>[[1,2,3,4]]</box>：正常。", [Found("左肾", (BOX,)), "：正常。"]),
        ("<ref>liver</ref> is large", [Found("liver", ()), " is large"]),
        ("<box>[[1, 2, 3, 4]]</box>", [Found("", (BOX,))]),
        ("<box>[1, 2, 3, 4]</box>", [Found("", (BOX,))]),
        ("Nothing is seen.", ["Nothing is seen."]),
        ("", []),
        # what cannot be parsed stays text
        ("<ref>liver</ref><box>[[1, 2, 3", [Found("liver", ()), "[[1, 2, 3"]),
        ("<ref>liver is", ["liver is"]),
        ("<box>here</box>", ["here"]),
        ("a</box>b", ["ab"]),
        ("<ref>a<ref>b</ref>", ["a", Found("b", ())]),
        # lists of numbers that are no box are named, not used
        ("<ref>a</ref><box>[[5, 2, 3, 4]]</box>", [Found("a", (), ("[5, 2, 3, 4]",))]),
        ("<ref>a</ref><box>[[1, 2, 3, 4], [1, 2, 3]]</box>", [Found("a", (BOX,), ("[1, 2, 3]",))]),
        ("<ref>a</ref><box>[[1, 2, 3, 1000]]</box>", [Found("a", (), ("[1, 2, 3, 1000]",))]),
        ("<ref>a</ref><box>[[0.1, 0.2, 0.3, 0.4]]</box>", [Found("a", (), ("[0.1, 0.2, 0.3, 0.4]",))]),
        ("<ref>a</ref><box>gone</box>", [Found("a", (), ("gone",))]),
    ],
)
def test_tagged_answers(answer: str, expected: list[Any]) -> None:
    assert parse(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("liver[[1, 2, 3, 4]]", [Found("liver", (BOX,))]),
        ("left kidney [[1, 2, 3, 4], [50, 60, 700, 800]]", [Found("left kidney", (BOX, BOX2))]),
        ("a[[1, 2, 3, 4]], b[[50, 60, 700, 800]]", [Found("a", (BOX,)), ", ", Found("b", (BOX2,))]),
        ("左肾[[1, 2, 3, 4]]：正常。脾[[1, 2, 3, 4]]", [Found("左肾", (BOX,)), "：正常。", Found("脾", (BOX,))]),
        ("[[1, 2, 3, 4]]", [Found("", (BOX,))]),
        ("Seen [1, 2] times", ["Seen [1, 2] times"]),
        ("liver[[4, 3, 2, 1]]", ["liver[[4, 3, 2, 1]]"]),
        ("a[[1, 2, 3", ["a[[1, 2, 3"]),
    ],
)
def test_stripped_answers(answer: str, expected: list[Any]) -> None:
    assert parse(answer) == expected


A, B, C = Found("lung", (BOX,)), Found("heart", (BOX2,)), Found("spine", (BOX, BOX2))


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (
            f"{place_text('lung', [BOX])}: Clear. No effusion. {place_text('heart', [BOX2])}: Large.",
            [Item((A,), "Clear. No effusion."), Item((B,), "Large.")],
        ),
        (f"{place_text('lung', [BOX])}, {place_text('heart', [BOX2])}: Normal.", [Item((A, B), "Normal.")]),
        (f"{place_text('lung', [BOX])} and {place_text('heart', [BOX2])}: Normal.", [Item((A, B), "Normal.")]),
        (
            f"{place_text('lung', [BOX])}：清晰。{place_text('spine', [BOX, BOX2])}：侧弯。",
            [Item((A,), "清晰。"), Item((C,), "侧弯。")],
        ),
        ("lung[[1, 2, 3, 4]]: Clear. heart[[50, 60, 700, 800]]: Large.", [Item((A,), "Clear."), Item((B,), "Large.")]),
        ("lung[[1, 2, 3, 4]]：清晰。heart[[50, 60, 700, 800]]：大。", [Item((A,), "清晰。"), Item((B,), "大。")]),
        (f"No change. {place_text('lung', [BOX])}: Clear.", [Item((), "No change."), Item((A,), "Clear.")]),
        (
            f"{place_text('lung', [BOX])}: lies beside {place_text('heart', [BOX2])}.",
            [Item((A, B), "lies beside heart.")],
        ),
        ("Nothing.", [Item((), "Nothing.")]),
        ("", []),
    ],
)
def test_grounded_reports(report: str, expected: list[Item]) -> None:
    assert grounded_items(report) == expected


def test_plain_answer_has_names_but_no_tags_and_numbers() -> None:
    assert plain("The <ref>liver</ref><box>[[1, 2, 3, 4]]</box>, seen.") == "The liver, seen."
    assert plain("<box>gone</box> a") == "gone a"


def test_long_answers_are_parsed_in_no_time() -> None:
    assert len(parse("word " * 20000)) == 1
    assert len(parse("<ref>" * 2000)) == 0
    assert len(parse("[[1, 2, " * 5000)) == 1


def test_boxes_are_written_as_the_model_reads_them() -> None:
    assert boxes_text([BOX, BOX2]) == "[[1, 2, 3, 4], [50, 60, 700, 800]]"
    assert parse(place_text("x", [BOX, BOX2])) == [Found("x", (BOX, BOX2))]
    with pytest.raises(InvalidInput, match=r"box is \[3, 2, 1, 4\]"):
        boxes_text([(3, 2, 1, 4)])
