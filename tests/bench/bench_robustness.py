"""Prints the tables of the robustness proofs: fuzzed inputs, fault loops, bombs.

    python tests/bench/bench_robustness.py --inputs 2000 --short > robustness.md

The figures are counts, CPU seconds and memory, so that other work on the machine changes little; wall times are hints.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "robustness"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"edgemed_bench_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


def table(*rows: tuple[Any, ...]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ("---",) * len(head), *body)) + "\n"


def fuzz_table(inputs: int, seed: int) -> str:
    """Return what the inputs of each target ended in."""
    command = [sys.executable, str(FOLDER / "harness.py"), str(inputs), "--seed", str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    rows: list[tuple[Any, ...]] = [("Target", "Inputs", "Read", "Refused", "Decoder crashed in its child", "Findings")]
    for line in done.stdout.splitlines():
        told = json.loads(line)
        ends = told["outcomes"]
        read, wrong = ends.get("read", 0), ends.get("FINDING", 0)
        crashed = sum(count for end, count in ends.items() if "crashed" in end)
        rows.append((told["target"], told["inputs"], read, told["inputs"] - read - wrong - crashed, crashed, wrong))
    rows.append(("all", *(sum(row[column] for row in rows[1:]) for column in range(1, 6))))
    return table(*rows)


def loop_table(short: bool) -> str:
    """Return the fault loops: calls, faults injected, losses."""
    loops = module("loops")
    with tempfile.TemporaryDirectory(prefix="edgemed-faults-", dir=loops.memory()) as folder:
        return str(loops.table(loops.run([], short, Path(folder)))) + "\n"


def bomb_table() -> str:
    """Return what each bomb cost in a process of its own."""
    bombs = module("bombs")
    rows: list[tuple[Any, ...]] = [("Bomb", "Bytes", "Exit", "CPU s", "Peak MiB")]
    with tempfile.TemporaryDirectory(prefix="edgemed-bombs-") as folder:
        for path in bombs.write(Path(folder)):
            command = [sys.executable, str(FOLDER / "bombs.py"), str(path)]
            told = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
            end = told["found"][str(path)]
            name = path.relative_to(folder)
            rows.append((name, path.stat().st_size, end["code"], f"{end['cpu_s']:.2f}", f"{told['peak_mib']:.0f}"))
    return table(*rows)


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="some n of each fault loop")
    options = parser.parse_args()
    for made in (fuzz_table(options.inputs, options.seed), loop_table(options.short), bomb_table()):
        print(made, flush=True)


if __name__ == "__main__":
    main()
