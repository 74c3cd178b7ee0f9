"""What is read from `config.json`, what falls back to the published value, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from edgemed.errors import InvalidInput
from edgemed.families.medrega_config import read_config


def test_a_bare_config_is_the_published_model_and_says_so() -> None:
    config = read_config({"model_type": "internvl_chat"})
    v, c = config.vision, config.language
    assert (v.width, v.layers, v.heads, v.inner, v.patch_px, v.side_px) == (3200, 45, 25, 12800, 14, 448)
    assert (v.norm_eps, v.qkv_bias, v.qk_norm) == (1e-6, False, True)
    assert (c.vocabulary, c.width, c.layers, c.heads, c.kv_heads, c.head_dim) == (64007, 7168, 60, 56, 8, 128)
    assert (c.inner, c.rope_theta, c.norm_eps, c.tied, c.context) == (20480, 5e6, 1e-5, False, 4096)
    assert (config.side_px, config.run_layers, config.fold, config.tile_tokens) == (448, 45, 2, 256)
    assert (config.template, config.pixel_shuffle, config.tiled, config.max_tiles) == ("Hermes-2", "v1", False, 6)
    assert set(config.fell_back) >= {"vision_config.hidden_size", "llm_config.rope_theta", "select_layer", "ps_version"}
    assert len(config.fell_back) == 9 + 10 + 10


def test_an_older_revision_without_its_template_gets_the_published_one() -> None:
    config = read_config(
        {"architectures": ["InternVLChatModel"], "template": None, "vision_config": {"num_hidden_layers": 12}}
    )
    assert config.run_layers == config.vision.layers == 12
    assert "template" in config.fell_back
    assert "vision_config.num_hidden_layers" not in config.fell_back


def test_the_picture_has_the_side_of_the_position_table_unless_it_is_forced() -> None:
    tall = {"model_type": "internvl_chat", "vision_config": {"image_size": 224}}
    assert read_config(tall).side_px == 224
    assert read_config({**tall, "force_image_size": 336}).tile_tokens == 144


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model_type", "llava", "model_type is 'llava', 'internvl_chat' was expected"),
        ("vision_config", [], r"vision_config is \[\], expected an object"),
        ("vision_config.hidden_size", "64", "vision_config.hidden_size is '64', expected a value of type int"),
        ("vision_config.num_hidden_layers", True, "num_hidden_layers is True, expected a value of type int"),
        ("vision_config.num_attention_heads", 7, "expected a divisor of vision_config.hidden_size, 3200"),
        ("vision_config.hidden_act", "gelu_new", "hidden_act is 'gelu_new', expected 'gelu'"),
        ("vision_config.norm_type", "layer_norm", "norm_type is 'layer_norm', expected 'rms_norm'"),
        ("llm_config.num_key_value_heads", 5, "expected a divisor of llm_config.num_attention_heads, 56"),
        ("llm_config.rope_scaling", {"type": "linear"}, "rope_scaling is .*, expected None"),
        ("llm_config.attention_bias", True, "attention_bias is True, expected False"),
        ("llm_config.vocab_size", 0, "vocab_size is 0, expected a number above 0"),
        ("llm_config.head_dim", 5, "head_dim is 5, expected an even number"),
        ("select_layer", -47, "select_layer is -47, expected one of -46..45"),
        ("ps_version", "v3", "ps_version is 'v3', expected 'v1' or 'v2'"),
        ("downsample_ratio", 0.4, "downsample_ratio is 0.4, expected 1 divided by a whole number"),
        ("force_image_size", 450, "force_image_size is 450, expected a multiple of 28"),
        ("min_dynamic_patch", 9, "min_dynamic_patch is 9, expected at most max_dynamic_patch, 6"),
    ],
)
def test_a_value_that_cannot_be_is_named(key: str, value: object, said: str) -> None:
    config: dict[str, Any] = {"model_type": "internvl_chat", "vision_config": {}, "llm_config": {}}
    *path, last = key.split(".")
    part = copy.deepcopy(config)
    target = part
    for name in path:
        target = target[name]
    target[last] = value
    with pytest.raises(InvalidInput, match=said):
        read_config(part)
