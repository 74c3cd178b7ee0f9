"""One error, one line on stderr, one documented exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from edgemed import errors
from edgemed.cli import main, verbs


def leaves(kind: type[errors.EdgemedError]) -> list[type[errors.EdgemedError]]:
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in leaves(child))]


def test_every_error_has_its_own_documented_code() -> None:
    codes = [kind.exit_code for kind in leaves(errors.EdgemedError)]
    assert len(set(codes)) == len(codes)
    assert set(codes) <= {1, 4, 20, 21, 22, 40, *range(80, 88)}
    tree = errors.__doc__ or ""
    assert all(f" {kind.exit_code}" in tree and kind.__name__ in tree for kind in leaves(errors.EdgemedError))


@pytest.mark.parametrize("kind", leaves(errors.EdgemedError), ids=lambda kind: kind.__name__)
def test_an_error_of_edgemed_ends_in_its_code_and_one_line(
    kind: type[errors.EdgemedError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_raising(kind("found this,\nexpected that"), monkeypatch) == kind.exit_code
    assert capsys.readouterr() == ("", "edgemed: found this, expected that\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [(MemoryError(), 4), (KeyboardInterrupt(), 130), (click.Abort(), 130), (BrokenPipeError(), 0)],
    ids=["memory", "interrupt", "abort", "pipe"],
)
def test_events_of_the_system_have_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verbs, "_reader_left", lambda: 0)  # it would close this test's own stdout
    assert run_raising(error, monkeypatch) == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_foreign_error_is_told_by_type_and_place_and_keeps_its_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_raising(ValueError("PatientName Doe^Jane"), monkeypatch) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "ValueError in test_errors.py line" in told
    assert "Doe" not in told


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_raising(ValueError("why"), monkeypatch, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "a verb is missing"),
        (["no-such-verb"], "No such command 'no-such-verb'"),
        (["infer"], "Missing"),
        (["infer", "x.dcm"], "--prompt"),
        (["infer", "x.dcm", "--prompt", "y", "--device", "cuda"], "gpu:N"),
        (["infer", "x.dcm", "--prompt", "y", "--frame", "-1"], "--frame"),
        (["infer", "x.dcm", "--prompt", "y", "--backend", "none"], "--backend"),
        (["models"], "a verb is missing"),
        (["train"], "RECIPE"),
        (["eval", "series"], "FOLDER"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_and_code_1(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("edgemed: ")
    assert err.count("\n") == 1
    assert told in err
    assert "--help'." in err


def test_a_missing_recipe_and_checkpoint_cannot_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", str(tmp_path / "no.toml")]) == 20
    assert main(["export", str(tmp_path / "no"), "-o", str(tmp_path / "bundle")]) == 20
    assert capsys.readouterr().err.count("\n") == 2


def test_evaluating_what_is_not_there_cannot_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["eval", "series", str(tmp_path / "no"), str(tmp_path / "no.nii.gz")]) == 20
    assert main(["eval", "records", str(tmp_path / "no.jsonl")]) == 20
    assert capsys.readouterr().err.count("\n") == 2


def test_a_missing_library_is_code_82_and_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "recipe.toml").write_text("")
    assert main(["train", str(tmp_path / "recipe.toml")]) == 82
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "bundle")]) == 82
    told = capsys.readouterr().err
    assert "edgemed[train]" in told
    assert "edgemed[export]" in told


def test_a_reader_that_leaves_early_gets_no_complaint() -> None:
    code = "import os, sys; os.close(sys.stdin.fileno())"
    reader = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    reader.wait()
    assert reader.stdin is not None
    writer = subprocess.run(
        [sys.executable, "-m", "edgemed", "--help"], stdout=reader.stdin, stderr=subprocess.PIPE, check=False
    )
    reader.stdin.close()
    assert writer.stderr == b""


def run_raising(error: BaseException, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Return the exit code of a verb whose body raises `error`."""

    @click.command("raise")
    @verbs.debug_option
    def command() -> None:
        raise error

    monkeypatch.setattr(verbs.Verbs, "get_command", lambda self, ctx, name: command)
    return main(["raise", *arguments])
