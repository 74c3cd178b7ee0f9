"""Prompts for the mask decoder and its losses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgemed.training.mask_stage import SegState, draw_prompts, mask_loss

WIDTH = 16


def make_masks() -> npt.NDArray[np.bool_]:
    masks = np.zeros((3, 256, 256), bool)
    masks[0, 50:90, 60:120] = True
    masks[1, 150:200, 150:180] = True
    masks[2, 0:5, 0:5] = True  # too small to ask for
    return masks


STRUCTURES = np.array([3, 8, 9])
MAPS = np.zeros((12, 64, 64), np.float32)
MAPS[3, 12:23, 15:30] = 0.9  # the first as the dense head may see it
STATES = {(7, 3): SegState(np.ones(WIDTH, np.float32), (61.0, 50.0, 119.0, 91.0))}


def test_prompts_have_the_shapes_of_the_decoder_and_fit_their_masks() -> None:
    masks = make_masks()
    kinds, maps = set(), set()
    for seed in range(60):
        drawn = draw_prompts(STRUCTURES, masks, STATES, MAPS, 7, WIDTH, 3, np.random.default_rng(seed))
        assert drawn is not None
        shapes = {name: tuple(tensor.shape) for name, tensor in drawn.feeds.items()}
        assert shapes == {
            "boxes": (3, 4), "has_box": (3,), "points": (3, 1, 2), "point_labels": (3, 1),
            "mask_prompts": (3, 256, 256), "has_mask": (3,), "seg_hidden": (3, WIDTH), "has_seg": (3,),
        }  # fmt: skip
        assert drawn.feeds["point_labels"].dtype == torch.int64
        assert drawn.masks.dtype == torch.bool
        for i in range(3):
            f = {name: tensor[i] for name, tensor in drawn.feeds.items()}
            truth = drawn.masks[i].numpy()
            assert any(np.array_equal(truth, m) for m in masks[:2])
            point = bool(f["point_labels"][0] == 1)
            box, seg, earlier = (bool(f[k]) for k in ("has_box", "has_seg", "has_mask"))
            assert point or box or seg
            kinds.add((box, point, seg))
            if point:
                x, y = f["points"][0].tolist()
                assert truth[int(y), int(x)]
            if box:
                x0, y0, x1, y1 = f["boxes"].tolist()
                assert truth[int(y0) : int(y1), int(x0) : int(x1)].sum() > 0.5 * truth.sum()
            if seg:
                assert np.array_equal(truth, masks[0])  # only the first has a state
                assert f["seg_hidden"].min() == 1
            if earlier:
                inside = f["mask_prompts"].numpy() > 0
                assert (inside & truth).sum() > 0.7 * truth.sum()
            maps.add((point and not box, seg, earlier, truth[60, 70]))
    # a point on what the dense head sees, and what was written, mostly bring its map; a point elsewhere brings none
    assert {(True, False, True, True), (True, False, False, True), (False, True, True, True)} <= maps
    assert {(True, False, False), (False, True, False), (True, False, True), (True, True, True)} <= kinds


def test_nothing_is_asked_where_nothing_is_large_enough() -> None:
    tiny = make_masks()[2:]
    assert draw_prompts(STRUCTURES[2:], tiny, {}, MAPS, 0, WIDTH, 2, np.random.default_rng(0)) is None
    assert draw_prompts(STRUCTURES[:0], tiny[:0], {}, MAPS, 0, WIDTH, 2, np.random.default_rng(0)) is None


def test_a_right_mask_costs_nothing_and_a_wrong_one_a_lot() -> None:
    truth = torch.from_numpy(make_masks()[:2])
    right = torch.where(truth, 30.0, -30.0)
    good = mask_loss(right, torch.ones(2), truth)
    assert {k: v.item() for k, v in good.items()} == pytest.approx(dict(cross_entropy=0, dice=0, iou=0), abs=1e-3)
    bad = mask_loss(-right, torch.ones(2), truth)
    assert bad["dice"].item() > 0.9
    assert bad["cross_entropy"].item() > 50
    assert bad["iou"].item() == pytest.approx(0.5)  # half of the squared error between 1 and 0
