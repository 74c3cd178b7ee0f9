"""The `config.json` of a MedRegA checkpoint as a typed value.

Covers every key that changes what is computed; keys that only concern training are not read. A key that is missing (or
null) falls back to what was published for the released model and is named in `MedRegaConfig.fell_back`, so that the
export can say so. Nothing here needs torch.

Source of the keys and the published values: github xmed-lab/MedRegA at dfdb0db. Older revisions lack `template`,
`ps_version` and `select_layer`; the published values then hold, not the defaults of the authors' config class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from edgemed.families.published_config import Keys, check_family, wrong

FAMILY = "medrega"
MODEL_TYPE = "internvl_chat"
"""What `model_type` of the published config holds."""

_ARCHITECTURE = "InternVLChatModel"
_VISION = "vision_config."
_LANGUAGE = "llm_config."


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the image encoder. `side_px` is the side that its position table was made for."""

    width: int
    layers: int
    heads: int
    inner: int
    patch_px: int
    side_px: int
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Sizes of the language model. `context` is the longest sequence in tokens."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    rope_theta: float
    norm_eps: float
    tied: bool
    context: int


@dataclass(frozen=True, kw_only=True)
class MedRegaConfig:
    """A MedRegA checkpoint.

    side_px: the side of the square picture that the encoder gets. run_layers: layers of the encoder that run before the
    feature is taken. fold: patches are folded fold x fold into one image token. min_tiles, max_tiles, thumbnail: how a
    picture is cut if `tiled`. fell_back: the keys that were missing, in the order they were looked up.
    """

    vision: VisionConfig
    language: LanguageConfig
    side_px: int
    run_layers: int
    fold: int
    pixel_shuffle: Literal["v1", "v2"]
    template: str
    pad_to_square: bool
    tiled: bool
    thumbnail: bool
    min_tiles: int
    max_tiles: int
    fell_back: tuple[str, ...]

    @property
    def tile_tokens(self) -> int:
        """Image tokens of one tile: 256 for the released model."""
        return (self.side_px // self.vision.patch_px // self.fold) ** 2


def read_config(config: Mapping[str, Any]) -> MedRegaConfig:
    """Return the typed form of a checkpoint's `config.json`.

    Raises InvalidInput, naming the key, where the file is of another family, a value is of the wrong kind, sizes do not
    fit each other, or something is asked for that the published architecture does not have.
    """
    check_family(config, MODEL_TYPE, _ARCHITECTURE, "MedRegA")
    keys = Keys(config)
    vision = _vision(keys)
    language = _language(keys)
    side_px = keys.positive("force_image_size", vision.side_px)
    select = keys.get("select_layer", -1)
    run_layers = select if select >= 0 else vision.layers + 1 + select
    version = keys.get("ps_version", "v1")
    ratio = keys.get("downsample_ratio", 0.5)
    if not 0 <= run_layers <= vision.layers:
        raise wrong("select_layer", select, f"one of -{vision.layers + 1}..{vision.layers}")
    if version not in ("v1", "v2"):
        raise wrong("ps_version", version, "'v1' or 'v2'")
    if not 0 < ratio <= 1 or abs(1 / ratio - round(1 / ratio)) > 1e-6:
        raise wrong("downsample_ratio", ratio, "1 divided by a whole number")
    fold = round(1 / ratio)
    if side_px % (vision.patch_px * fold):
        raise wrong("force_image_size", side_px, f"a multiple of {vision.patch_px * fold} (patch_size x {fold})")
    min_tiles, max_tiles = keys.positive("min_dynamic_patch", 1), keys.positive("max_dynamic_patch", 6)
    if min_tiles > max_tiles:
        raise wrong("min_dynamic_patch", min_tiles, f"at most max_dynamic_patch, {max_tiles}")
    return MedRegaConfig(
        vision=vision,
        language=language,
        side_px=side_px,
        run_layers=run_layers,
        fold=fold,
        pixel_shuffle=cast('Literal["v1", "v2"]', version),
        template=keys.get("template", "Hermes-2"),
        pad_to_square=keys.get("pad2square", False),
        tiled=keys.get("dynamic_image_size", False),
        thumbnail=keys.get("use_thumbnail", False),
        min_tiles=min_tiles,
        max_tiles=max_tiles,
        fell_back=tuple(keys.fell_back),
    )


def _vision(keys: Keys) -> VisionConfig:
    p = _VISION
    keys.must_be(p + "hidden_act", "gelu")
    keys.must_be(p + "num_channels", 3)
    keys.must_be(p + "norm_type", "rms_norm")
    vision = VisionConfig(
        width=keys.positive(p + "hidden_size", 3200),
        layers=keys.positive(p + "num_hidden_layers", 45),
        heads=keys.positive(p + "num_attention_heads", 25),
        inner=keys.positive(p + "intermediate_size", 12800),
        patch_px=keys.positive(p + "patch_size", 14),
        side_px=keys.positive(p + "image_size", 448),
        norm_eps=keys.positive(p + "layer_norm_eps", 1e-6),
        qkv_bias=keys.get(p + "qkv_bias", False),
        qk_norm=keys.get(p + "qk_normalization", True),
    )
    keys.divides(p + "num_attention_heads", vision.heads, p + "hidden_size", vision.width)
    keys.divides(p + "patch_size", vision.patch_px, p + "image_size", vision.side_px)
    return vision


def _language(keys: Keys) -> LanguageConfig:
    p = _LANGUAGE
    keys.must_be(p + "hidden_act", "silu")
    keys.must_be(p + "attention_bias", False)
    keys.must_be(p + "mlp_bias", False)
    keys.must_be(p + "rope_scaling", None)
    width, heads = keys.positive(p + "hidden_size", 7168), keys.positive(p + "num_attention_heads", 56)
    language = LanguageConfig(
        vocabulary=keys.positive(p + "vocab_size", 64007),
        width=width,
        layers=keys.positive(p + "num_hidden_layers", 60),
        heads=heads,
        kv_heads=keys.positive(p + "num_key_value_heads", 8),
        head_dim=keys.optional(p + "head_dim", width // heads),
        inner=keys.positive(p + "intermediate_size", 20480),
        rope_theta=keys.positive(p + "rope_theta", 5_000_000.0),
        norm_eps=keys.positive(p + "rms_norm_eps", 1e-5),
        tied=keys.get(p + "tie_word_embeddings", False),
        context=keys.positive(p + "max_position_embeddings", 4096),
    )
    keys.divides(p + "num_key_value_heads", language.kv_heads, p + "num_attention_heads", heads)
    keys.divides(p + "num_attention_heads", heads, p + "hidden_size", width)
    if language.head_dim % 2:
        raise wrong(p + "head_dim", language.head_dim, "an even number")
    return language
