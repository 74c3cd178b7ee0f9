"""Speed and memory of the command line, printed, not asserted: run it on an idle machine.

    python tests/bench/bench_infer.py [SCAN]

Help: wall time of the process. `infer`: wall time from process start to the answer, and the peak memory of the process
and its reader child together (resident set, sampled every 5 ms, Linux only). Second question: its own total.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

SCAN = Path(__file__).resolve().parents[1] / "files" / "sample_ct.dcm"
PROMPTS = ("Where is the liver?", "Where is the spleen?")


def resident_mib(pid: int) -> float:
    """Return the resident memory of a process and its descendants in MiB; 0 where /proc does not tell it."""
    total = 0.0
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        total += next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS:")), 0.0)
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(resident_mib(int(child)) for child in (task / "children").read_text().split())
    except OSError:
        return total  # it ended while it was looked at
    return total


def measure(*arguments: str) -> tuple[float, float, str]:
    """Return (wall seconds, peak MiB, stdout) of `edgemed` with `arguments`."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "edgemed", *arguments], stdout=subprocess.PIPE, text=True)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, resident_mib(process.pid))
        time.sleep(0.005)
    seconds = time.perf_counter() - started
    assert process.stdout is not None
    out = process.stdout.read()
    if process.returncode:
        sys.exit(f"edgemed {' '.join(arguments)} ended with {process.returncode}")
    return seconds, peak, out


def main() -> None:
    """Print the table."""
    scan = sys.argv[1] if len(sys.argv) > 1 else str(SCAN)
    machine = platform.processor() or platform.machine()
    print(f"{datetime.now(UTC):%Y-%m-%d}, {machine}, Python {platform.python_version()}")
    helps = []
    for _ in range(11):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "edgemed", "--help"], stdout=subprocess.DEVNULL, check=True)
        helps.append(time.perf_counter() - started)
    print(
        f"--help                      median {statistics.median(helps) * 1000:6.0f} ms   max {max(helps) * 1000:.0f} ms"
    )
    walls, peaks, seconds = [], [], []
    for _ in range(5):
        wall, peak, out = measure("infer", scan, "--prompt", PROMPTS[0], "--json")
        walls.append(wall)
        peaks.append(peak)
        _, _, out = measure("infer", scan, "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--json")
        seconds.append(json.loads(out.splitlines()[1])["provenance"]["timings_ms"]["total"] / 1000)
    print(f"infer, one question         median {statistics.median(walls):6.2f} s    max {max(walls):.2f} s")
    print(f"  peak memory               {max(peaks):6.0f} MiB")
    print(f"second question, one image  median {statistics.median(seconds):6.2f} s    max {max(seconds):.2f} s")


if __name__ == "__main__":
    main()
