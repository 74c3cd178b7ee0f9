"""The dense head and the projector: boxes from edges, bins, pooling, the rows of the language model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgemed.geometry import box_to_bins
from edgemed.models.projector import FIRST_PROPOSAL, PROPOSALS, ROWS, Projector, box_bins, pool_pictures, pool_regions
from edgemed.models.structure_head import StructureConfig, StructureHead, boxes_from_edges, sides_from_edges
from edgemed.models.tiny_vit import CHANNELS

CONFIG = StructureConfig(structures=30, modalities=3, body_parts=4, context=24, layers=1, heads=2)
WIDTH = 16


def edges_at(*bins: tuple[int, ...]) -> torch.Tensor:
    """Return edge logits [4, 256], all of the weight of a side evenly on its bins."""
    logits = torch.full((4, 256), -30.0)
    for side, peaks in enumerate(bins):
        logits[side, list(peaks)] = 10.0
    return logits


@pytest.mark.parametrize(
    ("bins", "box"),
    [
        (((10,), (20,), (99,), (149,)), (10, 20, 100, 150)),  # the end is the far side of its pixel
        (((0,), (0,), (255,), (255,)), (0, 0, 256, 256)),
        (((10, 11), (20,), (99,), (147, 148, 149)), (10.5, 20, 100, 149)),
        (((10, 200), (20,), (99,), (149,)), (10, 20, 100, 150)),  # of two far peaks the first
    ],
)
def test_a_box_is_read_from_the_peaks(bins: tuple[tuple[int, ...], ...], box: tuple[float, ...]) -> None:
    assert boxes_from_edges(edges_at(*bins)).tolist() == pytest.approx(box, abs=1e-3)


def test_sides_the_wrong_way_round_still_give_a_box() -> None:
    x0, y0, x1, y1 = boxes_from_edges(edges_at((90,), (255,), (10,), (0,))).tolist()
    assert 0 <= x0 <= x1 - 2 <= 254
    assert 0 <= y0 <= y1 - 2 <= 254


@pytest.fixture(scope="module")
def projector() -> Projector:
    torch.manual_seed(0)
    model = Projector(CONFIG, WIDTH, bins=1000).eval()
    model.coordinates.normal_()
    return model


def features(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 256, 64, 64, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_the_head_says_the_same_of_a_picture_alone_and_in_a_batch(projector: Projector) -> None:
    head: StructureHead = projector.head
    both, alone = head(features(2)), head(features(2)[1:])
    assert both.maps.shape == (2, 30, 64, 64)
    assert both.presence.shape == (2, 30)
    assert both.modality.shape == (2, 3)
    assert both.body_part.shape == (2, 4)
    for name in ("maps", "presence", "modality", "body_part"):
        assert torch.allclose(getattr(both, name)[1:], getattr(alone, name), atol=1e-4)
    boxes = head.all_boxes(both.maps)
    assert boxes.shape == (2, 30, 4)
    one = boxes_from_edges(head.edges(both.maps[1, 7:8], torch.tensor([7])))
    assert torch.allclose(boxes[1, 7], one[0], atol=1e-3)


def test_bins_are_those_of_the_geometry() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(-5, 250, (300, 2))
    boxes = np.concatenate([low, low + rng.uniform(0, 60, (300, 2))], axis=1).astype(np.float32)
    found = box_bins(torch.from_numpy(boxes), 1000).tolist()
    assert found == [list(box_to_bins(tuple(map(float, b)), 256)) for b in boxes]  # type: ignore[arg-type]


def test_a_region_sees_what_lies_under_it() -> None:
    x = features()
    maps = torch.randn(1, 30, 64, 64)
    weights = torch.zeros(2, 64, 64)
    weights[0, 10, 20] = 1  # one cell
    weights[1, :, :2] = 1 / 128  # the two left columns
    one, strip = pool_regions(x, maps, weights)
    assert one.shape == (256 + 30 + 4,)
    assert torch.allclose(one[:256], x[0, :, 10, 20], atol=1e-5)
    assert torch.allclose(one[256:286], maps[0, :, 10, 20].sigmoid(), atol=1e-5)
    assert one[286:].tolist() == pytest.approx([20.5 / 64, 10.5 / 64, 0, 0], abs=2e-3)
    assert torch.allclose(strip[:256], x[0, :, :, :2].mean((1, 2)), atol=1e-5)
    assert strip[286:].tolist() == pytest.approx([1 / 64, 0.5, 4 * 0.5 / 64, 4 * 0.28865], abs=2e-3)


def test_pictures_are_pooled_row_by_row() -> None:
    x = features()
    assert torch.allclose(pool_pictures(x)[0, 9], x[0, :, 8:16, 8:16].mean((1, 2)), atol=1e-5)


def test_a_side_is_as_sure_as_its_distribution_is_narrow() -> None:
    edges = torch.full((1, 4, 256), -30.0)
    edges[0, 0, 100] = 0  # one place
    edges[0, 1, [90, 110]] = torch.tensor([0.001, 0.0])  # two places, 20 apart
    edges[0, 2, 98:103] = 0  # five neighbours
    edges[0, 3] = 0  # anywhere
    probability, spread = sides_from_edges(edges)
    assert probability[0].tolist() == pytest.approx([1.0, 0.5, 1.0, 5 / 256], abs=1e-3)
    assert spread[0].tolist() == pytest.approx([0.0, 10.0, 2**0.5, (256**2 / 12) ** 0.5], abs=0.01)


@torch.no_grad()
def test_what_the_graph_gives_fits_together(projector: Projector) -> None:
    weights = torch.full((2, 64, 64), 1 / 4096)
    rows, regions, presence, boxes, maps, probability, spread = projector(features(), weights)
    assert rows.shape == (ROWS, WIDTH)
    assert regions.shape == (2, WIDTH)
    assert torch.allclose(regions[0], regions[1], atol=1e-6)
    assert presence.shape == (30,)
    assert 0 < presence.min() <= presence.max() < 1
    assert 0 <= maps.min() <= maps.max() <= 1
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert probability.shape == spread.shape == (30, 4)
    assert 0 < probability.min() <= probability.max() <= 1.00001
    assert 0 <= spread.min() <= spread.max() <= 128
    output = projector.head(features())
    proposals = projector.propose(output, boxes[None])
    likeliest = presence.argsort(descending=True)[:PROPOSALS]
    order = proposals.index[0]
    assert set(order.tolist()) == set(likeliest.tolist())
    bins = proposals.bins[0]
    assert bins.tolist() == box_bins(boxes[order], 1000).tolist()
    visible = int((presence >= 0.5).sum())
    area = (bins[:visible, 2] - bins[:visible, 0]) * (bins[:visible, 3] - bins[:visible, 1])
    assert (area.diff() <= 0).all()  # what is visible, largest first
    assert order[visible:].tolist() == likeliest[visible:].tolist()


@torch.no_grad()
def test_a_region_row_carries_the_structure_that_is_seen_there(projector: Projector) -> None:
    pooled = torch.zeros(3, projector.region_features)
    pooled[0, CHANNELS + 7] = 0.9
    pooled[0, CHANNELS + 8] = 0.4
    pooled[1, CHANNELS + 8] = 0.3
    nothing = projector.region(torch.cat([-projector.head.feature_mean / projector.head.feature_std, torch.zeros(34)]))
    rows = projector.region_rows(pooled) - projector.region_rows(pooled[2:])
    near = torch.nn.functional.cosine_similarity(rows[:2, None], projector.structure, dim=-1)
    assert near.argmax(1).tolist() == [7, 8]
    assert torch.allclose(projector.region_rows(pooled[2:])[0], nothing, atol=1e-5)


@torch.no_grad()
def test_a_likely_structure_shows_its_coordinates_and_an_unlikely_one_does_not(projector: Projector) -> None:
    output = projector.head(features())
    output.presence[:] = -9.0
    output.presence[0, 4] = 9.0
    boxes = torch.full((1, 30, 4), 7.0)
    boxes[0, :, 2:] = 99.0
    proposals = projector.propose(output, boxes)
    assert int(proposals.index[0, 0]) == 4
    tables = [projector.coordinates, projector.coordinates + 1]
    one, other = (
        projector.rows(output.modality, output.body_part, pool_pictures(features()), proposals, table)[0]
        for table in tables
    )
    changed = (one != other).any(dim=1).nonzero()[:, 0].tolist()
    assert changed == [FIRST_PROPOSAL + 1 + k for k in range(4)]


def test_presence_is_calibrated_by_scale_and_shift(projector: Projector) -> None:
    logits = torch.tensor([[0.0, 2.0]]).repeat(1, 15)
    assert torch.allclose(projector.calibrated(logits), logits.sigmoid())
    other = Projector(CONFIG, WIDTH)
    other.presence_scale.fill_(2.0)
    other.presence_shift.fill_(-1.0)
    assert torch.allclose(other.calibrated(logits), (2 * logits - 1).sigmoid())
