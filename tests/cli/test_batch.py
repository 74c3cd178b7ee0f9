"""`edgemed batch`: order of work, exit codes, shards, going on. The model is hand-made but for the last test."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image

import edgemed.batch
import edgemed.infer
from edgemed.batch import read_schema
from edgemed.cli import batch, main
from edgemed.core import Answer
from edgemed.infer import InferOptions, Session

Captured = pytest.CaptureFixture[str]

ROWS: list[dict[str, Any]] = [
    {
        "id": 10 + i,
        "image": "images/picture.png",
        "conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "a"}],
    }
    for i in range(5)
]


@pytest.fixture(scope="module")
def bundle(tiny_native: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle that finds the liver in everything."""
    made = tiny_native.make(
        tmp_path_factory.mktemp("batch") / "b", "<ref>liver</ref><box><c100><c200><c500><c600></box>."
    )
    return str(made.path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, InferOptions]]:
    """The questions that reach a session, as it is asked them."""
    seen: list[tuple[str, InferOptions]] = []
    ask = Session.ask

    def noted(self: Session, scans: Any, prompt: Any, options: Any = None) -> Answer:
        seen.append((prompt.text, options))
        return ask(self, scans, prompt, options)

    monkeypatch.setattr(Session, "ask", noted)
    return seen


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A file of five questions about one picture."""
    (tmp_path / "images").mkdir()
    Image.fromarray(np.arange(2400, dtype=np.uint8).reshape(40, 60)).save(tmp_path / "images" / "picture.png")
    return write(tmp_path / "questions.jsonl", *ROWS)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_formats_are_those_that_can_be_written() -> None:
    assert batch.FORMATS == edgemed.batch.FORMATS


def test_every_question_has_a_line_and_options_reach_the_session(
    questions: Path, bundle: str, asked: list[tuple[str, InferOptions]], tmp_path: Path, capsys: Captured
) -> None:
    output = tmp_path / "answers.jsonl"
    options = "--device cpu --lang zh --decode plain --no-grammar --max-new-tokens 50 --temperature 0.5 --seed 3"
    assert main(["batch", str(questions), "-o", str(output), "--bundle", bundle, *options.split()]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == f"wrote {output}: 5 answers"
    assert [text for text, _ in asked] == ["0?", "1?", "2?", "3?", "4?"]
    assert asked[0][1] == InferOptions(decode="plain", grammar=False, max_new_tokens=50, temperature=0.5, seed=3)
    lines = read(output)
    assert [(line["id"], line["index"], line["gt"], line["language"]) for line in lines] == [
        (10 + i, i, "a", "zh") for i in range(5)
    ]
    assert lines[0]["provenance"]["family"] == "native"


def test_shards_are_the_whole_and_a_limit_is_the_beginning(questions: Path, bundle: str, tmp_path: Path) -> None:
    def run(name: str, *options: str) -> list[dict[str, Any]]:
        output = tmp_path / name
        assert main(["batch", str(questions), "-o", str(output), "--bundle", bundle, "-q", *options]) == 0
        return read(output)

    first = run("whole", "--limit", "2")
    whole = run("whole", "--resume")
    assert (len(first), len(whole)) == (2, 5)
    assert first == whole[:2]
    parts = [run(f"part{i}", "--shard", f"{i}/2") for i in (1, 2)]
    assert [line["index"] for line in parts[0]] == [0, 2, 4]
    assert sorted((line for part in parts for line in part), key=lambda line: line["index"]) == whole


def test_resume_asks_what_is_left_and_nothing_when_all_is_there(
    questions: Path, bundle: str, asked: list[tuple[str, InferOptions]], tmp_path: Path, capsys: Captured
) -> None:
    output = tmp_path / "answers"
    arguments = ["batch", str(questions), "-o", str(output), "--bundle", bundle, "--format", "medrega", "-q"]
    assert main(arguments) == 0
    whole = output.read_bytes()
    assert len(json.loads(whole)) == 5
    output.write_bytes(whole[: whole.index(b'"2?"') + 9])
    assert main(arguments) == 40
    assert "--resume" in capsys.readouterr().err
    asked.clear()
    assert main([*arguments, "--resume"]) == 0
    assert [text for text, _ in asked] == ["2?", "3?", "4?"]
    assert output.read_bytes() == whole
    assert main([*arguments[:-1], "--resume", "--bundle", "no-such-bundle"]) == 0
    assert capsys.readouterr().err == f"wrote {output}: 5 answers\n"


def test_rows_that_fail_have_an_error_and_the_command_ends_with_87(
    questions: Path, bundle: str, tmp_path: Path, capsys: Captured
) -> None:
    write(questions, ROWS[0], {**ROWS[1], "image": "images/none.png"}, {}, ROWS[3])
    output = tmp_path / "answers.jsonl"
    arguments = ["batch", str(questions), "-o", str(output), "--bundle", bundle, "-q"]
    assert main(arguments) == 87
    told = f"edgemed: 2 of 4 questions failed; each has an 'error' in {output}\n"
    assert capsys.readouterr().err == told
    lines = read(output)
    assert [line.get("error", {}).get("code") for line in lines] == [None, 20, 22, None]
    assert main([*arguments, "--resume"]) == 87
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("text", "code"),
    [('{"image": "a.png"\n', 22), ("[1]", 22), ("", 21)],
)
def test_a_bad_file_is_one_error_before_anything_is_opened(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, text: str, code: int
) -> None:
    opened: list[object] = []
    monkeypatch.setattr(edgemed.infer, "open_session", lambda **options: opened.append(options))
    (tmp_path / "questions.jsonl").write_text(text)
    output = tmp_path / "answers.jsonl"
    assert main(["batch", str(tmp_path / "questions.jsonl"), "-o", str(output)]) == code
    assert capsys.readouterr().err.count("\n") == 1
    assert not output.exists()
    assert opened == []


def test_what_is_not_there_is_told(questions: Path, tmp_path: Path, capsys: Captured) -> None:
    output = str(tmp_path / "answers.jsonl")
    assert main(["batch", str(tmp_path / "none.jsonl"), "-o", output]) == 20
    assert main(["batch", str(questions), "-o", output, "--images", str(tmp_path / "none")]) == 20
    assert main(["batch", str(questions), "-o", str(tmp_path / "none" / "answers")]) == 40
    assert main(["batch", str(questions), "-o", output, "--bundle", "no-such-bundle"]) == 80
    assert main(["batch", str(questions), "-o", output, "--task", "vqa"]) == 22
    assert capsys.readouterr().err.splitlines()[-1] == "edgemed: the family native has no setting 'task'; it has none"
    for shard in ("3/2", "0/1", "1", "a/b"):
        assert main(["batch", str(questions), "-o", output, "--shard", shard]) == 1
    assert Path(output).read_bytes() == b""


def test_paths_start_at_the_folder_of_images(questions: Path, bundle: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = write(elsewhere / "q.jsonl", {**ROWS[0], "image": "picture.png"})
    folder, output = tmp_path / "images", tmp_path / "answers"
    arguments = ["batch", str(moved), "-o", str(output), "--bundle", bundle, "-q", "--format", "medplib-vqa"]
    assert main([*arguments, "--images", str(folder), "--answer-type", "open"]) == 0
    (line,) = read(output)
    assert (line["image_path"], line["answer_type"]) == (str(folder / "picture.png"), "open")


def test_the_embedded_model_answers_a_file_about_the_sample_scan(sample_scan: str, tmp_path: Path) -> None:
    shutil.copy(sample_scan, tmp_path / "scan.dcm")
    talk = [{"from": "human", "value": "<image>\nWhere is the liver?"}]
    questions = write(tmp_path / "q.jsonl", {"image": "scan.dcm", "conversations": talk})
    done = subprocess.run(
        [sys.executable, "-m", "edgemed", "batch", str(questions), "-o", str(tmp_path / "answers.jsonl")],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    (line,) = read(tmp_path / "answers.jsonl")
    jsonschema.validate(line, read_schema())
    assert line["regions"][0]["label"] == "liver"
    assert line["regions"][0]["mask"]["area_px"] > 5000
