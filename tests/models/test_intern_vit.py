"""InternViT against the published code's arrays, and against a plain restatement of its equations at other sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from edgemed.checkpoints import open_checkpoint
from edgemed.families.medrega_torch import load
from edgemed.models.intern_vit import InternViT, InternViTConfig

SMALL = InternViTConfig(
    width=24, layers=3, heads=3, inner=40, patch_px=5, side_px=20, norm_eps=1e-6, qkv_bias=True, qk_norm=True,
    run_layers=3,
)  # fmt: skip


def make(config: InternViTConfig) -> InternViT:
    torch.manual_seed(0)
    model = InternViT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def plain(model: InternViT, image: torch.Tensor) -> torch.Tensor:
    """One patch, one head and one query at a time, in float64: [1 + patches, width] after the last layer.

    image: [3, side, side], of the side that the position table is made for.
    """
    c = model.config
    w = {k: v.double() for k, v in model.state_dict().items()}

    def norm(v: torch.Tensor, name: str) -> torch.Tensor:
        return v / (v.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[name]

    def linear(v: torch.Tensor, name: str) -> torch.Tensor:
        return v @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(1).double())

    rows = [w["embeddings.class_token"][0, 0]]
    for y in range(0, image.shape[1], c.patch_px):
        for x in range(0, image.shape[2], c.patch_px):
            patch = image[:, y : y + c.patch_px, x : x + c.patch_px].double()
            rows.append((w["embeddings.patch.weight"] * patch).sum((1, 2, 3)) + w["embeddings.patch.bias"])
    x = torch.stack(rows) + w["embeddings.position"][0]
    size = c.width // c.heads
    for i in range(c.layers):
        p = f"layers.{i}."
        query, key, value = linear(norm(x, p + "norm1.weight"), p + "attn.qkv").split(c.width, dim=1)
        if c.qk_norm:
            query, key = norm(query, p + "attn.q_norm.weight"), norm(key, p + "attn.k_norm.weight")
        mixed = torch.zeros_like(query)
        for h in range(c.heads):
            s = slice(h * size, (h + 1) * size)
            for t in range(len(x)):
                mixed[t, s] = (key[:, s] @ query[t, s] / size**0.5).softmax(0) @ value[:, s]
        x = x + w[p + "ls1"] * linear(mixed, p + "attn.proj")
        inner = linear(norm(x, p + "norm2.weight"), p + "fc1")
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        x = x + w[p + "ls2"] * linear(inner, p + "fc2")
    return x


@pytest.mark.parametrize(("qkv_bias", "qk_norm"), [(True, True), (False, False)])
def test_the_last_layer_equals_the_plain_equations(qkv_bias: bool, qk_norm: bool) -> None:
    model = make(dataclasses.replace(SMALL, qkv_bias=qkv_bias, qk_norm=qk_norm))
    image = torch.randn(1, 3, 20, 20)
    with torch.no_grad():
        ours = model(image)
    # the stream grows to about 30 with these weights
    assert torch.allclose(ours[0].double(), plain(model, image[0])[1:], atol=2e-4)


def test_the_feature_is_taken_after_the_selected_layer_without_the_class_token() -> None:
    model = make(SMALL)
    image = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        states = model.hidden_states(image)
        model.config = dataclasses.replace(SMALL, run_layers=1)
        early = model(image)
    assert len(states) == SMALL.layers + 1
    assert torch.equal(early, states[1][:, 1:])


def test_a_tile_does_not_change_with_its_neighbours() -> None:
    model = make(SMALL)
    image = torch.randn(3, 3, 20, 20)
    with torch.no_grad():
        assert torch.allclose(model(image)[1:2], model(image[1:2]), atol=2e-5)


def test_another_side_keeps_the_class_place_and_resizes_the_others() -> None:
    model = make(SMALL)
    places = torch.zeros(1, 17, SMALL.width)
    places[:, 1:] = torch.arange(4.0).repeat_interleave(4)[None, :, None]  # the row of each patch
    with torch.no_grad():
        model.embeddings.position.copy_(places)
        model.embeddings.patch.weight.zero_()
        model.embeddings.patch.bias.zero_()
        out = model.embeddings(torch.zeros(1, 3, 40, 20))
        assert torch.equal(out[:, :1], model.embeddings.class_token)
    column = out[0, 1:, 0].view(8, 4)
    assert torch.equal(column, column[:, :1].expand(8, 4))
    # bicubic (a = -0.75), twice as many rows, centres at -0.25 and 3.25 hang over the edge by the same amount
    assert torch.allclose(column[:, 0] + column[:, 0].flip(0), torch.full((8,), 3.0), atol=1e-6)
    assert torch.allclose(column[3:5, 0], torch.tensor([1.25, 1.75]), atol=0.05)


def test_sizes_that_do_not_fit_are_refused() -> None:
    for wrong in ({"heads": 5}, {"side_px": 21}, {"run_layers": 4}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dataclasses.replace(SMALL, **wrong)


@pytest.fixture(scope="module")
def tiny(reference: Any) -> Any:
    return reference("medrega-tiny")


@pytest.fixture(scope="module")
def encoder(tiny: Any) -> InternViT:
    return load(open_checkpoint(tiny.folder)).vision_encoder


ARRAYS = {
    "vit_embeddings_square": "pixel_square",
    "vit_hidden_states_square": "pixel_square",
    "vit_out_square": "pixel_square",
    "vit_out_four_three": "pixel_four_three",
    "vit_out_two_one": "pixel_two_one",
    "vit_out_tiles_two_one": "pixel_tiles_two_one",
    "vit_out_interp_square": "pixel_interp_square",
}


@pytest.mark.parametrize("name", ARRAYS)
def test_the_published_encoder_gives_the_same(tiny: Any, encoder: InternViT, name: str) -> None:
    pixels = torch.from_numpy(tiny.expected(ARRAYS[name]))
    with torch.no_grad():
        states = encoder.hidden_states(pixels)
        if name.startswith("vit_out"):
            assert torch.equal(encoder(pixels), states[-1][:, 1:])
    ours = {"embeddings": states[0], "hidden": torch.stack(states)}.get(name.split("_")[1], states[-1])
    np.testing.assert_allclose(tiny.rows(name, ours), tiny.expected(name), atol=1e-4, rtol=0)
