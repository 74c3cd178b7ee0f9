"""Question files: both forms, rows that are none, files that are none, shards; one row in memory at a time."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from edgemed.errors import CannotRead, EdgemedError, InvalidInput, NoInput
from edgemed.questions import MAX_ROW, Question, Shard, read_questions


def talk(*values: Any) -> list[dict[str, Any]]:
    """Return turns of human and gpt in turn."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def written(path: Path, *rows: Any, listed: bool = False) -> Path:
    texts = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text(f"[{', '.join(texts)}]" if listed else "\n".join(texts), encoding="utf-8")
    return path


def only(tmp_path: Path, **row: Any) -> Question:
    (question,) = read_questions(written(tmp_path / "one.jsonl", row))
    return question


@pytest.mark.parametrize("listed", [False, True])
def test_lines_and_a_list_hold_the_same_questions(tmp_path: Path, listed: bool) -> None:
    rows = [
        {"id": 4, "image": "a.png", "width": 60, "height": 40, "conversations": talk("<image>\n肝脏?", "在")},
        {"image": ["a.png", "b.png"], "answer_type": "open", "conversations": talk("Which?", 3, "Why?")},
        {"conversations": talk("What is a lesion?"), "icl_examples": [{"image": "e.png", "mask": "m.png"}]},
    ]
    first, second, third, fourth = read_questions(written(tmp_path / "q.json", *rows, listed=listed))
    assert first == Question(0, 4, 0, "<image>\n肝脏?", "在", ("a.png",), size=(40, 60))
    assert (second.id, second.turn, second.truth, second.images) == (1, 0, "3", ("a.png", "b.png"))
    assert (third.turn, third.truth, third.earlier, third.answer_type) == (1, None, (("Which?", "3"),), "open")
    assert (fourth.index, fourth.images, fourth.examples) == (2, (), (("e.png", "m.png"),))


def test_an_answer_before_the_first_question_is_passed_over(tmp_path: Path) -> None:
    question = only(tmp_path, conversations=[{"from": "gpt", "value": "Hello."}, *talk("Where?", "There.")])
    assert (question.text, question.truth, question.earlier) == ("Where?", "There.", ())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "'conversations' is no list"),
        ({"conversations": []}, "no turn of human"),
        ({"conversations": [{"from": "system", "value": "x"}]}, "without 'from' human or gpt"),
        ({"conversations": [{"from": "human"}]}, "without 'value'"),
        ({"conversations": [*talk("a", "b"), {"from": "gpt", "value": "c"}]}, "two turns of gpt"),
        ({"conversations": talk("a"), "image": 3}, "'image' is no path"),
        ({"conversations": talk("a"), "image": ["a", None]}, "'image' is no path"),
        ({"conversations": talk("a"), "id": [1]}, "'id' is no whole number"),
        ({"conversations": talk("a"), "icl_examples": [{"image": "a"}]}, "'icl_examples' is no list"),
        ('{"conversations": [{"from": "human", "value": "\\ud800"}]}', "half a surrogate pair"),
        ('{"id": "\\ud800", "conversations": []}', "'id' is no whole number"),
    ],
)
def test_a_row_that_is_no_question_says_why(tmp_path: Path, row: Any, said: str) -> None:
    good = {"id": 9, "conversations": talk("Where?")}
    bad, following = read_questions(written(tmp_path / "q.jsonl", row, good))
    assert said in bad.problem
    assert (bad.index, bad.turn, bad.id) == (0, 0, 0)
    assert (following.id, following.problem) == (9, "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1}\n{"b": }\n', "line 2: Expecting value"),
        ('{"a": 1}\n{"b": "cut', "line 2: Unterminated string"),
        ('{"a": 1}\n3\n', "line 2: a JSON object was expected"),
        ('{"a": 1},\n{"a": 1}\n', "line 1: a JSON object was expected"),
        ('[{"a": 1}\n{"b": 2}]', "line 2: a comma or the end"),
        ('[{"a": 1},\n]', "line 2: a row was expected after the comma"),
        ('[{"a": 1},', "line 1: the list has no end"),
        ('[{"a": 1}] x', "line 1: there is something behind"),
        ('{"a": ' + "9" * 5000 + "}", "line 1: a number is too long"),
        ('{"a": ' + "[" * 100_000, "line 1: a number is too long, or the nesting too deep"),
        ('{"a": "\n"}' + " " * 200_000, "line 1: Invalid control character"),
    ],
)
def test_a_file_that_holds_something_else_is_one_error_naming_the_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(InvalidInput, match="expected") as told:
        list(read_questions(tmp_path / "q.jsonl"))
    assert said in str(told.value)


def test_a_row_has_a_longest_length(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"a": 1}\n{"a": "' + "x" * (MAX_ROW + 200_000))
    with pytest.raises(InvalidInput, match="line 2: the row is longer than"):
        list(read_questions(tmp_path / "q.jsonl"))


def test_files_that_cannot_be_read_or_are_empty(tmp_path: Path) -> None:
    with pytest.raises(CannotRead, match="No such file"):
        list(read_questions(tmp_path / "none.jsonl"))
    for name, text in (("empty.jsonl", ""), ("list.json", " [ ] ")):
        with pytest.raises(NoInput, match="holds no rows"):
            list(read_questions(written(tmp_path / name, text)))
    (tmp_path / "latin.jsonl").write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(InvalidInput, match="not UTF-8"):
        list(read_questions(tmp_path / "latin.jsonl"))


def test_shards_take_every_row_once_and_rows_of_several_turns_stay_together(tmp_path: Path) -> None:
    rows = [{"conversations": talk(f"{i}?", "a", "And?") if i % 2 else talk(f"{i}?")} for i in range(7)]
    path = written(tmp_path / "q.jsonl", *rows)
    whole = list(read_questions(path))
    parts = [list(read_questions(path, Shard(number, 3))) for number in (1, 2, 3)]
    assert sorted((q.index, q.turn) for part in parts for q in part) == [(q.index, q.turn) for q in whole]
    assert [q.index for q in parts[1]] == [1, 1, 4]
    assert [q.index for q in read_questions(path, Shard(2, 2), limit=4)] == [1, 1, 3, 3]
    for shard in ((0, 2), (3, 2)):
        with pytest.raises(EdgemedError, match="I from 1 to N"):
            Shard(*shard)


@pytest.mark.parametrize("listed", [False, True])
def test_one_row_at_a_time_is_in_memory(tmp_path: Path, listed: bool) -> None:
    row = {"image": "a.png", "conversations": talk("Where is it? " * 300, "There.")}
    path = written(tmp_path / "q.json", *[row] * 2000, listed=listed)
    assert path.stat().st_size > 7_000_000
    tracemalloc.start()
    assert sum(1 for _ in read_questions(path)) == 2000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
