"""Scenes: facts and proposals always say the same, however a scene was changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from edgemed.families.native_lexicon import STRUCTURES
from edgemed.geometry import box_of
from edgemed.models.projector import PROPOSALS, Projector
from edgemed.training.facts import ImageFacts, RegionFact
from edgemed.training.prepare import FeatureCache
from edgemed.training.scenes import (
    Scene,
    _make_regions,
    batch_rows,
    inner_point,
    jitter_box,
    made_up,
    make_scenes,
    nudged,
    point_box,
)
from edgemed.training.slices import INDEX


@pytest.fixture(scope="module")
def scenes(cache: FeatureCache, make_projector: Callable[[], Projector]) -> list[Scene]:
    projector = make_projector()
    projector.presence_scale.fill_(60.0)  # random weights are all near one half; this spreads them
    return make_scenes(cache, projector, [0, 1, 2], 1, lambda line: None)


def check(scene: Scene) -> None:
    """Facts name exactly the proposals that are likelier than not, with their boxes; all boxes are boxes."""
    shown = {int(s): tuple(b) for s, b, p in zip(scene.index, scene.bins, scene.presence, strict=True) if p >= 0.5}
    assert dict(scene.facts.visible) == shown
    assert set(scene.facts.absent) == set(range(len(STRUCTURES))) - set(shown)
    assert len(set(scene.index.tolist())) == PROPOSALS
    shown_bins = scene.bins[: len(shown)]
    areas = (shown_bins[:, 2] - shown_bins[:, 0]) * (shown_bins[:, 3] - shown_bins[:, 1])
    assert (np.diff(areas) <= 0).all()  # what is visible, largest first
    assert (np.diff(scene.presence[len(shown) :]) <= 0).all()
    assert ((scene.bins >= 0) & (scene.bins <= 999)).all()
    assert (scene.bins[:, :2] < scene.bins[:, 2:]).all()


def test_a_scene_is_what_the_head_found(scenes: list[Scene]) -> None:
    for scene in scenes:
        check(scene)
        assert scene.pooled.shape == (64, 256)
        assert scene.modality.sum() == pytest.approx(1, abs=1e-5)
        assert len(scene.regions) == len(scene.facts.regions)
    assert {len(s.facts.visible) for s in scenes} != {0}


def test_made_up_facts_fit_made_up_proposals(scenes: list[Scene]) -> None:
    counts = set()
    for seed in range(30):
        scene = made_up(scenes[0], np.random.default_rng(seed))
        check(scene)
        assert scene.facts.regions == ()
        counts.add(len(scene.facts.visible))
    assert len(counts) > 8
    assert 0 in counts


def test_nudged_facts_follow_nudged_proposals(scenes: list[Scene]) -> None:
    base = made_up(scenes[0], np.random.default_rng(3))
    seen = next(iter(base.facts.visible))
    known = RegionFact("box", seen, base.facts.visible[seen], base.facts.visible[seen])
    own = RegionFact("point", seen, (1, 2, 3, 4), (5, 6, 7, 8))  # a target that is not the proposal's box
    nothing = RegionFact("mask", None, (1, 2, 3, 4), None)
    base = replace(base, facts=replace(base.facts, regions=(known, own, nothing)))
    moved = 0
    for seed in range(10):
        scene = nudged(base, np.random.default_rng(seed))
        check(scene)
        moved += not np.array_equal(scene.bins, base.bins)
        assert scene.facts.regions[0].target_bins == scene.facts.visible[seen]
        assert scene.facts.regions[1:] == (own, nothing)
    assert moved == 10


def test_region_maps_sum_to_one_and_lie_on_their_structure(cache: FeatureCache) -> None:
    kinds = set()
    for sample in range(cache.ready):
        maps, facts = _make_regions(cache, sample, {}, np.random.default_rng(sample))
        assert len(maps) == len(facts) <= 5
        structures, masks = cache.masks(sample)
        for weights, fact in zip(maps, facts, strict=True):
            kinds.add((fact.kind, fact.structure is None))
            assert weights.shape == (64, 64)
            assert weights.min() >= 0
            assert weights.sum() == pytest.approx(1, abs=1e-5)
            under = np.repeat(np.repeat(weights, 4, 0), 4, 1) / 16
            if fact.structure is None:
                assert (under * (cache.labels[sample] > 0)).sum() < 0.1
            else:
                mask = masks[structures.tolist().index(fact.structure)]
                assert (under * mask).sum() > 0.5
    assert {("box", False), ("point", False), ("mask", False), ("box", True)} <= kinds


def test_an_answer_about_a_region_names_the_box_of_the_proposal(cache: FeatureCache) -> None:
    liver = INDEX["liver"]
    sample = next(i for i in range(cache.ready) if (cache.labels[i] == liver + 1).sum() > 400)
    box = box_of(np.asarray(cache.labels[sample]) == liver + 1)
    assert box is not None
    bins = tuple(round(v * 1000 / 256) for v in box)
    near = (bins[0] + 3, bins[1] + 3, bins[2] + 3, bins[3] + 3)
    _, facts = _make_regions(cache, sample, {liver: near}, np.random.default_rng(0))
    assert {f.target_bins for f in facts if f.structure == liver} == {near}


def test_points_and_jittered_boxes_stay_inside() -> None:
    mask = np.zeros((256, 256), bool)
    mask[100:130, 3:50] = True
    for seed in range(20):
        rng = np.random.default_rng(seed)
        x, y = inner_point(mask, rng)
        assert mask[int(y), int(x)]
        assert 102 <= y <= 128  # the rim was worn away twice or more
        assert 5 <= x <= 48
        x0, y0, x1, y1 = jitter_box((3, 100, 50, 130), rng, 0.3)
        assert 0 <= x0 < x1 <= 256
        assert 0 <= y0 < y1 <= 256
    thin = np.zeros((256, 256), bool)
    thin[7, 7] = True
    assert inner_point(thin, np.random.default_rng(0)) == (7.5, 7.5)
    assert point_box(2, 254) == pytest.approx((0, 243.76, 12.24, 256))


def test_scenes_become_the_rows_that_the_graph_would_give(
    cache: FeatureCache, scenes: list[Scene], make_projector: Callable[[], Projector]
) -> None:
    import torch

    projector = make_projector()
    projector.presence_scale.fill_(60.0)
    features = torch.from_numpy(np.array(cache.features[1:2])).float()
    with torch.no_grad():
        projector.coordinates.normal_()
        rows = batch_rows(scenes[1:2], projector, projector.coordinates)[0]
        expected = projector(features, torch.full((1, 64, 64), 1 / 4096))[0]
    # pooled features are kept in float16
    assert torch.allclose(rows, expected, atol=5e-3)


def test_an_image_without_anything_lit_is_all_picture() -> None:
    assert ImageFacts(None, None, {}).extent == (1000, 1000)
