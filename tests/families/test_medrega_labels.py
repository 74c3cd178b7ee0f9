"""Label lists are whole, a site's file is read or refused, and an answer is mapped as it was published."""

from pathlib import Path

import pytest

from edgemed.errors import CannotRead, EdgemedError, InvalidInput, NoInput, ResourceLimit
from edgemed.families.medrega_labels import MAX_LABEL_BYTES, LabelList, classify, label_lists, labels_in, read_labels

CHEST = ("No Finding", "Edema", "Pleural Effusion", "Lung Opacity")


def test_lists_of_the_public_sets_are_whole() -> None:
    lists = label_lists()
    assert len(lists) == 31
    sizes = {"chexpert": 14, "chestmnist": 15, "cxr14": 20, "octmnist": 4, "organsmnist": 11, "kathercolon": 9}
    sizes |= {"rfmid": 29, "pannuke": 19, "vindrcxr": 28, "brset": 14, "isic2018": 7, "isic2019": 8}
    assert {name: len(lists[name].labels) for name in sizes} == sizes


def test_nine_sets_have_several_labels_an_image() -> None:
    assert {name for name, one in label_lists().items() if one.multi} == {
        *("brset", "chestmnist", "chexpert", "cxr14", "rfmid"),
        *("vindrcxr", "vindrmammo", "vindrpcxr", "vindrspinexr"),
    }


@pytest.mark.parametrize("name", sorted(label_lists()))
@pytest.mark.parametrize("reference", [False, True])
def test_every_label_of_a_set_is_found_again(name: str, reference: bool) -> None:
    one = label_lists()[name]
    for label in one.labels:
        assert classify(f"{label.upper()}.", one.labels, one.multi, reference=reference) == (label,)
    if one.multi:
        assert classify(", ".join(one.labels), one.labels, multi=True, reference=reference) == one.labels


@pytest.mark.parametrize(
    ("answer", "multi", "expected"),
    [
        ("edema", True, ("Edema",)),
        ("Edema, pleural effusion", True, ("Edema", "Pleural Effusion")),
        ("Edema, pleural effusion", False, ("Edema",)),
        ("edema，lung opacity、pleural effusion。", True, ("Edema", "Lung Opacity", "Pleural Effusion")),
        ("edema, some edema", True, ("Edema",)),
        ("small effusion", True, ("Pleural Effusion",)),
        ("edema,, fracture", True, ("Edema",)),
        ("fracture, edema", False, ()),
        ("", True, ()),
        (" . ", False, ()),
    ],
)
def test_pieces_of_an_answer_are_mapped_to_labels(answer: str, multi: bool, expected: tuple[str, ...]) -> None:
    assert classify(answer, CHEST, multi) == expected


def test_first_of_equal_labels_is_taken() -> None:
    assert classify("lung", ["left lung", "right lung"], multi=False) == ("left lung",)
    assert classify("lung", ["right lung", "left lung"], multi=False) == ("right lung",)


def test_short_piece_prefers_the_shorter_label() -> None:
    assert classify("effusion", ["large pleural effusion", "pleural effusion"], multi=False) == ("pleural effusion",)


def test_long_piece_is_not_rewarded_for_repeating_a_word() -> None:
    assert classify("lung lung edema", ["Lung Opacity", "Lung Edema"], multi=False) == ("Lung Edema",)


@pytest.mark.parametrize(("multi", "expected"), [(False, ("No Finding",)), (True, ("No Finding", "Edema"))])
def test_reference_takes_the_first_label_where_nothing_fits(multi: bool, expected: tuple[str, ...]) -> None:
    assert classify("fracture, edema", CHEST, multi, reference=True) == expected


def test_chinese_labels_are_compared_by_character() -> None:
    labels = ["肺炎", "胸腔积液", "未见异常"]
    assert classify("右侧胸腔积液，肺炎。", labels, multi=True) == ("胸腔积液", "肺炎")
    assert classify("右侧胸腔积液", labels, multi=True, reference=True) == ("肺炎",)


def test_answer_needs_labels_to_be_mapped_to() -> None:
    with pytest.raises(InvalidInput, match="at least one was expected"):
        classify("edema", [], multi=True)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Your task: diagnosis. The diagnoses are:\nEdema\nBowen's disease\n", ("Edema", "Bowen's disease")),
        ("Labels:\n  Edema \r\nNo Finding\n“No Finding” means healthy", ("Edema", "No Finding")),
        ("You see:\nThe labels are:\nEdema\nMass\nAnswer with one of them.\nMore", ("Edema", "Mass")),
        ("标签：\n肺炎\n正常\n\n回答", ("肺炎", "正常")),
        ("The possible diagnoses are normal and abnormal.", ()),
        ("Labels:", ()),
        ("", ()),
    ],
)
def test_labels_are_read_out_of_a_base_prompt(prompt: str, expected: tuple[str, ...]) -> None:
    assert labels_in(prompt) == expected


def test_site_file_has_one_label_a_line(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes("\ufeffEdema\r\n\r\n 肺炎 \n".encode())
    assert read_labels(file, multi=True) == LabelList(("Edema", "肺炎"), multi=True)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"", NoInput, "has no labels; write one a line"),
        (b" \n\n", NoInput, "has no labels"),
        (b"Edema\nedema\n", InvalidInput, "'edema' is listed twice"),
        (b"\xff\xfe\x00", InvalidInput, "is not UTF-8"),
        (b"a" * (MAX_LABEL_BYTES + 1), ResourceLimit, "larger than 1 MiB"),
    ],
)
def test_site_file_that_is_no_label_list_is_refused(
    tmp_path: Path, data: bytes, error: type[EdgemedError], message: str
) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes(data)
    with pytest.raises(error, match=message):
        read_labels(file)


def test_site_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(CannotRead, match=r"cannot read label file .*none.txt"):
        read_labels(tmp_path / "none.txt")


@pytest.mark.parametrize("labels", [(), ("a", ""), ("a\nb",)])
def test_label_list_is_checked_when_made(labels: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput, match="was expected"):
        LabelList(labels, multi=False)
