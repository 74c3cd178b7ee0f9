"""A site's meta file is read and its prompts recognised; our own have the shape that the model reads."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from edgemed.core import Language
from edgemed.errors import CannotRead, InvalidInput, ResourceLimit
from edgemed.families.medrega_labels import label_lists, labels_in
from edgemed.families.medrega_prompts import (
    AUTHORS_PROMPTS,
    BASE_PROMPTS,
    MAX_META_BYTES,
    Prompts,
    Task,
    default_prompt,
    describe,
    identify,
    locate,
    modality_name,
    prompt_source,
    read_prompts,
    regional_question,
    with_findings,
    with_options,
)
from edgemed.families.medrega_text import Found, parse

LANGUAGES: tuple[Language, ...] = ("en", "zh")
BOX = (1, 2, 3, 4)
BOX2 = (50, 60, 700, 800)


# --- whose prompt it is -----------------------------------------------------------------------------------------------


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Language], None]:
    """Make a text count as one of the authors' prompts; their own are not shipped."""

    def add(name: str, text: str, language: Language) -> None:
        entry = (language, len(text), hashlib.sha256(text.encode()).hexdigest()[:16])
        monkeypatch.setattr("edgemed.families.medrega_prompts.AUTHORS_PROMPTS", {**AUTHORS_PROMPTS, name: entry})

    return add


def test_authors_prompt_is_known_by_its_bytes(theirs: Callable[..., None]) -> None:
    theirs("vqa", "Name it.", "en")
    assert prompt_source("Name it.") == "vqa"
    assert prompt_source("Name it. ") is None


def test_hashes_agree_with_the_reference(reference: Any) -> None:
    listed = reference("medrega-tiny").prompts["official_prompt_hashes"]
    known = {(entry["chars"], entry["sha256_16"]) for entry in listed if "chars" in entry}
    ours = {(characters, digest) for language, characters, digest in AUTHORS_PROMPTS.values() if language == "en"}
    assert ours - known == {(473, "2fcb4adb52f68bc0")}, "only the demo's shorter text2region is no meta entry"
    assert known <= ours


def test_meta_entry_is_named_by_the_prompt_it_holds(tmp_path: Path, theirs: Callable[..., None]) -> None:
    theirs("vqa", "Answer it.", "en")
    file = tmp_path / "meta.json"
    entry = {"root": "r", "annotation": "a", "length": 3, "repeat_time": 1, "data_augment": True}
    file.write_text(
        json.dumps({"slake": {**entry, "base_prompt": "Answer it."}, "own_set": {"base_prompt": " Say it.\n"}}),
        encoding="utf-8",
    )
    prompts = read_prompts(file)
    assert prompts.base_prompt("own") == " Say it.\n"
    assert (prompts.source("slake"), prompts.source("own_set")) == ("vqa", "unknown")
    digest = hashlib.sha256(b"Answer it.").hexdigest()[:16]
    assert prompts.note("slake") == f"slake: the authors' prompt vqa ({digest})"
    assert prompts.note("own") == "own_set: not one of the authors' published prompts; used as it is"


def test_task_means_the_authors_prompt_of_it(theirs: Callable[..., None]) -> None:
    theirs("vqa_multiple_choice", "Choose.", "en")
    prompts = Prompts({"pmcvqa_train_vqa": "Choose.", "other": "Say."})
    assert prompts.base_prompt("vqa_multiple_choice") == "Choose."
    others: list[tuple[str, Language]] = [("vqa", "en"), ("vqa_multiple_choice", "zh")]
    for task, language in others:
        with pytest.raises(InvalidInput, match=f"no prompt for '{task}' .{language}.; the file has 'pmcvqa_train_vqa'"):
            prompts.base_prompt(task, language)


def test_task_in_chinese_means_the_chinese_prompt(theirs: Callable[..., None]) -> None:
    theirs("grounded_report_zh", "描述。", "zh")
    assert Prompts({"lesions": "描述。"}).base_prompt("grounded_report", "zh") == "描述。"


def test_several_entries_with_one_text_are_one_prompt() -> None:
    assert Prompts({"pathcrc_norm": "A", "pathcrc_nonorm": "A"}).base_prompt("pathcrc") == "A"
    with pytest.raises(InvalidInput, match="prompts that differ: 'own_a', 'own_b'; name one of them"):
        Prompts({"own_a": "A", "own_b": "B"}).base_prompt("own")


def test_long_list_of_entries_is_shortened_in_an_error() -> None:
    with pytest.raises(InvalidInput, match="'set7' and 12 more"):
        Prompts({f"set{i}": "A" for i in range(20)}).base_prompt("none")


# --- a file that is none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not JSON: line 1"),
        (b'{"a": {"base_prompt": "x"},\n}', "is not JSON: line 2"),
        (b"\xff{}", "is not UTF-8"),
        (b"[]", "is no JSON object with entries"),
        (b"{}", "is no JSON object with entries"),
        (b'{"slake": {"root": "r"}}', "entry 'slake' has no text in 'base_prompt'"),
        (b'{"slake": {"base_prompt": 3}}', "entry 'slake' has no text"),
        (b'{"slake": {"base_prompt": " "}}', "entry 'slake' has no text"),
        (b'{"slake": "Answer."}', "entry 'slake' has no text"),
        (b'{"a": {"base_prompt": "x"}, "a": {"base_prompt": "y"}}', "'a' is there twice"),
        (b'{"a": {"base_prompt": "\\ud800"}}', "half a surrogate pair"),
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be used: Exceeds the limit"),
    ],
)
def test_file_that_is_no_meta_file_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "meta.json"
    file.write_bytes(data)
    with pytest.raises(InvalidInput, match=message):
        read_prompts(file)


def test_file_that_is_too_large_is_not_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "meta.json"
    with open(file, "wb") as stream:
        stream.truncate(MAX_META_BYTES + 1)
    with pytest.raises(ResourceLimit, match="larger than 16 MiB"):
        read_prompts(file)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CannotRead, match=r"cannot read prompt file .*none.json"):
        read_prompts(tmp_path / "none.json")


# --- our own prompts --------------------------------------------------------------------------------------------------


def test_every_task_has_a_prompt_of_ours_in_both_languages() -> None:
    assert set(BASE_PROMPTS) == {(task, language) for task in get_args(Task) for language in LANGUAGES}
    assert len(set(BASE_PROMPTS.values())) == len(BASE_PROMPTS)
    assert not any(prompt_source(prompt) for prompt in BASE_PROMPTS.values())


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", sorted(label_lists()))
def test_labels_put_into_a_prompt_are_read_out_again(name: str, language: Language) -> None:
    one = label_lists()[name]
    task: Task = "classification_multi" if one.multi else "classification"
    assert labels_in(default_prompt(task, language, one.labels)) == one.labels


def test_label_that_means_nothing_is_explained() -> None:
    assert "“正常”表示" in default_prompt("classification", "zh", ["肺炎", "正常"])
    assert "means" not in default_prompt("classification", "en", ["benign", "malignant"])


def test_prompt_without_labels_is_the_plain_one() -> None:
    assert default_prompt("report", "zh") == BASE_PROMPTS["report", "zh"]


def test_labels_are_for_classifications() -> None:
    with pytest.raises(InvalidInput, match="labels were given for the task 'vqa'"):
        default_prompt("vqa", "en", ["a"])
    with pytest.raises(InvalidInput, match="'A' is listed twice"):
        default_prompt("classification", "en", ["a", "A"])


def test_options_are_lettered() -> None:
    assert with_options("哪个器官?", ["肝", "脾", "肾"]) == "哪个器官?\nA. 肝\nB. 脾\nC. 肾"
    for count in (1, 27):
        with pytest.raises(InvalidInput, match=f"has {count} options; 2 to 26"):
            with_options("Which?", ["a"] * count)


# --- questions about places -------------------------------------------------------------------------------------------


def test_eight_modalities_have_a_name_in_both_languages() -> None:
    codes = ("DX", "CT", "MR", "US", "OP", "OPT", "DMS", "SM")
    assert len({modality_name(code) for code in codes}) == 8
    assert len({modality_name(code, "zh") for code in codes}) == 8


@pytest.mark.parametrize(
    ("code", "expected"),
    [("CR", "X-ray"), ("MG", "X-ray"), (" mr ", "MRI"), ("X-ray", "X-ray"), ("oct", "OCT"), ("GM", "pathology")],
)
def test_modality_is_named_from_code_or_word(code: str, expected: str) -> None:
    assert modality_name(code) == expected


@pytest.mark.parametrize("code", ["", "OT", "XC", "ES", "PT", "NM", "C"])
def test_modality_that_may_be_anything_is_not_named(code: str) -> None:
    assert modality_name(code) is None


def test_every_modality_word_names_itself() -> None:
    for code in ("DX", "CT", "MR", "US", "OP", "OPT", "DMS", "SM"):
        word = modality_name(code)
        assert word is not None and modality_name(word) == word


def test_question_where_objects_are_is_the_published_shape(reference: Any) -> None:
    turn = reference("medrega-tiny").prompts["t2r_en"]["question"]
    assert locate(["left kidney", " liver "], "CT") == turn.partition("\n")[2]
    assert locate(["左肾"], modality_name("MR", "zh"), "zh") == "请在这张磁共振图像中定位<ref>左肾</ref>。"
    assert locate(["nodule <5 mm"]) == "Please locate <ref>nodule <5 mm</ref> in this image."


def test_question_what_is_in_a_box_is_the_published_shape(reference: Any) -> None:
    turn = reference("medrega-tiny").prompts["r2t_en"]["question"]
    assert identify((421, 351, 505, 470), "CT") == turn.partition("\n")[2]
    asked = identify(BOX, "CT", "zh")
    assert parse(asked) == ["这张CT图像中", Found("该区域", (BOX,)), "是什么？"]
    with pytest.raises(InvalidInput, match=r"box is \[3, 2, 1, 4\]"):
        identify((3, 2, 1, 4))


def test_grounded_report_names_its_objects() -> None:
    assert describe(["heart"]) == "Please locate <ref>heart</ref> and describe the condition of it."
    assert describe(["心脏", "左肺"], "zh") == "请定位<ref>心脏</ref>, <ref>左肺</ref>，并描述其情况。"


@pytest.mark.parametrize("ask", [locate, describe])
@pytest.mark.parametrize("name", ["", " ", "a</ref>", "<image>", "<box>", "<|im_end|>"])
def test_object_names_are_plain_words(ask: Callable[[list[str]], str], name: str) -> None:
    with pytest.raises(InvalidInput, match="is empty or holds a tag"):
        ask(["liver", name])
    with pytest.raises(InvalidInput, match="no object is named"):
        ask([])


# --- regional thought -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["Is the heart large?", "心脏大吗？", ""])
@pytest.mark.parametrize("language", LANGUAGES)
def test_first_call_asks_for_one_tagged_thing_and_tells_the_question(question: str, language: Language) -> None:
    asked = regional_question(question, language)
    assert [piece.boxes for piece in parse(asked) if isinstance(piece, Found)] == [()]
    assert question in asked
    assert asked.count("\n") == bool(question)


def test_second_call_tells_places_as_they_were_found() -> None:
    answer = "<ref>heart</ref><box>[[1, 2, 3, 4], [50, 60, 700, 800]]</box>, <box>[[1, 2, 3, 4]]</box>"
    places = [piece for piece in parse(answer) if isinstance(piece, Found)]
    asked = with_findings("Is it large?", places)
    assert asked.endswith(".\nIs it large?")
    assert [p for p in parse(asked) if isinstance(p, Found)] == [Found("heart", (BOX, BOX2)), Found("region", (BOX,))]
    assert with_findings("大吗？", places[1:], "zh") == (
        "已找到的区域：<ref>区域</ref><box>[[1, 2, 3, 4]]</box>。\n大吗？"
    )


@pytest.mark.parametrize("places", [[], [Found("heart", ())], [Found("heart", (), ("[5, 2, 3, 4]",))]])
def test_second_call_is_the_plain_question_where_nothing_was_found(places: list[Found]) -> None:
    assert with_findings("Is it large?", places) == "Is it large?"


def test_place_is_told_once_and_without_tags_in_its_name() -> None:
    asked = with_findings("Q", [Found("heart", (BOX,)), Found("<image>heart<|im_end|>", (BOX,))])
    assert asked == "Regions found: <ref>heart</ref><box>[[1, 2, 3, 4]]</box>.\nQ"
