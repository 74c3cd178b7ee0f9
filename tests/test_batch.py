"""Files of questions: answers are those of the authors' code, lines have their form, a cut file is gone on with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image

from edgemed.batch import FORMATS, AnswerFile, Asker, Lines, Manner, Outcome, read_schema, settings_for
from edgemed.cli.regions import read_region
from edgemed.core import Answer, Prompt, PromptRegion, Provenance, Scan
from edgemed.dicom import Reader
from edgemed.errors import BackendUnavailable, CannotWrite, EdgemedError, InvalidInput
from edgemed.infer import InferOptions, Session, open_session
from edgemed.language import answer_language
from edgemed.questions import Question, read_questions

ANSWER = "The <ref>liver</ref><box><c200><c300><c500><c600></box><seg> is enlarged."


def talk(*values: str) -> list[dict[str, str]]:
    """Return turns of human and gpt in turn."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    with Reader() as made:
        yield made


@pytest.fixture(scope="module")
def session(tiny_native: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A native session that finds the liver in everything."""
    bundle = tiny_native.make(tmp_path_factory.mktemp("batch") / "tiny", ANSWER)
    with open_session(bundle.path, threads=1) as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with picture.png of 40 x 60 and two masks, one of another size."""
    Image.fromarray(np.arange(2400, dtype=np.uint8).reshape(40, 60)).save(tmp_path / "picture.png")
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 10:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask[:20]).save(tmp_path / "small.png")
    return tmp_path


def asker(session: Any, folder: Path, reader: Reader, *, limit: int = 64, **manner: Any) -> Asker:
    """Return what asks the questions of a file in `folder`."""
    how = {"language": answer_language, "settings": {}, "options": InferOptions(max_new_tokens=limit), **manner}

    def read_mask(path: str, scan: Scan) -> PromptRegion:
        return read_region(f"mask:{path}", scan, reader.read)

    return Asker(session, folder, Manner(**how), reader.read, read_mask)


def lines(asking: Asker, folder: Path, *rows: dict[str, Any], form: str = "edgemed") -> list[dict[str, Any]]:
    """Return the answer lines of rows, as they are read back from the file."""
    (folder / "questions.json").write_text(json.dumps(list(rows)), encoding="utf-8")
    (folder / "answers").unlink(missing_ok=True)
    with AnswerFile(folder / "answers", Lines(form, folder)) as answers:
        for question in answers.left(read_questions(folder / "questions.json")):
            answers.write(asking.ask(question))
    text = (folder / "answers").read_text("utf-8")
    whole: list[dict[str, Any]] = json.loads(text) if text[0] == "[" else [json.loads(t) for t in text.splitlines()]
    return whole


# -- the authors' files ------------------------------------------------------------------------------------------------


def test_a_file_of_medrega_is_answered_as_by_the_authors_code(reference: Any, tmp_path: Path, reader: Reader) -> None:
    tiny = reference("medrega-tiny")
    cases = ("vqa_zh", "r2t_en", "text_only_en")
    rows = []
    for case in cases:
        image = tiny.prompts[case]["image"]
        row = {"id": f"q-{case}", "conversations": talk(tiny.prompts[case]["question"], "truth")}
        rows.append({**row, "image": f"image_{image}.png"} if image else row)
    first, later = tiny.prompts["vqa_en"], tiny.prompts["history_en"]
    given = talk(first["question"], first["response"], later["question"])
    alone = [given[0], given[2]]
    picture = {"image": f"image_{first['image']}.png"}
    with open_session(tiny.folder, "torch", "cpu", threads=1) as session:
        settings = settings_for(Lines("medrega", tmp_path), session, {"task": "none"})
        options = InferOptions(max_new_tokens=24, grammar=False)  # the published code has none
        asking = asker(session, tiny.folder, reader, options=options, settings=settings)
        found = lines(asking, tmp_path, *rows, {**picture, "conversations": given}, form="medrega")
        own = asker(session, tiny.folder, reader, options=options, settings=settings, own_history=True)
        repeated = lines(own, tmp_path, {**picture, "conversations": alone}, form="medrega")
    assert settings["compat"] == "reference"
    assert [line["pred_answer"] for line in found[:3]] == [tiny.prompts[case]["response"] for case in cases]
    assert found[0] == {
        "question": tiny.prompts["vqa_zh"]["question"],
        "question_id": "q-vqa_zh",
        "pred_answer": tiny.prompts["vqa_zh"]["response"],
        "gt_answer": "truth",
    }
    for turns in (found[3:], repeated):
        assert [line["pred_answer"] for line in turns] == [first["response"], later["response"]]


def test_a_file_of_medplib_is_answered_as_by_the_authors_code(reference: Any, tmp_path: Path, reader: Reader) -> None:
    tiny = reference("medplib-tiny")
    cases, path = ("vqa_demo", "region_demo", "ground_four_three_demo"), "<region>region_mask_four_three.png</region>"
    asked = {c: tiny.prompts[c]["prompt"].split("<im_end>\n")[1].removesuffix(" ASSISTANT:") for c in cases}
    rows = [
        {
            "image": f"image_{tiny.prompts[case]['image']}.png",
            "conversations": talk(
                f"<image>\n{text.replace('<region></region>', path)}", "It is <SEG>.<mask>m.png</mask>"
            ),
            "answer_type": "open",
        }
        for case, text in asked.items()
    ]
    with open_session(tiny.folder, "torch", "cpu", threads=1) as session:
        steps = max(tiny.expected(f"gen_{case}").shape[1] for case in cases)
        options = InferOptions(max_new_tokens=steps, grammar=False)  # the published code has none
        asking = asker(session, tiny.folder, reader, options=options)
        found = lines(asking, tmp_path, *rows, form="medplib-vqa")
        (grounded,) = lines(asking, tmp_path, rows[2])
    assert [line["text"] for line in found] == [tiny.prompts[case]["response"] for case in cases]
    assert [line["prompt"] for line in found] == list(asked.values())
    assert found[1] == {
        "question_id": 1,
        "image_path": str(tmp_path / "image_four_three.png"),
        "prompt": asked["region_demo"],
        "gt": "It is <SEG>.",
        "text": tiny.prompts["region_demo"]["response"],
        "answer_id": "1-0",
        "model_id": tiny.folder.name,
        "answer_type": "open",
        "metadata": {},
    }
    assert grounded["regions"][0]["mask"]["area_px"] > 0
    assert "<SEG>" in grounded["tagged_text"]


# -- lines of edgemed.batch/1 ------------------------------------------------------------------------------------------


def test_lines_satisfy_the_schema_and_hold_no_times(session: Session, folder: Path, reader: Reader) -> None:
    rows = (
        {"id": 7, "image": "picture.png", "conversations": talk("<image>\n肝脏在哪里？", "这里")},
        {"image": "picture.png", "conversations": talk("What is <region>mask.png</region>?")},
        {"image": "missing.png", "conversations": talk("Where?", "")},
        {"conversations": "none"},
    )
    found = lines(asker(session, folder, reader), folder, *rows)
    for line in found:
        jsonschema.validate(line, read_schema())
    first, region, missing, broken = found
    assert (first["id"], first["gt"], first["language"], first["images"]) == (7, "这里", "zh", ["picture.png"])
    assert first["regions"][0]["mask"]["rle"]["size"] == [40, 60]
    assert first["answer"] == "The liver is enlarged."
    assert "timings_ms" not in first["provenance"]
    assert "gt" not in region
    assert region["regions"]
    assert (missing["error"]["name"], missing["error"]["code"], missing["gt"]) == ("CannotRead", 20, "")
    assert "'conversations'" in broken["error"]["message"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**first, "error": missing["error"]}, read_schema())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": "/etc/passwd", "conversations": talk("Where?")}, "leads out of it"),
        ({"image": "a/../../b.png", "conversations": talk("Where?")}, "leads out of it"),
        ({"image": "a\\..\\..\\b.png", "conversations": talk("Where?")}, "leads out of it"),
        ({"image": "C:\\b.png", "conversations": talk("Where?")}, "leads out of it"),
        ({"image": "a\0b.png", "conversations": talk("Where?")}, "leads out of it"),
        ({"image": " ", "conversations": talk("Where?")}, "leads out of it"),
        ({"image": "picture.png", "conversations": talk("<region>../mask.png</region>?")}, "leads out of it"),
        ({"image": "picture.png", "conversations": talk("<region>small.png</region>?")}, "60 x 20 pixels"),
        ({"image": "picture.png", "conversations": talk("<region></region>?")}, "leads out of it"),
        ({"image": "questions.json", "conversations": talk("Where?")}, "is not a DICOM file or a PNG"),
        ({"image": "picture.png", "conversations": talk(" ")}, "the question is empty"),
        ({"conversations": talk("<region>mask.png</region>?")}, "without an image"),
        ({"conversations": talk("Where?")}, "an INPUT is missing"),
        ({"image": ["picture.png"] * 2, "conversations": talk("Where?")}, "one image at a time"),
    ],
)
def test_a_row_that_cannot_be_asked_has_an_error_and_the_next_is_asked(
    session: Session, folder: Path, reader: Reader, row: dict[str, Any], said: str
) -> None:
    good = {"image": "picture.png", "conversations": talk("Where is the liver?")}
    bad, following = lines(asker(session, folder, reader), folder, row, good)
    assert said in bad["error"]["message"]
    assert "answer" not in bad
    assert following["regions"]


@pytest.mark.parametrize(
    ("own", "earlier", "said"),
    [
        (False, talk("A?", "a"), "answers single questions"),
        (False, [{"from": "human", "value": "A?"}], "turn 0, which this one goes on from, has no answer in the row"),
        (True, talk(" ", "a"), "turn 0, which this one goes on from, failed"),
        (True, talk("<region>mask.png</region>?", "a"), "cannot be repeated"),
    ],
)
def test_a_later_turn_that_cannot_be_asked_says_why(
    session: Session, folder: Path, reader: Reader, own: bool, earlier: list[dict[str, str]], said: str
) -> None:
    row = {"image": "picture.png", "conversations": [*earlier, {"from": "human", "value": "B?"}]}
    *_, later = lines(asker(session, folder, reader, own_history=own), folder, row)
    assert later["turn"] == 1
    assert said in later["error"]["message"]


def test_examples_are_shown_unless_they_are_left_out(session: Session, folder: Path, reader: Reader) -> None:
    example = {"image": "picture.png", "mask": "mask.png"}
    row = {"image": "picture.png", "conversations": talk("Where?"), "icl_examples": [example]}
    (refused,) = lines(asker(session, folder, reader), folder, row)
    assert "takes no examples" in refused["error"]["message"]
    (answered,) = lines(asker(session, folder, reader, examples=False), folder, row)
    assert answered["regions"]


def test_a_picture_is_read_once_for_questions_in_a_row(
    session: Session, folder: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[str] = []
    read = Reader.read

    def noted(self: Reader, path: str) -> Scan:
        paths.append(path)
        return read(self, path)

    monkeypatch.setattr(Reader, "read", noted)
    row = {"image": "picture.png", "conversations": talk("Where?")}
    other = {"image": "mask.png", "conversations": talk("Where?")}
    lines(asker(session, folder, reader), folder, row, row, other, row)
    assert [Path(path).name for path in paths] == ["picture.png", "mask.png", "picture.png"]


def test_a_setting_that_the_family_lacks_is_refused_before_anything_is_asked(
    session: Session, folder: Path, reader: Reader
) -> None:
    assert settings_for(Lines("medrega", folder), session, {}) == {}
    with pytest.raises(InvalidInput, match="has no setting 'task'"):
        asker(session, folder, reader, settings={"task": "vqa"})


def test_what_every_question_would_end_in_ends_the_run(
    session: Session, folder: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: Any) -> Answer:
        raise BackendUnavailable("onnxruntime is missing")

    monkeypatch.setattr(session, "ask", ask)
    with pytest.raises(BackendUnavailable):
        lines(asker(session, folder, reader), folder, {"image": "picture.png", "conversations": talk("Where?")})


def test_too_little_memory_for_one_question_is_its_error(
    session: Session, folder: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: Any) -> Answer:
        raise MemoryError

    monkeypatch.setattr(session, "ask", ask)
    row = {"image": "picture.png", "conversations": talk("Where?")}
    (line,) = lines(asker(session, folder, reader), folder, row)
    assert (line["error"]["name"], line["error"]["code"]) == ("OutOfMemory", 4)


# -- the answers file --------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"id": 3, "image": "a.png", "conversations": talk("肝脏？", "有 <mask>m.png</mask>")},
    {"image": "b.png", "width": 5, "height": 4, "conversations": talk("One?", "1", "Two?", "2")},
    {"image": "c.png", "conversations": talk("Last?")},
]


def outcome(question: Question) -> Outcome:
    """Return a made-up answer; an error for the row of c.png."""
    if question.images == ("c.png",):
        return Outcome(question, error=EdgemedError("no\nanswer"))
    made_by = Provenance("0", "f", "b", "0" * 64, "torch", "CPU", {}, "auto", {}, {})
    text = f"答 {question.text}"
    scan = Scan(np.zeros((1, 4, 5, 3), np.uint8), "OT")
    return Outcome(question, (scan,), Prompt(question.text), Answer(text, f"{text}<SEG>", (), made_by))


def questions(tmp_path: Path, rows: list[dict[str, Any]] | None = None) -> Iterator[Question]:
    path = tmp_path / f"{0 if rows is None else len(rows)}.json"
    if rows is not None or not path.exists():
        path.write_text(json.dumps(ROWS if rows is None else rows))
    return read_questions(path)


def fill(path: Path, form: str, *, resume: bool = False, rows: list[dict[str, Any]] | None = None) -> list[Question]:
    """Write the answers to all rows that the file lacks; return what was asked."""
    with AnswerFile(path, Lines(form, path.parent), resume=resume) as answers:
        asked = list(answers.left(questions(path.parent, rows)))
        for question in asked:
            answers.write(outcome(question))
        assert (answers.answered, answers.failed) == (4, 1)
    return asked


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_cut_at_any_place_becomes_the_same_file_again(tmp_path: Path, form: str) -> None:
    path = tmp_path / "answers"
    assert len(fill(path, form)) == 4
    whole = path.read_bytes()
    asked = []
    for length in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:length])
        asked.append([(q.index, q.turn) for q in fill(path, form, resume=True)])
        assert path.read_bytes() == whole
    path.write_bytes(whole)
    assert fill(path, form, resume=True) == []
    assert path.read_bytes() == whole
    everything = [(0, 0), (1, 0), (1, 1), (2, 0)]
    assert [everything[4 - count :] for count in (4, 3, 1)] == [a for i, a in enumerate(asked) if a not in asked[:i]][
        :3
    ]


def test_the_authors_forms_are_theirs(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    fill(path, "medrega-t2r")
    error = {"name": "EdgemedError", "code": 1, "message": "no answer"}
    assert json.loads(path.read_text("utf-8")) == [
        {"hw": [4, 5], "answer": "答 肝脏？", "gt": "有 <mask>m.png</mask>"},
        {"hw": [4, 5], "answer": "答 One?", "gt": "1"},
        {"hw": [4, 5], "answer": "答 Two?", "gt": "2"},
        {"hw": None, "answer": "", "gt": "", "error": error},
    ]
    path.unlink()
    fill(path, "medplib-vqa")
    line = json.loads(path.read_text("utf-8").splitlines()[0])
    assert list(line) == [
        "question_id", "image_path", "prompt", "gt", "text", "answer_id", "model_id", "answer_type", "metadata",
    ]  # fmt: skip
    assert (line["gt"], line["text"], line["answer_type"]) == ("有 ", "答 肝脏？<SEG>", "closed")


@pytest.mark.parametrize("form", FORMATS)
def test_answers_to_other_questions_are_left_as_they_are(tmp_path: Path, form: str) -> None:
    path = tmp_path / "answers"
    fill(path, form)
    whole = path.read_bytes()
    changed = {**ROWS[1], "conversations": talk("One?", "another", "Two?", "2")}
    for rows, line in (([ROWS[0], changed, ROWS[2]], 2), (ROWS[:2], 4)):
        for kept in (whole, whole[:-9]):
            path.write_bytes(kept)
            with pytest.raises(InvalidInput, match=f"line {line} of the answers in .* belongs to other questions"):
                fill(path, form, resume=True, rows=rows)
            assert path.read_bytes() == kept


@pytest.mark.parametrize("text", ["notes of mine", '{"id": 1, "conversations": [', '["a"]', '{"id": 1}\n'])
@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_holds_no_answers_is_left_as_it_is(tmp_path: Path, form: str, text: str) -> None:
    (tmp_path / "mine").write_text(text)
    with pytest.raises(InvalidInput, match="belongs to other questions"):
        fill(tmp_path / "mine", form, resume=True)
    assert (tmp_path / "mine").read_text() == text


def test_answers_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    path.touch()
    fill(path, "edgemed")
    with pytest.raises(CannotWrite, match="--resume to go on"):
        AnswerFile(path, Lines("edgemed", tmp_path))
    with pytest.raises(CannotWrite, match="cannot write"):
        AnswerFile(tmp_path, Lines("edgemed", tmp_path))
    with pytest.raises(CannotWrite, match="cannot write"):
        AnswerFile(tmp_path / "no" / "answers", Lines("edgemed", tmp_path))


def test_a_list_has_its_end_after_an_error_and_without_answers(tmp_path: Path) -> None:
    path = tmp_path / "answers"

    def stopped() -> None:
        with AnswerFile(path, Lines("medrega", tmp_path), resume=True) as answers:
            answers.write(outcome(next(answers.left(questions(tmp_path)))))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert len(json.loads(path.read_text("utf-8"))) == 1
    path.unlink()
    with AnswerFile(path, Lines("medrega", tmp_path)) as answers:
        assert list(answers.left(iter(()))) == []
    assert path.read_text() == "[]\n"


def test_each_line_is_on_the_disk_when_it_is_written(tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "answers", Lines("edgemed", tmp_path)) as answers:
        for count, question in enumerate(answers.left(questions(tmp_path)), 1):
            answers.write(outcome(question))
            assert (tmp_path / "answers").read_bytes().count(b"\n") == count
