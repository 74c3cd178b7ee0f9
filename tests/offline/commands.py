"""Commands a site runs, each in a process of its own: python commands.py SCAN FOLDER. Exit code 0 if all of them did.

Meant for `namespace.py`; works anywhere. EDGEMED_NIGHTLY=1: a session stays open for 60 s, too, in which onnxruntime
would have sent its first events.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from pynetdicom import AE
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

EDGEMED = (sys.executable, "-m", "edgemed")


def run(*arguments: str) -> str:
    """Return what `edgemed ARGUMENTS` prints. Raises RuntimeError with its last lines if it fails."""
    done = subprocess.run([*EDGEMED, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


def serve(folder: Path) -> None:
    """Start a node, verify it by C-ECHO, end it."""
    config = folder / "node.toml"
    config.write_text(
        f'folder = "{(folder / "node").as_posix()}"\nport = 0\nmin_free_mib = 0\n'
        '[[sender]]\naet = "CT1"\naddresses = ["127.0.0.1"]\n'
        '[[rule]]\nname = "any"\nprompt = "What is there?"\nkinds = ["sr"]\n'
    )
    command = [*EDGEMED, "serve", "--dicom", "--config", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as node:
        try:
            assert node.stderr is not None
            told = (re.search(r'"listening", "port": (\d+)', line) for line in node.stderr)
            port = next(int(found[1]) for found in told if found)
            ae = AE("CT1")
            ae.add_requested_context(Verification)
            assoc = ae.associate("127.0.0.1", port, ae_title="EDGEMED")
            if not assoc.is_established or assoc.send_c_echo().Status != 0:
                raise RuntimeError("the node did not answer C-ECHO")
            assoc.release()
            node.send_signal(signal.SIGTERM)
            if code := node.wait(60):
                raise RuntimeError(f"serve ended with {code}")
        finally:
            node.kill()


def main(scan: str, out: str) -> None:
    """Run them all."""
    folder = Path(out)
    answer = json.loads(
        run("infer", scan, "--prompt", "Where is the liver?", "--json", "--to", "json,seg,sr", "-o", out)
    )
    assert answer["regions"], "the sample scan shows a liver"
    turns = [{"from": "human", "value": "Which modality is this?"}, {"from": "gpt", "value": ""}]
    row = {"id": 1, "image": Path(scan).name, "conversations": turns}
    (folder / "questions.jsonl").write_text(json.dumps(row), encoding="utf-8")
    where = ("-o", str(folder / "answers.jsonl"), "--images", str(Path(scan).parent))
    run("batch", str(folder / "questions.jsonl"), *where)
    run("models", "list", "--json")
    run("models", "verify", "nano")
    run("bundle", "pack", "nano", "-o", str(folder / "parts"))
    run("config", "show", "--origin")
    run("doctor")
    serve(folder)
    if os.environ.get("EDGEMED_NIGHTLY"):
        stay = "import time; from edgemed.infer import open_session; session = open_session(); time.sleep(60)"
        subprocess.run([sys.executable, "-c", stay], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
