"""SAM-Med2D: sizes from shapes, attention against plain equations, and what the published code computed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from edgemed.errors import InvalidInput
from edgemed.families.medplib_view import MedplibView
from edgemed.models.sam_med2d import (
    GridAttention,
    ImageEncoder,
    PromptEncoder,
    SamMaskDecoder,
    SamMed2dConfig,
    config_from_shapes,
)

ATOL = 5e-4
"""What the README of the reference suggests; measured with unrounded weights: 7e-5 on mask logits, 8e-6 before."""
ATOL_ROUNDED = 2e-3
"""On mask logits (up to 18) in the compact copy, whose weights are rounded to 2**-18: measured 8.3e-4."""
IMAGES = ("square", "four_three", "two_one")
PREFIX = "model.visual_model."
SMALL = SamMed2dConfig(
    width=12, heads=3, inner=20, windows=(4, 0, 3), grid=6, patch=2, adapter=5, prompt_width=16, mask_channels=8,
    decoder_depth=2, decoder_inner=24, attention_width=8, mask_tokens=3, iou_hidden=10,
)  # fmt: skip


class Sam(nn.Module):
    """The three parts under the names that the published keys give them."""

    def __init__(self, config: SamMed2dConfig) -> None:
        super().__init__()
        self.image_encoder = ImageEncoder(config)
        self.prompt_encoder = PromptEncoder(config)
        self.mask_decoder = SamMaskDecoder(config)


def make(config: SamMed2dConfig = SMALL) -> Sam:
    torch.manual_seed(4)
    model = Sam(config).eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randn(value.shape) * 0.4)
    return model


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{}, {"adapter": 0}, {"windows": (0, 0)}, {"decoder_depth": 1, "mask_tokens": 1}])
def test_all_sizes_are_read_from_shapes(change: dict[str, Any]) -> None:
    config = dataclasses.replace(SMALL, **change)
    assert config_from_shapes(shapes(make(config))) == config


def test_a_missing_weight_is_named() -> None:
    found = shapes(make())
    del found["prompt_encoder.no_mask_embed.weight"]
    with pytest.raises(InvalidInput, match=r"prompt_encoder\.no_mask_embed\.weight is missing"):
        config_from_shapes(found)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("image_encoder.pos_embed", (1, 6, 7, 12)),
        ("image_encoder.pos_embed", (6, 6, 12)),
        ("image_encoder.blocks.1.attn.rel_pos_h", (12, 4)),
        ("image_encoder.blocks.1.attn.rel_pos_h", (11, 5)),
    ],
)
def test_a_weight_whose_shape_fits_nothing_is_named(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match=name):
        config_from_shapes({**shapes(make()), name: shape})


# -- arithmetic --------------------------------------------------------------------------------------------------------


def plain_attention(model: GridAttention, x: Tensor) -> Tensor:
    """One pair of cells at a time, float64. x: [side, side, width]."""
    w = {k: v.double() for k, v in model.state_dict().items()}
    side, _, width = x.shape
    head_dim = width // model.heads
    qkv = x.double() @ w["qkv.weight"].T + w["qkv.bias"]
    out = torch.zeros(side, side, width, dtype=torch.float64)
    for head in range(model.heads):
        q, k, v = (qkv[..., part * width + head * head_dim :][..., :head_dim] for part in range(3))
        for row in range(side):
            for column in range(side):
                scores = torch.zeros(side, side, dtype=torch.float64)
                for r in range(side):
                    for c in range(side):
                        bias = w["rel_pos_h"][row - r + side - 1] + w["rel_pos_w"][column - c + side - 1]
                        scores[r, c] = q[row, column] @ (k[r, c] / head_dim**0.5 + bias)
                share = scores.flatten().softmax(0).view(side, side, 1)
                out[row, column, head * head_dim : (head + 1) * head_dim] = (share * v).sum((0, 1))
    return out @ w["proj.weight"].T + w["proj.bias"]


def test_attention_with_relative_places_equals_the_plain_equations() -> None:
    torch.manual_seed(5)
    model = GridAttention(12, 3, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * 0.4)
        x = torch.randn(2, 3, 3, 12)
        ours = model(x)
    torch.testing.assert_close(ours[1].double(), plain_attention(model, x[1]), atol=1e-5, rtol=1e-5)


def test_windows_cut_the_grid_and_zeros_fill_the_last_ones() -> None:
    block = make().image_encoder.blocks[0]  # windows of 4 on a grid of 6: 8 x 8 after filling
    x = torch.randn(1, 6, 6, 12)
    with torch.no_grad():
        filled = torch.zeros(1, 8, 8, 12)
        filled[:, :6, :6] = x
        ours = block._windowed(x)
        corner = block.attn(filled[:, 4:, 4:])
    torch.testing.assert_close(ours[:, 4:, 4:], corner[:, :2, :2])


def test_a_box_and_points_are_ordered_and_padded_as_published() -> None:
    prompts = make().prompt_encoder
    points, labels, box = torch.rand(1, 3, 2) * 12, torch.tensor([[1, 0, -1]]), torch.tensor([[1.0, 2.0, 9.0, 8.0]])
    with torch.no_grad():
        alone, both = prompts.native(points, labels), prompts.native(points, labels, box)
        assert prompts.native().shape == (1, 0, SMALL.prompt_width)
        torch.testing.assert_close(alone[:, :3], both[:, :3])
        torch.testing.assert_close(both[:, 3:], prompts.boxes(box))
        torch.testing.assert_close(alone[0, 3], prompts.not_a_point_embed.weight[0])
        torch.testing.assert_close(alone[0, 2], prompts.not_a_point_embed.weight[0])


def test_a_token_that_is_not_present_changes_nothing() -> None:
    model = make()
    with torch.no_grad():
        embedding, places = torch.randn(1, 16, 6, 6), model.prompt_encoder.dense_places()
        dense, sparse = model.prompt_encoder.no_mask(), torch.randn(2, 3, 16)
        plain = model.mask_decoder(embedding, places, sparse[:, :2], dense)
        masked = model.mask_decoder(embedding, places, sparse, dense, torch.tensor([[1.0, 1.0, 0.0]] * 2))
    torch.testing.assert_close(masked, plain, atol=1e-5, rtol=1e-5)
    assert plain[0].shape == (2, SMALL.mask_tokens, SMALL.mask_side, SMALL.mask_side)
    assert plain[1].shape == (2, SMALL.mask_tokens)


# -- the published code ------------------------------------------------------------------------------------------------


class Tiny:
    """The reference checkpoint's SAM part, its keys as published, and the arrays."""

    def __init__(self, arrays: Any) -> None:
        self.arrays = arrays
        with safe_open(arrays / "model.safetensors", "pt") as file:
            state = {k.removeprefix(PREFIX): file.get_tensor(k) for k in file.keys() if k.startswith(PREFIX)}  # noqa: SIM118
        self.config = config_from_shapes({k: tuple(v.shape) for k, v in state.items()})
        self.sam = Sam(self.config).eval()
        self.sam.load_state_dict(state)

    def pixels(self, image: str) -> Tensor:
        return torch.from_numpy(MedplibView().sam_image(self.arrays.input(f"image_{image}")))

    def check(self, name: str, found: Tensor) -> None:
        ours = self.arrays.rows(name, found.detach().numpy())
        atol = ATOL_ROUNDED if "low_res" in name and self.arrays.steps else ATOL
        np.testing.assert_allclose(ours, self.arrays.expected(name), rtol=0, atol=atol)

    def prompt(self, kinds: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Sparse and dense tokens of the stored native prompts."""
        given = {k: torch.from_numpy(self.arrays.input(f"sam_{k}")) for k in ("points", "point_labels", "box")}
        encoder = self.sam.prompt_encoder
        sparse = encoder.native(
            given["points"] if "points" in kinds else None,
            given["point_labels"].long() if "points" in kinds else None,
            given["box"] if "box" in kinds else None,
        )
        mask = torch.from_numpy(self.arrays.input("sam_mask_input"))
        return sparse, encoder.masks(mask) if "mask" in kinds else encoder.no_mask()


@pytest.fixture(scope="module")
def tiny(reference: Any) -> Tiny:
    return Tiny(reference("medplib-tiny"))


PROMPTS = {
    "points": ("points",),
    "box": ("box",),
    "mask": ("mask",),
    "points_box_mask": ("points", "box", "mask"),
}


def test_sizes_of_the_reference_are_what_it_was_made_with(tiny: Tiny) -> None:
    made, found = tiny.arrays.prompts["sam_sizes"], tiny.config
    assert (found.width, found.heads, len(found.windows)) == (made["vit_dim"], made["vit_heads"], made["vit_depth"])
    assert [i for i, window in enumerate(found.windows) if not window] == made["global_blocks"]
    assert set(found.windows) == {0, made["window"]}
    assert (found.side, found.patch, found.prompt_width) == (made["image"], made["patch"], made["prompt_dim"])
    assert (found.decoder_inner, found.iou_hidden) == (made["decoder_mlp"], made["iou_hidden"])
    assert (found.decoder_heads, found.mask_channels) == (made["decoder_heads"], made["mask_in_chans"])


@torch.no_grad()
def test_patches_are_the_authors(tiny: Tiny) -> None:
    tiny.check("sam_patch_embed_square", tiny.sam.image_encoder.patch_embed(tiny.pixels("square")))


@torch.no_grad()
def test_output_of_every_block_is_the_authors(tiny: Tiny) -> None:
    encoder, outputs = tiny.sam.image_encoder, []
    x = encoder.patch_embed(tiny.pixels("square")) + encoder.pos_embed
    for block in encoder.blocks:
        x = block(x)
        outputs.append(x[0])
    tiny.check("sam_block_outputs_square", torch.stack(outputs))


@pytest.mark.parametrize("image", IMAGES)
@torch.no_grad()
def test_image_embedding_is_the_authors(tiny: Tiny, image: str) -> None:
    tiny.check(f"sam_image_embedding_{image}", tiny.sam.image_encoder(tiny.pixels(image)))


@torch.no_grad()
def test_places_and_dense_tokens_are_the_authors(tiny: Tiny) -> None:
    tiny.check("dense_pe", tiny.sam.prompt_encoder.dense_places())
    tiny.check("dense_prompt_embedding_demo", tiny.sam.prompt_encoder.no_mask())
    tiny.check("sam_mask_dense", tiny.prompt(("mask",))[1])


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_native_prompt_tokens_are_the_authors(tiny: Tiny, prompt: str) -> None:
    tiny.check(f"sam_{prompt}_sparse", tiny.prompt(PROMPTS[prompt])[0])


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_masks_and_scores_of_native_prompts_are_the_authors(tiny: Tiny, prompt: str) -> None:
    embedding = tiny.sam.image_encoder(tiny.pixels("square"))
    sparse, dense = tiny.prompt(PROMPTS[prompt])
    logits, iou = tiny.sam.mask_decoder(embedding, tiny.sam.prompt_encoder.dense_places(), sparse, dense)
    tiny.check(f"sam_{prompt}_low_res_all4", logits)
    tiny.check(f"sam_{prompt}_iou_all4", iou)
