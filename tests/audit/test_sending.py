"""Records reach a server over TLS, each once, whatever happens to it, to us, or to the connection between."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from edgemed import audit
from edgemed.audit import message
from edgemed.audit.syslog import to_frame
from edgemed.errors import CannotRead, CannotWrite, EdgemedError

NIGHTLY = os.environ.get("EDGEMED_NIGHTLY") == "1"
STUDY = "1.2.826.0.1.3680043.8.498.1"
Check = Callable[[str], ElementTree.Element]
Configure = Callable[..., Path]


def settings() -> audit.Settings:
    found = audit.read_audit()
    assert found is not None
    return found


def trail() -> Any:
    return audit.own_trail(settings())


def numbers(receiver: Any) -> list[int]:
    return [int(text.partition('sequenceId="')[2].partition('"')[0]) for text in receiver.messages]


def write(count: int) -> None:
    for _ in range(count):
        audit.record(message.accessed([STUDY], "infer"))


def test_records_arrive_whole_and_in_order(receiver: Any, authority: Any, configure: Configure, check: Check) -> None:
    configure(receiver, authority)
    receiver.up()
    with audit.application("infer"):
        audit.record(message.accessed([STUDY], "infer"))
        audit.record(message.exported([STUDY], "infer", ["seg"]))
        assert receiver.messages == []
    assert numbers(receiver) == [1, 2, 3, 4]
    assert [check(text)[0][0].attrib["csd-code"] for text in receiver.messages] == [
        "110100",
        "110103",
        "110106",
        "110100",
    ]
    assert receiver.versions == ["TLSv1.3"]
    assert trail().check().unsent == 0
    assert audit.send(trail(), settings()) == 0


def test_a_server_that_was_away_gets_all_of_it_later(receiver: Any, authority: Any, configure: Configure) -> None:
    configure(receiver, authority)
    write(3)
    audit.drain()
    assert trail().check().unsent == 3
    started = time.perf_counter()
    audit.drain()  # at once after a failure: it is left alone
    assert time.perf_counter() - started < 1.0
    receiver.up()
    audit.drain()
    assert receiver.messages == []
    assert audit.send(trail(), settings()) == 3
    receiver.down()
    write(1)
    with pytest.raises(CannotWrite, match="records are kept"):
        audit.send(trail(), settings())
    receiver.up()
    assert audit.send(trail(), settings()) == 1
    assert numbers(receiver) == [1, 2, 3, 4]


def test_what_is_not_confirmed_is_sent_again(receiver: Any, authority: Any, configure: Configure) -> None:
    configure(receiver, authority)
    receiver.confirms = False
    receiver.up()
    write(2)
    with pytest.raises(CannotWrite, match="without a close_notify"):
        audit.send(trail(), settings())
    assert trail().check().unsent == 2
    receiver.confirms = True
    assert audit.send(trail(), settings()) == 2
    assert numbers(receiver) == [1, 2, 1, 2]


def test_a_connection_that_breaks_in_the_middle_loses_nothing(
    receiver: Any, authority: Any, configure: Configure
) -> None:
    configure(receiver, authority)
    receiver.limit = 50_000
    receiver.up()
    write(200)  # 300 kB
    with pytest.raises(CannotWrite):
        audit.send(trail(), settings())
    receiver.limit = 1 << 30
    receiver.messages.clear()
    assert audit.send(trail(), settings()) == 200
    assert numbers(receiver) == list(range(1, 201))


def test_more_than_one_batch_goes_in_several_connections(
    receiver: Any, authority: Any, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(receiver, authority)
    monkeypatch.setattr(audit, "_BATCH", 4)
    receiver.up()
    write(10)
    assert audit.send(trail(), settings()) == 10
    assert numbers(receiver) == list(range(1, 11))
    assert len(receiver.versions) == 3


def test_a_stranger_is_not_spoken_to_and_gets_nothing(
    receiver: Any, authority: Any, configure: Configure, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = type(authority)(tmp_path / "other", "other")
    receiver.up()
    configure(receiver, other)  # our certificate is another authority's, and the server's is not of ours
    write(1)
    with pytest.raises(CannotWrite, match="certificate"):
        audit.send(trail(), settings())
    receiver.down()
    imposter = type(receiver)(other)
    imposter.context.load_verify_locations(authority.file)
    configure(imposter, authority)
    imposter.up()
    with pytest.raises(CannotWrite, match="certificate"):
        audit.send(trail(), settings())
    imposter.down()
    assert receiver.messages == imposter.messages == []
    assert trail().check().unsent == 1


def test_our_certificate_is_asked_for(receiver: Any, authority: Any, configure: Configure, tmp_path: Path) -> None:
    configure(receiver, authority)
    (tmp_path / "other").mkdir()
    certificate, key = type(authority)(tmp_path / "other", "other").issue("mallory")
    (tmp_path / "workstation.crt").write_bytes(certificate.read_bytes())
    (tmp_path / "workstation.key").write_bytes(key.read_bytes())
    receiver.up()
    write(1)
    for _ in range(20):  # its refusal comes before or after our last byte
        with pytest.raises(CannotWrite):
            audit.send(trail(), settings())
    assert receiver.messages == []
    assert trail().check().unsent == 1


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_both_versions_of_tls_are_spoken(
    version: ssl.TLSVersion, receiver: Any, authority: Any, configure: Configure
) -> None:
    configure(receiver, authority)
    receiver.context.maximum_version = version
    receiver.up()
    write(2)
    assert audit.send(trail(), settings()) == 2
    assert numbers(receiver) == [1, 2]


def test_tls_below_1_2_is_refused(receiver: Any, authority: Any, configure: Configure) -> None:
    from edgemed.audit.syslog import to_context

    configure(receiver, authority)
    server = settings().server
    assert server is not None
    context = to_context(server)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


def test_a_key_that_others_may_read_is_refused(
    receiver: Any, authority: Any, configure: Configure, tmp_path: Path
) -> None:
    configure(receiver, authority)
    receiver.up()
    write(1)
    (tmp_path / "workstation.key").chmod(0o640)
    with pytest.raises(CannotRead, match="chmod 600"):
        audit.send(trail(), settings())
    audit.drain()
    assert trail().check().unsent == 1


def test_without_a_server_records_stay(configure: Configure) -> None:
    configure()
    write(1)
    audit.drain()
    with pytest.raises(EdgemedError, match=r"audit\.server is not set"):
        audit.send(trail(), settings())


def test_a_changed_record_is_sent_with_an_alert(
    receiver: Any, authority: Any, configure: Configure, check: Check
) -> None:
    configure(receiver, authority)
    write(3)
    file = trail().folder / "trail"
    data = file.read_bytes()
    file.write_bytes(data.replace(b'EventActionCode="R"', b'EventActionCode="U"', 2).replace(b'="U"', b'="R"', 1))
    receiver.up()
    assert audit.send(trail(), settings()) == 3
    assert audit.send(trail(), settings()) == 1
    assert numbers(receiver) == [1, 2, 3, 4]
    alert = check(receiver.messages[-1])
    assert alert[0].attrib["EventOutcomeIndicator"] == "12"
    assert audit.send(trail(), settings()) == 0


def test_records_in_several_files_are_sent_once_and_files_that_were_sent_may_go(
    receiver: Any, authority: Any, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEMED_AUDIT_FILE_MIB", "0.002")
    configure(receiver, authority)
    write(5)
    receiver.up()
    assert audit.send(trail(), settings()) == 5
    receiver.down()
    write(4)
    with pytest.raises(CannotWrite):
        audit.send(trail(), settings())
    first, second = (trail().folder / name for name in ("trail", "trail-3"))
    first.unlink()
    second.unlink()
    receiver.up()
    assert audit.send(trail(), settings()) == 4
    assert numbers(receiver) == list(range(1, 10))
    assert audit.send(trail(), settings()) == 0


def test_a_trail_that_was_cut_off_does_not_keep_new_records_from_being_sent(
    receiver: Any, authority: Any, configure: Configure
) -> None:
    configure(receiver, authority)
    receiver.up()
    write(3)
    audit.send(trail(), settings())
    (trail().folder / "trail").write_bytes(b"")
    write(2)
    assert audit.send(trail(), settings()) == 2
    assert numbers(receiver)[3:] == [4, 5]


@pytest.mark.parametrize(
    ("length", "frame"), [("abc", b"3 abc"), ("\ufeff\u809d", b"6 \xef\xbb\xbf\xe8\x82\x9d"), ("", b"0 ")]
)
def test_frames_count_bytes(length: str, frame: bytes) -> None:
    assert to_frame(length) == frame


CHILD = """
import sys
from edgemed import audit
from edgemed.audit import message
for _ in range(50):
    audit.record(message.accessed(["1.2.3"], "infer"))
    print("recorded", flush=True)
    audit.drain()
"""


@pytest.mark.parametrize("kills", [60 if NIGHTLY else 3])
def test_killed_between_writing_and_sending_loses_nothing(
    kills: int, receiver: Any, authority: Any, configure: Configure
) -> None:
    """What the server has twice is only what it had not confirmed when we were killed: one batch a kill at most."""
    configure(receiver, authority)
    receiver.up()
    recorded = 0
    for kill in range(kills):
        with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            lines = 0
            for _ in range(1 + kill % 5):
                lines += child.stdout.readline() == b"recorded\n"
            child.send_signal(signal.SIGKILL)
            recorded += lines + child.stdout.read().count(b"recorded\n")
    audit.send(trail(), settings())
    there = trail().check()
    assert there.damage == ""
    assert there.records >= recorded
    assert set(numbers(receiver)) == set(range(1, there.records + 1))
    assert len(receiver.messages) - there.records <= 2 * kills
