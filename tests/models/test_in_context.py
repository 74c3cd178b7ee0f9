"""The parts for questions with examples against plain restatements of the published formulas, with random weights."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemed.models.in_context import MaskTokenEncoder, TokenCompressor, pool_rows

Array = npt.NDArray[np.float64]
WIDTH = 20


def randomised(module: nn.Module) -> nn.Module:
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.3)
    return module.eval()


def normed(x: Array, weight: Tensor, bias: Tensor) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return np.asarray(centred / spread * weight.double().numpy() + bias.double().numpy())


def linear(x: Array, weight: Tensor, bias: Tensor) -> Array:
    return np.asarray(x @ weight.double().numpy().T + bias.double().numpy())


def averaged(x: Array, count: int) -> Array:
    """Return [count, width]: the mean of each window of [rows, width]."""
    n = len(x)
    return np.stack([x[math.floor(i * n / count) : math.ceil((i + 1) * n / count)].mean(0) for i in range(count)])


@pytest.mark.parametrize(("rows", "count"), [(576, 256), (441, 64), (9, 4), (7, 3), (5, 5), (3, 5), (1, 1), (4, 1)])
def test_rows_are_averaged_as_adaptive_pooling_does(rows: int, count: int) -> None:
    torch.manual_seed(3)
    x = torch.randn(2, rows, WIDTH)
    pooled = pool_rows(x, count)
    torch.testing.assert_close(pooled, F.adaptive_avg_pool1d(x.transpose(1, 2), count).transpose(1, 2))
    np.testing.assert_allclose(pooled[1].numpy(), averaged(x[1].double().numpy(), count), atol=1e-6)


def test_lower_precision_stays_as_it_is() -> None:
    assert pool_rows(torch.ones(1, 9, 2, dtype=torch.bfloat16), 4).dtype == torch.bfloat16


@torch.no_grad()
def test_compressor_is_pool_norm_and_linear_in_this_order() -> None:
    torch.manual_seed(5)
    compressor = randomised(TokenCompressor(WIDTH))
    x, w = torch.randn(1, 576, WIDTH), compressor.state_dict()
    expected = averaged(x[0].double().numpy(), 256)
    expected = linear(normed(expected, w["norm.weight"], w["norm.bias"]), w["proj.weight"], w["proj.bias"])
    found = compressor(x)
    assert found.shape == (1, 256, WIDTH)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5)


@torch.no_grad()
def test_mask_encoder_is_four_convolutions_pool_linear_and_norm_in_this_order() -> None:
    torch.manual_seed(7)
    encoder = randomised(MaskTokenEncoder(WIDTH, 3)).double()
    mask = (torch.rand(2, 1, 37, 37) > 0.5).double()
    w = encoder.state_dict()
    x = mask
    for i in (0, 2, 4, 6):
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), w[f"encoder.{i}.weight"], w[f"encoder.{i}.bias"], stride=2)
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    assert x.shape == (2, 256, 3, 3)
    places = x[1].permute(1, 2, 0).reshape(9, 256).numpy()  # row by row
    expected = normed(linear(averaged(places, 3), w["proj.weight"], w["proj.bias"]), w["norm.weight"], w["norm.bias"])
    np.testing.assert_allclose(encoder(mask)[1].numpy(), expected, atol=1e-6)


@torch.no_grad()
def test_a_mask_of_published_size_gives_64_rows() -> None:
    assert MaskTokenEncoder(WIDTH)(torch.zeros(1, 1, 336, 336)).shape == (1, 64, WIDTH)


def test_weights_have_the_published_names_and_shapes() -> None:
    compressor = {name: tuple(w.shape) for name, w in TokenCompressor(WIDTH).state_dict().items()}
    assert compressor == {
        "norm.weight": (20,), "norm.bias": (20,), "proj.weight": (20, 20), "proj.bias": (20,),
    }  # fmt: skip
    encoder = {name: tuple(w.shape) for name, w in MaskTokenEncoder(WIDTH).state_dict().items()}
    assert encoder == {
        "encoder.0.weight": (64, 1, 3, 3), "encoder.0.bias": (64,),
        "encoder.2.weight": (128, 64, 3, 3), "encoder.2.bias": (128,),
        "encoder.4.weight": (256, 128, 3, 3), "encoder.4.bias": (256,),
        "encoder.6.weight": (256, 256, 3, 3), "encoder.6.bias": (256,),
        "proj.weight": (20, 256), "proj.bias": (20,), "norm.weight": (20,), "norm.bias": (20,),
    }  # fmt: skip
