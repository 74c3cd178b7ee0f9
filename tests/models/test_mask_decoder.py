"""The mask decoder: absent prompts change nothing, every published weight finds its place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from edgemed.models.mask_decoder import Attention, MaskDecoder, Perceptron, from_lite_medsam

WIDTH = 24


@pytest.fixture(scope="module")
def decoder() -> MaskDecoder:
    torch.manual_seed(0)
    model = MaskDecoder(WIDTH).eval()
    with torch.no_grad():
        model.frequencies.normal_()
        for p in model.parameters():
            if p.ndim == 1 or not p.any():
                p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture(scope="module")
def features() -> Tensor:
    return torch.randn(1, 256, 64, 64, generator=torch.Generator().manual_seed(1))


def prompts(count: int = 1, points: int = 1) -> dict[str, Tensor]:
    """Return feeds in which nothing is present."""
    return {
        "boxes": torch.zeros(count, 4),
        "has_box": torch.zeros(count),
        "points": torch.zeros(count, points, 2),
        "point_labels": torch.full((count, points), -1),
        "mask_prompts": torch.zeros(count, 256, 256),
        "has_mask": torch.zeros(count),
        "seg_hidden": torch.zeros(count, WIDTH),
        "has_seg": torch.zeros(count),
    }


BOX = {"boxes": torch.tensor([[30.0, 40.0, 120.0, 160.0]]), "has_box": torch.ones(1)}


@torch.no_grad()
def run(decoder: MaskDecoder, features: Tensor, feeds: dict[str, Tensor]) -> Tensor:
    logits, iou = decoder(features, **feeds)
    assert logits.shape == (len(iou), 256, 256)
    return torch.cat([logits.flatten(1), iou[:, None]], dim=1)


def test_absent_prompts_change_nothing(decoder: MaskDecoder, features: Tensor) -> None:
    alone = run(decoder, features, prompts() | BOX)
    absent = {
        "points": torch.rand(1, 3, 2) * 256,
        "point_labels": torch.full((1, 3), -1),
        "mask_prompts": torch.randn(1, 256, 256),
        "seg_hidden": torch.randn(1, WIDTH),
    }
    assert torch.allclose(run(decoder, features, prompts() | BOX | absent), alone, atol=1e-4)


@pytest.mark.parametrize(
    "present",
    [
        {"points": torch.full((1, 1, 2), 80.0), "point_labels": torch.ones(1, 1, dtype=torch.int64)},
        {"mask_prompts": torch.full((1, 256, 256), 3.0), "has_mask": torch.ones(1)},
        {"seg_hidden": torch.linspace(-1, 1, WIDTH)[None], "has_seg": torch.ones(1)},
        {"has_box": torch.zeros(1)},
    ],
    ids=["point", "mask", "seg", "no box"],
)
def test_present_prompts_change_something(decoder: MaskDecoder, features: Tensor, present: dict[str, Tensor]) -> None:
    alone = run(decoder, features, prompts() | BOX)
    assert (run(decoder, features, prompts() | BOX | present) - alone).abs().max() > 1e-3


def test_prompts_of_one_call_do_not_touch_each_other(decoder: MaskDecoder, features: Tensor) -> None:
    alone = run(decoder, features, prompts() | BOX)
    both = prompts(2, points=2)
    both["boxes"][0], both["has_box"][0] = BOX["boxes"][0], 1
    both["points"][1], both["point_labels"][1] = 99.0, torch.tensor([1, 0])
    both["seg_hidden"][1], both["has_seg"][1] = torch.randn(WIDTH), 1
    assert torch.allclose(run(decoder, features, both)[0], alone[0], atol=1e-4)


def test_attention_may_be_narrower_than_its_channels() -> None:
    torch.manual_seed(0)
    attention = Attention(128)
    q, k = torch.randn(2, 3, 256), torch.randn(2, 5, 256)
    found = attention(q, k, k)
    queries, keys, values = (p(t) for p, t in ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, k)))
    heads = []
    for h in range(8):
        part = slice(16 * h, 16 * h + 16)
        weights = (queries[..., part] @ keys[..., part].transpose(1, 2) / 4).softmax(-1)
        heads.append(weights @ values[..., part])
    assert torch.allclose(found, attention.out_proj(torch.cat(heads, -1)), atol=1e-5)


def test_a_perceptron_has_relu_between_its_layers_only() -> None:
    torch.manual_seed(0)
    mlp = Perceptron(4, 6, 6, 2)
    x = torch.randn(3, 4)
    a, b, c = mlp.layers
    assert torch.equal(mlp(x), c(F.relu(b(F.relu(a(x))))))


def published(decoder: MaskDecoder) -> dict[str, Tensor]:
    """Return the decoder's weights under the published names, with those of the published one that ours leaves out."""
    prefixes = {
        "mask_downscaling.": "prompt_encoder.mask_downscaling.",
        "blocks.": "mask_decoder.transformer.layers.",
        "final_attn.": "mask_decoder.transformer.final_attn_token_to_image.",
        "final_norm.": "mask_decoder.transformer.norm_final_attn.",
        "upscaling.": "mask_decoder.output_upscaling.",
        "hypernetwork.": "mask_decoder.output_hypernetworks_mlps.0.",
    }
    own = decoder.state_dict()
    state = {new + k[len(old) :]: v for k, v in own.items() for old, new in prefixes.items() if k.startswith(old)}
    state |= {k.replace("hypernetworks_mlps.0", f"hypernetworks_mlps.{i}"): v + 1
              for k, v in state.items() if "hypernetworks" in k for i in (1, 2, 3)}  # fmt: skip
    for key in (k for k in own if k.startswith("iou_head.")):
        value = own[key]
        four = torch.cat([value, value + 1, value + 2, value + 3]) if ".2." in key else value
        state[key.replace("iou_head.", "mask_decoder.iou_prediction_head.")] = four
    state["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"] = own["frequencies"]
    state["mask_decoder.iou_token.weight"] = own["iou_token"]
    state["mask_decoder.mask_tokens.weight"] = own["mask_tokens"]
    state["prompt_encoder.not_a_point_embed.weight"] = own["not_a_point"][None]
    state["prompt_encoder.no_mask_embed.weight"] = own["no_mask"][None]
    for i, row in enumerate(own["point_embeddings"]):
        state[f"prompt_encoder.point_embeddings.{i}.weight"] = row[None]
    return state | {"image_encoder.neck.0.weight": torch.zeros(1)}


def test_every_published_weight_of_the_decoder_finds_its_place(decoder: MaskDecoder) -> None:
    state = published(decoder)
    loaded = from_lite_medsam(state, WIDTH).state_dict()
    for key, value in decoder.state_dict().items():
        assert key.startswith("seg_projection.") or torch.equal(loaded[key], value), key
    with pytest.raises(ValueError, match="does not fit: missing"):
        from_lite_medsam({k: v for k, v in state.items() if "final_attn" not in k}, WIDTH)
