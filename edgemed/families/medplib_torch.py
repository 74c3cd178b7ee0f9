"""Build half of the medplib family: a published checkpoint -> encoders, projector, decoder and mask decoder in torch.

Covers the modules, which published keys become which of ours (query, key and value are one matrix here, gate and up
another), that every key of the checkpoint is used or known to be derived, and that every shape is what `config.json`
says. Does not cover reading files (`edgemed.checkpoints`), pixels, regions, text, or bringing masks back to the scan.

Source of the keys: github ShawnHuang497/MedPLIB at 5ab54bc; proven against tests/reference/medplib-tiny.
"""

from __future__ import annotations

import re
from dataclasses import asdict

import torch
from torch import Tensor, nn

from edgemed.checkpoints import Checkpoint, check_keys
from edgemed.errors import InvalidInput
from edgemed.families.medplib_config import (
    CLIP_PREFIX,
    COMPAT,
    FAMILY,
    MAX_EXAMPLES,
    LanguageConfig,
    MedplibConfig,
    read_config,
    read_preprocessor,
    read_tower_config,
)
from edgemed.families.medplib_view import view_of
from edgemed.families.published_tokenizer import convert
from edgemed.families.published_tokens import TOKENIZER, Generation
from edgemed.families.published_torch import Piece, Published, PublishedTensors
from edgemed.families.specs import decoder_spec
from edgemed.graphs import DimRange, GraphSpec, TensorSpec
from edgemed.models.clip_vit import ClipVit, ClipVitConfig
from edgemed.models.in_context import MaskTokenEncoder, TokenCompressor
from edgemed.models.llama import LlamaConfig
from edgemed.models.moe import MoeLlama
from edgemed.models.sam_med2d import ImageEncoder, PromptEncoder, SamMaskDecoder, SamMed2dConfig, config_from_shapes

MAX_REGIONS = 16
MAX_PROMPTS = 16
MAX_POINTS = 16
_GENERATION: Generation = "4.31"  # of the library whose tokenizer the released model was trained with

_SAM_PREFIX = "model.visual_model."
_HEAD = "lm_head.weight"
_INV_FREQ = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_DERIVED = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.(inv_freq|cos_cached|sin_cached)"
    rf"|{re.escape(CLIP_PREFIX)}embeddings\.position_ids"
    r"|model\.visual_model\.pixel_(mean|std)"
)
"""Buffers that some versions of the authors' libraries save; they are computed here."""
_INV_FREQ_TOLERANCE = 2**-7  # relative; bf16 rounds by up to 2 ** -9
_KEPT_FP32 = ("router.weight", "positional_encoding_gaussian_matrix")

# Per role, how our names begin and how the published ones do.
_PREFIXES = {
    "vision_encoder": (("clip.", CLIP_PREFIX), ("sam.", _SAM_PREFIX + "image_encoder.")),
    "projector": (
        ("image.", "model.mm_projector."),
        ("compressor.", "model.mm_token_compressor."),
        ("region.", "model.region_fea_adapter."),
        ("mask.", "model.mask_encoder."),
    ),
    "decoder": (("embedding.", "model.embed_tokens."), ("norm.", "model.norm."), ("head.", "lm_head.")),
    "mask_decoder": (
        ("seg.", "model.text_hidden_fcs.0."),
        ("prompts.", _SAM_PREFIX + "prompt_encoder."),
        ("decoder.", _SAM_PREFIX + "mask_decoder."),
    ),
}
_LAYER = {
    "attention_norm": "input_layernorm",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "down": "mlp.down_proj",
    "mlp.router": "mlp.deepspeed_moe.gate.wg",
}
"""Our part of a decoder layer -> the published one, where both are one matrix."""
_EXPERTS = "mlp.deepspeed_moe.experts.deepspeed_experts"


class VisionEncoder(nn.Module):
    """The two encoders of one picture, each with its own view of it."""

    def __init__(self, config: MedplibConfig, sam: SamMed2dConfig) -> None:
        super().__init__()
        t = config.tower
        self.select_layer = config.select_layer
        self.clip = ClipVit(
            ClipVitConfig(
                width=t.width, layers=t.layers, heads=t.heads, inner=t.inner, side=t.side_px, patch=t.patch_px,
                norm_eps=t.norm_eps,
            )
        )  # fmt: skip
        self.sam = ImageEncoder(sam)

    def forward(self, clip_image: Tensor, sam_image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (image_features [1, patches, tower width], mask_features [1, mask width, grid, grid], last_features).

        last_features [1, patches, tower width] leave the tower's last layer; image retrieval compares their mean.
        clip_image: [1, 3, 336, 336]; sam_image: [1, 3, 256, 256], both normalised, sizes as published.
        """
        features, last = self.clip.two_patch_features(clip_image, self.select_layer)
        return features, self.sam(sam_image), last


class Projector(nn.Module):
    """Tower features -> rows that the language model reads: of the picture, and one for each region asked about.

    A checkpoint may have two parts more: one averages the rows of a picture down, one gives rows of an example's mask.
    """

    def __init__(self, config: MedplibConfig) -> None:
        super().__init__()
        width = config.language.width
        layers: list[nn.Module] = [nn.Linear(config.tower.width, width)]
        for _ in range(config.projector_depth - 1):
            layers += [nn.GELU(), nn.Linear(width, width)]
        self.image = nn.Sequential(*layers)
        self.compressor = TokenCompressor(width, config.compressed_tokens) if config.compressed_tokens else None
        self.region = nn.Linear(config.tower.width, width)
        self.mask = MaskTokenEncoder(width, config.mask_tokens) if config.mask_tokens else None

    def forward(
        self, image_features: Tensor, region_weights: Tensor, mask_image: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return (image_tokens [tokens, width], region_tokens [regions, width]); mask_tokens [tokens, width] third.

        image_features: [1, patches, tower width]; region_weights: [regions, patches], the share of each patch in a
        region's mean, each region adding up to 1 (`medplib_view.region_weights`); mask_image: [1, 1, side, side], 0 or
        1, where there is a mask encoder.

        The published code adapts every patch and then takes the mean; the adapter is linear, so it comes after the mean
        here and has fewer rows to multiply.
        """
        features = image_features[0]
        tokens: Tensor = self.image(features)
        if self.compressor is not None:
            tokens = self.compressor(tokens[None])[0]
        mean = (region_weights.float() @ features.float()).to(features.dtype)  # fp32 as published
        if self.mask is None:
            return tokens, self.region(mean)
        return tokens, self.region(mean), self.mask(mask_image)[0]


class MaskDecoder(nn.Module):
    """`<SEG>` vectors, boxes, points and earlier masks, any of them absent, -> masks on one picture."""

    def __init__(self, config: MedplibConfig, sam: SamMed2dConfig) -> None:
        super().__init__()
        width = config.language.width
        self.seg = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.mask_width))
        self.prompts = PromptEncoder(sam)
        self.decoder = SamMaskDecoder(sam)

    def forward(
        self,
        mask_features: Tensor,
        seg_hidden: Tensor,
        has_seg: Tensor,
        boxes: Tensor,
        has_box: Tensor,
        points: Tensor,
        point_labels: Tensor,
        mask_prompts: Tensor,
        has_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return (mask_logits [prompts, masks, side, side], iou [prompts, masks]); mask 0 is the one for a `<SEG>`.

        mask_features [1, mask width, grid, grid]; seg_hidden [prompts, width], the hidden state that predicts `<SEG>`;
        boxes [prompts, 4] and points [prompts, points, 2] in pixels of SAM's square; point_labels int64 [prompts,
        points], 1 inside, 0 outside, -1 unused; mask_prompts [prompts, side, side] logits of an earlier mask; has_box,
        has_mask, has_seg [prompts], 0 or 1. A prompt that is absent changes nothing, whatever its values are.
        """
        count = boxes.shape[0]
        padding = self.prompts.not_a_point_embed.weight.expand(count, 1, -1)  # SAM adds it to points without a box
        named, corners = self.prompts.points(points, point_labels), self.prompts.boxes(boxes)
        sparse = torch.cat((named, padding, corners, self.seg(seg_hidden)[:, None]), dim=1)
        has_point = (point_labels >= 0).to(sparse.dtype)
        padded = has_point.amax(1) * (1 - has_box)
        present = torch.cat((has_point, torch.stack((padded, has_box, has_box, has_seg), dim=1)), dim=1)
        earlier = self.prompts.masks(mask_prompts[:, None])
        dense = torch.where(has_mask[:, None, None, None] > 0, earlier, self.prompts.no_mask())
        logits, iou = self.decoder(mask_features, self.prompts.dense_places(), sparse, dense, present)
        return logits, iou


class MedplibModel(nn.Module):
    """The four parts of one MedPLIB model, and the sizes that it was built from."""

    def __init__(self, config: MedplibConfig, sam: SamMed2dConfig) -> None:
        super().__init__()
        self.config = config
        self.sam = sam
        self.vision_encoder = VisionEncoder(config, sam)
        self.projector = Projector(config)
        self.decoder = MoeLlama(llama_config(config.language), config.language.experts)
        self.mask_decoder = MaskDecoder(config, sam)


def load(checkpoint: Checkpoint, compat: str = COMPAT[0], dtype: torch.dtype = torch.float32) -> MedplibModel:
    """Return the model in evaluation mode, its weights copied in `dtype`; router and places of prompts stay fp32.

    compat: one of `COMPAT`. They give the same modules: what differs lies in text, `<SEG>` position and masks.

    Raises InvalidInput naming the key where config and weights do not fit each other, or where `compat` is unknown.
    """
    if compat not in COMPAT:
        raise InvalidInput(f"compat is {compat!r}, expected one of {', '.join(COMPAT)}")
    model = build(*read_sizes(checkpoint))
    for role, tensors in published_tensors(checkpoint, model).items():
        state = {
            name: tensors[name].to(torch.float32 if name.endswith(_KEPT_FP32) else dtype, copy=True) for name in tensors
        }
        model.get_submodule(role).load_state_dict(state, assign=True)
    return model.eval()


def describe(checkpoint: Checkpoint, compat: str = COMPAT[0], cache: int | None = None) -> Published:
    """Return what the export and the torch back end need; of the weights only the rotary frequencies are read.

    compat: what an answer follows where the prompt does not say. cache: tokens of prompt and answer together, default
    the model's context.

    Raises InvalidInput naming the key where config, weights and tokenizer do not fit each other.
    """
    if compat not in COMPAT:
        raise InvalidInput(f"compat is {compat!r}, expected one of {', '.join(COMPAT)}")
    model = build(*read_sizes(checkpoint))
    config, sam = model.config, model.sam
    view, fell_back = view_of(
        read_preprocessor(checkpoint.folder, checkpoint.config), patch=config.tower.patch_px, sam_side=sam.side
    )
    if view.clip_side != config.tower.side_px:
        raise InvalidInput(
            f"preprocessor_config.json: crop_size is {view.clip_side}, expected the tower's image_size, "
            f"{config.tower.side_px}"
        )
    missing = (*config.fell_back, *(f"{key} of preprocessor_config.json" for key in fell_back))
    return Published(
        family=FAMILY,
        specs=specs(config, sam, cache or config.language.context),
        files={TOKENIZER: convert(checkpoint.folder, _GENERATION).encode()},
        settings={"compat": compat, "view": asdict(view)},
        notes=(*(f"config.json lacks {key}; the published value is used" for key in missing), *config.notes),
        modules=dict(model.named_children()),
        tensors=published_tensors(checkpoint, model),
        decoder=model.decoder.config,
        experts=config.language.experts,
        kept_fp32=_KEPT_FP32,
    )


def specs(config: MedplibConfig, sam: SamMed2dConfig, cache: int) -> dict[str, GraphSpec]:
    """Return the GraphSpecs of the four graphs, by role."""
    f, t = "float32", TensorSpec
    width, patches, side = config.language.width, config.patches, config.tower.side_px
    tokens, mask_tokens = config.image_tokens, config.mask_tokens
    examples = MAX_EXAMPLES * (tokens + max(tokens, mask_tokens or 0))
    mask_in = (t("mask_image", f, (1, 1, side, side)),) if mask_tokens else ()
    mask_out = (t("mask_tokens", f, (mask_tokens, width)),) if mask_tokens else ()
    features = t("image_features", f, (1, patches, config.tower.width))
    masks = t("mask_features", f, (1, config.mask_width, sam.grid, sam.grid))
    regions = DimRange(1, 1, MAX_REGIONS)
    low = sam.mask_side
    return {
        "vision_encoder": GraphSpec(
            "vision_encoder",
            (
                t("clip_image", f, (1, 3, side, side)),
                t("sam_image", f, (1, 3, sam.side, sam.side)),
            ),
            (features, masks, t("last_features", f, (1, patches, config.tower.width))),
        ),
        "projector": GraphSpec(
            "projector",
            (features, t("region_weights", f, ("regions", patches)), *mask_in),
            (t("image_tokens", f, (tokens, width)), t("region_tokens", f, ("regions", width)), *mask_out),
            {"regions": regions},
        ),
        "decoder": decoder_spec(
            llama_config(config.language),
            image_rows=DimRange(1, tokens, max(tokens + MAX_REGIONS, min(tokens + examples, cache))),
            cache=cache,
            draft=False,
            experts=config.language.experts,
        ),
        "mask_decoder": GraphSpec(
            "mask_decoder",
            (
                masks,
                t("seg_hidden", f, ("prompts", width)),
                t("has_seg", f, ("prompts",)),
                t("boxes", f, ("prompts", 4)),
                t("has_box", f, ("prompts",)),
                t("points", f, ("prompts", "points", 2)),
                t("point_labels", "int64", ("prompts", "points")),
                t("mask_prompts", f, ("prompts", low, low)),
                t("has_mask", f, ("prompts",)),
            ),
            (
                t("mask_logits", f, ("prompts", sam.mask_tokens, low, low)),
                t("iou", f, ("prompts", sam.mask_tokens)),
            ),
            {"prompts": DimRange(1, 1, MAX_PROMPTS), "points": DimRange(1, 1, MAX_POINTS)},
        ),
    }


def read_sizes(checkpoint: Checkpoint) -> tuple[MedplibConfig, SamMed2dConfig]:
    """Return what config.json says, and the sizes of SAM-Med2D, which only its tensors' shapes tell.

    Raises InvalidInput naming the key where one of them is wrong or they do not fit each other.
    """
    shapes = {name: tuple(checkpoint.shape(name)) for name in checkpoint.names}
    config = read_config(checkpoint.config, read_tower_config(checkpoint.folder, checkpoint.config), shapes)
    sam = config_from_shapes({n.removeprefix(_SAM_PREFIX): s for n, s in shapes.items() if n.startswith(_SAM_PREFIX)})
    if config.mask_width != sam.prompt_width:
        raise InvalidInput(
            f"config.json: out_dim is {config.mask_width}, expected the width of SAM's prompts, {sam.prompt_width}"
        )
    return config, sam


def build(config: MedplibConfig, sam: SamMed2dConfig) -> MedplibModel:
    """Return the modules without memory for their weights (on torch's meta device)."""
    with torch.device("meta"):
        return MedplibModel(config, sam)


def llama_config(language: LanguageConfig) -> LlamaConfig:
    """Return the decoder's sizes: no coordinate tokens, no box draft."""
    c = language
    return LlamaConfig(
        vocabulary=c.vocabulary, width=c.width, layers=c.layers, heads=c.heads, kv_heads=c.kv_heads,
        head_dim=c.head_dim, inner=c.inner, rope_theta=c.rope_theta, norm_eps=c.norm_eps, tied=c.tied, bins=0,
    )  # fmt: skip


def published_tensors(checkpoint: Checkpoint, model: MedplibModel) -> dict[str, PublishedTensors]:
    """Return the weights by role, under our names, after keys and shapes of the whole checkpoint were checked.

    model: what `build` gives. Only the rotary frequencies are read yet. Raises InvalidInput naming the first key that
    is missing, unknown, of another shape, or not the frequencies that `rope_theta` gives.
    """
    pieces = key_table(model)
    expected = {p.key: p.shape for own in pieces.values() for group in own.values() for p in group}
    ignorable = {name for name in checkpoint.names if _DERIVED.fullmatch(name)}
    if model.config.language.tied:
        ignorable.add(_HEAD)
    check_keys(checkpoint.names, expected, ignorable)
    for key, shape in expected.items():
        found = tuple(checkpoint.shape(key))
        if found != shape:
            raise InvalidInput(f"the checkpoint's {key} is {list(found)}, expected {list(shape)} by config.json")
    _check_frequencies(checkpoint, model.config.language)
    return {role: PublishedTensors(checkpoint, own) for role, own in pieces.items()}


def key_table(model: MedplibModel) -> dict[str, dict[str, tuple[Piece, ...]]]:
    """Return role -> our name of a weight -> the published tensors it is put together from, in order."""
    return {
        role: {
            name: _pieces(role, name, tuple(weight.shape), model.config.language)
            for name, weight in module.state_dict().items()
        }
        for role, module in model.named_children()
    }


def _pieces(role: str, name: str, shape: tuple[int, ...], language: LanguageConfig) -> tuple[Piece, ...]:
    c = language
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name) if role == "decoder" else None
    if layer is None:
        ours, published = next(pair for pair in _PREFIXES[role] if name.startswith(pair[0]))
        return (Piece(published + name.removeprefix(ours), shape),)
    prefix, part = f"model.layers.{layer[1]}.", layer[2]
    if part == "qkv":
        rows = (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads))
        return tuple(Piece(f"{prefix}self_attn.{k}_proj.weight", (n * c.head_dim, c.width)) for k, n in rows)
    if part in _LAYER:
        return (Piece(f"{prefix}{_LAYER[part]}.weight", shape),)
    expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(.+)", part)
    inside = f"{prefix}mlp" if expert is None else f"{prefix}{_EXPERTS}.{expert[1]}"
    if part.endswith("down"):
        return (Piece(f"{inside}.down_proj.weight", shape),)
    return tuple(Piece(f"{inside}.{k}_proj.weight", (c.inner, c.width)) for k in ("gate", "up"))


def _check_frequencies(checkpoint: Checkpoint, language: LanguageConfig) -> None:
    """Raise InvalidInput if the checkpoint's own rotary frequencies are not those of `rope_theta`."""
    c = language
    expected = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    for name in checkpoint.names:
        if not _INV_FREQ.fullmatch(name):
            continue
        stored = PublishedTensors(checkpoint, {name: (Piece(name, tuple(expected.shape)),)})[name].double()
        if stored.shape != expected.shape or not torch.allclose(stored, expected, rtol=_INV_FREQ_TOLERANCE, atol=0.0):
            raise InvalidInput(
                f"the checkpoint's {name} does not hold the {len(expected)} frequencies of rope_theta "
                f"{c.rope_theta:g}; config.json lacks what scales them"
            )
