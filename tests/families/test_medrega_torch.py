"""A published MedRegA checkpoint in our modules, against what the authors' code computed with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgemed.checkpoints import open_checkpoint
from edgemed.errors import EdgemedError, InvalidInput
from edgemed.families.medrega_config import read_config
from edgemed.families.medrega_torch import MedRegaModel, key_table, load, published_tensors

ATOL = 1e-4
"""What the README of the reference suggests; two attention implementations of the authors differ by 1.3e-5."""

IMAGES = ("square", "four_three", "two_one", "tiles_two_one")
PROMPTS: dict[str, tuple[str, ...]] = {
    "vqa_en": ("square",),
    "vqa_zh": ("square",),
    "r2t_en": ("four_three",),
    "r2t_zh": ("four_three",),
    "t2r_en": ("two_one",),
    "t2r_zh": ("two_one",),
    "t2r_en_train_order": ("two_one",),
    "report_zh_empty_turn": ("square",),
    "odd_text": ("square",),
    "text_only_en": (),
    "history_en": ("square",),
    "tiles_t2r_en": ("tiles_two_one",),
    "multi_image": ("square", "four_three"),
}
"""Prompt -> the pictures whose image tokens it holds, in order."""
SINGLE = tuple(name for name in PROMPTS if name not in ("tiles_t2r_en", "multi_image"))
"""The prompts whose logits are stored."""


class Tiny:
    """The loaded model together with the arrays; what several tests need is computed once."""

    def __init__(self, arrays: Any) -> None:
        self.arrays = arrays
        self.model: MedRegaModel = load(open_checkpoint(arrays.folder))
        self.end = int(arrays.prompts["ids"]["<|im_end|>"])
        self._image_token = int(arrays.prompts["ids"]["<IMG_CONTEXT>"])
        self._runs: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def features(self, image: str) -> Tensor:
        """The vision encoder's output for one picture or the tiles of one picture."""
        pixels = torch.from_numpy(self.arrays.expected(f"pixel_{image}"))
        features: Tensor = self.model.vision_encoder(pixels)
        return features

    @torch.no_grad()
    def rows(self, *images: str) -> Tensor:
        """The image tokens of pictures one after the other."""
        parts = [self.model.projector(self.features(image)) for image in images]
        return torch.cat([torch.zeros(0, self.model.decoder.config.width), *parts])

    def ids(self, name: str, rows: int) -> Tensor:
        """Stored token ids, each image placeholder replaced by the id of its row; all rows are used."""
        ids = torch.from_numpy(self.arrays.input(name)).long()
        places = ids == self._image_token
        assert int(places.sum()) == rows
        ids[places] = self.model.decoder.config.vocabulary + torch.arange(rows)
        return ids

    @torch.no_grad()
    def hidden(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Hidden states after the final norm, [1, tokens, width]."""
        decoder = self.model.decoder
        hidden: Tensor = decoder(decoder.embed_mixed(ids, rows), torch.arange(ids.shape[1])[None])
        return hidden

    def logits(self, prompt: str) -> Tensor:
        """Logits at every position of a prompt."""
        if prompt not in self._runs:
            rows = self.rows(*PROMPTS[prompt])
            ids = self.ids(f"input_ids_{prompt}", len(rows))
            self._runs[prompt] = ids, self.model.decoder.logits(self.hidden(ids, rows)).detach()
        return self._runs[prompt][1]

    def check(self, name: str, ours: Tensor) -> None:
        """Assert that an expected array is met, all shapes included."""
        expected = self.arrays.expected(name)
        ours_there = self.arrays.rows(name, ours.detach())
        assert ours_there.shape == expected.shape
        np.testing.assert_allclose(ours_there, expected, atol=ATOL, rtol=0)


@pytest.fixture(scope="module")
def tiny(reference: Any) -> Tiny:
    return Tiny(reference("medrega-tiny"))


def test_every_published_size_is_read_and_none_fell_back(tiny: Tiny) -> None:
    config = tiny.model.config
    assert config.fell_back == ()
    assert config.tile_tokens == tiny.arrays.prompts["num_image_token"]
    assert sum(p.numel() for p in tiny.model.parameters()) == tiny.arrays.prompts["n_parameters"]
    keys = [p.key for own in key_table(config).values() for pieces in own.values() for p in pieces]
    assert len(set(keys)) == len(keys) == tiny.arrays.prompts["n_state_dict_keys"]


@pytest.mark.parametrize("image", IMAGES)
def test_patches_are_folded_as_published(tiny: Tiny, image: str) -> None:
    tiny.check(f"pixel_shuffle_{image}", tiny.model.projector.fold(tiny.features(image)))


@pytest.mark.parametrize("image", IMAGES)
def test_image_tokens_are_those_published(tiny: Tiny, image: str) -> None:
    tiny.check(f"image_tokens_{image}", tiny.rows(image).unflatten(0, (-1, 16)))


def test_image_tokens_of_the_other_pixel_shuffle_are_those_published(tiny: Tiny, tmp_path: Path) -> None:
    config = json.loads((tiny.arrays / "config.json").read_text())
    config["ps_version"] = "v2"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((tiny.arrays / "model.safetensors").read_bytes())
    projector = load(open_checkpoint(tmp_path)).projector
    with torch.no_grad():
        tiny.check("image_tokens_psv2_square", projector(tiny.features("square"))[None])


@pytest.mark.parametrize("prompt", SINGLE)
def test_logits_are_those_published(tiny: Tiny, prompt: str) -> None:
    name = f"logits_{prompt}"
    logits = tiny.logits(prompt)
    if prompt not in ("vqa_en", "r2t_zh", "t2r_en", "t2r_zh"):  # of the others, the first and the last 8 are stored
        logits = torch.cat((logits[:, :8], logits[:, -8:]), dim=1)
    tiny.check(name, logits)


@pytest.mark.parametrize("prompt", SINGLE)
def test_the_likeliest_token_is_the_same_at_every_position(tiny: Tiny, prompt: str) -> None:
    ours = tiny.logits(prompt).argmax(-1)
    assert tiny.arrays.rows(f"argmax_{prompt}", ours).tolist() == tiny.arrays.expected(f"argmax_{prompt}").tolist()


@pytest.mark.parametrize("prompt", ["vqa_en", "t2r_zh"])
def test_hidden_states_after_each_layer_are_those_published(tiny: Tiny, prompt: str) -> None:
    decoder = tiny.model.decoder
    rows = tiny.rows(*PROMPTS[prompt])
    embeddings = decoder.embed_mixed(tiny.ids(f"input_ids_{prompt}", len(rows)), rows)
    positions = torch.arange(embeddings.shape[1])[None]
    with torch.no_grad():
        states = [decoder.forward_tapped(embeddings, positions, None, i)[1] for i in range(decoder.config.layers)]
        states.append(decoder(embeddings, positions))
    tiny.check(f"llm_hidden_states_{prompt}", torch.stack(states))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_those_published_with_the_same_margins(tiny: Tiny, prompt: str) -> None:
    rows = tiny.rows(*PROMPTS[prompt])
    ids = tiny.ids(f"input_ids_{prompt}", len(rows))
    tokens: list[int] = []
    margins: list[float] = []
    while len(tokens) < 24 and tokens[-1:] != [tiny.end]:
        with torch.no_grad():
            logits = tiny.model.decoder.logits(tiny.hidden(ids, rows)[0, -1])
        if not tokens:
            logits[tiny.end] = -torch.inf  # the authors ask for one token at least
        best, second = logits.topk(2).values.tolist()
        margins.append(best - second)
        tokens.append(int(logits.argmax()))
        ids = torch.cat((ids, torch.tensor([tokens[-1:]])), dim=1)
    assert tokens == tiny.arrays.expected(f"gen_{prompt}")[0].tolist()
    expected = tiny.arrays.expected(f"gen_margin_{prompt}")
    np.testing.assert_allclose(tiny.arrays.rows(f"gen_margin_{prompt}", margins), expected, atol=2 * ATOL, rtol=0)


def test_the_training_loss_is_that_published(tiny: Tiny) -> None:
    rows = tiny.rows("two_one")
    logits = tiny.model.decoder.logits(tiny.hidden(tiny.ids("train_input_ids", len(rows)), rows))
    labels = torch.from_numpy(tiny.arrays.expected("train_labels")).long()
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
    tiny.check("train_loss", loss[None])


# -- other checkpoints of the layout -----------------------------------------------------------------------------------

OTHER: dict[str, Any] = {
    "model_type": "internvl_chat",
    "force_image_size": 72,
    "select_layer": -2,
    "downsample_ratio": 1 / 3,
    "ps_version": "v2",
    "template": "Hermes-2",
    "pad2square": True,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 4,
    "vision_config": {
        "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 28, "patch_size": 12,
        "image_size": 36, "layer_norm_eps": 1e-5, "qkv_bias": True, "qk_normalization": False,
    },
    "llm_config": {
        "vocab_size": 51, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
        "intermediate_size": 44, "rope_theta": 100, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "max_position_embeddings": 128,
    },
}  # fmt: skip
"""Every size and switch differs from the tiny reference; the position table is resized, the last layer not used."""

Weights = dict[str, Tensor]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[dict[str, Any], Weights], Path]:
    """Writes a checkpoint folder in the published layout."""
    from safetensors.torch import save_file

    def folder(config: dict[str, Any], weights: Weights) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return folder


@pytest.fixture
def weights() -> Weights:
    """Random weights for OTHER under the published keys."""
    torch.manual_seed(1)
    table = key_table(read_config(OTHER))
    return {p.key: torch.randn(p.shape) for own in table.values() for pieces in own.values() for p in pieces}


Write = Callable[[dict[str, Any], Weights], Path]


def test_another_checkpoint_of_the_layout_is_read_whole(write: Write, weights: Weights) -> None:
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    model = load(open_checkpoint(write(OTHER, weights)), "corrected")
    w = {k.removeprefix("language_model.model."): v for k, v in weights.items()}
    layer = model.decoder.state_dict()
    assert torch.equal(layer["layers.1.qkv.weight"][:24], w["layers.1.self_attn.q_proj.weight"])
    assert torch.equal(layer["layers.1.qkv.weight"][24:30], w["layers.1.self_attn.k_proj.weight"])
    assert torch.equal(layer["layers.1.qkv.weight"][30:], w["layers.1.self_attn.v_proj.weight"])
    assert torch.equal(layer["layers.0.gate_up.weight"][:44], w["layers.0.mlp.gate_proj.weight"])
    assert torch.equal(layer["layers.0.gate_up.weight"][44:], w["layers.0.mlp.up_proj.weight"])
    assert model.decoder.head is None
    assert model.decoder.box_draft is None
    assert model.config.tile_tokens == 4
    with torch.no_grad():
        image = torch.randn(2, 3, 72, 72)
        features = model.vision_encoder(image)
        assert torch.equal(features, model.vision_encoder.hidden_states(image)[1][:, 1:])
        rows = model.projector(features)
        assert rows.shape == (8, 24)
        mixed = model.decoder.embed_mixed(torch.tensor([[5, 51, 58, 50]]), rows)
        assert torch.equal(mixed[0, 1:3], rows[[0, 7]])
        logits = model.decoder.logits(model.decoder(mixed, torch.arange(4)[None]))
        assert torch.isfinite(logits).all()


def test_half_precision_weights_are_kept_or_widened(write: Write, weights: Weights) -> None:
    stored = {k: v.bfloat16() for k, v in weights.items()}
    checkpoint = open_checkpoint(write(OTHER, stored))
    wide, kept = load(checkpoint), load(checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    for (name, a), b in zip(wide.named_parameters(), kept.parameters(), strict=True):
        assert torch.equal(a, b.float()), name


def test_weights_are_read_one_by_one_for_an_export(write: Write, weights: Weights) -> None:
    checkpoint = open_checkpoint(write(OTHER, weights))
    roles = published_tensors(checkpoint, read_config(checkpoint.config))
    state = load(checkpoint).state_dict()
    assert {f"{role}.{name}" for role, tensors in roles.items() for name in tensors} == set(state)
    assert torch.equal(roles["decoder"]["layers.0.qkv.weight"], state["decoder.layers.0.qkv.weight"])
    assert len(roles["projector"]) == 6


EMBEDDING = "language_model.model.embed_tokens.weight"
PROJ = "vision_model.encoder.layers.1.attn.proj.weight"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (PROJ, None, ""),
        ("vision_model.encoder.layers.2.ls1", torch.ones(20), ""),
        ("mlp1.2.weight", torch.ones(2), ""),
        (PROJ, torch.ones(20, 21), r" is \[20, 21\], expected \[20, 20\]"),
        (EMBEDDING, torch.ones(52, 24), r" is \[52, 24\], .*llm_config.vocab_size 51"),
        (PROJ, torch.ones(20, 20, dtype=torch.int8), " is stored as int8"),
    ],
    ids=["missing", "a layer too many", "unknown", "shape", "vocabulary", "quantized"],
)
def test_a_key_that_does_not_fit_is_named(
    write: Write, weights: Weights, key: str, value: Tensor | None, said: str
) -> None:
    if value is None:
        del weights[key]
    else:
        weights[key] = value
    with pytest.raises(EdgemedError, match=key + said):
        load(open_checkpoint(write(OTHER, weights)))


def test_an_unknown_compat_is_refused(write: Write, weights: Weights) -> None:
    with pytest.raises(InvalidInput, match="compat is 'release-cli', expected one of reference, corrected"):
        load(open_checkpoint(write(OTHER, weights)), "release-cli")
