"""Build half of the native family: the four modules, and the checkpoint folder they are saved in and loaded from.

A checkpoint folder holds `config.json` (family, sizes, what it was trained on), `model.safetensors` and
`tokenizer.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from edgemed.errors import CannotRead, InvalidInput
from edgemed.files import write_atomically
from edgemed.models.llama import Llama, LlamaConfig
from edgemed.models.mask_decoder import MaskDecoder
from edgemed.models.projector import Projector
from edgemed.models.structure_head import StructureConfig
from edgemed.models.tiny_vit import TinyViT

FAMILY = "native"


class NativeModel(nn.Module):
    """The four parts of one native model."""

    def __init__(
        self, vision_encoder: TinyViT, projector: Projector, decoder: Llama, mask_decoder: MaskDecoder
    ) -> None:
        super().__init__()
        self.vision_encoder = vision_encoder
        self.projector = projector
        self.decoder = decoder
        self.mask_decoder = mask_decoder


def build(config: Mapping[str, Any]) -> NativeModel:
    """Return a model with fresh weights in the sizes of a checkpoint's `config.json`."""
    llama = LlamaConfig(**config["decoder"])
    structures = StructureConfig(**config["projector"])
    return NativeModel(
        TinyViT(), Projector(structures, llama.width, llama.bins), Llama(llama), MaskDecoder(llama.width)
    )


def save_checkpoint(folder: Path, model: NativeModel, tokenizer: Path, training: Mapping[str, Any]) -> None:
    """Write the checkpoint folder. `training` says what it was trained on and goes into `config.json`."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "family": FAMILY,
        "decoder": asdict(model.decoder.config),
        "projector": asdict(model.projector.head.config),
        "training": dict(training),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_atomically(folder / "model.safetensors", save(tensors))
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    write_atomically(folder / "config.json", json.dumps(config, indent=1, sort_keys=True).encode())


def load(folder: Path) -> NativeModel:
    """Return the model saved in a checkpoint folder, in evaluation mode.

    Raises CannotRead if a file is missing, InvalidInput naming the key if a weight is missing, unknown or of another
    shape.
    """
    from safetensors.torch import load_file

    config = read_config(folder)
    model = build(config)
    try:
        tensors = load_file(folder / "model.safetensors")
    except OSError as error:
        raise CannotRead(f"checkpoint {folder}: model.safetensors cannot be read: {error.strerror}") from error
    own = model.state_dict()
    for key in sorted(set(own) | set(tensors)):
        if key not in tensors or key not in own:
            raise InvalidInput(f"checkpoint {folder}: weight {key} is {'missing' if key in own else 'unknown'}")
        if own[key].shape != tensors[key].shape:
            raise InvalidInput(
                f"checkpoint {folder}: weight {key} is {list(tensors[key].shape)}, expected {list(own[key].shape)}"
            )
    model.load_state_dict(tensors)
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """Return `config.json` of a checkpoint folder. Raises CannotRead or InvalidInput."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise CannotRead(f"checkpoint {folder}: config.json cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise InvalidInput(f"checkpoint {folder}: config.json is not JSON: {error}") from error
    if config.get("family") != FAMILY:
        raise InvalidInput(f"checkpoint {folder} is of family {config.get('family')!r}, {FAMILY!r} was expected")
    return config
