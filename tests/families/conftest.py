"""The published families as exported bundles of the tiny references, each made once for the whole run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemed.backends import Outputs, Runner, open_runner
from edgemed.bundle import Bundle
from edgemed.core import Scan
from edgemed.graphs import Feeds
from edgemed.infer import Session

CACHE = 1024
"""Tokens of prompt and answer that the tiny decoders hold; the longest prompt has 684."""


class Tiny:
    """One reference folder with the bundle exported from it: a Session, and its graphs one by one, on the CPU."""

    def __init__(self, arrays: Any, bundle: Bundle) -> None:
        self.arrays = arrays
        self.bundle = bundle
        self._runners: dict[str, Runner] = {}

    @cached_property
    def session(self) -> Session:
        """A Session over the bundle."""
        return Session(self.bundle, device="cpu", threads=1)

    def run(self, role: str, feeds: Feeds) -> Outputs:
        """Return the outputs of one graph on feeds; the decoder's cache is overwritten from where the feeds say."""
        if role not in self._runners:
            path, spec = self.bundle.graph_path(role), self.bundle.spec(role)
            self._runners[role] = open_runner("onnxruntime", path, spec, device="cpu", threads=1)
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


def _exported(arrays: Any, folder: Path, describe: Any) -> Iterator[Tiny]:
    from edgemed.checkpoints import open_checkpoint
    from edgemed.export.published import Conversion, write_published_bundle

    checkpoint = open_checkpoint(arrays.folder)
    described = describe(checkpoint, cache=CACHE)
    tiny = Tiny(arrays, write_published_bundle(checkpoint, described, folder / "bundle", Conversion(arrays.family)))
    yield tiny
    tiny.close()


@pytest.fixture(scope="session")
def medrega(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """The exported tiny MedRegA; takes 3 s."""
    pytest.importorskip("onnxruntime")
    from edgemed.families.medrega_torch import describe

    yield from _exported(reference("medrega-tiny"), tmp_path_factory.mktemp("medrega"), describe)


@pytest.fixture(scope="session")
def medplib(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """The exported tiny MedPLIB; takes 10 s."""
    pytest.importorskip("onnxruntime")
    from edgemed.families.medplib_torch import describe

    yield from _exported(reference("medplib-tiny"), tmp_path_factory.mktemp("medplib"), describe)
