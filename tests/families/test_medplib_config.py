"""MedPLIB's config.json as a typed value: the published file, what falls back, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgemed.errors import InvalidInput
from edgemed.families.medplib_config import CLIP_PREFIX, read_config, read_tower_config

LEAST = {"model_type": "medplib_moe_llama"}


@pytest.fixture
def published(reference: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json of the reference checkpoint and that of its tower."""
    folder = reference("medplib-tiny").folder
    config = json.loads((folder / "config.json").read_text())
    tower = read_tower_config(folder, config)
    assert tower is not None
    return config, tower


def test_the_reference_is_read_in_full(published: tuple[dict[str, Any], dict[str, Any]]) -> None:
    found = read_config(*published)
    language, tower = found.language, found.tower
    assert (language.width, language.layers, language.heads, language.head_dim) == (96, 3, 6, 16)
    assert (language.vocabulary, language.inner, language.experts) == (907, 128, (2, 2, 2))
    assert (tower.width, tower.layers, tower.heads, tower.inner, tower.grid) == (64, 4, 4, 128, 24)
    assert (found.select_layer, found.projector_depth, found.mask_width, found.image_tokens) == (-2, 2, 48, 576)
    assert found.fell_back == ("rope_theta",)


def test_an_empty_file_falls_back_to_the_published_model_and_names_every_key() -> None:
    found = read_config(LEAST)
    language, tower = found.language, found.tower
    assert (language.width, language.layers, language.heads, language.kv_heads) == (4096, 32, 32, 32)
    assert (language.vocabulary, language.inner, language.experts) == (32267, 11008, (2,) * 32)
    assert (language.rope_theta, language.norm_eps, language.tied) == (10000.0, 1e-5, False)
    assert (tower.width, tower.layers, tower.heads, tower.inner, tower.side_px, tower.patch_px) == (
        1024, 24, 16, 4096, 336, 14,
    )  # fmt: skip
    assert (found.mask_width, found.region_points) == (256, 512)
    for key in ("hidden_size", "moe.num_experts", "clip.num_attention_heads", "out_dim", "mm_vision_select_layer"):
        assert key in found.fell_back


def test_without_the_towers_config_its_sizes_come_from_shapes_and_its_heads_from_the_published_width() -> None:
    shapes = {
        CLIP_PREFIX + "embeddings.patch_embedding.weight": (128, 3, 7, 7),
        CLIP_PREFIX + "embeddings.position_embedding.weight": (10, 128),
        CLIP_PREFIX + "encoder.layers.0.mlp.fc1.weight": (200, 128),
        CLIP_PREFIX + "encoder.layers.5.mlp.fc1.weight": (200, 128),
    }
    tower = read_config({**LEAST, "mm_hidden_size": 128}, None, shapes).tower
    assert (tower.width, tower.layers, tower.heads, tower.inner) == (128, 6, 2, 200)
    assert (tower.side_px, tower.patch_px, tower.grid) == (21, 7, 3)
    named = read_config({**LEAST, "mm_hidden_size": 128}, None, shapes).fell_back
    assert [key for key in named if key.startswith("clip.")] == ["clip.num_attention_heads", "clip.layer_norm_eps"]


def test_a_dense_checkpoint_and_one_with_experts_in_some_layers_are_read() -> None:
    base = {**LEAST, "num_hidden_layers": 4}
    assert read_config({**base, "moe": {"moe_enable": False}}).language.experts == (1, 1, 1, 1)
    some = {"moe_layers_idx": [1, 3], "num_experts": [4]}
    assert read_config({**base, "moe": some}).language.experts == (1, 4, 1, 4)


def test_a_capacity_that_would_drop_tokens_is_noted() -> None:
    notes = read_config({**LEAST, "moe": {"eval_capacity_factor": 1}}).notes
    assert len(notes) == 1
    assert "eval_capacity_factor is 1.0 for 2 experts" in notes[0]


@pytest.mark.parametrize(
    ("change", "compressed", "of_mask", "fell_back"),
    [
        ({}, None, None, []),
        ({"mm_token_compress": False, "mm_compressed_token_count": 100}, None, None, []),
        ({"mm_token_compress": True}, 256, None, ["mm_compressed_token_count"]),
        ({"mm_token_compress": True, "mm_compressed_token_count": 144}, 144, None, []),
        ({"icl_mask_encoder": True, "mask_encoder_token_count": None}, None, 64, ["mask_encoder_token_count"]),
        ({"icl_mask_encoder": True, "mask_encoder_token_count": 16}, None, 16, []),
    ],
)
def test_parts_for_examples_are_there_where_their_flag_says_so(
    change: dict[str, Any], compressed: int | None, of_mask: int | None, fell_back: list[str]
) -> None:
    found = read_config({**LEAST, **change})
    assert (found.compressed_tokens, found.mask_tokens) == (compressed, of_mask)
    assert (found.patches, found.image_tokens) == (576, compressed or 576)
    assert [key for key in found.fell_back if "token" in key and key.startswith(("mm", "mask"))] == fell_back


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "internvl_chat"}, "model_type is 'internvl_chat'"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', expected a value of type int"),
        ({"hidden_size": 100}, "num_attention_heads is 32, expected a divisor of hidden_size, 100"),
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5, expected a divisor"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a number above 0"),
        ({"num_attention_heads": 4096}, "num_attention_heads is 4096, expected heads of an even width"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*, expected None"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_hidden_size": 768}, "mm_hidden_size is 768, expected the width of the CLIP tower, 1024"),
        ({"mm_vision_select_layer": 25}, "mm_vision_select_layer is 25, expected one of -25..24"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch', expected 'patch'"),
        ({"mm_token_compress": "yes"}, "mm_token_compress is 'yes', expected False or True"),
        ({"mm_token_compress": True, "mm_compressed_token_count": 0}, "mm_compressed_token_count is 0, expected a num"),
        ({"icl_mask_encoder": 2}, "icl_mask_encoder is 2, expected False or True"),
        (
            {"icl_mask_encoder": True, "mask_encoder_token_count": 64.0},
            "mask_encoder_token_count is 64.0, expected a v",
        ),
        ({"region_geo_sampler": True}, "region_geo_sampler is True, expected False"),
        ({"moe": {"top_k_experts": 2}}, r"moe\.top_k_experts is 2, expected 1"),
        ({"moe": {"use_residual": True}}, r"moe\.use_residual is True"),
        (
            {"moe": {"num_experts": [2, 2]}},
            r"moe\.num_experts is \[2, 2\], expected a number above 0 for each of the 32",
        ),
        ({"moe": {"num_experts": 2}}, r"moe\.num_experts is 2, expected a list of whole numbers"),
        ({"moe": {"moe_layers_idx": [0, 0]}}, r"moe\.moe_layers_idx is \[0, 0\], expected different numbers"),
        ({"moe": {"moe_layers_idx": [32]}}, r"moe\.moe_layers_idx is \[32\]"),
        ({"moe": [2]}, "moe is .*, expected an object with keys"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_config({**LEAST, **change})


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        ({"hidden_act": "gelu"}, r"clip\.hidden_act is 'gelu', expected 'quick_gelu'"),
        ({"num_attention_heads": 7}, r"clip\.num_attention_heads is 7, expected a divisor of clip\.hidden_size, 1024"),
        ({"patch_size": 15}, r"clip\.patch_size is 15, expected a divisor of clip\.image_size, 336"),
    ],
)
def test_a_wrong_value_of_the_tower_is_refused_by_its_key(tower: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_config(LEAST, tower)


@pytest.mark.parametrize("path", ["./clip-x", "/authors/models/clip-x/", "C:\\models\\clip-x", "authors/clip-x"])
def test_only_the_last_part_of_the_towers_path_counts(tmp_path: Path, path: str) -> None:
    (tmp_path / "clip-x").mkdir()
    (tmp_path / "clip-x" / "config.json").write_text('{"hidden_size": 8}')
    assert read_tower_config(tmp_path, {"mm_vision_tower": path}) == {"hidden_size": 8}


@pytest.mark.parametrize("config", [{}, {"mm_vision_tower": ".."}, {"mm_vision_tower": "elsewhere"}])
def test_a_tower_that_is_not_in_the_checkpoint_folder_has_no_config(tmp_path: Path, config: dict[str, str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert read_tower_config(tmp_path / "inner", config) is None


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[1]", "holds no object")])
def test_a_towers_config_that_cannot_be_read_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "clip-x").mkdir()
    (tmp_path / "clip-x" / "config.json").write_text(content)
    with pytest.raises(InvalidInput, match=message):
        read_tower_config(tmp_path, {"mm_vision_tower": "clip-x"})
