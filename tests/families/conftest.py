"""The published families over the tiny references, exported and in torch, each made once for the whole run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemed.backends import Outputs, Runner, open_runner
from edgemed.bundle import Bundle
from edgemed.core import Scan
from edgemed.graphs import Feeds, GraphSpec
from edgemed.infer import Session

CACHE = 1024
"""Tokens of prompt and answer that the tiny decoders hold; the longest prompt has 684."""


class Tiny:
    """One reference folder with its bundle: a Session, and its graphs one by one, on the CPU.

    artifact: what the back end torch runs for a role; None: onnxruntime runs the bundle's graphs.
    """

    def __init__(self, arrays: Any, bundle: Bundle, artifact: Callable[[str], Any] | None = None) -> None:
        self.arrays = arrays
        self.bundle = bundle
        self._artifact = artifact
        self._backend = "torch" if artifact else "onnxruntime"
        self._runners: dict[str, Runner] = {}

    def open_session(self) -> Session:
        """Return a new Session over the bundle."""
        return Session(self.bundle, self._backend, "cpu", threads=1, artifact=self._artifact)

    @cached_property
    def session(self) -> Session:
        """The Session that tests share."""
        return self.open_session()

    def run(self, role: str, feeds: Feeds) -> Outputs:
        """Return the outputs of one graph on feeds; the decoder's cache is overwritten from where the feeds say."""
        if role not in self._runners:
            runs, spec = (self._artifact or self.bundle.graph_path)(role), self.bundle.spec(role)
            self._runners[role] = open_runner(self._backend, runs, spec, device="cpu", threads=1)
        return self._runners[role].run(feeds)

    def scan(self, image: str) -> Scan:
        """Return a stored picture as a Scan."""
        return Scan(self.arrays.input(f"image_{image}")[None], modality="OT")

    def close(self) -> None:
        """Give back what was opened."""
        for runner in self._runners.values():
            runner.close()
        if "session" in vars(self):
            self.session.close()

    def compare(self, name: str, ours: Any, atol: float) -> None:
        """Assert that an expected array is met, shape included: integers and pixels exactly, the rest within `atol`.

        Values that no graph gives are NaN in `ours` and are passed over; some must be left.
        """
        expected = self.arrays.expected(name)
        found = self.arrays.rows(name, ours)
        assert found.shape == expected.shape
        if expected.dtype.kind in "iu" or name.startswith("pixel_"):
            np.testing.assert_array_equal(found, expected)
            return
        given = ~np.isnan(found)
        assert given.any()
        np.testing.assert_allclose(found[given], expected[given], rtol=0, atol=atol)


@pytest.fixture(scope="session")
def traced_once() -> Iterator[None]:
    """Traces each module once: a trace knows shapes only, which the compact and the full reference share."""
    from edgemed.export import traced_graph

    made: dict[str, Any] = {}

    def traced(module: Any, spec: GraphSpec) -> Any:
        if repr(spec) not in made:
            made[repr(spec)] = trace(module, spec)
        return deepcopy(made[repr(spec)])  # the weights are written into it

    trace = traced_graph.traced
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traced_graph, "traced", traced)
        yield


def _exported(arrays: Any, folder: Path, describe: Any) -> Iterator[Tiny]:
    from edgemed.checkpoints import open_checkpoint
    from edgemed.export.published import Conversion, write_published_bundle

    checkpoint = open_checkpoint(arrays.folder)
    described = describe(checkpoint, cache=CACHE)
    tiny = Tiny(arrays, write_published_bundle(checkpoint, described, folder / "bundle", Conversion(arrays.family)))
    yield tiny
    tiny.close()


def _opened(arrays: Any) -> Iterator[Tiny]:
    from edgemed.families.opened_torch import open_folder

    tiny = Tiny(arrays, *open_folder(arrays.folder))
    yield tiny
    tiny.close()


@pytest.fixture(scope="session")
def medrega(reference: Any, tmp_path_factory: pytest.TempPathFactory, traced_once: None) -> Iterator[Tiny]:
    """The exported tiny MedRegA; takes 5 s."""
    from edgemed.families.medrega_torch import describe

    yield from _exported(reference("medrega-tiny"), tmp_path_factory.mktemp("medrega"), describe)


@pytest.fixture(scope="session")
def medplib(reference: Any, tmp_path_factory: pytest.TempPathFactory, traced_once: None) -> Iterator[Tiny]:
    """The exported tiny MedPLIB; takes 10 s."""
    from edgemed.families.medplib_torch import describe

    yield from _exported(reference("medplib-tiny"), tmp_path_factory.mktemp("medplib"), describe)


@pytest.fixture(scope="session")
def medrega_in_torch(reference: Any) -> Iterator[Tiny]:
    """The tiny MedRegA without export, run by torch."""
    yield from _opened(reference("medrega-tiny"))


@pytest.fixture(scope="session")
def medplib_in_torch(reference: Any) -> Iterator[Tiny]:
    """The tiny MedPLIB without export, run by torch."""
    yield from _opened(reference("medplib-tiny"))
