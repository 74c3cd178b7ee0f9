"""Loop and Processes: resuming, the learning rate, gradients over many processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from edgemed.errors import InvalidInput
from edgemed.training import loop as loops
from edgemed.training.device import ALONE, Processes, is_main_process, open_processes
from edgemed.training.loop import Loop


def train(path: Path, steps: int, until: int, log: list[str]) -> nn.Linear:
    """Take the steps of a small fit up to `until`; the data of a step depend on its number alone."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.1)
    loop = Loop("fit", "weights", path, module, optimiser, steps, warm_up=2, floor=0.1, log=log.append, processes=ALONE)
    for step in loop.left():
        if step == until:
            break
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        out = module(x)
        loop.take(step, {"size": out.square().mean(), "sum": out.sum() * 0.01})
    return module


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "SAVE_EVERY", 2)
    log: list[str] = []
    whole = train(tmp_path / "whole.pt", 7, 7, log)
    train(tmp_path / "cut.pt", 7, 5, log)  # state saved after step 4
    assert torch.load(tmp_path / "cut.pt", weights_only=True)["step"] == 4
    resumed = train(tmp_path / "cut.pt", 7, 7, log)
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items())
    assert set(torch.load(tmp_path / "cut.pt", weights_only=True)) == {"weights", "optimiser", "schedule", "step"}
    assert [line.split(",")[0] for line in log] == ["fit 7/7", "fit 7/7"]
    assert "left: size " in log[0]


def test_a_finished_stage_takes_no_step(tmp_path: Path) -> None:
    log: list[str] = []
    done = train(tmp_path / "a.pt", 3, 3, log)
    again = train(tmp_path / "a.pt", 3, 3, log)
    assert torch.equal(done.weight, again.weight)
    assert len(log) == 1


def test_the_rate_rises_and_falls(tmp_path: Path) -> None:
    module = nn.Linear(1, 1)
    optimiser = torch.optim.AdamW(module.parameters())
    loop = Loop("x", "w", tmp_path / "x.pt", module, optimiser, 100, 10, 0.2, print, ALONE)
    assert loop.rate_at(0) == pytest.approx(0.1)
    assert loop.rate_at(9) == pytest.approx(1, abs=0.02)
    assert loop.rate_at(50) == pytest.approx(0.6)
    assert loop.rate_at(100) == pytest.approx(0.2)


def test_parts_of_a_batch_are_all_of_it() -> None:
    rows = list(range(12))
    parts = [rows[Processes(rank, 3).part] for rank in range(3)]
    assert sorted(row for part in parts for row in part) == rows
    assert {len(p) for p in parts} == {4}
    assert rows[ALONE.part] == rows
    Processes(0, 3).check_batch(12, "language.batch")
    with pytest.raises(InvalidInput, match=r"language\.batch is 10; a multiple of 3"):
        Processes(0, 3).check_batch(10, "language.batch")


def test_a_process_that_was_not_launched_with_others_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert open_processes() is ALONE
    assert is_main_process()
    monkeypatch.setenv("RANK", "1")
    assert not is_main_process()
    code = (
        "import sys; from edgemed.training import stages; stages.open_processes(); print('accelerate' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"


STAGE = """
import sys
import numpy as np, torch
from pathlib import Path
from edgemed.training.device import open_processes
from edgemed.training.prepare import FeatureCache
from edgemed.training.structure_stage import train_structures

cache, folder = FeatureCache(Path(sys.argv[1])), Path(sys.argv[2])
torch.set_num_threads(1)
processes = open_processes()
head = train_structures(cache, folder, steps=2, batch=2, rate=1e-3, repeat={}, seed=1, device=processes.device,
                        log=print if processes.is_main else (lambda line: None), processes=processes)

lone = torch.nn.Linear(2, 2)  # a gradient that only one process has, and one that none has
processes.share(lone)
if processes.rank == 1:
    lone.weight.grad = torch.full((2, 2), 6.0)
processes.average_gradients([lone.weight, lone.bias])
gradient = None if lone.weight.grad is None else lone.weight.grad[0, 0].item()
torch.save({"state": head.state_dict(), "lone": lone.state_dict(), "gradient": gradient, "bias": lone.bias.grad,
            "count": processes.count, "dice": torch.rand(1).item()}, folder / f"rank{processes.rank}.pt")
processes.wait()
processes.close()
"""


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights(tmp_path: Path, cache: object) -> None:
    """Two CPU processes (gloo), two steps of the first stage.

    Started by torchrun, which `accelerate launch` calls for several GPUs; on a CPU it would want MPI.
    """
    script = tmp_path / "stage.py"
    script.write_text(STAGE, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    folder = str(cache.folder)  # type: ignore[attr-defined]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [*launch, str(script), folder, str(tmp_path)], capture_output=True, text=True, check=False, env=environment
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.count("structure 2/2") == 1  # only the first process logs
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert first["count"] == second["count"] == 2
    for part in ("state", "lone"):
        assert all(torch.equal(v, second[part][k]) for k, v in first[part].items())
    assert first["gradient"] == second["gradient"] == 3.0
    assert first["bias"] is second["bias"] is None
    assert first["dice"] != second["dice"]  # dropout differs
    saved = torch.load(tmp_path / "structure.pt", weights_only=True)
    assert saved["step"] == 2
    assert all(torch.equal(v, saved["head"][k]) for k, v in first["state"].items())
