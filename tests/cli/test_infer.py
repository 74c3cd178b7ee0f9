"""`edgemed infer`: order of work, outputs, exit codes. The model is a stand-in but for the last test."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from PIL import Image

import edgemed.infer
from edgemed.cli import main
from edgemed.core import Answer, Language, Prompt, Provenance, Region, Scan
from edgemed.errors import BackendUnavailable, InvalidInput
from edgemed.infer import InferOptions
from edgemed.report import read_schema

Captured = pytest.CaptureFixture[str]


class FakeSession:
    """Answers every question with the middle of the scan; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Scan, Prompt, InferOptions]] = []
        self.together: list[int] = []
        self.opened: dict[str, object] = {}
        self.error: Exception | None = None

    def ask(self, scans: Sequence[Scan], prompt: Prompt, options: InferOptions) -> Answer:
        self.together.append(len(scans))
        scan = scans[0] if scans else Scan(np.zeros((1, 8, 8, 3), np.uint8), "OT")
        self.asked.append((scan, prompt, options))
        if self.error is not None:
            raise self.error
        mask = np.zeros((scan.rows, scan.columns), bool)
        mask[scan.rows // 4 : scan.rows // 2, scan.columns // 4 : scan.columns // 2] = True
        box = (scan.columns / 4, scan.rows / 4, scan.columns / 2, scan.rows / 2)
        provenance = Provenance(
            "0", "fake", "fake", "0" * 64, "fake", "CPU", {"decoder": "fp32"}, "auto",
            {"prompt": 3, "generated": 2, "decoder_calls": 2}, {"decoder": 1.0, "total": 2.0},
        )  # fmt: skip
        name = "肝脏" if prompt.language == "zh" else "liver"
        return Answer(
            name,
            f"<ref>{name}</ref>",
            (Region(name, box, mask=mask, score=0.5),),
            provenance,
            (1, 2, 9),
            (4, 5),
            router=np.tile(np.array([0.25, 0.75], np.float32), (4, 2, 1)) if options.router else None,
            vocabulary=9,
        )

    def notice(self, language: Language) -> str:
        return "not for diagnosis" if language == "en" else "不可用于诊断"


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> FakeSession:
    """A stand-in for the session that `edgemed infer` opens."""
    fake = FakeSession()

    def open_fake(**options: object) -> FakeSession:
        fake.opened = options
        return fake

    monkeypatch.setattr(edgemed.infer, "open_session", open_fake)
    return fake


@pytest.fixture
def picture(tmp_path: Path) -> str:
    """A PNG of 40 rows and 60 columns."""
    path = tmp_path / "picture.png"
    Image.fromarray(np.arange(2400, dtype=np.uint8).reshape(40, 60)).save(path)
    return str(path)


def test_text_has_answer_table_and_notice(session: FakeSession, picture: str, capsys: Captured) -> None:
    assert main(["infer", picture, "--prompt", "Where is the liver?"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "liver"
    assert "15, 10, 30, 20" in out
    assert out.endswith("not for diagnosis\n")
    assert err == ""


def test_json_is_one_line_of_the_schema_with_reading_time(
    session: FakeSession, sample_scan: str, capsys: Captured
) -> None:
    assert (
        main(["infer", sample_scan, "--prompt", "肝脏在哪里?", "--json", "--tokens", "--region", "point:100,200"]) == 0
    )
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    answer = json.loads(out)
    jsonschema.validate(answer, read_schema())
    assert answer["input"]["path"] == sample_scan
    assert answer["prompt"]["language"] == "zh"
    assert answer["prompt"]["regions"] == [{"kind": "point", "point_px": [100.0, 200.0]}]
    assert answer["regions"][0]["mask"]["area_mm2"] == pytest.approx(128 * 128 * 0.9765625**2, abs=0.1)
    assert answer["generated_ids"] == [4, 5]
    timings = answer["provenance"]["timings_ms"]
    assert 0 < timings["read"] < timings["total"]


def test_options_reach_the_session(session: FakeSession, picture: str, capsys: Captured) -> None:
    options = "--bundle b --backend onnxruntime --device gpu:1 --allow-cpu --lang zh --decode plain --no-grammar"
    options += " --max-new-tokens 7 --temperature 0.5 --seed 3"
    assert main(["infer", picture, "--prompt", "Where?", *options.split()]) == 0
    opened = {name: value for name, value in session.opened.items() if name != "tell"}
    assert opened == {"bundle": "b", "backend": "onnxruntime", "device": "gpu:1", "allow_cpu": True}
    _, prompt, asked = session.asked[0]
    assert prompt.language == "zh"
    assert asked == InferOptions(decode="plain", grammar=False, max_new_tokens=7, temperature=0.5, seed=3)


def test_window_and_frame_reach_the_reader(session: FakeSession, sample_scan: str, capsys: Captured) -> None:
    assert main(["infer", sample_scan, "--prompt", "?", "--window", "-600,1500"]) == 0
    window = session.asked[0][0].window
    assert window is not None
    assert (window.center, window.width) == (-600, 1500)
    assert main(["infer", sample_scan, "--prompt", "?", "--frame", "1"]) == 22


def test_every_prompt_is_asked_about_every_input_on_one_read_scan(
    session: FakeSession, picture: str, sample_scan: str, capsys: Captured
) -> None:
    assert main(["infer", picture, sample_scan, "--prompt", "A?", "--prompt", "B?", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(Path(line["input"]["path"]).name, line["prompt"]["text"]) for line in lines] == [
        ("picture.png", "A?"), ("picture.png", "B?"), ("sample_ct.dcm", "A?"), ("sample_ct.dcm", "B?"),
    ]  # fmt: skip
    assert session.asked[0][0] is session.asked[1][0]
    assert lines[1]["provenance"]["timings_ms"]["read"] == 0


def test_a_batch_goes_on_after_a_failure_and_ends_with_87(
    session: FakeSession, picture: str, tmp_path: Path, capsys: Captured
) -> None:
    missing, empty = str(tmp_path / "missing.dcm"), tmp_path / "empty.dcm"
    empty.write_bytes(b"")
    assert main(["infer", missing, picture, str(empty), "--prompt", "?", "--json"]) == 87
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    told = err.splitlines()
    assert len(told) == 3
    assert missing in told[0]
    assert told[0].endswith("(code 20)")
    assert told[1].endswith("(code 21)")
    assert told[2] == "edgemed: 2 of 3 inputs failed; each is told above"


def test_a_single_failure_keeps_its_own_code(session: FakeSession, tmp_path: Path, capsys: Captured) -> None:
    assert main(["infer", str(tmp_path / "missing.dcm"), "--prompt", "?"]) == 20
    assert main(["infer", str(tmp_path), "--prompt", "?"]) == 21
    session.error = InvalidInput("the prompt does not fit")
    Image.new("L", (8, 8), 9).save(tmp_path / "a.png")
    assert main(["infer", str(tmp_path / "a.png"), "--prompt", "?"]) == 22
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 3


def test_a_back_end_that_is_missing_ends_a_batch_at_once(session: FakeSession, picture: str, capsys: Captured) -> None:
    session.error = BackendUnavailable("onnxruntime is missing")
    assert main(["infer", picture, picture, "--prompt", "?"]) == 82
    assert capsys.readouterr().err == "edgemed: onnxruntime is missing\n"


def test_an_empty_prompt_and_a_bad_region_are_told(session: FakeSession, picture: str, capsys: Captured) -> None:
    assert main(["infer", picture, "--prompt", " "]) == 22
    assert main(["infer", picture, "--prompt", "?", "--region", "circle:1"]) == 1
    assert main(["infer", picture, "--prompt", "?", "--region", "box:0,0,61,40"]) == 22
    assert session.asked == []


def test_files_go_to_the_folder_and_names_do_not_collide(
    session: FakeSession, picture: str, tmp_path: Path, capsys: Captured
) -> None:
    folder, report = tmp_path / "new" / "answers", tmp_path / "run.json"
    arguments = ["infer", picture, "--prompt", "A?", "--prompt", "B?", "-o", str(folder), "--overlay"]
    assert main([*arguments, "--report", str(report)]) == 0
    out, err = capsys.readouterr()
    names = ["picture-2.answer.json", "picture-2.overlay.png", "picture.answer.json", "picture.overlay.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [line.split()[0] for line in err.splitlines()] == ["wrote"] * 4
    assert "== " in out
    jsonschema.validate(json.loads((folder / "picture.answer.json").read_text("utf-8")), read_schema())
    with Image.open(folder / "picture.overlay.png") as overlay:
        assert overlay.width > 60
    runs = json.loads(report.read_text("utf-8"))["runs"]
    assert [set(run["outputs"]) for run in runs] == [{"json", "overlay"}] * 2


def test_a_question_without_an_image_is_asked(session: FakeSession, capsys: Captured) -> None:
    assert main(["infer", "--prompt", "What is a liver?", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, read_schema())
    assert (answer["input"], answer["regions"], session.together) == (None, [], [0])
    assert main(["infer", "--prompt", "?", "--region", "point:1,1"]) == 1


def test_inputs_asked_about_together_make_one_answer(
    session: FakeSession, picture: str, sample_scan: str, capsys: Captured
) -> None:
    assert main(["infer", picture, sample_scan, "--together", "--prompt", "Which is larger?", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, read_schema())
    assert session.together == [2]
    assert [entry["path"] for entry in answer["more_inputs"]] == [sample_scan]


def test_the_turns_of_a_chat_see_those_before_them(session: FakeSession, picture: str, capsys: Captured) -> None:
    prompts = ["--prompt", "Where is it?", "--prompt", "How large?", "--prompt", "Why?"]
    assert main(["infer", picture, "--chat", *prompts]) == 0
    histories = [[turn.question for turn in prompt.history] for _, prompt, _ in session.asked]
    assert histories == [[], ["Where is it?"], ["Where is it?", "How large?"]]
    assert session.asked[1][1].history[0].tagged_text == "<ref>liver</ref>"


def test_settings_reach_the_family(session: FakeSession, picture: str, capsys: Captured) -> None:
    given = "--compat corrected --task vqa --prompts meta.json --labels chexpert --set tiles=4 --set order=training"
    assert main(["infer", picture, "--prompt", "?", *given.split(), "--beams", "3"]) == 0
    assert session.asked[0][1].settings == {
        "compat": "corrected", "task": "vqa", "prompts": "meta.json", "labels": "chexpert", "tiles": "4",
        "order": "training",
    }  # fmt: skip
    assert session.asked[0][2].beams == 3
    assert main(["infer", picture, "--prompt", "?", "--set", "tiles"]) == 1


def test_examples_are_read_once_and_reach_every_question(
    session: FakeSession, picture: str, sample_scan: str, tmp_path: Path, capsys: Captured
) -> None:
    mask = tmp_path / "mask.png"
    Image.fromarray(np.eye(40, 60, dtype=np.uint8)).save(mask)
    examples = ["--example", f"{picture}={mask}"] * 2
    assert main(["infer", sample_scan, picture, "--prompt", "A?", "--prompt", "B?", "--json", *examples]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"]["examples"] for line in lines] == [2] * 4
    assert not any(str(mask) in line for line in lines)
    asked = [prompt.examples for _, prompt, _ in session.asked]
    assert all(a is b for examples in asked for a, b in zip(examples, asked[0], strict=True))
    assert np.array_equal(asked[0][1].mask, np.eye(40, 60, dtype=bool))


def test_examples_are_shown_in_the_window_of_the_input(
    session: FakeSession, sample_scan: str, tmp_path: Path, capsys: Captured
) -> None:
    mask = tmp_path / "mask.png"
    Image.fromarray(np.ones((512, 512), np.uint8)).save(mask)
    arguments = [sample_scan, "--prompt", "?", "--window", "-600,1500", "--example", f"{sample_scan}={mask}"]
    assert main(["infer", *arguments]) == 0
    window = session.asked[0][1].examples[0].scan.window
    assert window is not None
    assert (window.center, window.width) == (-600, 1500)


def test_a_bad_example_ends_the_command_before_any_question(
    session: FakeSession, picture: str, tmp_path: Path, capsys: Captured
) -> None:
    Image.fromarray(np.ones((8, 8), np.uint8)).save(tmp_path / "small.png")
    for text, code in (
        (picture, 1),
        (f"{picture}={tmp_path / 'missing.png'}", 20),
        (f"{tmp_path / 'missing.png'}={picture}", 20),
        (f"{picture}={tmp_path / 'small.png'}", 22),
    ):
        assert main(["infer", picture, picture, "--prompt", "?", "--example", text]) == code
    assert session.asked == []


def test_panels_and_router_are_written(session: FakeSession, picture: str, tmp_path: Path, capsys: Captured) -> None:
    router = tmp_path / "router.json"
    arguments = ["infer", picture, "--prompt", "?", "--panels", "-o", str(tmp_path / "out"), "--router", str(router)]
    assert main(arguments) == 0
    assert (tmp_path / "out" / "picture.panels.png").is_file()
    (written,) = json.loads(router.read_text())
    assert written["tokens"] == {"image": 1, "text": 3}
    assert written["share_by_layer"]["all"] == [[0.0, 1.0], [0.0, 1.0]]


def test_quiet_says_nothing_on_stderr(session: FakeSession, picture: str, tmp_path: Path, capsys: Captured) -> None:
    assert main(["infer", picture, "--prompt", "?", "-o", str(tmp_path / "out"), "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_made_is_code_40(
    session: FakeSession, picture: str, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["infer", picture, "--prompt", "?", "-o", str(tmp_path / "file")]) == 40
    assert main(["infer", picture, "--prompt", "?", "--report", str(tmp_path / "no" / "run.json")]) == 40


def test_the_embedded_model_answers_about_the_sample_scan(sample_scan: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgemed", "infer", sample_scan, "--json", "--prompt", "Where is the liver?"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    answer = json.loads(done.stdout)
    jsonschema.validate(answer, read_schema())
    (region,) = answer["regions"]
    assert region["label"] == "liver"
    assert region["mask"]["area_px"] > 5000
    assert answer["provenance"]["bundle"] == "nano"
