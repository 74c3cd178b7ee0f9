"""A checkpoint folder of any family: which build half it belongs to, and the Bundle over it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgemed.bundle import Bundle
from edgemed.checkpoints import open_checkpoint
from edgemed.errors import BundleError, CannotRead, InvalidInput
from edgemed.families import FAMILIES, open_family
from edgemed.families.native_torch import NativeModel, load
from edgemed.families.opened_torch import BUILD_HALVES, describe, digest, family_of, load_module, open_folder
from edgemed.models.cached_decoder import CachedDecoder


@pytest.fixture(scope="module")
def native(tiny_native: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tiny_native.checkpoint(tmp_path_factory.mktemp("opened") / "Tiny native")
    return made


@pytest.fixture
def copy(native: Path, tmp_path: Path) -> Path:
    """The native checkpoint in a folder that a test may spoil."""
    for file in native.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_every_family_has_both_halves() -> None:
    assert set(BUILD_HALVES) == set(FAMILIES)


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"family": "native"}, "native"),
        ({"model_type": "internvl_chat", "family": None}, "medrega"),
        ({"architectures": ["InternVLChatModel"]}, "medrega"),
        ({"model_type": "medplib_moe_llama", "architectures": []}, "medplib"),
        ({"architectures": ["Other", "MedPLIBForCausalLM"]}, "medplib"),
    ],
)
def test_config_json_tells_the_family(config: dict[str, Any], family: str) -> None:
    assert family_of(config) == family


@pytest.mark.parametrize("config", [{}, {"model_type": "llava"}, {"model_type": ["native"], "architectures": "native"}])
def test_another_model_is_refused_with_what_it_says(config: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="this version reads checkpoints of the families native, medrega, medplib"):
        family_of(config)


@pytest.mark.parametrize("family", ["medrega", "medplib"])
def test_a_published_folder_gives_bundle_and_modules(reference: Any, family: str) -> None:
    folder = reference(f"{family}-tiny").folder
    bundle, artifact = open_folder(folder)
    assert (bundle.manifest.name, bundle.manifest.family) == (f"{family}-tiny", family)
    assert bundle.digest == digest(folder)
    assert set(open_family(bundle).graphs()) == set(bundle.manifest.graphs)
    for role in bundle.manifest.graphs:
        module = artifact(role)()
        assert isinstance(module, CachedDecoder) == (role == "decoder")
        assert not module.training
        tensors = [*module.parameters(), *module.buffers()]
        assert {(t.device.type, t.dtype) for t in tensors} == {("cpu", torch.float32)}
    with pytest.raises(BundleError, match=r"has no file graphs/decoder\.onnx"):
        bundle.graph_path("decoder")


def test_options_go_to_the_build_half(reference: Any) -> None:
    published = describe(open_checkpoint(reference("medplib-tiny").folder), cache=640)
    assert published.specs["decoder"].dims["cache"].max == 640
    decoder = load_module(published, "decoder")
    assert isinstance(decoder, CachedDecoder)
    assert decoder.kept.shape == (3, 2, 1, 6, 640, 16)


def test_native_weights_are_those_of_the_checkpoint(native: Path) -> None:
    published = describe(open_checkpoint(native), cache=96)
    whole: NativeModel = load(native)
    assert published.specs["decoder"].dims["cache"].max == 96
    for role, module in whole.named_children():
        loaded = published.load(role)
        assert not loaded.training
        for name, tensor in module.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    assert published.decoder == whole.decoder.config


def test_a_native_folder_gives_a_bundle_under_its_own_name(native: Path) -> None:
    bundle: Bundle = open_folder(native)[0]
    assert bundle.manifest.name == "tiny-native"
    assert "Demonstration model" in open_family(bundle).notice("en")


def test_the_files_of_a_bundle_go_when_it_does(native: Path) -> None:
    bundle, _ = open_folder(native)
    folder = bundle.path
    assert [p.name for p in folder.rglob("*.json")] == ["tokenizer.json"]
    del bundle
    assert not folder.exists()


def test_the_digest_tells_checkpoints_apart(copy: Path) -> None:
    first = digest(copy)
    assert digest(copy) == first
    (copy / "notes.txt").write_text("x")
    second = digest(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "training": {"seed": 2}}))
    assert len({first, second, digest(copy)}) == 3


def test_a_native_weight_that_does_not_fit_is_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["decoder.norm.weight"] = torch.ones(65)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(InvalidInput, match=r"weight decoder.norm.weight is \[65\], expected \[64\]"):
        open_folder(copy)
    del tensors["decoder.norm.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(InvalidInput, match=r"weight decoder.norm.weight is missing"):
        open_folder(copy)


def test_a_native_checkpoint_without_tokenizer_is_refused(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CannotRead, match=r"tokenizer\.json cannot be read"):
        open_folder(copy)
