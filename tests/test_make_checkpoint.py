"""The generator of random checkpoints writes what the published layout is, at the published and at other sizes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from edgemed.checkpoints import open_checkpoint
from edgemed.errors import CannotWrite, InvalidInput
from edgemed.families import medplib_config, medplib_torch, medrega_config, medrega_torch
from edgemed.families.medplib_text import IMAGE_ID, MedplibText
from edgemed.families.medrega_text import MedRegaText
from edgemed.families.published_tokenizer import convert
from edgemed.families.published_tokens import PublishedTokens

FILE = Path(__file__).resolve().parent / "bench" / "make_checkpoint.py"
FAMILIES = ("medrega", "medplib")
OTHER_SIZES = {
    "medrega": ("llm_config.hidden_size=48", "llm_config.vocab_size=1007"),
    "medplib": ("hidden_size=48", "clip.hidden_size=32", "vocab_size=1267", "sam.windows=[0, 14]"),
}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoint", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_checkpoint"] = module  # where its dataclass looks its own annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of a family with two layers, other sizes than the references and several shards."""
    root = tmp_path_factory.mktemp("made")

    def made(family: str) -> Path:
        if not (root / family).exists():
            sizes = [part for pair in OTHER_SIZES[family] for part in ("--set", pair)]
            shared = ("--scale", "small", "--layers", "2", "--vision-layers", "2", "--shard-gb", "0.0005")
            tool.main([family, str(root / family), *shared, *sizes])
        return root / family

    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_published_sizes_have_the_published_number_of_parameters(tool: ModuleType, family: str) -> None:
    tool.check_parameters(family)


def test_full_config_holds_the_values_that_a_missing_key_falls_back_to(tool: ModuleType) -> None:
    def plain(config: Any) -> Any:
        return dataclasses.replace(config, fell_back=())

    rega = medrega_config.read_config(tool.configure("medrega", {}))
    assert plain(rega) == plain(medrega_config.read_config({"model_type": medrega_config.MODEL_TYPE}))
    settings = tool.configure("medplib", {})
    plib = medplib_config.read_config(settings, settings["clip"])
    assert plain(plib) == plain(medplib_config.read_config({"model_type": medplib_config.MODEL_TYPE}))


def test_medrega_loads_and_answers_with_finite_numbers(small: Callable[[str], Path]) -> None:
    folder = small("medrega")
    checkpoint = open_checkpoint(folder, model_types=(medrega_config.MODEL_TYPE,))
    assert len({stored.file for stored in checkpoint.stored.values()}) > 1
    assert {checkpoint.dtype(name) for name in checkpoint.names} == {"bfloat16"}
    model = medrega_torch.load(checkpoint)
    assert (len(model.decoder.layers), len(model.vision_encoder.layers)) == (2, 2)
    text = MedRegaText(PublishedTokens(convert(folder, "4.37")), model.config.tile_tokens)
    ids = torch.tensor([text.encode_prompt("<image>\nWhere is the liver? 肝脏", tiles=[1])])
    places = ids == text.context_id
    assert text.context_id == 1000 and int(places.sum()) == model.config.tile_tokens
    ids[places] = model.decoder.config.vocabulary + torch.arange(model.config.tile_tokens)
    with torch.no_grad():
        rows = model.projector(model.vision_encoder(torch.randn(1, 3, 112, 112)))
        hidden = model.decoder(model.decoder.embed_mixed(ids, rows), torch.arange(ids.shape[1])[None])
    assert hidden.isfinite().all() and hidden.std() > 0.1


def test_medplib_loads_and_answers_with_finite_numbers(small: Callable[[str], Path]) -> None:
    folder = small("medplib")
    checkpoint = open_checkpoint(folder, model_types=(medplib_config.MODEL_TYPE,))
    assert len({stored.file for stored in checkpoint.stored.values()}) > 1
    assert [file.name for file in folder.glob("*.index.json")] == ["pytorch_model.bin.index.json"]
    model = medplib_torch.load(checkpoint)
    assert (model.config.tower.width, model.config.language.experts, model.sam.windows) == (32, (2, 2), (0, 14))
    text = MedplibText(PublishedTokens(convert(folder, "4.31")))
    assert text.seg_id == 1000
    ids = torch.tensor([i for i in text.encode_prompt("Segment the liver.") if i != IMAGE_ID])[None]
    with torch.no_grad():
        features, mask_features, _ = model.vision_encoder(torch.randn(1, 3, 336, 336), torch.randn(1, 3, 256, 256))
        rows = model.projector(features, torch.full((1, 576), 1 / 576))[0]
        ids = torch.cat((model.decoder.config.vocabulary + torch.arange(576)[None], ids), dim=1)
        hidden = model.decoder(model.decoder.embed_mixed(ids, rows), torch.arange(ids.shape[1])[None])
    assert hidden.isfinite().all() and hidden.std() > 0.1 and mask_features.isfinite().all()


@pytest.mark.parametrize(("family", "generation"), [("medrega", "4.37"), ("medplib", "4.31")])
def test_tokenizer_of_full_size_has_the_published_ids(
    tool: ModuleType, tmp_path: Path, family: str, generation: Any
) -> None:
    tool.write_files(family, tmp_path, tool.configure(family, {}))
    tokens = PublishedTokens(convert(tmp_path, generation))
    known = {
        "medrega": {"<|im_start|>": 6, "<|im_end|>": 7, "<|im_sep|>": 8, "<IMG_CONTEXT>": 64000, "</box>": 64006},
        "medplib": {"</s>": 2, "<SEG>": 32000, "<region>": 32003, "<gen_256>": 32264, "<im_end>": 32266},
    }
    assert {name: tokens.id_of(name) for name in known[family]} == known[family]
    sentence = "The liver [12, 340, 560, 999] 肝脏 is large."
    ids = tokens.encode(sentence, bos=False)
    assert tokens.decode(ids) == sentence and len(ids) < len(sentence)


def test_seed_alone_decides_the_weights(tool: ModuleType, tmp_path: Path) -> None:
    def weights(folder: str, seed: int) -> bytes:
        tool.make("medplib", tmp_path / folder, scale="small", dtype="fp32", seed=seed)
        return bytes((tmp_path / folder / "pytorch_model-00001-of-00001.safetensors").read_bytes())

    first = weights("first", 1)
    assert weights("again", 1) == first
    assert weights("other", 2) != first
    assert json.loads((tmp_path / "first" / "config.json").read_text())["torch_dtype"] == "float32"


def test_checkpoint_too_large_for_the_disk_ends_in_one_line(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        tool.main(["medrega", str(tmp_path / "new"), "--set", "llm_config.intermediate_size=1000000000"])
    assert exit_.value.code == CannotWrite.exit_code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "the checkpoint takes" in lines[0]
    assert not (tmp_path / "new").exists()


def test_folder_with_files_is_refused(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00009.safetensors").touch()
    with pytest.raises(CannotWrite, match="not an empty folder"):
        tool.make("medrega", tmp_path, scale="small")


def test_unknown_key_and_vocabulary_without_room_are_refused(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no llm_config\.layers"):
        tool.make("medrega", tmp_path, {"llm_config.layers": 2}, "small")
    with pytest.raises(InvalidInput, match="leaves 193 pieces, at least 270"):
        tool.make("medrega", tmp_path, {"llm_config.vocab_size": 200}, "small")
    assert not any(tmp_path.iterdir())
