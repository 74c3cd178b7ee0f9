"""The back-end seam: a Runner runs one graph, and `open_runner` makes one by name.

Covers the table of back ends and what a Runner is. Each back end is one file here, imported on use, so that a missing
library costs nothing until it is asked for. No back end ever falls back to another device in silence.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgemed.errors import BackendUnavailable, InvalidInput
from edgemed.graphs import Feeds, GraphSpec

Outputs = dict[str, npt.NDArray[Any]]


class Runner(Protocol):
    """One opened graph. What `spec.state` pairs up stays inside, on the Runner's own device, from call to call."""

    @property
    def backend(self) -> str:
        """The back end's name in the table."""

    @property
    def device(self) -> str:
        """The device that really runs the graph, such as "CPU"."""

    def run(self, feeds: Feeds) -> Outputs:
        """Return the outputs that are not state. Raises InvalidInput where `feeds` do not fit the GraphSpec."""

    def reset(self) -> None:
        """Forget the state: every value of it is zero again."""

    def close(self) -> None:
        """Give back memory and device. The Runner cannot run afterwards."""


@dataclass(frozen=True)
class Backend:
    """A row of the table: where the Runner is, the library it needs, the extra that installs that library.

    instead: a library that does, too, where the first is missing. tells: opening may take minutes, so that the Runner
    is given `tell`. on_cpu: whether it runs there, too.
    """

    runner: str
    library: str
    extra: str
    instead: str = ""
    tells: bool = False
    on_cpu: bool = True


BACKENDS: Mapping[str, Backend] = {
    "onnxruntime": Backend("edgemed.backends.onnxruntime_runner:OnnxRuntimeRunner", "onnxruntime", "cpu"),
    "tensorrt": Backend(
        "edgemed.backends.tensorrt_runner:TensorRTRunner",
        "tensorrt_rtx",
        "gpu",
        instead="tensorrt",
        tells=True,
        on_cpu=False,
    ),
    "torch": Backend("edgemed.backends.torch_runner:TorchRunner", "torch", "export"),
}
"""The back ends of this version. The first row is what "auto" means."""

Artifact = Path | Callable[[], Any]
"""What a Runner is made from: a graph's file, or what loads the module of a checkpoint (torch)."""


@dataclass(frozen=True)
class Device:
    """What was asked for: kind is "auto", "cpu" or "gpu"; index is the number of the GPU."""

    kind: str
    index: int = 0


def open_runner(
    backend: str,
    artifact: Artifact,
    spec: GraphSpec,
    *,
    device: str = "auto",
    threads: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> Runner:
    """Return a Runner of the graph that `artifact` is, opened by `backend` ("auto": the first of the table).

    device: "auto", "cpu", "gpu" or "gpu:N". threads: CPU threads; None means one for each physical core. tell: gets a
    line where opening takes long, or where something that was kept cannot be used.

    Raises BackendUnavailable where the library or the device is missing, BundleError where the file is not a graph
    that fits `spec`, InvalidInput where `device` or `threads` make no sense.
    """
    wanted = device_from_text(device)
    if threads is not None and threads < 1:
        raise InvalidInput(f"threads is {threads}; a number above 0 was expected")
    row = find_backend(backend)
    module, _, attribute = row.runner.partition(":")
    make = getattr(importlib.import_module(module), attribute)
    more = {"tell": tell} if row.tells else {}
    runner: Runner = make(artifact, spec, device=wanted, threads=threads, **more)
    return runner


def find_backend(name: str) -> Backend:
    """Return the row of a back end ("auto": the first) after importing its library. Raises BackendUnavailable."""
    name = next(iter(BACKENDS)) if name == "auto" else name
    if name not in BACKENDS:
        raise BackendUnavailable(f"there is no back end {name!r} in this version; choose from: {', '.join(BACKENDS)}")
    row = BACKENDS[name]
    cause: ImportError | None = None
    for library in filter(None, (row.library, row.instead)):
        try:
            importlib.import_module(library)
        except ImportError as error:
            cause = cause or error
        else:
            return row
    raise BackendUnavailable(
        f"the {name} back end needs the {row.library!r} package; install the extra: edgemed[{row.extra}]"
    ) from cause


def device_from_text(text: str) -> Device:
    """Return the Device that "auto", "cpu", "gpu" or "gpu:N" stands for.

    >>> device_from_text("gpu:1")
    Device(kind='gpu', index=1)
    """
    kind, colon, index = text.partition(":")
    if kind not in ("auto", "cpu", "gpu") or (colon and (kind != "gpu" or not index.isdecimal())):
        raise InvalidInput(f"device is {text!r}; auto, cpu, gpu or gpu:N was expected")
    return Device(kind, int(index) if index else 0)


def empty_state(spec: GraphSpec) -> dict[str, npt.NDArray[Any]]:
    """Return zeros for every state input of `spec`, dynamic dims at their largest; bfloat16 as uint16, of equal bits.

    Raises InvalidInput where a state has a dynamic dim other than `cache`; only in-place caches can be run.
    """
    inputs = {t.name: t for t in spec.inputs}
    state = {}
    for _, name in spec.state:
        tensor = inputs[name]
        if growing := [d for d in tensor.shape if isinstance(d, str) and d != "cache"]:
            raise InvalidInput(f"graph {spec.role}, state {name}: dim {growing[0]} is dynamic; only `cache` may be")
        shape = [d if isinstance(d, int) else spec.dims[d].max for d in tensor.shape]
        state[name] = np.zeros(shape, "uint16" if tensor.dtype == "bfloat16" else tensor.dtype)
    return state
