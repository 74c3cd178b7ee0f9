"""What the training tests share: phantoms, a stub encoder, a small cache of samples with features, a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgemed.families.native_lexicon import STRUCTURES
from edgemed.families.native_text import NativeText
from edgemed.models.projector import Projector
from edgemed.training.prepare import FeatureCache, write_features, write_samples
from edgemed.training.slices import INDEX, LabelledSlice
from edgemed.training.sources import BODY_PART, MODALITY, SOFT
from edgemed.training.structure_stage import CONFIG

WIDTH = 32


class StubEncoder(nn.Module):
    """Grey level per 4 x 4 pixels in every channel: instead of TinyViT's second of work a picture."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(image, 4).mean(1, keepdim=True).expand(-1, 256, -1, -1) * torch.linspace(
            0.5, 1.5, 256
        ).view(-1, 1, 1)


def make_phantom(rows: int = 90, columns: int = 120, bright: float = 300.0) -> LabelledSlice:
    """A CT slice: air, an ellipse of soft tissue, in it a bright liver square and a darker spleen disc."""
    ys, xs = np.mgrid[0:rows, 0:columns] + 0.5
    body = ((xs / columns - 0.5) / 0.45) ** 2 + ((ys / rows - 0.5) / 0.45) ** 2 < 1
    liver = (abs(xs / columns - 0.35) < 0.12) & (abs(ys / rows - 0.45) < 0.15)
    spleen = ((xs / columns - 0.7) / 0.1) ** 2 + ((ys / rows - 0.55) / 0.13) ** 2 < 1
    image = np.where(body, 40.0, -1000.0)
    image[liver], image[spleen] = bright, -80.0
    labels = np.zeros((rows, columns), np.uint8)
    labels[liver], labels[spleen] = INDEX["liver"] + 1, INDEX["spleen"] + 1
    return LabelledSlice(
        image.astype(np.float32),
        labels,
        np.ones(len(STRUCTURES), bool),
        MODALITY["ct"],
        BODY_PART["abdomen"],
        "phantom",
        "phantom",
        (1.0, 1.0),
        (SOFT,),
    )


@pytest.fixture(scope="session")
def phantom() -> LabelledSlice:
    return make_phantom()


@pytest.fixture(scope="session")
def stub_encoder() -> type[StubEncoder]:
    return StubEncoder


@pytest.fixture(scope="session")
def pieces() -> dict[str, list[LabelledSlice]]:
    """Training pictures of two groups: CT phantoms, and a photograph with a box instead of a mask."""
    photo = LabelledSlice(
        np.full((80, 100, 3), 150, np.uint8),
        np.zeros((80, 100), np.uint8),
        np.ones(len(STRUCTURES), bool),
        MODALITY["microscopy"],
        BODY_PART["blood"],
        "photo",
        "photo",
        boxes=((INDEX["white_blood_cell"], (30.0, 20.0, 60.0, 50.0)),),
    )
    return {"ct": [make_phantom(), replace(make_phantom(100, 100), patient="second")], "cells": [photo]}


PLAN = {"ct": 7, "cells": 2}


@pytest.fixture(scope="session")
def plan() -> dict[str, int]:
    return dict(PLAN)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, pieces: dict[str, list[LabelledSlice]]) -> FeatureCache:
    """Nine samples with features."""
    folder = tmp_path_factory.mktemp("cache")
    write_samples(folder, pieces, PLAN, 1, lambda line: None)
    return write_features(folder, StubEncoder(), 0, torch.device("cpu"), lambda line: None)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory, tiny_native: ModuleType) -> NativeText:
    """A tokenizer of the special tokens and single bytes."""
    path = tmp_path_factory.mktemp("text") / "tokenizer.json"
    path.write_text(tiny_native.tokenizer_json(), encoding="utf-8")
    return NativeText(path)


@pytest.fixture(scope="session")
def make_projector() -> Callable[[int], Projector]:
    """Make a projector of a small width with random weights, in evaluation mode."""

    def make(width: int = WIDTH) -> Projector:
        torch.manual_seed(5)
        return Projector(CONFIG, width).eval()

    return make


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
