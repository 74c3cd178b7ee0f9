"""The commands of a site work where there is no network, and nothing in them asks for one, native code included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ISOLATED = ("unshare", "-rnm")
BUILD_SERVERS = ("CI", "GITHUB_ACTIONS", "CIRCLECI", "JENKINS_URL", "CODEBUILD_BUILD_ID", "TF_BUILD", "GITLAB_CI")
"""Where one is set, onnxruntime may keep quiet: the tests take them out, so that it would not."""

NIGHTLY = bool(os.environ.get("EDGEMED_NIGHTLY"))


def isolated(home: Path, *command: str, **environment: str) -> dict[str, Any]:
    """Return the report of `namespace.py` about a command, run with a home folder of its own."""
    try:
        probe = subprocess.run([*ISOLATED, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare here (util-linux)")
    if probe.returncode:
        pytest.skip(f"namespaces are not permitted here: {probe.stderr.strip()}")
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if k not in BUILD_SERVERS and not k.startswith("EDGEMED_")}
    kept |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "OMP_NUM_THREADS": "1", **environment}
    report = home.parent / "report.json"
    full = [*ISOLATED, sys.executable, str(HERE / "namespace.py"), str(report), *command]
    done = subprocess.run(full, env=kept, capture_output=True, text=True, check=False)
    assert report.is_file(), done.stderr[-2000:]
    told: dict[str, Any] = json.loads(report.read_text("utf-8"))
    assert told["exit"] == 0, done.stderr[-2000:]
    return told


def test_what_a_site_runs_works_without_a_network_and_asks_for_none(sample_scan: str, tmp_path: Path) -> None:
    for library in ("onnxruntime", "pynetdicom"):
        pytest.importorskip(library)
    (tmp_path / "out").mkdir()
    more = {"EDGEMED_NIGHTLY": "1"} if NIGHTLY else {}
    told = isolated(
        tmp_path / "home", sys.executable, str(HERE / "commands.py"), sample_scan, str(tmp_path / "out"), **more
    )
    assert told["names"] == []
    assert told["no_route"] == 0
    assert not (tmp_path / "home" / ".cache" / "Microsoft").exists(), "onnxruntime gave this machine an id"


def test_native_code_that_asks_for_the_network_is_seen(tmp_path: Path) -> None:
    code = (
        "import contextlib, socket\n"
        "with contextlib.suppress(OSError): socket.getaddrinfo('example.invalid', 443)\n"
        "with contextlib.suppress(OSError): socket.create_connection(('192.0.2.1', 443))\n"
    )
    told = isolated(tmp_path / "home", sys.executable, "-c", code)
    assert set(told["names"]) == {"example.invalid"}
    assert told["no_route"] == 1


def test_without_the_switch_onnxruntime_gives_the_machine_an_id(tmp_path: Path) -> None:
    """If this fails, a release of onnxruntime has no telemetry any more: its switch and this test can go."""
    pytest.importorskip("onnxruntime")
    seconds = 45 if NIGHTLY else 0
    code = (
        "import os, time\n"
        "from edgemed.cli.doctor import MATMUL_ONNX\n"
        "os.environ.pop('ORT_DISABLE_TELEMETRY', None)\n"
        "import onnxruntime\n"
        "session = onnxruntime.InferenceSession(MATMUL_ONNX)\n"
        f"time.sleep({seconds})\n"
    )
    told = isolated(tmp_path / "home", sys.executable, "-c", code)
    assert (tmp_path / "home" / ".cache" / "Microsoft").exists()
    if NIGHTLY:
        assert "mobile.events.data.microsoft.com" in told["names"]
