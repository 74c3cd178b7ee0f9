"""MedPLIB's prompts have the published ids in every mode, and `<SEG>` vectors come from the published positions."""

from typing import Any

import numpy as np
import pytest

from edgemed.errors import BundleError, InvalidInput
from edgemed.families.medplib_text import (
    IMAGE_ID,
    REGION_ID,
    Compat,
    Icl,
    MedplibText,
    example_lines,
    with_regions,
)
from edgemed.families.published_tokenizer import convert
from edgemed.families.published_tokens import PublishedTokens

CASES = ("vqa", "region", "ground_square", "ground_four_three", "ground_two_one")
ANSWERS = {"vqa": "CT", "region": "The liver is seen."}
GROUNDED = "It is <SEG>."


@pytest.fixture(scope="module")
def text(reference: Any) -> MedplibText:
    return MedplibText(PublishedTokens(convert(reference("medplib-tiny").folder, "4.31")))


def question(tiny: Any, case: str) -> tuple[str, int]:
    """Return a case's question and its number of regions."""
    words = tiny.prompts["questions"]["grounding" if case.startswith("ground") else case]
    return (words % "<region></region>", 1) if case == "region" else (words, 0)


def ids_of(tiny: Any, name: str) -> list[int]:
    return list(map(int, tiny.input(name)[0]))


@pytest.mark.parametrize("compat", ["reference", "corrected"])
@pytest.mark.parametrize("case", CASES)
def test_prompt_in_trainings_wording_has_the_published_ids(
    reference: Any, text: MedplibText, case: str, compat: Compat
) -> None:
    tiny = reference("medplib-tiny")
    words, regions = question(tiny, case)
    assert text.prompt_text(words, regions=regions) == tiny.prompts[f"{case}_demo"]["prompt"]
    ids = text.encode_prompt(words, regions=regions, compat=compat)
    assert ids == ids_of(tiny, f"input_ids_{case}_demo")
    # 576 rows take the place of one id
    assert len(ids) + 575 == tiny.prompts[f"{case}_demo"]["sequence_length_after_expansion"]


@pytest.mark.parametrize("case", CASES)
def test_prompt_of_the_released_command_line_has_the_published_ids(
    reference: Any, text: MedplibText, case: str
) -> None:
    tiny = reference("medplib-tiny")
    words, regions = question(tiny, case)
    answer = ANSWERS.get(case, GROUNDED)
    whole = text.prompt_text(words, regions=regions, wording="user", answer=answer)
    assert whole == tiny.prompts[f"{case}_v1"]["prompt"]
    ids = text.encode_prompt(words, regions=regions, compat="release-cli", answer=answer)
    assert ids == ids_of(tiny, f"input_ids_{case}_v1")
    assert ids == text.encode_prompt(words, regions=regions, compat="release-cli")


def test_released_command_line_cuts_inside_an_answer_with_a_colon(text: MedplibText) -> None:
    good = text.encode_prompt("What?", compat="release-cli", answer="CT")
    leaking = text.encode_prompt("What?", compat="release-cli", answer="It is: CT")
    assert leaking[: len(good)] == good
    assert len(leaking) > len(good)
    assert text.encode_prompt("What?", answer="It is: CT") == text.encode_prompt("What?")


@pytest.mark.parametrize("case", ["square", "two_one"])
def test_training_ids_and_labels_are_the_published_ones(reference: Any, text: MedplibText, case: str) -> None:
    tiny = reference("medplib-tiny")
    words, _ = question(tiny, "ground")
    ids, labels = text.encode_training(words, GROUNDED)
    np.testing.assert_array_equal([ids], tiny.input(f"train_input_ids_{case}"))
    np.testing.assert_array_equal([labels], tiny.expected(f"train_labels_{case}"))


def test_path_of_a_mask_is_taken_out_of_question_and_answer(text: MedplibText) -> None:
    ids, _ = text.encode_training("What is <region>a/b.png</region>?", "It is <SEG><mask>c/d.png</mask>.", regions=1)
    expected, _ = text.encode_training("What is <region></region>?", "It is <SEG>.", regions=1)
    assert ids == expected


def test_region_rows_stand_between_the_regions_tags(text: MedplibText) -> None:
    ids = text.encode_prompt("Compare <region> and <region>.", regions=2)
    at = [i for i, index in enumerate(ids) if index == REGION_ID]
    assert len(at) == 2
    assert all(ids[i - 1 : i + 2] == [text.region_start_id, REGION_ID, text.region_end_id] for i in at)
    image, rows = text.positions(ids, 576)
    assert image == ids.index(IMAGE_ID)
    assert rows == tuple(i + 575 for i in at)


@pytest.mark.parametrize(
    ("words", "regions", "expected"),
    [
        ("At <region></region>?", 1, "At <region></region>?"),
        ("At <region>?", 1, "At <region></region>?"),
        ("What is it?", 2, "What is it? <region></region> <region></region>"),
        ("<region> and <region>", 1, "<region></region> and "),
    ],
)
def test_regions_and_their_tags_match(words: str, regions: int, expected: str) -> None:
    assert with_regions(words, regions) == expected


def test_prompt_without_an_image_has_no_image_tokens(text: MedplibText) -> None:
    ids = text.encode_prompt("What is it? <image>", image=False)
    assert IMAGE_ID not in ids
    assert text.tokens.id_of("<im_start>") not in ids
    assert text.positions(ids, 576) == (None, ())
    with pytest.raises(InvalidInput, match="without an image"):
        text.encode_prompt("What is it?", image=False, regions=1)


@pytest.mark.parametrize("ids", [[IMAGE_ID, IMAGE_ID], [REGION_ID, IMAGE_ID]])
def test_a_second_image_or_a_region_before_it_is_refused(text: MedplibText, ids: list[int]) -> None:
    with pytest.raises(InvalidInput, match="one image, before every region"):
        text.positions(ids, 576)


@pytest.mark.parametrize("case", [f"{case}_{variant}" for case in CASES for variant in ("v1", "demo")])
def test_answer_is_shown_as_published(reference: Any, text: MedplibText, case: str) -> None:
    tiny = reference("medplib-tiny")
    ids = tiny.expected(f"gen_{case}")[0].tolist()
    assert text.shown(ids) == tiny.prompts[case]["response"].strip()
    if "seg_step" in tiny.prompts[case]:
        assert text.seg_steps(ids) == (tiny.prompts[case]["seg_step"],)


def test_modes_differ_in_the_vectors_they_take(text: MedplibText) -> None:
    seg, stop = text.seg_id, text.stop_id
    assert text.seg_steps([5, 6, stop]) == text.seg_steps([5, 6, stop], "release-cli") == ()
    assert text.seg_steps([5, seg, 6, seg, stop]) == (1,)
    assert text.seg_steps([5, seg, 6, seg, stop], "corrected") == (1, 3)
    assert text.seg_steps([5, seg, 6, seg, stop], "release-cli") == (1,)
    assert text.seg_steps([5, seg, 6, 7, stop], "release-cli") == (3,)
    assert text.seg_steps([5, seg, stop], "release-cli") == text.seg_steps([5, seg, stop]) == (1,)


def test_tokenizer_of_another_family_is_refused(reference: Any) -> None:
    with pytest.raises(BundleError, match="lacks <SEG>"):
        MedplibText(PublishedTokens(convert(reference("medrega-tiny").folder, "4.37")))


@pytest.mark.parametrize(("mode", "images"), [("overlay", 3), ("separate", 5)])
@pytest.mark.parametrize("compat", ["reference", "release-cli"])
def test_examples_come_between_the_system_message_and_the_image(
    text: MedplibText, mode: Icl, images: int, compat: Compat
) -> None:
    bare = text.encode_prompt("Outline the same.", compat=compat)
    ids = text.encode_prompt("Outline the same.", before=example_lines(2, mode), compat=compat)
    start, end = text.tokens.id_of("<im_start>"), text.tokens.id_of("<im_end>")
    after = bare.index(end)
    assert ids[-len(bare[after:]) :] == bare[after:]
    at = [i for i, index in enumerate(ids) if index == IMAGE_ID]
    assert len(at) == images
    assert all((ids[i - 1], ids[i + 1]) == (start, end) for i in at)


def test_lines_of_examples_are_the_authors() -> None:
    image = "<im_start><image><im_end>\n"
    assert example_lines(0, "overlay") == example_lines(0, "separate") == ""
    told = "The blue overlay is the reference segmentation mask.\n"
    assert example_lines(2, "overlay") == f"Example 1: {image}{told}Example 2: {image}{told}Query: "
    assert example_lines(1, "separate") == f"Example 1 image: {image}Example 1 mask: {image}Query: "
