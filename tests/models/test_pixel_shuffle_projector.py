"""The order in which patches become image tokens, on numbers that name their place."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from edgemed.models.pixel_shuffle_projector import PixelShuffleProjector, fold_patches


@pytest.mark.parametrize(
    ("version", "second"), [("v1", [[20, 21, 30, 31], [2, 3, 12, 13]]), ("v2", [[2, 3, 12, 13], [20, 21, 30, 31]])]
)
def test_squares_of_neighbours_become_tokens_transposed_in_v1_only(
    version: Literal["v1", "v2"], second: list[list[int]]
) -> None:
    places = (10 * torch.arange(4)[:, None] + torch.arange(4)).view(1, 4, 4, 1)  # row and column as two digits
    tokens = fold_patches(places, 2, version).flatten(0, 2).tolist()
    assert tokens == [[0, 1, 10, 11], *second, [22, 23, 32, 33]]


def test_a_factor_of_three_and_two_channels() -> None:
    x = torch.arange(2 * 6 * 6 * 2).view(2, 6, 6, 2)
    folded = fold_patches(x, 3, "v2")
    assert folded.shape == (2, 2, 2, 18)
    assert torch.equal(folded[1, 0, 1], x[1, 0:3, 3:6].flatten())


def test_tiles_follow_each_other_in_the_rows() -> None:
    torch.manual_seed(0)
    projector = PixelShuffleProjector(5, 8, 2, "v1")
    features = torch.randn(3, 16, 5)
    with torch.no_grad():
        rows = projector(features)
        assert rows.shape == (12, 8)
        assert torch.allclose(rows[4:8], projector(features[1:2]), atol=1e-6)


@pytest.mark.parametrize("patches", [15, 9])
def test_patches_that_cannot_be_folded_are_refused(patches: int) -> None:
    with pytest.raises(ValueError, match=str(patches)):
        PixelShuffleProjector(5, 8, 2, "v1")(torch.zeros(1, patches, 5))
