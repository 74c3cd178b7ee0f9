"""`edgemed serve`: options, exit codes, signals, status."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from edgemed.cli import main, verbs
from edgemed.serve.journal import Instance, Journal

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _verb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verbs.VERBS, "serve", "Answer the studies that a PACS sends.")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "node.toml"
    file.write_text(
        f'folder = "{(tmp_path / "node").as_posix()}"\nport = 0\nmin_free_mib = 0\nquiet_seconds = 3600\n'
        '[[sender]]\naet = "CT1"\naddresses = ["127.0.0.1"]\n'
        '[[rule]]\nname = "any"\nprompt = "What is there?"\nkinds = ["sr"]\n'
    )
    return file


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--config", "{config}"], 1, "--dicom is missing"),
        (["--dicom"], 1, "--config is missing"),
        (["--dicom", "--config", "{config}x"], 20, "cannot read"),
        (["--dicom", "--config", "{config}", "--aet", "A" * 17], 22, "AE title"),
        (["--dicom", "--config", "{config}", "--bind", "0.0.0.0"], 22, "beyond_loopback"),
        (["--dicom", "--config", "{config}", "--port", "70000"], 1, "--port"),
        (["status"], 1, "--config is missing"),
        (["status", "--config", "{config}"], 21, "no journal"),
    ],
)
def test_mistakes_end_in_one_line_and_their_code(
    config: Path, capsys: Captured, arguments: list[str], code: int, told: str
) -> None:
    assert main(["serve", *(a.replace("{config}", str(config)) for a in arguments)]) == code
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_port_that_is_taken_is_told(config: Path, capsys: Captured) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--dicom", "--config", str(config), "--port", port]) == 20
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


@contextmanager
def running(config: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Give (a node that was started from the command line, its port)."""
    code = (
        "import sys; from edgemed.cli import verbs; verbs.VERBS.setdefault('serve', ''); "
        f"sys.exit(verbs.main(['serve', '--dicom', '--config', {str(config)!r}]))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            found = None
            for line in process.stderr:
                if found := re.search(r'"listening", "port": (\d+)', line):
                    break
            assert found, "the node did not start"
            yield process, int(found[1])
        finally:
            process.kill()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")
@pytest.mark.parametrize("sent", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_node_with_0_and_nothing_lost(
    config: Path, helper: ModuleType, tmp_path: Path, capsys: Captured, sent: str
) -> None:
    files = helper.write_instances(tmp_path / "scans", 2)
    with running(config) as (process, port):
        with helper.association(port) as assoc:
            assert assoc.send_c_store(files[0]).Status == 0x0000
            process.send_signal(getattr(signal, sent))
            assert assoc.send_c_store(files[1]).Status == 0x0000
        assert process.wait(60) == 0
        assert process.stderr is not None
        log = process.stderr.read()
    assert '"stopped"' in log
    assert "Planted" not in log
    assert helper.ROOT not in log
    assert all(json.loads(line)["event"] for line in log.splitlines())
    assert main(["serve", "status", "--config", str(config), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["instances"] == {"stored": 2}
    assert main(["serve", "--config", str(config), "status"]) == 0
    assert "studies     receiving 1" in capsys.readouterr().out


def test_status_works_while_a_node_runs(config: Path, capsys: Captured) -> None:
    with running(config):
        assert main(["serve", "status", "--config", str(config)]) == 0
    assert "jobs        queued 0  running 0  done 0  failed 0" in capsys.readouterr().out


def test_what_was_given_up_is_tried_again_on_request(config: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "node").mkdir()
    with Journal(tmp_path / "node" / "journal.sqlite") as journal:
        journal.add_instance(Instance("1.1", "1", "a", "0", 1), "CT1", 1.0)
        assert journal.close_study("1", ["any"], 1.0, 1.0)
        job = journal.claim(1.0)
        assert job is not None
        journal.fail(job, "InvalidInput", 1.0, None)
        assert main(["serve", "retry", "--config", str(config)]) == 0
        assert journal.counts()["jobs"]["queued"] == 1
    assert capsys.readouterr().out == "1 to be tried again\n"


def test_the_help_loads_no_library(config: Path) -> None:
    code = (
        "import sys; from edgemed.cli import verbs; verbs.VERBS.setdefault('serve', ''); verbs.main(['serve', '-h'])\n"
        "assert not {'pynetdicom', 'pydicom', 'numpy', 'dicomweb_client'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
