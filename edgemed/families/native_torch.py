"""Build half of the native family: the four modules, their GraphSpecs, and the checkpoint folder they are saved in.

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

from edgemed.box_confidence import SETTING, confidence_of
from edgemed.checkpoints import Checkpoint
from edgemed.errors import CannotRead, EdgemedError, InvalidInput
from edgemed.families.native import TOKENIZER
from edgemed.families.published_torch import Piece, Published, PublishedTensors
from edgemed.families.specs import decoder_spec
from edgemed.files import write_atomically
from edgemed.graphs import DimRange, GraphSpec, TensorSpec
from edgemed.models.llama import Llama, LlamaConfig
from edgemed.models.mask_decoder import MaskDecoder
from edgemed.models.projector import ROWS, Projector
from edgemed.models.structure_head import StructureConfig
from edgemed.models.tiny_vit import CHANNELS, GRID, SIDE, TinyViT

FAMILY = "native"

MAX_REGIONS = 16
MAX_PROMPTS = 24
MAX_POINTS = 16
CACHE = 1024

CONFIDENCE, CONFIDENCE_PLOT = "confidence.json", "confidence.png"
"""What `edgemed eval confidence` writes: how true the scores of boxes are, and the fit that makes them so."""

DEMONSTRATION = {
    "en": "Demonstration model, trained on few public images (mostly one abdominal CT; see the model card). "
    "Not for diagnosis.",
    "zh": "演示模型，仅用少量公开影像训练（主要为一例腹部CT，见模型说明）。不得用于诊断。",
}
"""What goes with every answer of a native model, in words and on overlays."""


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
    _check_shapes(
        folder,
        {key: tuple(weight.shape) for key, weight in model.state_dict().items()},
        {key: tuple(weight.shape) for key, weight in tensors.items()},
    )
    model.load_state_dict(tensors)
    return model.eval()


def _check_shapes(folder: Path, own: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    for key in sorted(set(own) | set(found)):
        if key not in found or key not in own:
            raise InvalidInput(f"checkpoint {folder}: weight {key} is {'missing' if key in own else 'unknown'}")
        if own[key] != found[key]:
            raise InvalidInput(f"checkpoint {folder}: weight {key} is {list(found[key])}, expected {list(own[key])}")


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CannotRead(f"{file} cannot be read: {error.strerror or 'refused'}; a checkpoint has it") from error


def native_specs(model: NativeModel, cache: int = CACHE) -> dict[str, GraphSpec]:
    """Return the GraphSpecs of the four graphs, by role."""
    width = model.decoder.config.width
    structures = model.projector.head.config.structures
    f, t = "float32", TensorSpec
    features = t("image_features", f, (1, CHANNELS, GRID, GRID))
    return {
        "vision_encoder": GraphSpec("vision_encoder", (t("image", f, (1, 3, SIDE, SIDE)),), (features,)),
        "projector": GraphSpec(
            "projector",
            (features, t("region_maps", f, ("regions", GRID, GRID))),
            (
                t("image_tokens", f, (ROWS, width)),
                t("region_tokens", f, ("regions", width)),
                t("presence", f, (structures,)),
                t("boxes", f, (structures, 4)),
                t("structure_maps", f, (structures, GRID, GRID)),
                t("side_probability", f, (structures, 4)),
                t("side_spread", f, (structures, 4)),
            ),
            {"regions": DimRange(1, 1, MAX_REGIONS)},
        ),
        "decoder": decoder_spec(
            model.decoder.config, image_rows=DimRange(1, ROWS, ROWS + MAX_REGIONS), cache=cache, split_head=True
        ),
        "mask_decoder": GraphSpec(
            "mask_decoder",
            (
                features,
                t("boxes", f, ("prompts", 4)),
                t("has_box", f, ("prompts",)),
                t("points", f, ("prompts", "points", 2)),
                t("point_labels", "int64", ("prompts", "points")),
                t("mask_prompts", f, ("prompts", SIDE, SIDE)),
                t("has_mask", f, ("prompts",)),
                t("seg_hidden", f, ("prompts", width)),
                t("has_seg", f, ("prompts",)),
            ),
            (t("mask_logits", f, ("prompts", SIDE, SIDE)), t("iou", f, ("prompts",))),
            {"prompts": DimRange(1, 1, MAX_PROMPTS), "points": DimRange(1, 1, MAX_POINTS)},
        ),
    }


def describe(checkpoint: Checkpoint, cache: int | None = None) -> Published:
    """Return what the torch back end needs, in the form of the published families; no weight is read.

    cache: tokens of prompt and answer together, default CACHE. The modules are small: they have memory already.

    Raises InvalidInput naming the key where config and weights do not fit each other.
    """
    model = build(checkpoint.config)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    _check_shapes(checkpoint.folder, shapes, {name: checkpoint.shape(name) for name in checkpoint.names})
    tensors = {
        role: PublishedTensors(
            checkpoint, {name: (Piece(f"{role}.{name}", shapes[f"{role}.{name}"]),) for name in module.state_dict()}
        )
        for role, module in model.named_children()
    }
    return Published(
        family=FAMILY,
        specs=native_specs(model, cache or CACHE),
        files={TOKENIZER: _read_bytes(checkpoint.folder / "tokenizer.json")},
        settings=settings_of(checkpoint.folder),
        notes=(),
        modules=dict(model.named_children()),
        tensors=tensors,
        decoder=model.decoder.config,
        experts=(1,) * model.decoder.config.layers,
    )


def settings_of(folder: Path) -> dict[str, Any]:
    """Return the settings that a bundle of a checkpoint has. Raises what `read_confidence` raises."""
    found = read_confidence(folder)
    fitted = {} if found is None else {SETTING: {name: found[name] for name in ("slope", "offset")}}
    return {"notice": DEMONSTRATION, **fitted}


def read_confidence(folder: Path) -> dict[str, Any] | None:
    """Return what `edgemed eval confidence` wrote beside the weights, or None. Raises InvalidInput if it is damaged."""
    path = folder / CONFIDENCE
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        confidence_of({SETTING: found})
    except (OSError, ValueError, RecursionError, AttributeError, EdgemedError) as error:
        raise InvalidInput(f"checkpoint {folder}: {CONFIDENCE} is not what `edgemed eval confidence` writes") from error
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Return `config.json` of a checkpoint folder. Raises CannotRead or InvalidInput."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise CannotRead(f"checkpoint {folder}: config.json cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidInput(f"checkpoint {folder}: config.json is not JSON: {error}") from error
    if config.get("family") != FAMILY:
        raise InvalidInput(f"checkpoint {folder} is of family {config.get('family')!r}, {FAMILY!r} was expected")
    return config
