"""Build half of the medrega family: a published checkpoint -> vision encoder, projector and decoder in torch.

Covers which published key becomes which of ours (query, key and value are one matrix here, gate and up another), that
every key of the checkpoint is used or known to be derived, and that every shape is what `config.json` says. Does not
cover reading files (`edgemed.checkpoints`), pixels or text.

Source of the keys: github xmed-lab/MedRegA at dfdb0db; proven against tests/reference/medrega-tiny.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from edgemed.checkpoints import Checkpoint, check_keys
from edgemed.errors import InvalidInput
from edgemed.families.medrega_config import FAMILY, LanguageConfig, MedRegaConfig, read_config
from edgemed.families.published_tokenizer import convert
from edgemed.families.published_tokens import TOKENIZER, Generation
from edgemed.families.published_torch import Piece, Published, PublishedTensors
from edgemed.families.specs import decoder_spec
from edgemed.graphs import DimRange, GraphSpec, TensorSpec
from edgemed.models.intern_vit import InternViT, InternViTConfig
from edgemed.models.llama import Llama, LlamaConfig
from edgemed.models.pixel_shuffle_projector import PixelShuffleProjector

COMPAT = ("reference", "corrected")
"""Values of `compat`. They give the same modules: what differs lies in the pixels, the text and the boxes."""

MAX_TILES = 16
"""Tiles of one question, all its images together."""
_TEMPLATE = "Hermes-2"
_GENERATION: Generation = "4.37"  # of the library whose tokenizer the released model was trained and shown with

_DERIVED = re.compile(r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Buffers that some versions of the authors' libraries save; they follow from rope_theta."""
_EMBEDDING = "language_model.model.embed_tokens.weight"
_HEAD = "language_model.lm_head.weight"

# Per role, our part of a name and the published one, in the order in which `_renamed` tries them.
_VISION = (
    ("embeddings.class_token", "embeddings.class_embedding"),
    ("embeddings.position", "embeddings.position_embedding"),
    ("embeddings.patch.", "embeddings.patch_embedding."),
    (".fc1.", ".mlp.fc1."),
    (".fc2.", ".mlp.fc2."),
    ("layers.", "encoder.layers."),
)
_PROJECTOR = (("norm.", "0."), ("fc1.", "1."), ("fc2.", "3."))
_DECODER = (
    ("embedding.", "model.embed_tokens."),
    ("head.", "lm_head."),
    (".attention_norm.", ".input_layernorm."),
    (".mlp_norm.", ".post_attention_layernorm."),
    (".out.", ".self_attn.o_proj."),
    (".down.", ".mlp.down_proj."),
    ("layers.", "model.layers."),
    ("norm.", "model.norm."),
)


class MedRegaModel(nn.Module):
    """The three parts of one MedRegA model, and what its `config.json` says."""

    def __init__(
        self, config: MedRegaConfig, vision_encoder: InternViT, projector: PixelShuffleProjector, decoder: Llama
    ) -> None:
        super().__init__()
        self.config = config
        self.vision_encoder = vision_encoder
        self.projector = projector
        self.decoder = decoder


def load(checkpoint: Checkpoint, compat: str = "reference", dtype: torch.dtype = torch.float32) -> MedRegaModel:
    """Return the model in evaluation mode, its weights copied in `dtype`.

    Raises InvalidInput naming the key where config and weights do not fit each other, or where `compat` is unknown.
    """
    if compat not in COMPAT:
        raise InvalidInput(f"compat is {compat!r}, expected one of {', '.join(COMPAT)}")
    config = read_config(checkpoint.config)
    modules = build(config)
    for role, tensors in published_tensors(checkpoint, config).items():
        state = {name: tensors[name].to(dtype, copy=True) for name in tensors}
        modules.get_submodule(role).load_state_dict(state, assign=True)
    return modules.eval()


def describe(checkpoint: Checkpoint, compat: str = "reference", cache: int | None = None) -> Published:
    """Return what the export and the torch back end need; no weight is read.

    compat: what an answer follows where the prompt does not say. cache: tokens of prompt and answer together, default
    the model's context.

    Raises InvalidInput naming the key where config, weights and tokenizer do not fit each other, or this version lacks
    what the config asks for.
    """
    if compat not in COMPAT:
        raise InvalidInput(f"compat is {compat!r}, expected one of {', '.join(COMPAT)}")
    config = read_config(checkpoint.config)
    if config.template != _TEMPLATE:
        raise InvalidInput(f"config.json: template is {config.template!r}, expected {_TEMPLATE!r}")
    modules = build(config)
    settings = {
        "compat": compat,
        "image_tokens": config.tile_tokens,
        "view": {
            "side": config.side_px,
            "pad_to_square": config.pad_to_square,
            "tiled": config.tiled,
            "min_tiles": config.min_tiles,
            "max_tiles": config.max_tiles,
            "thumbnail": config.thumbnail,
        },
    }
    return Published(
        family=FAMILY,
        specs=specs(config, cache or config.language.context),
        files={TOKENIZER: convert(checkpoint.folder, _GENERATION).encode()},
        settings=settings,
        notes=tuple(f"config.json lacks {key}; the published value is used" for key in config.fell_back),
        modules=dict(modules.named_children()),
        tensors=published_tensors(checkpoint, config),
        decoder=modules.decoder.config,
        experts=(1,) * config.language.layers,
    )


def specs(config: MedRegaConfig, cache: int) -> dict[str, GraphSpec]:
    """Return the GraphSpecs of the three graphs, by role."""
    f, t = "float32", TensorSpec
    patches = (config.side_px // config.vision.patch_px) ** 2
    features = t("image_features", f, ("tiles", patches, config.vision.width))
    tiles = DimRange(1, 1, MAX_TILES)
    rows = DimRange(config.tile_tokens, config.tile_tokens, config.tile_tokens * MAX_TILES)
    image = t("image", f, ("tiles", 3, config.side_px, config.side_px))
    tokens = t("image_tokens", f, ("rows", config.language.width))
    any_rows = DimRange(1, rows.opt, rows.max)
    return {
        "vision_encoder": GraphSpec("vision_encoder", (image,), (features,), {"tiles": tiles}),
        "projector": GraphSpec("projector", (features,), (tokens,), {"tiles": tiles, "rows": rows}),
        "decoder": decoder_spec(llama_config(config.language), image_rows=any_rows, cache=cache, draft=False),
    }


def build(config: MedRegaConfig) -> MedRegaModel:
    """Return the modules without memory for their weights (on torch's meta device)."""
    v, c = config.vision, config.language
    vision = InternViTConfig(
        width=v.width, layers=v.layers, heads=v.heads, inner=v.inner, patch_px=v.patch_px, side_px=v.side_px,
        norm_eps=v.norm_eps, qkv_bias=v.qkv_bias, qk_norm=v.qk_norm, run_layers=config.run_layers,
    )  # fmt: skip
    with torch.device("meta"):
        return MedRegaModel(
            config,
            InternViT(vision),
            PixelShuffleProjector(v.width, c.width, config.fold, config.pixel_shuffle),
            Llama(llama_config(c)),
        )


def llama_config(language: LanguageConfig) -> LlamaConfig:
    """Return the decoder's sizes: no coordinate tokens, no box draft."""
    c = language
    return LlamaConfig(
        vocabulary=c.vocabulary, width=c.width, layers=c.layers, heads=c.heads, kv_heads=c.kv_heads,
        head_dim=c.head_dim, inner=c.inner, rope_theta=c.rope_theta, norm_eps=c.norm_eps, tied=c.tied, bins=0,
    )  # fmt: skip


def published_tensors(checkpoint: Checkpoint, config: MedRegaConfig) -> dict[str, PublishedTensors]:
    """Return the weights by role, under our names, after keys and shapes of the whole checkpoint were checked.

    Nothing is read yet. Raises InvalidInput naming the first key that is missing, unknown or of another shape.
    """
    pieces = key_table(config)
    expected = {p.key: p.shape for own in pieces.values() for group in own.values() for p in group}
    ignorable = {name for name in checkpoint.names if _DERIVED.fullmatch(name)}
    if config.language.tied:
        ignorable.add(_HEAD)
    check_keys(checkpoint.names, expected, ignorable)
    for key, shape in expected.items():
        found = tuple(checkpoint.shape(key))
        if found != shape:
            raise InvalidInput(
                f"the checkpoint's {key} is {list(found)}, expected {list(shape)} by config.json"
                + (f" (llm_config.vocab_size {shape[0]})" if key in (_EMBEDDING, _HEAD) else "")
            )
    return {role: PublishedTensors(checkpoint, own) for role, own in pieces.items()}


def key_table(config: MedRegaConfig) -> dict[str, dict[str, tuple[Piece, ...]]]:
    """Return role -> our name of a weight -> the published tensors it is put together from, in order."""
    table: dict[str, dict[str, tuple[Piece, ...]]] = {}
    for role, module in build(config).named_children():
        table[role] = {
            name: _pieces(role, name, tuple(weight.shape), config) for name, weight in module.state_dict().items()
        }
    return table


def _pieces(role: str, name: str, shape: tuple[int, ...], config: MedRegaConfig) -> tuple[Piece, ...]:
    c = config.language
    if role == "vision_encoder":
        return (Piece("vision_model." + _renamed(name, _VISION), shape),)
    if role == "projector":
        return (Piece("mlp1." + _renamed(name, _PROJECTOR), shape),)
    layer, _, fused = name.removesuffix(".weight").rpartition(".")
    prefix = f"language_model.model.{layer}."
    if fused == "qkv":
        rows = (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads))
        return tuple(Piece(f"{prefix}self_attn.{k}_proj.weight", (n * c.head_dim, c.width)) for k, n in rows)
    if fused == "gate_up":
        return tuple(Piece(f"{prefix}mlp.{k}_proj.weight", (c.inner, c.width)) for k in ("gate", "up"))
    return (Piece("language_model." + _renamed(name, _DECODER), shape),)


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """Return `name` with our parts replaced by the published ones.

    A part that starts with a dot may stand anywhere, any other one only at the start of the name.
    """
    for ours, published in pairs:
        if ours.startswith("."):
            name = name.replace(ours, published)
        elif name.startswith(ours):
            return published + name.removeprefix(ours)
    return name
