"""How much memory bundles take, beside what `edgemed.memory` estimates.

    python tests/bench/bench_memory.py [BUNDLE ...] [--words N]

Each bundle is opened and asked one question in a process of its own; its peak is what the kernel says (VmHWM), so Linux
only. The process that reads the scan is not among it. --words makes the question longer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgemed.bundle import open_bundle
from edgemed.memory import MIB, plan_memory

SCAN = Path(__file__).resolve().parents[1] / "files" / "sample_ct.dcm"

ASK = """
import json, sys
from edgemed.core import Prompt
from edgemed.dicom import read_scan
from edgemed.infer import InferOptions, open_session

def status():
    lines = open("/proc/self/status").read().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}

session = open_session(sys.argv[1], device="cpu")
session.wait()
loaded = status()["VmHWM"]
answer = session.ask(read_scan(sys.argv[2]), Prompt(sys.argv[3]), InferOptions(max_new_tokens=16))
print(json.dumps([loaded, status()["VmHWM"], answer.provenance.tokens["prompt"]]))
"""


def measure(bundle: str, question: str) -> tuple[int, int, int]:
    """Return (peak in bytes when the graphs are loaded, peak after one answer, tokens of the prompt)."""
    done = subprocess.run([sys.executable, "-c", ASK, bundle, SCAN, question], stdout=subprocess.PIPE, check=True)
    told: Any = json.loads(done.stdout)
    return told[0], told[1], told[2]


def main() -> None:
    """Print a line for each bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", default=["nano"], metavar="BUNDLE")
    parser.add_argument("--words", type=int, default=0, metavar="N")
    options = parser.parse_args()
    print(
        "| bundle | prompt tokens | loaded, MiB | peak, MiB | estimate, MiB | error |\n|---|---:|---:|---:|---:|---:|"
    )
    for name in options.bundles:
        loaded, peak, tokens = measure(name, "Where is the liver?" + " liver" * options.words)
        total = plan_memory(open_bundle(name), tokens).total
        sizes = " | ".join(f"{size / MIB:.0f}" for size in (loaded, peak, total))
        print(f"| {Path(name).name} | {tokens} | {sizes} | {total / peak - 1:+.0%} |")


if __name__ == "__main__":
    main()
