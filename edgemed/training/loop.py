"""Loop: what the three stages have in common: resuming, a step of the optimiser, progress, the saved state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from edgemed.training.device import Processes

Log = Callable[[str], None]

LOG_EVERY = 50
SAVE_EVERY = 200


@dataclass(eq=False)
class Loop:
    """The steps of one stage, from the one after the last saved.

    stage: its name in the log. part: under which key `path` holds the weights of `module`. warm_up: steps until the
    learning rate is at its peak; it falls along a cosine to `floor` of the peak at the last step. keep: share of the
    running average of a loss that each step leaves.
    """

    stage: str
    part: str
    path: Path
    module: nn.Module
    optimiser: torch.optim.Optimizer
    steps: int
    warm_up: int
    floor: float
    log: Log
    processes: Processes
    keep: float = 0.95
    first: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Take up the state in `path`, if there is one, and give every process the same weights."""
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: self.rate_at(step))
        self._parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        self._running: dict[str, float] = {}
        if self.path.exists():
            saved = torch.load(self.path, map_location=self._parameters[0].device, weights_only=True)
            self.module.load_state_dict(saved[self.part])
            self.optimiser.load_state_dict(saved["optimiser"])
            self._schedule.load_state_dict(saved["schedule"])
            self.first = saved["step"]
        self.processes.share(self.module)
        self._start = time.monotonic()

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step as a share of its peak."""
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return min(1.0, (step + 1) / self.warm_up) * (self.floor + (1 - self.floor) * fall)

    def left(self) -> range:
        """Return the numbers of the steps still to be made."""
        return range(self.first, self.steps)

    def take(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Make one step down the sum of `losses`; log and save when it is time."""
        self.optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        self.processes.average_gradients(self._parameters)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self.optimiser.step()
        self._schedule.step()
        for name, value in losses.items():
            now = value.item()
            self._running[name] = self.keep * self._running.get(name, now) + (1 - self.keep) * now
        last = step == self.steps - 1
        if step % LOG_EVERY == LOG_EVERY - 1 or last:
            each = (time.monotonic() - self._start) / (step + 1 - self.first)
            left = (self.steps - step - 1) * each / 60
            parts = ", ".join(f"{k} {v:.4f}" for k, v in self._running.items())
            self.log(f"{self.stage} {step + 1}/{self.steps}, {each:.2f} s a step, {left:.0f} min left: {parts}")
        if (step % SAVE_EVERY == SAVE_EVERY - 1 or last) and self.processes.is_main:
            self._save(step + 1)

    def _save(self, step: int) -> None:
        temporary = self.path.with_suffix(".tmp")
        torch.save({self.part: self.module.state_dict(), "optimiser": self.optimiser.state_dict(),
                    "schedule": self._schedule.state_dict(), "step": step}, temporary)  # fmt: skip
        temporary.replace(self.path)
