"""The `config.json` of a MedRegA checkpoint as a typed value.

Covers every key that changes what is computed; keys that only concern training are not read. A key that is missing (or
null) falls back to what was published for the released model and is named in `MedRegaConfig.fell_back`, so that the
export can say so. Nothing here needs torch.

Source of the keys and the published values: github xmed-lab/MedRegA at dfdb0db. Older revisions lack `template`,
`ps_version` and `select_layer`; the published values then hold, not the defaults of the authors' config class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from edgemed.errors import InvalidInput

FAMILY = "medrega"
MODEL_TYPE = "internvl_chat"
"""What `model_type` of the published config holds."""

_ARCHITECTURE = "InternVLChatModel"
_VISION = "vision_config."
_LANGUAGE = "llm_config."

T = TypeVar("T", bool, int, float, str)
N = TypeVar("N", int, float)


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
    _check_family(config)
    keys = _Keys(config)
    vision = _vision(keys)
    language = _language(keys)
    side_px = keys.positive("force_image_size", vision.side_px)
    select = keys.get("select_layer", -1)
    run_layers = select if select >= 0 else vision.layers + 1 + select
    version = keys.get("ps_version", "v1")
    ratio = keys.get("downsample_ratio", 0.5)
    if not 0 <= run_layers <= vision.layers:
        raise _wrong("select_layer", select, f"one of -{vision.layers + 1}..{vision.layers}")
    if version not in ("v1", "v2"):
        raise _wrong("ps_version", version, "'v1' or 'v2'")
    if not 0 < ratio <= 1 or abs(1 / ratio - round(1 / ratio)) > 1e-6:
        raise _wrong("downsample_ratio", ratio, "1 divided by a whole number")
    fold = round(1 / ratio)
    if side_px % (vision.patch_px * fold):
        raise _wrong("force_image_size", side_px, f"a multiple of {vision.patch_px * fold} (patch_size x {fold})")
    min_tiles, max_tiles = keys.positive("min_dynamic_patch", 1), keys.positive("max_dynamic_patch", 6)
    if min_tiles > max_tiles:
        raise _wrong("min_dynamic_patch", min_tiles, f"at most max_dynamic_patch, {max_tiles}")
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


def _vision(keys: _Keys) -> VisionConfig:
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


def _language(keys: _Keys) -> LanguageConfig:
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
        raise _wrong(p + "head_dim", language.head_dim, "an even number")
    return language


@dataclass(frozen=True)
class _Keys:
    """Looks keys up by their dotted names and remembers which were missing."""

    config: Mapping[str, Any]
    fell_back: list[str] = field(default_factory=list)

    def get(self, key: str, published: T) -> T:
        """Return the value of `key`, which must be of the kind of `published`, or `published` if it is missing."""
        value = self._find(key)
        if value is None:
            self.fell_back.append(key)
            return published
        wanted: type = type(published)
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:  # an exact match: True is an int to isinstance
            raise _wrong(key, value, f"a value of type {wanted.__name__}")
        return cast("T", value)

    def positive(self, key: str, published: N) -> N:
        """Return the value of `key`, a number above 0."""
        value = self.get(key, published)
        if not value > 0:
            raise _wrong(key, value, "a number above 0")
        return value

    def optional(self, key: str, rule: int) -> int:
        """Return the value of a key that the published file leaves out, or what follows by rule."""
        return rule if self._find(key) is None else self.positive(key, rule)

    def must_be(self, key: str, only: object) -> None:
        """Raise InvalidInput if `key` holds anything but `only`; a missing key is the same as `only`."""
        value = self._find(key)
        if value is not None and value != only:
            raise _wrong(key, value, f"{only!r} (the published architecture has nothing else)")

    def divides(self, key: str, value: int, whole_key: str, whole: int) -> None:
        """Raise InvalidInput if the value of one key does not divide that of the other."""
        if whole % value:
            raise _wrong(key, value, f"a divisor of {whole_key}, {whole}")

    def _find(self, key: str) -> Any:
        part: Any = self.config
        for name in key.split("."):
            if not isinstance(part, Mapping):
                raise _wrong(key.rpartition(".")[0], part, "an object with keys")
            part = part.get(name)
            if part is None:
                return None
        return part


def _check_family(config: Mapping[str, Any]) -> None:
    """Raise InvalidInput unless `model_type`, or `architectures` where that is missing, is MedRegA's."""
    found = config.get("model_type")
    names = config.get("architectures") or []
    if found == MODEL_TYPE or (found is None and _ARCHITECTURE in names):
        return
    raise InvalidInput(
        f"config.json: model_type is {found!r}, {MODEL_TYPE!r} was expected; this is no MedRegA checkpoint"
    )


def _wrong(key: str, found: object, expected: str) -> InvalidInput:
    return InvalidInput(f"config.json: {key} is {found!r}, expected {expected}")
