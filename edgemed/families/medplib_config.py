"""The `config.json` of a MedPLIB checkpoint, and that of its CLIP tower, as one typed value.

Covers every key that changes what is computed; keys that only concern training are not read, and the sizes of SAM-Med2D
are in no config: they are read from tensor shapes. A key that is missing (or null) falls back to what was published for
the released model and is named in `MedplibConfig.fell_back`, so that the export can say so. Nothing here needs torch.

Source of the keys and the published values: github ShawnHuang497/MedPLIB at 5ab54bc and the DeepSpeed it uses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemed.errors import CannotRead, InvalidInput
from edgemed.families.published_config import Keys, check_family, wrong

FAMILY = "medplib"
MODEL_TYPE = "medplib_moe_llama"
"""What `model_type` of the published config holds."""
COMPAT = ("reference", "corrected", "release-cli")
"""Whose quirks are kept: training's and the web demo's (the default), none, or those of the first release's CLI."""
MAX_EXAMPLES = 3
"""The most examples that the authors' code shows before a question."""

CLIP_PREFIX = "model.vision_tower.vision_tower.vision_model."
"""Where the CLIP tower's tensors are in a checkpoint."""

_ARCHITECTURE = "MedPLIBForCausalLM"
_TOWER = "clip."
_MOE = "moe."
_HEAD_DIM = 64  # of every published CLIP tower

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Sizes of the CLIP tower."""

    width: int
    layers: int
    heads: int
    inner: int
    side_px: int
    patch_px: int
    norm_eps: float

    @property
    def grid(self) -> int:
        """Patches along one side: 24 for the released model; also the side of a region's map."""
        return self.side_px // self.patch_px


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Sizes of the language model.

    experts: how many each layer has, 1 for a dense layer; context: the longest sequence; begin, end: ids around a text.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    experts: tuple[int, ...]
    rope_theta: float
    norm_eps: float
    tied: bool
    context: int
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class MedplibConfig:
    """A MedPLIB checkpoint.

    select_layer: which hidden state of the tower is the feature, as the tower counts them (-2: what enters the last
    layer). projector_depth: linear layers from feature to image token. mask_width: width of the `<SEG>` vector.
    region_points: the most cells of a region that the authors' code samples. compressed_tokens: what the tokens of a
    picture are averaged down to; mask_tokens: what the mask encoder gives; None where there is no such part. fell_back:
    the keys that were missing, in the order they were looked up; `clip.` is the tower's own config.json. notes: what
    else the export should say.
    """

    tower: TowerConfig
    language: LanguageConfig
    select_layer: int
    projector_depth: int
    mask_width: int
    region_points: int
    compressed_tokens: int | None
    mask_tokens: int | None
    fell_back: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def patches(self) -> int:
        """Patches of one picture: 576 for the released model."""
        return self.tower.grid**2

    @property
    def image_tokens(self) -> int:
        """Image tokens of one picture: as many as patches, or 256 where they are compressed as published."""
        return self.compressed_tokens or self.patches


def read_config(
    config: Mapping[str, Any], tower: Mapping[str, Any] | None = None, shapes: Shapes | None = None
) -> MedplibConfig:
    """Return the typed form of a checkpoint's `config.json`.

    tower: the config.json of the CLIP tower, alone or with the text half around it. shapes: of the checkpoint's tensors
    by name; they give the tower's sizes where its config is not there.

    Raises InvalidInput, naming the key, where the file is of another family, a value is of the wrong kind, sizes do not
    fit each other, or something is asked for that this version does not compute.
    """
    check_family(config, MODEL_TYPE, _ARCHITECTURE, "MedPLIB")
    keys = Keys({**config, "clip": _with_shapes(tower or {}, shapes or {})})
    _check_refused(keys)
    language = _language(keys)
    clip = _tower(keys)
    select = keys.get("mm_vision_select_layer", -2)
    if not -clip.layers - 1 <= select <= clip.layers:
        raise wrong("mm_vision_select_layer", select, f"one of -{clip.layers + 1}..{clip.layers}")
    width = keys.get("mm_hidden_size", clip.width)
    if width != clip.width:
        raise wrong("mm_hidden_size", width, f"the width of the CLIP tower, {clip.width}")
    kind = keys.get("mm_projector_type", "mlp2x_gelu")
    depth = re.fullmatch(r"mlp([1-9])x_gelu", kind)
    if depth is None:
        raise wrong("mm_projector_type", kind, "mlp1x_gelu to mlp9x_gelu")
    return MedplibConfig(
        tower=clip,
        language=language,
        select_layer=select,
        projector_depth=int(depth[1]),
        mask_width=keys.positive("out_dim", 256),
        region_points=keys.positive("max_sample_point", 512),
        compressed_tokens=_optional_tokens(keys, "mm_token_compress", "mm_compressed_token_count", 256),
        mask_tokens=_optional_tokens(keys, "icl_mask_encoder", "mask_encoder_token_count", 64),
        fell_back=tuple(keys.fell_back),
        notes=tuple(keys.notes),
    )


def read_tower_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the CLIP tower's config.json if its folder lies in the checkpoint folder, else None.

    Only the last part of the path in `mm_vision_tower` (or `vision_tower`) counts: the published one is absolute and of
    the authors' machine. Raises CannotRead or InvalidInput if the file is there but cannot be read.
    """
    return _tower_file(folder, config, "config.json")


def read_preprocessor(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the CLIP tower's preprocessor_config.json, or {} where it is not there; errors as `read_tower_config`."""
    return _tower_file(folder, config, "preprocessor_config.json") or {}


def _tower_file(folder: Path, config: Mapping[str, Any], file_name: str) -> dict[str, Any] | None:
    named = config.get("mm_vision_tower") or config.get("vision_tower")
    if not isinstance(named, str) or (name := re.split(r"[/\\]", named.rstrip("/\\"))[-1]) in ("", ".", ".."):
        return None
    file = folder / name / file_name
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CannotRead(f"{name}/{file_name} of the CLIP tower cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{name}/{file_name} of the CLIP tower is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidInput(f"{name}/{file_name} of the CLIP tower holds no object with keys")
    return found


def _optional_tokens(keys: Keys, flag: str, count: str, published: int) -> int | None:
    """Return how many tokens an optional part gives, or None where `flag` does not ask for it: most configs lack it."""
    keys.must_be(flag, False, True)
    return keys.positive(count, published) if keys.config.get(flag) else None


def _language(keys: Keys) -> LanguageConfig:
    width, heads = keys.positive("hidden_size", 4096), keys.positive("num_attention_heads", 32)
    layers = keys.positive("num_hidden_layers", 32)
    language = LanguageConfig(
        vocabulary=keys.positive("vocab_size", 32267),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=keys.positive("num_key_value_heads", heads),
        head_dim=width // heads,
        inner=keys.positive("intermediate_size", 11008),
        experts=_experts(keys, layers),
        rope_theta=keys.get("rope_theta", 10000.0),
        norm_eps=keys.get("rms_norm_eps", 1e-5),
        tied=keys.get("tie_word_embeddings", False),
        context=keys.positive("max_position_embeddings", 4096),
        begin=keys.get("bos_token_id", 1),
        end=keys.get("eos_token_id", 2),
    )
    keys.divides("num_attention_heads", heads, "hidden_size", width)
    keys.divides("num_key_value_heads", language.kv_heads, "num_attention_heads", heads)
    if language.head_dim % 2:
        raise wrong("num_attention_heads", heads, f"heads of an even width, hidden_size is {width}")
    return language


def _experts(keys: Keys, layers: int) -> tuple[int, ...]:
    """Return the number of experts of each layer; 1 is a dense layer."""
    if not keys.get(_MOE + "moe_enable", True):
        return (1,) * layers
    keys.must_be(_MOE + "top_k_experts", 1)
    keys.must_be(_MOE + "use_residual", False)
    places = keys.numbers(_MOE + "moe_layers_idx", range(layers))
    counts = keys.numbers(_MOE + "num_experts", [2] * len(places))
    if len(counts) == 1:
        counts = counts * len(places)
    if len(counts) != len(places) or min(counts, default=1) < 1:
        raise wrong(_MOE + "num_experts", counts, f"a number above 0 for each of the {len(places)} layers with experts")
    if len(set(places)) != len(places) or any(not 0 <= i < layers for i in places):
        raise wrong(_MOE + "moe_layers_idx", places, f"different numbers from 0 to {layers - 1}")
    factor = keys.get(_MOE + "eval_capacity_factor", 2.0)
    if factor < max(counts, default=1):
        keys.notes.append(
            f"config.json: {_MOE}eval_capacity_factor is {factor} for {max(counts)} experts: the authors' code would "
            "drop some tokens at random; none is dropped here"
        )
    by_layer = dict(zip(places, counts, strict=True))
    return tuple(by_layer.get(i, 1) for i in range(layers))


def _tower(keys: Keys) -> TowerConfig:
    p = _TOWER
    keys.must_be(p + "hidden_act", "quick_gelu")
    keys.must_be(p + "num_channels", 3)
    width = keys.positive(p + "hidden_size", 1024)
    tower = TowerConfig(
        width=width,
        layers=keys.positive(p + "num_hidden_layers", 24),
        heads=keys.positive(p + "num_attention_heads", max(width // _HEAD_DIM, 1)),
        inner=keys.positive(p + "intermediate_size", 4096),
        side_px=keys.positive(p + "image_size", 336),
        patch_px=keys.positive(p + "patch_size", 14),
        norm_eps=keys.get(p + "layer_norm_eps", 1e-5),
    )
    keys.divides(p + "num_attention_heads", tower.heads, p + "hidden_size", width)
    keys.divides(p + "patch_size", tower.patch_px, p + "image_size", tower.side_px)
    return tower


def _with_shapes(tower: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """Return the vision half of a CLIP config; sizes that it lacks are filled in from tensor shapes where they tell."""
    filled: dict[str, Any] = {}
    patches = shapes.get(CLIP_PREFIX + "embeddings.patch_embedding.weight", ())
    places = shapes.get(CLIP_PREFIX + "embeddings.position_embedding.weight", ())
    inner = shapes.get(CLIP_PREFIX + "encoder.layers.0.mlp.fc1.weight", ())
    layers = [int(m[1]) for n in shapes if (m := re.match(re.escape(CLIP_PREFIX) + r"encoder\.layers\.(\d+)\.", n))]
    if len(patches) == 4 and len(places) == 2 and len(inner) == 2 and layers:
        side = round((places[0] - 1) ** 0.5) * patches[2]
        filled = {
            "hidden_size": patches[0],
            "num_hidden_layers": max(layers) + 1,
            "intermediate_size": inner[0],
            "patch_size": patches[2],
            "image_size": side,
        }
    vision = tower.get("vision_config")
    own = vision if isinstance(vision, Mapping) else tower
    return {**filled, **{k: v for k, v in own.items() if v is not None}}


def _check_refused(keys: Keys) -> None:
    """Raise InvalidInput for parts that a config may switch on and that are not computed here."""
    keys.must_be("hidden_act", "silu")
    keys.must_be("attention_bias", False)
    keys.must_be("rope_scaling", None)
    keys.must_be("mm_vision_select_feature", "patch")
    keys.must_be("region_geo_sampler", False)
