"""Samples and features: repeatable, in the model frame, resumable."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgemed.families.native_lexicon import STRUCTURES
from edgemed.geometry import box_iou, box_of
from edgemed.training import prepare
from edgemed.training.prepare import FeatureCache, make_sample, write_features, write_samples
from edgemed.training.slices import INDEX, LabelledSlice
from edgemed.training.structure_stage import kept_back

CPU = torch.device("cpu")


def test_an_unchanged_sample_shows_its_labels_where_they_are(phantom: LabelledSlice) -> None:
    sample = make_sample(phantom, np.random.default_rng(0), change=False)
    assert (sample.image.shape, sample.labels.shape) == ((256, 256, 3), (256, 256))
    bright = sample.image[..., 0] > 200
    liver = sample.labels == INDEX["liver"] + 1
    assert (bright & liver).sum() / (bright | liver).sum() > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_a_box_without_a_mask_stays_around_its_cell(pieces: dict[str, list[LabelledSlice]], seed: int) -> None:
    photo = pieces["cells"][0]
    cell, box = photo.boxes[0]
    x0, y0, x1, y1 = (int(v) for v in box)
    image = photo.image.copy()
    image[y0:y1, x0:x1] = (20, 20, 90)
    labels = photo.labels.copy()
    labels[y0:y1, x0:x1] = cell + 1
    marked = prepare.replace(photo, image=image, labels=labels)
    sample = make_sample(marked, np.random.default_rng(seed), change=True)
    around = box_of(sample.labels == cell + 1)
    assert around is not None
    clipped = np.clip(sample.boxes[0][1], 0, 256)
    assert box_iou(tuple(map(float, clipped)), around) > 0.9  # type: ignore[arg-type]


def test_samples_are_a_function_of_the_seed(tmp_path: Path, pieces: dict[str, list[LabelledSlice]]) -> None:
    told: list[str] = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_samples(tmp_path / name, pieces, {"ct": 2, "cells": 1, "nowhere": 5}, seed, told.append)
    images = [np.load(tmp_path / name / "images.npy") for name in "abc"]
    assert images[0].shape == (3, 256, 256, 3)
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
    assert told == ["no pictures for nowhere: left out"] * 3
    facts = json.loads((tmp_path / "a" / "facts.json").read_text())
    assert sorted(f["group"] for f in facts) == ["cells", "ct", "ct"]
    assert all(len(f["known"]) == len(STRUCTURES) for f in facts)


def test_finished_samples_are_not_drawn_again(tmp_path: Path, pieces: dict[str, list[LabelledSlice]]) -> None:
    write_samples(tmp_path, pieces, {"ct": 1}, 1, print)
    before = (tmp_path / "images.npy").read_bytes()
    write_samples(tmp_path, pieces, {"ct": 2}, 9, print)
    assert (tmp_path / "images.npy").read_bytes() == before


class Tiny(nn.Module):
    """An encoder of 2 x 4 x 4 numbers that is killed at call `killed_at`."""

    def __init__(self, killed_at: int | None = None) -> None:
        super().__init__()
        self.calls, self.killed_at = 0, killed_at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.killed_at:
            raise KeyboardInterrupt
        return F.adaptive_avg_pool2d(x, 4)[:, :2]


def make_images(folder: Path, count: int) -> None:
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (count, 256, 256, 3)).astype(np.uint8)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", np.zeros((count, 256, 256), np.uint8))
    fact = {"group": "g", "source": "s", "modality": 0, "body_part": 0, "known": [1] * len(STRUCTURES), "boxes": []}
    (folder / "facts.json").write_text(json.dumps([fact] * count))


def test_features_go_on_where_a_killed_run_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CHANNELS", 2)
    monkeypatch.setattr(prepare, "GRID", 4)
    for name in ("killed", "whole"):
        make_images(tmp_path / name, 60)
    with pytest.raises(KeyboardInterrupt):
        write_features(tmp_path / "killed", Tiny(killed_at=56), 0, CPU, print)  # type: ignore[arg-type]
    assert FeatureCache(tmp_path / "killed").ready == 50  # the state is marked every 50 samples
    again = Tiny()
    resumed = write_features(tmp_path / "killed", again, 0, CPU, print)  # type: ignore[arg-type]
    assert (resumed.ready, again.calls) == (60, 10)
    whole = write_features(tmp_path / "whole", Tiny(), 0, CPU, print)  # type: ignore[arg-type]
    assert np.array_equal(resumed.features, whole.features)


def test_only_as_many_features_as_asked_for_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CHANNELS", 2)
    monkeypatch.setattr(prepare, "GRID", 4)
    make_images(tmp_path / "c", 5)
    assert write_features(tmp_path / "c", Tiny(), 3, CPU, print).ready == 3  # type: ignore[arg-type]
    assert write_features(tmp_path / "c", Tiny(), 0, CPU, print).ready == 5  # type: ignore[arg-type]


def test_a_brain_holds_its_grey_and_white_matter(tmp_path: Path) -> None:
    make_images(tmp_path / "c", 1)
    labels = np.zeros((1, 256, 256), np.uint8)
    for column, key in enumerate(("brain", "grey_matter", "white_matter")):
        labels[0, :10, column] = INDEX[key] + 1
    np.save(tmp_path / "c" / "labels.npy", labels)
    np.save(tmp_path / "c" / "features.npy", np.zeros((1, 1), np.float16))
    structures, masks = FeatureCache(tmp_path / "c").masks(0)
    areas = {int(s): int(mask.sum()) for s, mask in zip(structures, masks, strict=True)}
    assert areas == {INDEX["brain"]: 30, INDEX["grey_matter"]: 10, INDEX["white_matter"]: 10}


def test_one_sample_in_sixteen_is_kept_back() -> None:
    assert np.flatnonzero(kept_back(40)).tolist() == [7, 23, 39]
