"""The Triton kernels in numbers, as Markdown tables.

    python tests/bench/bench_kernels.py                 all three parts; without a GPU a minute
    python tests/bench/bench_kernels.py compile         every kernel for every GPU generation: bytes, registers, opcodes
    python tests/bench/bench_kernels.py cpu             the NumPy path: allowed rows beside the whole vocabulary
    python tests/bench/bench_kernels.py gpu             on a GPU: equal to the reference, time, share of the bandwidth

compile needs triton and no GPU. gpu needs triton, torch and, for the launch that uses neither, cuda-core; without a GPU
it says so. Times on a GPU: median of `triton.testing.do_bench`, which empties the cache before each run; without copies
to and from the host. Bandwidth: a copy of 1 GiB on the device, bytes read and written. Weights are random.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from edgemed.errors import BackendUnavailable
from edgemed.triton_kernels import box_head, expert_gemv, masked_argmax
from edgemed.triton_kernels.accept_draft import accept_draft, run_accept_draft
from edgemed.triton_kernels.aot import Compiled, build_kernels
from edgemed.triton_kernels.launch import CubinLauncher, check_driver
from edgemed.triton_kernels.triton_launcher import TritonLauncher
from edgemed.triton_kernels.variants import TARGETS, Launcher, Variant
from edgemed.triton_kernels.weights import LOWEST, Matrix, load_matrix, pack

OPCODES = {"HMMA": "HMMA", "LDGSTS.128": r"LDGSTS\.E\.BYPASS\.128", "LDG.128": r"LDG\.E\.128", "I2F": r"I2F(?!P)"}
WIDTHS = (4096, 7168)
VOCABULARIES = (32_000, 64_000, 152_000)
ROWS = (10, 1000)
POSITIONS = (1, 8)
EXPERT = (4096, 11008)  # width and inner of a 7B decoder
TOLERANCE = 5e-3  # of logits near 10, after 7168 products of float16 values


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", default=[])
    options = parser.parse_args()
    if not set(options.parts) <= set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}")
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, ", end="")
    print(f"load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, NumPy {np.__version__}\n")
    for part in options.parts or PARTS:
        PARTS[part]()


def compile_all() -> None:
    """Print what each kernel becomes for each target."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        built = build_kernels(Path(folder), TARGETS)
        seconds = time.perf_counter() - start
        for target in TARGETS:
            print(f"### sm_{target}\n\n| kernel | bytes | registers | shared | {' | '.join(OPCODES)} |")
            print("|---" * (4 + len(OPCODES)) + "|")
            for one in (one for one in built if one.entry["target"] == target):
                print(f"| {one.entry['name']} | {one.entry['bytes']:,} | {' | '.join(_machine_code(folder, one))} |")
            print()
    total = sum(one.entry["bytes"] for one in built)
    print(f"{len(built)} kernels, {total:,} bytes, compiled in {seconds:.0f} s by Triton {built[0].entry['triton']}\n")


def _machine_code(folder: str, one: Compiled) -> Iterator[str]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = Path(folder) / f"sm_{one.entry['target']}" / one.entry["file"]

    def dump(option: str) -> str:
        return subprocess.run([tool, option, cubin], check=True, capture_output=True, text=True).stdout

    found = re.search(r"REG:(\d+)", dump("--dump-resource-usage"))
    yield found[1] if found else "?"
    yield f"{one.entry['shared_bytes']:,}"
    code = dump("-sass")
    for pattern in OPCODES.values():
        yield str(len(re.findall(rf"\s{pattern}", code)))


def cpu() -> None:
    """Print the time of the NumPy path, allowed rows beside all, in float32."""
    print("### NumPy, float32, one and eight positions, median of 9 in ms\n")
    print("| width | vocabulary | rows | 1 position | 8 positions |\n" + "|---" * 5 + "|")
    rng = np.random.default_rng(0)
    for width, vocabulary in ((512, 9000), (2048, 92_553), (4096, 32_000)):
        head = pack(rng.standard_normal((vocabulary, width), np.float32), "fp32")
        for rows in (*(range(7000, 7000 + count) for count in ROWS), range(vocabulary)):
            cells = []
            for positions in POSITIONS:
                hidden = rng.standard_normal((positions, width), np.float32)
                allowed = np.ones((positions, len(rows)), np.bool_)
                times = []
                for _ in range(9):
                    start = time.perf_counter()
                    box_head.box_head(hidden, head, rows, allowed)
                    times.append(1000 * (time.perf_counter() - start))
                cells.append(f"{statistics.median(times):.2f}")
            print(f"| {width} | {vocabulary:,} | {len(rows):,} | {' | '.join(cells)} |")
    print(flush=True)


def gpu() -> None:
    """Print whether the kernels are right on this machine's GPU, and how fast; or that there is none."""
    try:
        check_driver()
    except BackendUnavailable as error:
        print(f"### On a GPU\n\nnot run on a GPU: {error}\n")
        return
    import torch

    major, minor = torch.cuda.get_device_capability()
    capability = 10 * major + minor
    print(f"### {torch.cuda.get_device_name()}, torch {torch.__version__}\n\n| check | launcher | largest difference |")
    print("|---" * 3 + "|")
    check(TritonLauncher("cuda"), capability, "triton")
    with tempfile.TemporaryDirectory() as folder:
        build_kernels(Path(folder), [target for target in TARGETS if target <= capability])
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # a process that never loads torch
            pool.submit(check_cubins, folder, capability).result()
    _times(capability)


def check_cubins(folder: str, capability: int) -> None:
    """Check the compiled kernels through cuda-core, in a process without torch and triton."""
    check(CubinLauncher(Path(folder)), capability, "cuda-core")
    assert not {"torch", "triton"} & set(sys.modules)


def check(launcher: Launcher, capability: int, name: str) -> None:
    """Compare every operation and format with its reference, on fresh random values; raise where one is wrong."""
    rng = np.random.default_rng()
    for form in (f for f in box_head.FORMATS if LOWEST.get(f, 0) <= capability):
        head = pack(rng.standard_normal((2000, 1024), np.float32) / 16, form)
        for positions in POSITIONS:
            hidden = rng.standard_normal((positions, 1024), np.float32).astype(np.float16)
            for rows in (range(500, 1500), rng.permutation(2000)[:10]):
                allowed = rng.random((positions, len(rows))) < 0.7
                allowed[:, 3] = True
                box = box_head.run_box_head(launcher, hidden, head, rows, allowed)
                expected = box_head.box_head(hidden, head, rows, allowed)
                _compare(name, f"box_head {form} {positions} x {len(rows)}", box, expected)
            if form in masked_argmax.FORMATS:
                free = rng.random((positions, 2000)) < 0.7
                best = masked_argmax.run_masked_argmax(launcher, hidden, head, free)
                logits = hidden.astype(np.float32) @ head.to_float32().T
                _compare(name, f"masked_argmax {form} {positions}", best, masked_argmax.masked_argmax(logits, free))
    for form in expert_gemv.FORMATS:
        gate_up, down = _experts(rng, form, 1024, 2816)
        x = rng.standard_normal(1024, np.float32).astype(np.float16)
        out = expert_gemv.run_expert_gemv(launcher, x, gate_up, down, 1, 0.75)
        off = np.abs(out - expert_gemv.expert_gemv(x, gate_up, down, 1, 0.75)).max()
        assert off < TOLERANCE
        print(f"| expert_gemv {form} | {name} | {off:.1e} |")
    for accepted in range(8):
        draft = rng.integers(0, 1000, 7, np.int32)
        best_tokens = np.append(draft, np.int32(5))
        best_tokens[accepted:] += 1
        assert run_accept_draft(launcher, draft, best_tokens) == accept_draft(draft, best_tokens)
    print(f"| accept_draft | {name} | equal |", flush=True)


def _compare(name: str, what: str, found: Any, expected: Any) -> None:
    near = np.abs(found.peak - expected.peak) < TOLERANCE  # another token only where two are as good
    assert (near | (found.index == expected.index)).all(), what
    off = max(np.abs(found.peak - expected.peak).max(), np.abs(found.log_sum_exp - expected.log_sum_exp).max())
    assert off < TOLERANCE, what
    print(f"| {what} | {name} | {off:.1e} |")


class _Recorder(TritonLauncher):
    """Keeps what it launches, so that the launches alone can be timed."""

    def __init__(self) -> None:
        super().__init__("cuda")
        self.launched: list[tuple[Variant, dict[str, Any]]] = []

    def launch(self, variant: Variant, **arguments: Any) -> None:
        self.launched.append((variant, arguments))
        super().launch(variant, **arguments)

    def again(self) -> None:
        for variant, arguments in self.launched:
            super().launch(variant, **arguments)


def _times(capability: int) -> None:
    """Print the tables of times, beside torch in float16."""
    import torch

    bandwidth = _copy_bandwidth()
    print(f"\nBandwidth of a copy: {bandwidth / 1e9:.0f} GB/s\n")
    print("| width | vocabulary | positions | rows | format | ms | of bandwidth | torch eager | torch compiled |")
    print("|---" * 9 + "|")
    rng = np.random.default_rng(0)
    for width in WIDTHS:
        for vocabulary in VOCABULARIES:
            weights = rng.standard_normal((vocabulary, width), np.float32) / 64
            plain = torch.from_numpy(weights).half().cuda()
            heads = {f: pack(weights, f) for f in box_head.FORMATS if LOWEST.get(f, 0) <= capability}
            for positions in POSITIONS:
                hidden = rng.standard_normal((positions, width), np.float32).astype(np.float16)
                eager = _torch(plain, torch.from_numpy(hidden).cuda())
                peer = f"{_median(eager):.4f} | {_median(torch.compile(eager)):.4f}"
                for form, head in heads.items():
                    for count in (*ROWS, vocabulary):
                        if count == vocabulary and form not in masked_argmax.FORMATS:
                            continue
                        ms = _kernel_ms(hidden, head, count)
                        share = head.values.nbytes / vocabulary * count / (ms / 1000) / bandwidth
                        print(
                            f"| {width} | {vocabulary:,} | {positions} | {count:,} | {form} | {ms:.4f} | {share:.0%} | "
                            f"{peer} |",
                            flush=True,
                        )
    print("\n| expert, width x inner | format | ms | of bandwidth |\n" + "|---" * 4 + "|")
    for form in expert_gemv.FORMATS:
        matrices = _experts(rng, form, *EXPERT)
        launcher = _Recorder()
        x = rng.standard_normal(EXPERT[0], np.float32).astype(np.float16)
        expert_gemv.run_expert_gemv(launcher, x, *matrices, 1, 0.75)
        ms = _median(launcher.again)
        read = sum((m.values.nbytes + m.scales.nbytes * (form != "fp16")) / 2 for m in matrices)
        print(f"| {EXPERT[0]} x {EXPERT[1]} | {form} | {ms:.4f} | {read / (ms / 1000) / bandwidth:.0%} |", flush=True)


def _copy_bandwidth() -> float:
    """Return bytes a second, read and written."""
    import torch

    gib = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    to = torch.empty_like(gib)
    return 2 * gib.numel() / (_median(lambda: to.copy_(gib)) / 1000)


def _kernel_ms(hidden: np.ndarray[Any, np.dtype[np.float16]], head: Matrix, count: int) -> float:
    launcher = _Recorder()
    loaded, uploaded = load_matrix(launcher, head), launcher.upload(hidden)
    allowed = np.ones((len(hidden), count), np.bool_)
    if count == head.rows:
        masked_argmax.launch_masked_argmax(launcher, uploaded, loaded, allowed)
    else:
        rows = box_head.load_rows(launcher, range(1000, 1000 + count), head.rows)
        box_head.launch_box_head(launcher, uploaded, loaded, rows, allowed)
    return _median(launcher.again)


def _torch(weights: Any, hidden: Any) -> Callable[[], Any]:
    """Return the step over the whole vocabulary as it is written in torch."""
    import torch

    mask = torch.ones(len(hidden), len(weights), dtype=torch.bool, device="cuda")

    def step() -> tuple[Any, Any, Any]:
        logits = (hidden @ weights.T).float().masked_fill(~mask, -torch.inf)
        return *logits.max(dim=1), logits.logsumexp(dim=1)

    return step


def _median(work: Callable[[], Any]) -> float:
    import triton

    ms: float = triton.testing.do_bench(work, warmup=50, rep=300, return_mode="median")
    return ms


def _experts(rng: np.random.Generator, form: str, width: int, inner: int) -> tuple[Matrix, Matrix]:
    gate_up = rng.standard_normal((2, 2 * inner, width), np.float32) / np.float32(width**0.5)
    down = rng.standard_normal((2, width, inner), np.float32) / np.float32(inner**0.5)
    return pack(gate_up, form), pack(down, form)


PARTS: dict[str, Callable[[], None]] = {"compile": compile_all, "cpu": cpu, "gpu": gpu}


if __name__ == "__main__":
    main()
