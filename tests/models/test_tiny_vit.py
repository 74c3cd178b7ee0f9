"""The image encoder against a plain restatement, and the published weights' names."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemed.models.tiny_vit import (
    ChannelNorm,
    TinyViT,
    WindowBlock,
    fold_batch_norms,
    from_lite_medsam,
)


def randomise(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.3)
    return module.eval()


def plain_block(w: dict[str, Tensor], x: Tensor, heads: int, side: int) -> Tensor:
    """One window block, window by window, head by head and query by query, float64. x: [rows, columns, width]."""
    rows, columns, width = x.shape
    x = x.double()
    w = {k: v.double() for k, v in w.items()}
    depth = width // heads
    tall, wide = -(-rows // side) * side, -(-columns // side) * side
    padded = torch.zeros(tall, wide, width, dtype=torch.float64)  # zeros that the norm turns into its bias
    padded[:rows, :columns] = x
    mixed = torch.zeros_like(padded)
    for top, left in itertools.product(range(0, tall, side), range(0, wide, side)):
        places = [(top + i, left + j) for i in range(side) for j in range(side)]
        tokens = torch.stack([padded[p] for p in places])
        normed = F.layer_norm(tokens, (width,), w["attn.norm.weight"], w["attn.norm.bias"])
        qkv = normed @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]
        out = torch.zeros(len(places), width, dtype=torch.float64)
        for h in range(heads):
            q, k, v = (qkv[:, h * 3 * depth + part * depth :][:, :depth] for part in range(3))
            for i, a in enumerate(places):
                bias = torch.stack([w["attn.attention_biases"][h, abs(a[0] - b[0]) * side + abs(a[1] - b[1])]
                                    for b in places])  # fmt: skip
                weights = (q[i] @ k.T / depth**0.5 + bias).softmax(0)
                out[i, h * depth : (h + 1) * depth] = weights @ v
        out = out @ w["attn.proj.weight"].T + w["attn.proj.bias"]
        for place, value in zip(places, out, strict=True):
            mixed[place] = value
    x = x + mixed[:rows, :columns]
    x = F.conv2d(x.permute(2, 0, 1)[None], w["local_conv.weight"], w["local_conv.bias"], padding=1, groups=width)
    x = x[0].permute(1, 2, 0)
    normed = F.layer_norm(x, (width,), w["mlp.norm.weight"], w["mlp.norm.bias"])
    inner = F.gelu(normed @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
    return x + inner @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]


@pytest.mark.parametrize(("rows", "columns"), [(8, 4), (6, 5)], ids=["whole windows", "padded windows"])
def test_a_window_block_does_what_its_equations_say(rows: int, columns: int) -> None:
    block = randomise(WindowBlock(12, heads=3, window=4))
    x = torch.randn(2, rows, columns, 12)
    with torch.no_grad():
        found = block(x)
    for picture, out in zip(x, found, strict=True):
        expected = plain_block(block.state_dict(), picture, heads=3, side=4)
        assert torch.allclose(out.double(), expected, atol=1e-5)


def test_channel_norm_is_layer_norm_over_channels() -> None:
    norm = randomise(ChannelNorm(6))
    x = torch.randn(2, 6, 3, 4)
    expected = F.layer_norm(x.permute(0, 2, 3, 1), (6,), norm.weight, norm.bias, 1e-6).permute(0, 3, 1, 2)
    assert torch.allclose(norm(x), expected, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_folded_batch_norm_changes_nothing(groups: int) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 8, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(8).eval()
    with torch.no_grad():
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.running_var.uniform_(0.1, 3)  # type: ignore[union-attr]
        norm.weight.normal_()
        norm.bias.normal_()
    state = {f"a.b.c.{k}": v for k, v in conv.state_dict().items()}
    state |= {f"a.b.bn.{k}": v for k, v in norm.state_dict().items()} | {"other.weight": torch.ones(1)}
    folded = fold_batch_norms(state)
    assert set(folded) == {"a.b.weight", "a.b.bias", "other.weight"}
    x = torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        expected = norm(conv(x))
        found = F.conv2d(x, folded["a.b.weight"], folded["a.b.bias"], padding=1, groups=groups)
    assert torch.allclose(found, expected, atol=1e-5)


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return our state under the published names, each convolution with a batch norm that changes nothing."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.replace("patch_embed.conv1", "patch_embed.seq.0").replace("patch_embed.conv2", "patch_embed.seq.2")
        stem, kind = name.rsplit(".", 1)
        convolution = ("conv" in key or "patch_embed" in key) and "neck" not in key
        if not convolution:
            out[name] = value
        elif kind == "weight":
            out[f"{stem}.c.weight"] = value
            out[f"{stem}.bn.weight"] = torch.ones(value.shape[0])
            out[f"{stem}.bn.running_mean"] = torch.zeros(value.shape[0])
            out[f"{stem}.bn.running_var"] = torch.ones(value.shape[0]) - 1e-5
        else:
            out[f"{stem}.bn.bias"] = value
    return {f"image_encoder.{k}": v for k, v in out.items()} | {"mask_decoder.iou_token.weight": torch.zeros(1)}


def test_every_published_weight_of_the_encoder_finds_its_place() -> None:
    model = randomise(TinyViT())
    names = published(model.state_dict())
    assert {
        "image_encoder.patch_embed.seq.2.c.weight",
        "image_encoder.layers.0.blocks.1.conv3.bn.running_var",
        "image_encoder.layers.1.blocks.0.attn.attention_biases",
        "image_encoder.layers.2.blocks.5.local_conv.c.weight",
        "image_encoder.layers.3.blocks.1.mlp.fc2.bias",
        "image_encoder.layers.2.downsample.conv2.bn.bias",
        "image_encoder.neck.3.bias",
    } <= set(names)
    loaded = from_lite_medsam(names).state_dict()
    for key, value in model.state_dict().items():
        assert torch.allclose(loaded[key], value, atol=1e-6), key
    del names["image_encoder.neck.3.bias"]
    with pytest.raises(RuntimeError, match=r"neck\.3\.bias"):
        from_lite_medsam(names)


@pytest.mark.slow
def test_an_image_becomes_a_map_of_64_by_64() -> None:
    with torch.no_grad():
        out = TinyViT().eval()(torch.rand(1, 3, 256, 256))
    assert out.shape == (1, 256, 64, 64)
