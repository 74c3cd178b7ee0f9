"""The torch back end: the modules of a checkpoint, without export, on the CPU or an NVIDIA GPU.

State lies in the module, which keeps it from call to call and has `reset`. Covers running a module as its GraphSpec
says. Does not cover ONNX graphs, or where modules and weights come from (`edgemed.families.opened_torch`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgemed.backends import Device, Outputs
from edgemed.errors import BackendUnavailable, DeviceOutOfMemory, InvalidInput, OutOfMemory
from edgemed.graphs import Feeds, GraphSpec

Artifact = Callable[[], nn.Module]
"""Loads the module of one role: its inputs and outputs are those of the spec, in order, without the state."""


class TorchRunner:
    """Runs one module; see `edgemed.backends.Runner`."""

    backend = "torch"

    def __init__(
        self, artifact: Path | Artifact, spec: GraphSpec, *, device: Device, threads: int | None = None
    ) -> None:
        if isinstance(artifact, Path):
            raise BackendUnavailable(
                f"the torch back end runs the folder of a checkpoint, {artifact.name} is a graph of a bundle; pass the "
                "folder of the checkpoint, or use --backend onnxruntime"
            )
        self.spec = spec
        self._place = _place(device)
        self.device = "CPU" if self._place.type == "cpu" else f"GPU {self._place.index}"
        self._threads = threads
        with self._memory_told():
            self._module: Any = artifact().eval().to(self._place)

    def run(self, feeds: Feeds) -> Outputs:
        """Return the outputs that are not state. Raises InvalidInput where `feeds` do not fit the GraphSpec."""
        if self._module is None:
            raise InvalidInput(f"graph {self.spec.role}: this Runner was closed")
        self.spec.check(feeds)
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)  # here, not at loading: torch keeps it for each thread that calls
        with self._memory_told(), torch.inference_mode(), _full_fp32():
            given = [self._tensor(feeds[t.name]) for t in self.spec.fed_inputs]
            try:
                made = self._module(*given)
            except (RuntimeError, ValueError, IndexError) as error:
                if _is_memory(error):
                    raise
                reason = _first_line(error)
                raise InvalidInput(f"graph {self.spec.role} cannot run on these inputs: {reason}") from error
            outputs = (made,) if isinstance(made, torch.Tensor) else made
            returned = zip(self.spec.returned_outputs, outputs, strict=True)
            return {t.name: value.to("cpu", getattr(torch, t.dtype)).numpy() for t, value in returned}

    def reset(self) -> None:
        """Forget the state: every value of it is zero again."""
        if self.spec.state:
            self._module.reset()

    def close(self) -> None:
        """Give back memory and device. The Runner cannot run afterwards."""
        self._module = None
        if self._place.type == "cuda":
            torch.cuda.empty_cache()

    def _tensor(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        # torch warns of memory that it may not write to, and takes no negative strides.
        return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self._place)

    @contextmanager
    def _memory_told(self) -> Iterator[None]:
        """Turn what torch raises where memory is short into one line."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not _is_memory(error):
                raise
            what = f"graph {self.spec.role} does not fit in the memory"
            if isinstance(error, torch.OutOfMemoryError):
                raise DeviceOutOfMemory(
                    f"{what} of {self.device}: {_first_line(error)}; use --device cpu or a larger GPU"
                ) from error
            raise OutOfMemory(f"{what}: {_first_line(error)}; use a machine with more memory") from error


def _place(device: Device) -> torch.device:
    """Return where to run. Raises BackendUnavailable where a GPU is asked for that torch cannot use."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.kind == "gpu" and device.index >= found:
        raise BackendUnavailable(
            f"device gpu:{device.index} was asked for, torch {torch.__version__} finds {found} GPUs: check the NVIDIA "
            "driver and that torch was built for CUDA, or use --device cpu"
        )
    on_gpu = device.kind == "gpu" or (device.kind == "auto" and found > 0)
    return torch.device("cuda", device.index) if on_gpu else torch.device("cpu")


@contextmanager
def _full_fp32() -> Iterator[None]:
    """Keep convolutions on a GPU in float32: torch rounds their inputs to 10 bits (TF32) unless told otherwise."""
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = before


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _first_line(error: BaseException) -> str:
    """Return torch's reason in one line, without the place in its source.

    >>> _first_line(RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate."))
    "DefaultCPUAllocator: can't allocate"
    """
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text.split("] err == 0. ")[-1].strip().rstrip(".")
