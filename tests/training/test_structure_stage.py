"""The dense head's targets and losses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgemed.families.native_lexicon import STRUCTURES
from edgemed.models.structure_head import StructureHead, StructureOutput
from edgemed.training.prepare import FeatureCache
from edgemed.training.slices import INDEX
from edgemed.training.structure_stage import (
    CONFIG,
    Targets,
    box_iou_of,
    calibrate_presence,
    feature_statistics,
    make_targets,
    structure_loss,
    train_structures,
)

LIVER, SPLEEN, UNKNOWN = INDEX["liver"], INDEX["spleen"], INDEX["stomach"]


def write_one(folder: Path, labels: np.ndarray, boxes: list[list[object]], unknown: tuple[int, ...]) -> FeatureCache:
    """Write a cache of one sample without features."""
    known = [int(s not in unknown) for s in range(len(STRUCTURES))]
    fact = {"group": "g", "source": "s", "modality": 0, "body_part": 0, "known": known, "boxes": boxes}
    np.save(folder / "images.npy", np.zeros((1, 256, 256, 3), np.uint8))
    np.save(folder / "labels.npy", labels[None])
    np.save(folder / "features.npy", np.zeros((1, 256, 64, 64), np.float16))
    (folder / "facts.json").write_text(json.dumps([fact]))
    return FeatureCache(folder)


def make_labels() -> np.ndarray:
    labels = np.zeros((256, 256), np.uint8)
    labels[40:60, 100:142] = LIVER + 1
    labels[0:5, 0:5] = SPLEEN + 1  # 25 pixels: too few to be there, too many to be absent
    labels[200:220, 200:220] = UNKNOWN + 1
    return labels


def test_targets_are_area_shares_and_boxes(tmp_path: Path) -> None:
    cell = INDEX["white_blood_cell"]
    boxes: list[list[object]] = [[cell, [-10, 64, 30, 128]], [INDEX["polyp"], [252, 10, 300, 60]]]
    targets = make_targets(write_one(tmp_path, make_labels(), boxes, (UNKNOWN,)), 0)
    assert targets.structures.tolist() == [LIVER, cell]
    assert targets.boxes[LIVER].tolist() == [100, 40, 142, 60]
    assert targets.boxes[cell].tolist() == [0, 64, 30, 128]
    presence = targets.presence.tolist()
    assert [presence[s] for s in (LIVER, SPLEEN, UNKNOWN, cell, INDEX["polyp"])] == [1, -1, -1, 1, -1]
    assert presence[INDEX["heart"]] == 0
    liver, ellipse = targets.maps.numpy()
    assert liver[10:15, 25:35].min() == 16
    assert liver[10, 35] == 8  # columns 140 and 141 of 140..143
    assert int(liver.sum()) == 20 * 42
    assert ellipse[24, 3] == 16
    assert ellipse[16, 0] == 0  # a corner of the box lies outside the ellipse


def make_output(seed: int = 0) -> StructureOutput:
    torch.manual_seed(seed)
    return StructureOutput(
        torch.randn(1, CONFIG.structures, 64, 64),
        torch.randn(1, CONFIG.structures),
        torch.randn(1, CONFIG.modalities),
        torch.randn(1, CONFIG.body_parts),
    )


@pytest.fixture(scope="module")
def head() -> StructureHead:
    torch.manual_seed(0)
    return StructureHead(CONFIG).eval()


def losses_of(head: StructureHead, output: StructureOutput, targets: Targets) -> dict[str, float]:
    zero = torch.zeros(1, dtype=torch.long)
    return {k: v.item() for k, v in structure_loss(head, output, [targets], zero, zero).items()}


def test_what_a_sample_does_not_know_costs_nothing(tmp_path: Path, head: StructureHead) -> None:
    targets = make_targets(write_one(tmp_path, make_labels(), [], (UNKNOWN,)), 0)
    output = make_output()
    before = losses_of(head, output, targets)
    maps, presence = output.maps.clone(), output.presence.clone()
    for s in (UNKNOWN, SPLEEN):
        maps[:, s], presence[:, s] = 9.0, 9.0
    assert losses_of(head, replace(output, maps=maps, presence=presence), targets) == before
    maps[:, LIVER] = 9.0
    changed = losses_of(head, replace(output, maps=maps), targets)
    assert all(changed[name] != before[name] for name in ("maps", "dice", "edges"))
    assert changed["presence"] == before["presence"]


def test_a_sample_without_any_structure_still_has_losses(tmp_path: Path, head: StructureHead) -> None:
    targets = make_targets(write_one(tmp_path, np.zeros((256, 256), np.uint8), [], ()), 0)
    losses = losses_of(head, make_output(), targets)
    assert losses["dice"] == losses["edges"] == 0
    assert losses["maps"] > 0
    assert all(np.isfinite(v) for v in losses.values())


def test_a_right_answer_costs_next_to_nothing(tmp_path: Path, head: StructureHead) -> None:
    targets = make_targets(write_one(tmp_path, make_labels(), [], ()), 0)
    maps = torch.full((1, CONFIG.structures, 64, 64), -20.0)
    for s, wanted in zip(targets.structures.tolist(), targets.maps, strict=True):
        maps[0, s] = torch.where(wanted > 8, 20.0, -20.0)
    presence = torch.where(targets.presence == 1, 20.0, -20.0)[None]
    losses = losses_of(head, replace(make_output(), maps=maps, presence=presence), targets)
    assert losses["presence"] < 1e-4
    assert losses["dice"] < 0.03


def test_the_iou_of_boxes_counts_present_structures(tmp_path: Path) -> None:
    targets = make_targets(write_one(tmp_path, make_labels(), [], (UNKNOWN,)), 0)
    boxes = targets.boxes.clone()[None]
    assert box_iou_of(boxes, [targets]) == [1.0]
    boxes[0, LIVER] = torch.tensor([100, 40, 121, 60])
    assert box_iou_of(boxes, [targets]) == [0.5]


def test_channels_that_never_change_keep_a_small_spread(cache: FeatureCache) -> None:
    mean, spread = feature_statistics(cache)
    assert mean.shape == spread.shape == (256,)
    assert float(spread.min()) >= 0.005


def test_a_stage_that_was_stopped_is_not_run_again(cache: FeatureCache, tmp_path: Path, cpu: torch.device) -> None:
    told: list[str] = []
    run = dict(batch=2, rate=1e-3, repeat={"ct": 2}, seed=1, device=cpu, log=told.append)
    once = train_structures(cache, tmp_path, steps=1, **run)  # type: ignore[arg-type]
    again = train_structures(cache, tmp_path, steps=1, **run)  # type: ignore[arg-type]
    assert len(told) == 1
    assert told[0].startswith("structure 1/1, ")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in once.state_dict().items())
    assert not once.training
    scale, shift = calibrate_presence(again, cache, cpu, told.append)
    assert scale.shape == shift.shape == (CONFIG.structures,)
    assert len(set(scale.tolist())) == 1  # one for all
