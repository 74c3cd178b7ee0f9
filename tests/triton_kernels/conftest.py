"""Where the kernels run without a GPU: under Triton's interpreter, and through its compiler."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edgemed.triton_kernels.aot import Compiled, build_kernels
from edgemed.triton_kernels.triton_launcher import TritonLauncher

TARGETS = (80, 90, 120)


@pytest.fixture(scope="session")
def triton_folder() -> Path:
    """Where triton is installed; it is not imported here, since the interpreter needs its flag before that."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        pytest.skip("triton is not installed (extra: edgemed[export], on Linux)")
    return Path(found.origin).parent


@pytest.fixture(scope="session")
def interpret(triton_folder: Path) -> Iterator[Callable[..., Any]]:
    """`interpret(function, *arguments)`: function(launcher, *arguments) in a process with TRITON_INTERPRET=1.

    A process of its own, because triton decides when it is imported, and other tests may have imported it.
    """
    spawned = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with pytest.MonkeyPatch.context() as environment, spawned as pool:
        environment.setenv("TRITON_INTERPRET", "1")
        assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == "1"
        environment.undo()
        launcher = TritonLauncher("cpu")
        yield lambda function, *arguments: pool.submit(function, launcher, *arguments).result()


@dataclass(frozen=True)
class Built:
    """A folder with every kernel for three generations (the oldest, the data centre's, the workstation's)."""

    folder: Path
    compiled: dict[tuple[str, int], Compiled]  # (name, target)


@pytest.fixture(scope="session")
def built(triton_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("kernels")
    found = build_kernels(folder, TARGETS, processes=2)
    return Built(folder, {(one.entry["name"], one.entry["target"]): one for one in found})
