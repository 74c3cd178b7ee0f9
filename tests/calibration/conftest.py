"""The full-precision bundles of the tiny published checkpoints, each made once for the whole run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from edgemed.bundle import Bundle


@pytest.fixture(scope="session")
def published_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """`published_bundle("medrega-tiny")`: the bundle of the compact reference of that name."""
    file = Path(__file__).resolve().parents[1] / "reference_data.py"
    spec = importlib.util.spec_from_file_location("reference_data", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    @cache
    def make(family: str) -> Bundle:
        from edgemed.checkpoints import open_checkpoint
        from edgemed.export.published import Conversion, write_published_bundle
        from edgemed.families.opened_torch import describe

        folder = tmp_path_factory.mktemp(family)
        checkpoint = open_checkpoint(module.References(folder, whole=False)(family).folder)
        published = describe(checkpoint, cache=1024)
        return write_published_bundle(checkpoint, published, folder / "bundle", Conversion(family))

    return make
