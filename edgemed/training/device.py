"""Processes: what a training run computes on, alone on a CPU or one GPU, or as one of many under `accelerate launch`.

The batch of a step is the same whatever the number of processes: each draws all of it from the recipe's seed and keeps
its own part, and the gradients are averaged. A process that is alone does none of this and does not import accelerate.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from edgemed.errors import BackendUnavailable, InvalidInput

_PATIENCE = timedelta(hours=6)
"""How long the other processes wait while the first one fills the cache; the libraries' own 10 minutes are too few."""


@dataclass(frozen=True)
class Processes:
    """This process's number among all, and how many there are."""

    rank: int = 0
    count: int = 1
    accelerator: Any = None  # accelerate.Accelerator where count > 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that logs and writes files."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """What this process computes on: its own GPU if there is one, else the CPU."""
        if self.accelerator is not None:
            device: torch.device = self.accelerator.device
            return device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def part(self) -> slice:
        """This process's part of a batch: `rows[processes.part]`."""
        return slice(self.rank, None, self.count)

    def check_batch(self, size: int, key: str) -> None:
        """Raise InvalidInput naming the recipe's `key` if a batch of `size` is not a whole number for each process."""
        if size % self.count:
            raise InvalidInput(f"recipe key {key} is {size}; a multiple of {self.count}, the processes, was expected")

    def share(self, module: nn.Module) -> None:
        """Give every process the first one's weights and buffers, and random numbers of its own from here on."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        with torch.no_grad():
            for tensor in module.state_dict().values():
                tensor.copy_(broadcast(tensor.contiguous()))
        torch.manual_seed(torch.initial_seed() + self.rank)

    @torch.no_grad()
    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes; one that no process has stays None."""
        if self.count == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        found = torch.tensor([float(p.grad is not None) for p in parameters], device=gradients[0].device)
        # One message for all of them: hundreds of small ones would each cost a round trip.
        total = self.accelerator.reduce(torch.cat([*(g.flatten() for g in gradients), found]), reduction="sum")
        held = total[-len(parameters) :].tolist()
        means = (total[: -len(parameters)] / self.count).split([p.numel() for p in parameters])
        for parameter, mean, holders in zip(parameters, means, held, strict=True):
            parameter.grad = mean.view_as(parameter) if holders else None

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the group; nothing is shared afterwards."""
        if self.count > 1:
            self.accelerator.end_training()


ALONE = Processes()
"""One process and no other."""


def open_processes() -> Processes:
    """Return this process's place: what `accelerate launch` (or torchrun) says in its environment, else ALONE.

    Raises BackendUnavailable if the processes that were launched do not find each other.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched <= 1:
        return ALONE
    from accelerate import Accelerator, InitProcessGroupKwargs

    handlers = [InitProcessGroupKwargs(timeout=_PATIENCE)]
    # Without `cpu`, accelerate takes each process for the only one where there is no GPU, and says nothing.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=handlers)
    if (found := accelerator.num_processes) != launched:
        raise BackendUnavailable(f"{launched} processes were launched, accelerate joined {found}; see `accelerate env`")
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator)


def is_main_process() -> bool:
    """Tell whether this process is the only one or the first of those that were launched together."""
    return os.environ.get("RANK", "0") == "0"
