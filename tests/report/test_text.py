"""The answer at a terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from edgemed.core import Answer, Prompt, Region, Scan
from edgemed.report import to_text
from edgemed.report.words import cells

MakeScan = Callable[..., Scan]


def test_text_table_and_notice_follow_each_other(
    answer: Answer, make_scan: MakeScan, english_prompt: Prompt, notices: dict[str, str]
) -> None:
    assert to_text(answer, make_scan(), english_prompt, notice=notices["en"]) == (
        "The liver is visible, and the spleen.\n"
        "\n"
        "region  box (px)        score     area\n"
        "liver   50, 30, 91, 71   0.93  314 mm²\n"
        "spleen  8, 10, 30, 40       -        -\n"
        "\n"
        "nano is a demonstration model. Not for diagnosis.\n"
    )


def test_area_is_in_pixels_without_a_spacing(answer: Answer, make_scan: MakeScan, english_prompt: Prompt) -> None:
    text = to_text(answer, make_scan(None), english_prompt)
    assert "1,257 px" in text
    assert "mm" not in text


def test_chinese_columns_line_up(chinese: Answer, make_scan: MakeScan, chinese_prompt: Prompt) -> None:
    both = replace(chinese, regions=(*chinese.regions, Region("IVC", (1, 2, 3, 4), score=0.25)))
    text = to_text(both, make_scan(), chinese_prompt)
    head, *rows = text.split("\n\n")[1].splitlines()
    assert head.startswith("区域")
    starts = {cells(line[: line.index(box)]) for line, box in zip(rows, ("50,", "1,"), strict=True)}
    assert starts == {cells(head[: head.index("框")])}


def test_answer_without_regions_has_no_table(answer: Answer, make_scan: MakeScan, english_prompt: Prompt) -> None:
    plain = replace(answer, text="The bladder is not visible in this image.", regions=())
    assert to_text(plain, make_scan(), english_prompt) == "The bladder is not visible in this image.\n"


def test_terminal_is_not_obeyed(answer: Answer, make_scan: MakeScan, english_prompt: Prompt) -> None:
    odd = replace(answer, text="a\x1b[2Jb", regions=(Region("x\x1b[0m\ny", (0, 0, 1, 1)),))
    text = to_text(odd, make_scan(), english_prompt)
    assert "\x1b" not in text
    assert "x\ufffd[0m y" in text
