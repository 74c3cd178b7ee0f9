"""`edgemed audit`: verify names what is damaged, show tells who did what, send needs a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgemed import audit, config
from edgemed.cli import main, verbs

Captured = pytest.CaptureFixture[str]
STUDY = "1.2.826.0.1.3680043.8.498.1"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(verbs.VERBS, "audit", "Verify, show and send the audit trail.")
    monkeypatch.setattr(config, "system_file", lambda: tmp_path / "no.toml")
    monkeypatch.delenv("EDGEMED_CONFIG", raising=False)
    monkeypatch.setenv("EDGEMED_HOME", str(tmp_path / "home"))


@pytest.fixture
def trail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("EDGEMED_AUDIT_FOLDER", str(tmp_path / "audit"))
    with audit.application("infer"):
        audit.record(audit.accessed([STUDY], "infer"))
        audit.record(audit.exported([STUDY], "infer", ["seg", "sr"]))
    (folder,) = (tmp_path / "audit").iterdir()
    return folder


def test_verify_tells_how_many_records_hold(trail: Path, capsys: Captured) -> None:
    assert main(["audit", "verify"]) == 0
    assert capsys.readouterr().out == f"{trail.name}: 4 records hold, 4 of them wait to be sent\n"
    assert main(["audit", "verify", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["trails"] == [{"trail": trail.name, "records": 4, "unsent": 4, "damage": "", "first": 1}]


def test_verify_names_the_first_damaged_record(trail: Path, capsys: Captured) -> None:
    data = (trail / "trail").read_bytes()
    (trail / "trail").write_bytes(data.replace(b"110103", b"110105", 1))
    assert main(["audit", "verify"]) == 22
    told = capsys.readouterr()
    assert told.out == ""
    assert "record 2 is numbered 2 or was changed; the 1 before it hold" in told.err
    assert told.err.count("\n") == 1
    (trail / "trail").write_bytes(data[: data.rindex(b"\n4 ") + 1])
    assert main(["audit", "verify"]) == 22
    assert "record 4 is missing: the trail was cut off" in capsys.readouterr().err


def test_verify_goes_through_all_files_and_can_begin_at_the_oldest(
    trail: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEMED_AUDIT_FILE_MIB", "0.001")
    for _ in range(3):
        audit.record(audit.accessed([STUDY], "infer"))
    assert {path.name for path in trail.glob("trail*")} == {"trail", "trail-5", "trail-6", "trail-7"}
    assert main(["audit", "verify"]) == 0
    assert capsys.readouterr().out == f"{trail.name}: 7 records hold, 7 of them wait to be sent\n"
    assert main(["audit", "show", "--last", "1"]) == 0
    (trail / "trail").unlink()
    assert main(["audit", "verify"]) == 22
    assert "records 1 to 4 are missing: the next file is trail-5; if the site" in capsys.readouterr().err
    assert main(["audit", "verify", "--from-oldest"]) == 0
    told = f"{trail.name}: 4 records hold (those before 5 are not here), 4 of them wait to be sent\n"
    assert capsys.readouterr().out == told


def test_show_tells_who_did_what_and_is_told_itself(trail: Path, capsys: Captured) -> None:
    assert main(["audit", "show", "--json"]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["event"] for row in rows] == [
        "Application Activity",
        "DICOM Instances Accessed",
        "Export",
        "Application Activity",
        "Audit Log Used",
    ]
    assert all(row["holds"] for row in rows)
    assert rows[2]["Results"] == "seg,sr"
    assert STUDY not in out
    assert main(["audit", "show", "--last", "1"]) == 0
    assert "Audit Log Used" in capsys.readouterr().out


def test_show_finds_a_study_by_its_uid(trail: Path, capsys: Captured) -> None:
    assert main(["audit", "show", "--study", STUDY]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["audit", "show", "--study", STUDY + ".2"]) == 0
    assert capsys.readouterr().out == ""


def test_show_marks_what_does_not_hold(trail: Path, capsys: Captured) -> None:
    data = (trail / "trail").read_bytes()
    (trail / "trail").write_bytes(data.replace(b"110103", b"110105", 1).replace(b"</AuditMessage>", b"<", 1))
    assert main(["audit", "show"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].endswith("DOES NOT HOLD")
    assert "unreadable" in out


def test_send_without_a_server_and_anything_without_a_trail_are_told(
    trail: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["audit", "send"]) == 1
    assert "audit.server is not set" in capsys.readouterr().err
    monkeypatch.delenv("EDGEMED_AUDIT_FOLDER")
    for verb in ("verify", "show", "send"):
        assert main(["audit", verb]) == 21
        assert "audit.folder is not set" in capsys.readouterr().err
