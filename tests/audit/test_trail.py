"""The trail: chained, owner-only, whole after a kill or on a full disk; what was done to it is found and named."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from edgemed.audit.trail import Place, Trail, Verdict, open_trail
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


def test_a_head_written_by_half_leaves_the_one_before(trail: Trail) -> None:
    before = (trail.folder / "head").read_bytes()
    write(trail, 1)
    after = (trail.folder / "head").read_bytes()
    for end in range(257):
        (trail.folder / "head").write_bytes(after[:end] + before[end:])
        assert trail.check() == Verdict(6, 6), end
    write(trail, 1)
    assert trail.check() == Verdict(7, 7)


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


# --- files of a size --------------------------------------------------------------------------------------------------


@pytest.fixture
def several(tmp_path: Path) -> Trail:
    """A trail of 40 records in files of four or five."""
    made = open_trail(tmp_path / "audit" / "1000", 400)
    write(made, 40)
    return made


def files(trail: Trail) -> list[Path]:
    numbered = [path for path in trail.folder.iterdir() if path.name.startswith("trail-")]
    return [trail.folder / "trail", *sorted(numbered, key=lambda path: int(path.name[6:]))]


def test_a_file_that_is_full_goes_on_in_another_and_the_chain_goes_through_all(several: Trail) -> None:
    assert len(files(several)) > 7
    assert all(path.stat().st_size <= 400 + 90 and path.stat().st_mode & 0o777 == 0o600 for path in files(several))
    for path in files(several)[1:]:
        after, first = path.read_text().splitlines()[:2]
        assert int(first.split()[0]) == int(after.split()[1]) + 1 == int(path.name[6:])
    assert [(r.number, r.text, r.holds) for r in several.records()] == [(n, f"event {n}", True) for n in range(1, 41)]
    assert several.check() == Verdict(40, 40)
    half = next(r.end for r in several.records() if r.number == 20)
    assert [r.number for r in several.records(half)] == list(range(21, 41))


def test_without_a_size_there_is_one_file(tmp_path: Path) -> None:
    trail = open_trail(tmp_path / "1000", 0)
    write(trail, 40)
    assert len(files(trail)) == 1


def test_a_file_that_is_missing_or_another_is_named_and_stays_named(several: Trail) -> None:
    whole = {path: path.read_bytes() for path in files(several)}
    for number, path in enumerate(whole):
        path.unlink()
        start = int(path.name[6:] or 1) if number else 1
        assert f" {start} " in several.check().damage, path
        path.write_bytes(whole[path])
        path.chmod(0o600)
    second, third = files(several)[1:3]
    second.write_bytes(whole[third])
    third.write_bytes(whole[second])
    assert f"{second.name} does not go on after" in several.check().damage
    write(several, 12)
    assert f"{second.name} does not go on after" in several.check().damage
    second.write_bytes(whole[second])
    third.write_bytes(whole[third].partition(b"\n")[2])
    assert f"{third.name} does not go on after" in several.check().damage
    third.write_bytes(whole[third])
    assert several.check().damage == ""
    third.rename(third.with_name(f"trail-{int(third.name[6:]) + 1}"))
    assert several.check().damage


def test_a_lost_last_file_is_told_and_does_not_stop_the_trail(several: Trail) -> None:
    files(several)[-1].unlink()
    damage = several.check().damage
    assert "the trail was cut off, it had 40" in damage
    write(several, 12)
    assert several.check().damage.split()[1] == damage.split()[1]
    assert [r.text for r in several.records()][-1] == "event 52"


def test_files_that_the_site_took_away_are_told_and_the_others_hold(several: Trail) -> None:
    for path in files(several)[:3]:
        path.unlink()
    first = int(files(several)[1].name[6:])
    assert several.check().damage == (
        f"records 1 to {first - 1} are missing: the next file is trail-{first}; if the site took them away, see "
        "--from-oldest"
    )
    assert several.check(from_oldest=True) == Verdict(40, 41 - first, "", first)
    several.note_sent(next(r.end for r in several.records() if r.number == first + 1))
    write(several, 2)
    assert several.check(from_oldest=True).damage == ""
    assert [r.number for r in several.unsent()] == list(range(first + 2, 43))
    middle = files(several)[3]
    middle.write_bytes(middle.read_bytes().replace(b"event", b"Event", 1))
    assert f"record {middle.name[6:]} is numbered" in several.check(from_oldest=True).damage


def test_a_writer_killed_while_it_began_a_file_is_made_up_for(several: Trail) -> None:
    head, last = (several.folder / "head").read_bytes(), files(several)[-1]
    count = several.check().records
    while files(several)[-1] == last:
        head, count = (several.folder / "head").read_bytes(), several.check().records
        write(several, 1)
    new = files(several)[-1]
    whole = new.read_bytes()
    for end in range(len(whole) + 1):
        new.write_bytes(whole[:end])
        (several.folder / "head").write_bytes(head)
        assert several.check() == Verdict(count + (end == len(whole)), count + (end == len(whole))), end
        write(several, 2)
        assert several.check() == Verdict(*[count + 2 + (end == len(whole))] * 2), end
        for path in files(several)[files(several).index(new) + 1 :]:
            path.unlink()


def test_a_writer_killed_before_its_first_head_leaves_a_trail_that_holds(tmp_path: Path) -> None:
    trail = open_trail(tmp_path / "1000")
    write(trail, 1)
    whole, head = ((trail.folder / name).read_bytes() for name in ("trail", "head"))
    head = head[:128]  # before the first record
    for end in range(len(whole) + 1):
        (trail.folder / "head").write_bytes(head)
        (trail.folder / "trail").write_bytes(whole[:end])
        write(trail, 1)
        assert trail.check().damage == ""


MANY = """
import sys
from pathlib import Path
from edgemed.audit.trail import open_trail
trail, me = open_trail(Path(sys.argv[1]), 3000), sys.argv[2]
for turn in range(int(sys.argv[3])):
    trail.append(lambda number: f"writer {me} turn {turn} " + "x" * (turn % 7 * 40))
    print(turn, flush=True)
"""


@pytest.mark.parametrize("rounds", [40 if NIGHTLY else 2])
def test_processes_at_the_same_time_and_killed_lose_and_double_nothing(tmp_path: Path, rounds: int) -> None:
    trail = open_trail(tmp_path / "1000", 3000)
    promised: set[str] = set()
    for turn in range(rounds):
        with ExitStack() as stack:
            writers = {}
            for writer in (f"{turn}.{n}" for n in range(4)):
                command = [sys.executable, "-c", MANY, str(trail.folder), writer, "100000"]
                writers[writer] = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            for at, (writer, child) in enumerate(writers.items()):
                assert child.stdout is not None
                told = [child.stdout.readline() for _ in range(20 + 5 * at + turn % 5)]
                child.kill()
                told += child.stdout.readlines()
                promised |= {f"writer {writer} turn {int(line)} " for line in told if line.endswith("\n")}
        texts = [record.text.rstrip("x") for record in trail.records()]
        assert trail.check() == Verdict(len(texts), len(texts))
        assert len(set(texts)) == len(texts)
        assert promised <= set(texts)
        assert len(texts) - len(promised) <= 4 * (turn + 1)  # those that were killed before they could tell
        assert len(files(trail)) > 3


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
