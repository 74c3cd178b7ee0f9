"""The trail: chained, owner-only, whole after a kill or on a full disk; what was done to it is found and named."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgemed.audit.trail import Place, Trail, open_trail
from edgemed.errors import CannotWrite

NIGHTLY = os.environ.get("EDGEMED_NIGHTLY") == "1"


@pytest.fixture
def trail(tmp_path: Path) -> Trail:
    made = open_trail(tmp_path / "audit" / "1000")
    write(made, 5)
    return made


def write(trail: Trail, count: int) -> None:
    for _ in range(count):
        trail.append(lambda number: f"event {number}")


def lines(trail: Trail) -> list[bytes]:
    return (trail.folder / "trail").read_bytes().splitlines(keepends=True)


def put(trail: Trail, changed: list[bytes]) -> None:
    (trail.folder / "trail").write_bytes(b"".join(changed))


def test_records_hold_and_are_for_their_owner_alone(trail: Trail) -> None:
    verdict = trail.check()
    assert (verdict.records, verdict.unsent, verdict.damage) == (5, 5, "")
    assert [(r.number, r.text, r.holds) for r in trail.records()][-1] == (5, "event 5", True)
    trail.key()
    assert {file.stat().st_mode & 0o777 for file in trail.folder.iterdir()} == {0o600}
    assert trail.folder.stat().st_mode & 0o777 == 0o700


def test_every_changed_byte_of_a_record_is_found_and_named(trail: Trail) -> None:
    whole = lines(trail)
    start = len(whole[0]) + len(whole[1])
    for at in range(len(whole[2])):
        data = bytearray(b"".join(whole))
        data[start + at] ^= 1
        put(trail, [bytes(data)])
        assert trail.check().damage.startswith("record 3 "), at


@pytest.mark.parametrize(
    ("change", "damage"),
    [
        (lambda rows: rows[:2] + rows[3:], "record 3 is numbered 4"),
        (lambda rows: [rows[0], rows[2], rows[1], *rows[3:]], "record 2 is numbered 3"),
        (lambda rows: [rows[0], *rows], "record 2 is numbered 1"),
        (lambda rows: rows[:3], "record 4 is missing: the trail was cut off, it had 5"),
        (lambda rows: [], "record 1 is missing"),
        (lambda rows: [*rows[:4], rows[4][:-9]], "record 5 is missing"),
        (lambda rows: [*rows[:2], b"garbage\n", *rows[2:]], "record 3 is no record"),
    ],
)
def test_what_was_taken_moved_or_put_in_is_named(trail: Trail, change: object, damage: str) -> None:
    put(trail, change(lines(trail)))  # type: ignore[operator]
    assert trail.check().damage.startswith(damage)
    write(trail, 2)  # and what comes later does not hide it
    assert trail.check().damage.startswith(damage.split(" is ")[0])
    assert [r.text for r in trail.records() if r.number > 0][-2:] == ["event 6", "event 7"]


def test_a_lost_or_damaged_head_is_told_and_stays_visible(trail: Trail) -> None:
    head = trail.folder / "head"
    head.write_bytes(b"x" * 128)
    assert "damaged" in trail.check().damage
    head.unlink()
    assert "head is missing" in trail.check().damage
    write(trail, 1)
    assert trail.check().damage.startswith("record 6 ")


def test_an_older_head_after_a_kill_or_a_power_cut_is_made_up_for(trail: Trail) -> None:
    old = (trail.folder / "head").read_bytes()
    write(trail, 2)
    (trail.folder / "head").write_bytes(old)
    with open(trail.folder / "trail", "ab") as file:
        file.write(b"8 abc")  # and a record that was not finished
    assert trail.check().damage == ""
    write(trail, 1)
    assert (trail.check().records, trail.check().damage) == (8, "")


def test_writers_at_the_same_time_make_one_chain(trail: Trail) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: write(trail, 5), range(8)))
    assert (trail.check().records, trail.check().damage) == (45, "")


WRITER = """
import sys
from pathlib import Path
from edgemed.audit.trail import open_trail
trail = open_trail(Path(sys.argv[1]))
while True:
    trail.append(lambda number: f"event {number} " + "x" * 3000)
    print("written", flush=True)
"""


@pytest.mark.parametrize("kills", [100 if NIGHTLY else 4])
def test_killed_writers_lose_nothing_and_leave_a_whole_chain(trail: Trail, kills: int) -> None:
    promised = 5
    for kill in range(kills):
        before = 3 + kill % 7
        with subprocess.Popen([sys.executable, "-c", WRITER, str(trail.folder)], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            for _ in range(before):
                child.stdout.readline()
            child.send_signal(signal.SIGKILL)
            more = child.stdout.read().count(b"\n")
        promised += before + more
        verdict = trail.check()
        assert verdict.damage == ""
        assert verdict.records >= promised
        write(trail, 1)
        promised = verdict.records + 1
    assert trail.check().damage == ""


FILLER = """
import resource, sys
from pathlib import Path
from edgemed.audit.trail import open_trail
from edgemed.errors import CannotWrite
trail = open_trail(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
count = 0
try:
    while True:
        trail.append(lambda number: f"event {number} " + "x" * 500)
        count += 1
except CannotWrite as error:
    print(count, error.exit_code)
    print(error)
"""


def test_a_full_disk_refuses_and_leaves_whole_records(tmp_path: Path) -> None:
    folder = tmp_path / "1000"
    run = subprocess.run([sys.executable, "-c", FILLER, str(folder)], capture_output=True, text=True, check=True)
    told, why = run.stdout.splitlines()
    count, code = map(int, told.split())
    assert count > 3
    assert code == 40
    assert "make room" in why
    trail = Trail(folder)
    assert (trail.check().records, trail.check().damage) == (count, "")
    write(trail, 1)
    assert (trail.check().records, trail.check().damage) == (count + 1, "")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_folder_of_others_or_a_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(CannotWrite, match="no folder"):
            open_trail(tmp_path / name)
    (tmp_path / "open").mkdir(0o777)
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(CannotWrite, match="chmod 700"):
        open_trail(tmp_path / "open")
    (tmp_path / "other").mkdir(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(CannotWrite, match="chown"):
        open_trail(tmp_path / "other")


def test_a_trail_that_is_a_link_is_not_followed(trail: Trail, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    (trail.folder / "trail").unlink()
    (trail.folder / "trail").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CannotWrite):
        write(trail, 1)
    assert (tmp_path / "elsewhere").read_bytes() == b""


def test_a_file_that_others_may_read_is_refused(trail: Trail) -> None:
    trail.key()
    for name in ("trail", "head", "key"):
        (trail.folder / name).chmod(0o640)
    for step in (lambda: write(trail, 1), trail.key, trail.check):
        with pytest.raises(CannotWrite, match="chmod 600"):
            step()


def test_a_pipe_in_its_place_does_not_block(trail: Trail) -> None:
    (trail.folder / "trail").unlink()
    os.mkfifo(trail.folder / "trail")
    with pytest.raises(CannotWrite, match="no plain file"):
        write(trail, 1)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can act for others")
def test_root_reaches_nothing_of_its_own_through_a_trail_of_a_user() -> None:
    user = 54321
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        top = Path(name)
        top.chmod(0o755)
        trail = open_trail(top / str(user))
        write(trail, 2)
        for path in (trail.folder, *trail.folder.iterdir()):
            os.chown(path, user, user)
        trail.note_sent(trail.sent())
        assert (trail.folder / "sent").stat().st_uid == user
        assert (trail.check().records, trail.check().damage) == (2, "")
        secret = top / "secret"
        secret.write_text("of root")
        secret.chmod(0o600)
        (trail.folder / "sent").unlink()
        os.link(secret, trail.folder / "sent")
        with pytest.raises(CannotWrite):
            trail.note_sent(Place())
        assert secret.read_text() == "of root"
        assert secret.stat().st_uid == os.geteuid() == 0
