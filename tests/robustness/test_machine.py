"""A disk that is full, memory that is used up, a clock that jumps: one line and its code, and nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgemed import keys, signing
from edgemed.backends.engine_cache import EngineKey, load_cached, write_cached
from edgemed.errors import OutOfMemory, SignatureError

pytest.importorskip("resource", reason="limits need a POSIX system")

FULL = """
import contextlib, io, json, resource, sys
from edgemed.cli import main
told = []
for size, *arguments in json.loads(sys.argv[1]):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told.append([code, error.getvalue()])
print(json.dumps(told))
"""

MEMORY = """
import contextlib, io, json, os, resource, sys
from edgemed.cli import main
arguments = sys.argv[2:]
with contextlib.redirect_stdout(io.StringIO()):
    assert main(arguments) == 0  # everything that is imported late is there now
with open("/proc/self/statm") as file:
    mapped = int(file.read().split()[0]) * resource.getpagesize()
told = []
for more in json.loads(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (more << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    told.append([code, error.getvalue()])
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with contextlib.redirect_stdout(io.StringIO()):
    told.append([main(arguments), ""])
print(json.dumps(told), flush=True)
os._exit(0)
"""


def run(code: str, *arguments: str, **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_full_disk_is_told_in_one_line_and_nothing_is_left(
    loops: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("EDGEMED_HOME", str(home))
    loops.write_tiny(tmp_path / "source", "2")
    loops.write_tiny(home / "bundles" / "tiny", "1")
    whole = {"size": 1 << 20, "parts": tmp_path / "parts", "bundle": tmp_path / "unpacked"}
    imported = ("models", "import", str(tmp_path / "source"), "--replace")
    packed = ("bundle", "pack", str(tmp_path / "source"), "-o", str(whole["parts"]), "--part-size", "2k")
    unpacked = ("bundle", "unpack", f"{whole['parts']}/tiny.index.json", "-o", str(whole["bundle"]), "-q")
    steps: list[tuple[int | str, ...]] = [(size, *imported) for size in (0, 7, 500, 1000)]
    steps += [(0, *packed), (1500, *packed), (1 << 20, *packed)]
    steps += [(size, *unpacked) for size in (0, 400, 1000)] + [(1 << 20, *unpacked), (1 << 20, *imported)]
    told = run(FULL, json.dumps(steps), EDGEMED_HOME=str(home), EDGEMED_CONFIG="")
    for (size, *arguments), (code, text) in zip(steps, told, strict=True):
        assert code == (0 if size == 1 << 20 else 40), (size, arguments, text)
        assert text.count("\n") == (code != 0), text
    assert loops.installed(tmp_path) == "2"
    assert sorted(os.listdir(tmp_path)) == ["home", "parts", "source", "unpacked"]
    assert os.listdir(home / "bundles") == ["tiny"]


def test_too_little_memory_is_exit_4_in_one_line_and_the_process_goes_on(sample_scan: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="no onnxruntime (extra: edgemed[cpu])")
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("how much is mapped is not told here")
    steps = [1, 10, 30, 60, 100, 200, 400, 600] if os.environ.get("EDGEMED_NIGHTLY") else [1, 100]
    asked = ("infer", sample_scan, "--prompt", "Where is the liver?", "--backend", "onnxruntime")
    # One arena: each thread would reserve 64 MiB of address space, which is what is limited here.
    environment = {"MALLOC_ARENA_MAX": "1", "EDGEMED_HOME": str(tmp_path), "EDGEMED_CONFIG": ""}
    *refused, (code, _) = run(MEMORY, json.dumps(steps), *asked, **environment)
    for step, (ended, text) in zip(steps, refused, strict=True):
        print(f"+{step} MiB: exit {ended}, {text.strip()[:100]}")
        assert ended == OutOfMemory.exit_code == 4, text
        assert text.count("\n") == 1 and text.startswith("edgemed: ")
    assert code == 0


# --- clocks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def signed(tmp_path: Path) -> tuple[bytes, bytes, signing.Policy, keys.KeyList, Any]:
    """A manifest signed by a key that is valid in 2026 until June; the list of keys was issued in September."""
    for name in ("root", "vendor"):
        keys.write_key_pair(tmp_path / name)
    root, vendor = (keys.read_private_key(tmp_path / f"{name}.key.pem") for name in ("root", "vendor"))
    trusted = keys.TrustedKey(keys.public_bytes(vendor), "vendor", "2026-01-01", "2026-06-30")
    listed = keys.KeyList(1, "2026-09-01", {keys.key_id(trusted.public): trusted})
    (tmp_path / "keys").write_bytes(keys.key_list_bytes(listed, root))
    policy = signing.Policy(True, tmp_path / "keys", (keys.key_id(keys.public_bytes(root)),))
    return b"{}", signing.to_bytes([signing.sign(b"{}", vendor, "vendor")]), policy, listed, root


def test_a_clock_that_goes_back_brings_no_expired_key_back(signed: Any) -> None:
    data, signature, policy, _, _ = signed
    for today in ("2026-11-22", "2026-06-30", "2026-03-01", "1970-01-01"):
        with pytest.raises(SignatureError, match="was valid until 2026-06-30"):
            signing.check_signatures(data, signature, policy, today)


def test_a_revoked_key_stays_revoked_whatever_the_clock_says(signed: Any) -> None:
    data, signature, policy, listed, root = signed
    name = next(iter(listed.keys))
    assert policy.trusted_keys is not None
    later = dataclasses.replace(listed, issued="2026-02-01").changed(revoke={name: "lost"}, today="2026-02-02")
    policy.trusted_keys.write_bytes(keys.key_list_bytes(later, root))
    for today in ("1970-01-01", "2026-02-01", "2026-03-01", "2999-01-01"):
        with pytest.raises(SignatureError, match="was revoked on 2026-02-02"):
            signing.check_signatures(data, signature, policy, today)


def test_an_older_list_is_not_installed_at_any_time(
    signed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, policy, listed, root = signed
    (tmp_path / "next").write_bytes(keys.key_list_bytes(listed.changed(today="2026-10-01"), root))
    (tmp_path / "old").write_bytes((tmp_path / "keys").read_bytes())
    monkeypatch.setattr(keys, "today_iso", lambda: "1970-01-01")
    keys.install_key_list(tmp_path / "next", tmp_path / "keys", policy.root_keys)
    with pytest.raises(SignatureError, match="a later one was expected"):
        keys.install_key_list(tmp_path / "old", tmp_path / "keys", policy.root_keys)


@pytest.mark.parametrize("seconds", [0, 4_000_000_000])
def test_an_engine_from_another_time_is_an_engine(tmp_path: Path, seconds: int) -> None:
    key = EngineKey("decoder", "g" * 64, "library", "any", "fp16", "p" * 64)
    path = write_cached(tmp_path, key, b"engine")
    os.utime(path, (seconds, seconds))
    assert load_cached(tmp_path, key) == b"engine"


def test_what_a_node_took_is_answered_though_its_clock_went_back(tmp_path: Path) -> None:
    from edgemed.serve.journal import Instance, Journal

    with Journal(tmp_path / "journal") as journal:
        journal.add_instance(Instance("1.2", "1", "a/1.dcm", "ab", 1), "CT1", 5000.0)
        assert journal.close_study("1", ["any"], 5000.0, 5000.0)
        assert journal.recover(100.0) == 0  # the clock went back by more than an hour, and the node was started anew
        job = journal.claim(100.0)
        assert job is not None
        journal.fail(job, "busy", 4000.0, 4030.0)  # and again while it ran
        again = journal.claim(4030.0)
        assert again is not None and again.attempts == 2
        assert journal.finish(again, [], [], 90.0)
        assert journal.counts()["jobs"] == {"queued": 0, "running": 0, "done": 1, "failed": 0}
        journal.check()
