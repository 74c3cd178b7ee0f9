"""Nodes on loopback with a quick stand-in for the model, senders, and instances made for the test."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("pynetdicom", reason="pynetdicom is not installed (extra: edgemed[serve])")


@pytest.fixture(scope="session")
def helper() -> ModuleType:
    """The module dicom_node.py of this folder."""
    name = "edgemed_tests_dicom_node"
    if name not in sys.modules:
        file = Path(__file__).resolve().parent / "dicom_node.py"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture
def clock(helper: ModuleType) -> Any:
    return helper.Clock()


@pytest.fixture
def log() -> list[dict[str, Any]]:
    """The log of the nodes that `serve` starts."""
    return []


@pytest.fixture
def serve(helper: ModuleType, tmp_path: Path, log: list[dict[str, Any]]) -> Callable[..., Any]:
    """`with serve(settings...) as node:` a node that listens; see `dicom_node.settings`."""

    @contextmanager
    def run(
        *, process: Any = None, send: Any = None, free_bytes: Any = None, now: Any = None, **more: Any
    ) -> Iterator[Any]:
        from edgemed.serve.node import Node
        from edgemed.serve.store import Store

        settings = helper.settings(tmp_path / "node", **more)
        lock = threading.Lock()

        def tell(what: str, **facts: Any) -> None:
            with lock:
                log.append({"event": what, **facts})

        given = {"free_bytes": free_bytes, "now": now}
        with Store(settings, **{k: v for k, v in given.items() if v is not None}) as store:
            sender = {} if send is None else {"send": send}
            node = Node(store, process or helper.quick_process, tell=tell, **sender)
            try:
                node.start()
                yield node
            finally:
                node.stop()

    return run


@pytest.fixture
def scans(helper: ModuleType, tmp_path: Path) -> Callable[..., Sequence[Path]]:
    """`scans(3)`: files of as many instances of a study."""

    def make(count: int, study: int = 1, **elements: Any) -> Sequence[Path]:
        return helper.write_instances(tmp_path / f"scans{study}", count, study, **elements)  # type: ignore[no-any-return]

    return make
