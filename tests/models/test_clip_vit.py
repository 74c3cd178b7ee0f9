"""The CLIP tower against a plain restatement of its equations, and against what the published code computed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from edgemed.families.medplib_view import MedplibView
from edgemed.models.clip_vit import ClipVit, ClipVitConfig

ATOL = 5e-4
"""What the README of the reference suggests; measured with unrounded weights: 7e-6."""
PREFIX = "model.vision_tower.vision_tower.vision_model."
SMALL = ClipVitConfig(width=12, layers=3, heads=3, inner=20, side=15, patch=5, norm_eps=1e-3)


def make(config: ClipVitConfig = SMALL) -> ClipVit:
    torch.manual_seed(3)
    model = ClipVit(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.4)
    return model


def plain_clip(model: ClipVit, image: Tensor, layers: int) -> Tensor:
    """One head and one patch at a time, in float64. image: [3, side, side]; returns [1 + patches, width]."""
    c = model.config
    w = {k: v.double() for k, v in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        scaled = x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    kernel = w["embeddings.patch_embedding.weight"].flatten(1)
    corners = [(y, x) for y in range(0, c.side, c.patch) for x in range(0, c.side, c.patch)]
    patches = [kernel @ image[:, y : y + c.patch, x : x + c.patch].double().flatten() for y, x in corners]
    h = norm(
        torch.stack([w["embeddings.class_embedding"], *patches]) + w["embeddings.position_embedding.weight"],
        "pre_layrnorm",
    )
    head_dim = c.width // c.heads
    for i in range(layers):
        p = f"encoder.layers.{i}."
        n = norm(h, p + "layer_norm1")
        q, k, v = (linear(n, f"{p}self_attn.{m}_proj").split(head_dim, dim=1) for m in "qkv")
        mixed = [(q[j] @ k[j].T / head_dim**0.5).softmax(-1) @ v[j] for j in range(c.heads)]
        h = h + linear(torch.cat(mixed, 1), p + "self_attn.out_proj")
        inner = linear(norm(h, p + "layer_norm2"), p + "mlp.fc1")
        h = h + linear(inner / (1 + torch.exp(-1.702 * inner)), p + "mlp.fc2")
    return h


@pytest.mark.parametrize(("layer", "layers"), [(0, 0), (1, 1), (-2, 2), (-1, 3)])
def test_every_hidden_state_equals_the_plain_equations(layer: int, layers: int) -> None:
    model, image = make(), torch.randn(1, 3, SMALL.side, SMALL.side)
    with torch.no_grad():
        ours = model(image, layer)
    torch.testing.assert_close(ours[0].double(), plain_clip(model, image[0], layers), atol=1e-5, rtol=1e-5)


def test_patch_features_leave_the_class_token_out() -> None:
    model, image = make(), torch.randn(2, 3, SMALL.side, SMALL.side)
    with torch.no_grad():
        features = model.patch_features(image, -2)
        assert torch.equal(features, model(image, -2)[:, 1:])
    assert features.shape == (2, 9, SMALL.width)


@pytest.mark.parametrize("layer", [4, -5])
def test_a_hidden_state_that_does_not_exist_is_refused(layer: int) -> None:
    with pytest.raises(IndexError):
        make()(torch.zeros(1, 3, SMALL.side, SMALL.side), layer)


@pytest.mark.parametrize("wrong", [{"heads": 5}, {"patch": 4}])
def test_sizes_that_do_not_fit_each_other_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must divide"):
        ClipVitConfig(**{"width": 12, "heads": 3, "side": 15, "patch": 5, **wrong})


class Tiny:
    """The tower of the reference checkpoint, its keys as published, and the arrays."""

    def __init__(self, arrays: Any) -> None:
        self.arrays = arrays
        sizes = json.loads((arrays / "clip-tiny-patch14-336/config.json").read_text())
        self.tower = ClipVit(
            ClipVitConfig(
                width=sizes["hidden_size"],
                layers=sizes["num_hidden_layers"],
                heads=sizes["num_attention_heads"],
                inner=sizes["intermediate_size"],
                side=sizes["image_size"],
                patch=sizes["patch_size"],
                norm_eps=sizes["layer_norm_eps"],
            )
        ).eval()
        with safe_open(arrays / "model.safetensors", "pt") as file:
            state = {k.removeprefix(PREFIX): file.get_tensor(k) for k in file.keys() if k.startswith(PREFIX)}  # noqa: SIM118
        self.tower.load_state_dict(state)

    @torch.no_grad()
    def hidden(self, image: str, layer: int) -> np.ndarray[Any, Any]:
        pixels = MedplibView().clip_image(self.arrays.input(f"image_{image}"))
        found: np.ndarray[Any, Any] = self.tower(torch.from_numpy(pixels), layer).numpy()
        return found

    def check(self, name: str, found: np.ndarray[Any, Any]) -> None:
        np.testing.assert_allclose(self.arrays.rows(name, found), self.arrays.expected(name), rtol=0, atol=ATOL)


@pytest.fixture(scope="module")
def tiny(reference: Any) -> Tiny:
    return Tiny(reference("medplib-tiny"))


@pytest.mark.parametrize(("name", "layer"), [("clip_embed_ln_square", 0), ("clip_last_hidden_square", -1)])
def test_first_and_last_hidden_state_are_the_authors(tiny: Tiny, name: str, layer: int) -> None:
    tiny.check(name, tiny.hidden("square", layer))


@pytest.mark.parametrize("image", ["square", "four_three"])
def test_patch_features_of_the_layer_before_the_last_are_the_authors(tiny: Tiny, image: str) -> None:
    tiny.check(f"clip_features_{image}", tiny.hidden(image, -2)[:, 1:])
