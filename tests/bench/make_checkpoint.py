"""A MedRegA or MedPLIB checkpoint of full size with random weights, in the published layout.

    python tests/bench/make_checkpoint.py medrega FOLDER                             80.1 GB, 40.07 billion parameters
    python tests/bench/make_checkpoint.py medplib FOLDER                             23.4 GB, 11.69 billion
    python tests/bench/make_checkpoint.py medrega FOLDER --layers 2 --vision-layers 2   true shapes on a small disk
    python tests/bench/make_checkpoint.py medplib FOLDER --scale small --set hidden_size=48 --seed 3

For what depends on sizes, keys and files alone: memory and time of export and inference. The answers of such a model
mean nothing. Layouts that are not MedRegA's or MedPLIB's own (LoRA, pickles) are not made.

    --scale full     what was published
    --scale small    the sizes of tests/reference, whose config and tokenizer files every checkpoint here starts from
    --set KEY=JSON   one value of config.json by its dotted name; `clip.` is the tower's own config.json, `sam.` a field
                     of SamMed2dConfig (no config names these). What follows from it follows: the tokenizer has
                     vocab_size minus the added tokens pieces, `moe` one entry for each layer.

Written one tensor after the other out of one block of random numbers, so memory stays small whatever the size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import resource
import shutil
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgemed.errors import CannotWrite, EdgemedError, InvalidInput
from edgemed.families import medplib_config, medplib_torch, medrega_config, medrega_torch
from edgemed.families.published_tokenizer import read_model
from edgemed.families.published_tokens import NORMAL, SPACE
from edgemed.models.sam_med2d import SamMed2dConfig

REFERENCE = Path(__file__).resolve().parents[1] / "reference"
CLIP_FOLDER = "clip-vit-large-patch14-336"
BLOCK = 4_194_301
"""Random numbers that are drawn: a prime, so that no row of a matrix is the beginning of another one."""
DEVIATION = 0.02
"""Of the weights. Residuals then reach 1,050 after MedRegA's 60 layers and 154 after MedPLIB's 32: half has room."""
SPARE_BYTES = 64_000_000
"""Disk kept free beside the weights: headers, index and tokenizer take 2 MB."""

Shape = tuple[int, ...]
Bytes = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Published:
    """What is particular to a family.

    values: of the released model, by the dotted name in its config. parameters: of each part, by the beginning of its
    keys (REFERENCE.md section 0, computed there from the architecture). layers, vision_layers: where config says them.
    """

    tiny: str
    values: Mapping[str, Any]
    parameters: Mapping[str, int]
    layers: str
    vision_layers: str
    vocabulary: str
    dtypes: tuple[str, ...]
    shards: str


FAMILIES = {
    "medrega": Published(
        tiny="medrega-tiny",
        values={
            "force_image_size": 448,
            "llm_config.hidden_size": 7168,
            "llm_config.intermediate_size": 20480,
            "llm_config.num_attention_heads": 56,
            "llm_config.num_hidden_layers": 60,
            "llm_config.num_key_value_heads": 8,
            "llm_config.vocab_size": 64007,
            "vision_config.hidden_size": 3200,
            "vision_config.image_size": 448,
            "vision_config.intermediate_size": 12800,
            "vision_config.num_attention_heads": 25,
            "vision_config.num_hidden_layers": 45,
        },
        parameters={
            "vision_model.": 5_536_496_000,
            "mlp1.": 143_170_560,
            "language_model.": 34_389_017_600,
            "": 40_068_684_160,
        },
        layers="llm_config.num_hidden_layers",
        vision_layers="vision_config.num_hidden_layers",
        vocabulary="llm_config.vocab_size",
        dtypes=("torch_dtype", "llm_config.torch_dtype", "vision_config.torch_dtype"),
        shards="model",
    ),
    "medplib": Published(
        tiny="medplib-tiny",
        values={
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32267,
            "clip.hidden_size": 1024,
            "clip.intermediate_size": 4096,
            "clip.num_attention_heads": 16,
            "clip.num_hidden_layers": 24,
            "clip.projection_dim": 768,
            "sam.width": 768,
            "sam.heads": 12,
            "sam.inner": 3072,
            "sam.windows": [0 if block in (2, 5, 8, 11) else 14 for block in range(12)],
            "sam.adapter": 192,
            "sam.prompt_width": 256,
            "sam.decoder_inner": 2048,
            "sam.attention_width": 128,
            "sam.iou_hidden": 256,
        },
        parameters={
            "model.vision_tower.": 303_507_456,
            "model.mm_projector.": 20_979_712,
            "model.region_fea_adapter.": 4_198_400,
            "model.text_hidden_fcs.": 17_830_144,
            "model.visual_model.image_encoder.": 267_177_216,
            "model.visual_model.prompt_encoder.": 6_220,
            "model.visual_model.mask_decoder.": 4_058_340,
            "": 11_687_144_240,
        },
        layers="num_hidden_layers",
        vision_layers="clip.num_hidden_layers",
        vocabulary="vocab_size",
        dtypes=("torch_dtype",),
        shards="pytorch_model",
    ),
}
TINY_SAM = {
    "width": 40, "heads": 4, "inner": 160, "windows": [14, 0, 14, 0], "grid": 16, "patch": 16, "adapter": 10,
    "prompt_width": 48, "mask_channels": 16, "decoder_depth": 2, "decoder_inner": 96, "attention_width": 24,
    "mask_tokens": 4, "iou_hidden": 40,
}  # fmt: skip
"""The SAM of tests/reference/medplib-tiny."""

_BUFFERS = re.compile(r".*(inv_freq|positional_encoding_gaussian_matrix)")
"""Tensors that are stored and are not parameters."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a checkpoint and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, metavar="N", help="of the language model")
    parser.add_argument("--vision-layers", type=int, metavar="N", help="of InternViT, or of CLIP")
    parser.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="most bytes of a file, in 10^9 (5)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--scale", choices=("full", "small"), default="full")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", dest="values")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--holes", action="store_true", help="matrices are zeros that take no room on the disk")
    options = parser.parse_args(arguments)
    family = FAMILIES[options.family]
    named = {family.layers: options.layers, family.vision_layers: options.vision_layers}
    start = time.perf_counter()
    try:
        changed = {key: value for key, value in named.items() if value is not None} | dict(map(_pair, options.values))
        parameters, size = make(
            options.family, options.folder, changed, options.scale, options.dtype, options.seed,
            int(options.shard_gb * 1e9), holes=options.holes,
        )  # fmt: skip
    except EdgemedError as error:
        parser.exit(error.exit_code, f"{parser.prog}: {error}\n")
    seconds = time.perf_counter() - start
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(f"{options.family}: {parameters:,} parameters, {size / 1e9:.2f} GB {options.dtype} in {options.folder}")
    print(f"{seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s; peak memory {peak_mb:.0f} MB")


def make(
    name: str,
    folder: Path,
    changed: Mapping[str, Any] | None = None,
    scale: str = "full",
    dtype: str = "bf16",
    seed: int = 0,
    shard_bytes: int = 5_000_000_000,
    *,
    holes: bool = False,
) -> tuple[int, int]:
    """Write a checkpoint of family `name` to a new or empty folder; return (parameters, bytes of all tensors).

    changed: values of the config by dotted name, as `--set`. holes: matrices are zeros that take no room on the disk.

    Raises InvalidInput for sizes that fit no model, CannotWrite if the folder holds files or the disk lacks room.
    """
    check_parameters(name)
    settings = configure(name, changed or {}, scale, dtype)
    table = shapes(name, settings)
    width = {"bf16": 2, "fp32": 4}[dtype]
    size = sum(math.prod(shape) for shape in table.values()) * width
    _check_folder(folder, 0 if holes else size)
    folder.mkdir(parents=True, exist_ok=True)
    write_files(name, folder, settings)
    shards = _split(table, shard_bytes // width)
    names = [f"{FAMILIES[name].shards}-{i:05}-of-{len(shards):05}" for i in range(1, len(shards) + 1)]
    frequencies = _frequencies(settings) if name == "medplib" else np.zeros(0)
    weights = Weights(dtype, seed, frequencies, holes=holes)
    for stem, shard in zip(names, shards, strict=True):
        weights.write(folder / f"{stem}.safetensors", shard)
    # The released MedPLIB has shards of both kinds and an index of the pickles alone.
    kind, index = ("bin", "pytorch_model.bin") if name == "medplib" else ("safetensors", "model.safetensors")
    places = {key: f"{stem}.{kind}" for stem, shard in zip(names, shards, strict=True) for key in shard}
    _write_json(folder / f"{index}.index.json", {"metadata": {"total_size": size}, "weight_map": places})
    return count(table), size


def check_parameters(name: str) -> None:
    """Assert that the published sizes give the published number of parameters, part by part."""
    table = shapes(name, configure(name, {}))
    for part, expected in FAMILIES[name].parameters.items():
        found = count({key: shape for key, shape in table.items() if key.startswith(part)})
        assert found == expected, f"{name} {part or 'in all'}: {found} parameters, {expected} expected"


def count(table: Mapping[str, Shape]) -> int:
    """Return the number of parameters; buffers that are stored with them do not count."""
    return sum(math.prod(shape) for key, shape in table.items() if not _BUFFERS.fullmatch(key))


# --- sizes ------------------------------------------------------------------------------------------------------------


def configure(name: str, changed: Mapping[str, Any], scale: str = "full", dtype: str = "bf16") -> dict[str, Any]:
    """Return the config as one nested dict, for MedPLIB with the sections `clip` and `sam`.

    Raises InvalidInput for a key of `changed` that is not there.
    """
    family = FAMILIES[name]
    tiny = REFERENCE / family.tiny
    settings: dict[str, Any] = json.loads((tiny / "config.json").read_text())
    if name == "medplib":
        settings["clip"] = json.loads(next(tiny.glob("clip*/config.json")).read_text())
        settings["sam"] = dict(TINY_SAM)
        settings["mm_vision_tower"] = settings["vision_tower"] = f"./{CLIP_FOLDER}"
    stored = {key: {"bf16": "bfloat16", "fp32": "float32"}[dtype] for key in family.dtypes}
    for key, value in {**stored, **(family.values if scale == "full" else {}), **changed}.items():
        _put(settings, key, value)
    if name == "medplib":
        layers = range(settings["num_hidden_layers"])
        follows = {
            "moe.moe_layers_idx": list(layers),
            "moe.num_experts": [2 for _ in layers],
            "mm_hidden_size": settings["clip"]["hidden_size"],
            "out_dim": settings["sam"]["prompt_width"],
        }
        for key in follows.keys() - changed.keys():
            _put(settings, key, follows[key])
    return settings


def shapes(name: str, settings: Mapping[str, Any]) -> dict[str, Shape]:
    """Return every published key with its shape. Raises InvalidInput for sizes that fit no model."""
    if name == "medrega":
        table = medrega_torch.key_table(medrega_config.read_config(settings))
        return {piece.key: piece.shape for own in table.values() for group in own.values() for piece in group}
    config = medplib_config.read_config(settings, settings["clip"])
    sam = SamMed2dConfig(**{**settings["sam"], "windows": tuple(settings["sam"]["windows"])})
    table = medplib_torch.key_table(medplib_torch.build(config, sam))
    found = {piece.key: piece.shape for own in table.values() for group in own.values() for piece in group}
    half = (config.language.head_dim // 2,)
    # transformers 4.31 saves these buffers.
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": half for i in range(config.language.layers)}
    return found | buffers


def _pair(text: str) -> tuple[str, Any]:
    """Return (key, value) of KEY=JSON; what is not JSON is text."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _put(settings: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    section: Any = settings
    for parent in parents:
        section = section.get(parent) if isinstance(section, dict) else None
    if not isinstance(section, dict) or last not in section:
        raise InvalidInput(f"the config has no {dotted}, a key of config.json was expected")
    section[last] = value


def _frequencies(settings: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    width = settings["hidden_size"] // settings["num_attention_heads"]
    theta = float(settings.get("rope_theta", 10000.0))
    found: np.ndarray[Any, np.dtype[np.float64]] = np.power(theta, -np.arange(0, width, 2, dtype=np.float64) / width)
    return found


# --- weights ----------------------------------------------------------------------------------------------------------


class Weights:
    """Makes tensors: a key decides where in one block of random numbers its tensor starts, the seed what they are."""

    def __init__(
        self, dtype: str, seed: int, frequencies: np.ndarray[Any, np.dtype[np.float64]], *, holes: bool = False
    ) -> None:
        self._holes = holes
        self.dtype = dtype
        self._seed = seed
        self._frequencies = frequencies
        self._block = self._stored(np.random.default_rng(seed).standard_normal(BLOCK, np.float32) * DEVIATION)

    def write(self, file: Path, shard: Mapping[str, Shape]) -> None:
        """Write one safetensors file. Raises CannotWrite if the disk does not take it."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for key, shape in shard.items():
            end = at + math.prod(shape) * self._block.itemsize
            kind = {"bf16": "BF16", "fp32": "F32"}[self.dtype]
            entries[key] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
            at = end
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        try:
            with file.open("wb") as stream:
                stream.write(len(header).to_bytes(8, "little") + header)
                for key, shape in shard.items():
                    for part in self._parts(key, shape):
                        if self._holes and len(shape) > 1:
                            stream.seek(part.nbytes, os.SEEK_CUR)
                        else:
                            stream.write(part.data)
                stream.truncate(stream.tell())
        except OSError as error:
            raise CannotWrite(f"{file} cannot be written: {error.strerror}") from error

    def _parts(self, key: str, shape: Shape) -> Iterator[Bytes]:
        """Yield a tensor's numbers in pieces, as they are stored."""
        if (special := self._special(key, shape)) is not None:
            yield self._stored(np.asarray(special, np.float32))
            return
        left, start = math.prod(shape), zlib.crc32(key.encode()) % BLOCK
        while left:
            part = self._block[start : start + left]
            yield part
            left, start = left - len(part), 0

    def _special(self, key: str, shape: Shape) -> Bytes | None:
        """Return the numbers of the few tensors that are not small random ones."""
        if key.endswith("inv_freq"):
            return self._frequencies
        if key.endswith("positional_encoding_gaussian_matrix"):
            return np.random.default_rng(self._seed).standard_normal(shape)
        if key.endswith((".ls1", ".ls2")):
            return np.full(shape, 0.1)
        if len(shape) == 1 and key.endswith(".weight"):  # norms: a linear layer's weight has two axes
            return np.ones(shape)
        return None

    def _stored(self, values: np.ndarray[Any, np.dtype[np.float32]]) -> Bytes:
        if self.dtype == "fp32":
            return values
        rounded: Bytes = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
        return rounded


def _split(table: Mapping[str, Shape], limit: int) -> list[dict[str, Shape]]:
    """Return the tensors in shards of at most `limit` numbers; a tensor with more has one of its own."""
    shards: list[dict[str, Shape]] = []
    used = limit
    for key, shape in table.items():
        numbers = math.prod(shape)
        if used + numbers > limit or not shards:
            shards.append({})
            used = 0
        shards[-1][key] = shape
        used += numbers
    return shards


def _check_folder(folder: Path, size: int) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CannotWrite(f"{folder} is there and not an empty folder; name a new one")
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < size + SPARE_BYTES:
        raise CannotWrite(
            f"the checkpoint takes {(size + SPARE_BYTES) / 1e9:.1f} GB, the disk of {folder} has {free / 1e9:.1f} GB "
            "free; make room, or give --layers and --vision-layers"
        )


# --- config and tokenizer ---------------------------------------------------------------------------------------------


def write_files(name: str, folder: Path, settings: Mapping[str, Any]) -> None:
    """Write everything but the weights. Raises InvalidInput for a vocabulary that lacks room for the special pieces."""
    family = FAMILIES[name]
    tiny = REFERENCE / family.tiny
    added: dict[str, int] = json.loads((tiny / "added_tokens.json").read_text())
    section: Any = settings
    for part in family.vocabulary.split("."):
        section = section[part]
    pieces = section - len(added)
    write_tokenizer(tiny / "tokenizer.model", folder / "tokenizer.model", pieces)
    moved = {content: index - min(added.values()) + pieces for content, index in added.items()}
    _write_json(folder / "added_tokens.json", moved)
    tokens = json.loads((tiny / "tokenizer_config.json").read_text())
    if "added_tokens_decoder" in tokens:
        old = tokens["added_tokens_decoder"]
        tokens["added_tokens_decoder"] = {str(moved.get(t["content"], int(i))): t for i, t in old.items()}
    _write_json(folder / "tokenizer_config.json", tokens)
    shutil.copyfile(tiny / "special_tokens_map.json", folder / "special_tokens_map.json")
    _write_json(folder / "config.json", {k: v for k, v in settings.items() if k not in ("clip", "sam")})
    if name == "medplib":
        clip = folder / CLIP_FOLDER
        clip.mkdir()
        _write_json(clip / "config.json", settings["clip"])
        processor = json.loads(next(tiny.glob("clip*/preprocessor_config.json")).read_text())
        side = settings["clip"]["image_size"]
        processor |= {"crop_size": {"height": side, "width": side}, "size": {"shortest_edge": side}}
        _write_json(clip / "preprocessor_config.json", processor)


def write_tokenizer(tiny: Path, file: Path, pieces: int) -> None:
    """Write a SentencePiece BPE model with so many pieces: those of `tiny` first, then letters, Chinese and n-grams.

    The special pieces keep their ids: `<|im_end|>` is 7. Raises InvalidInput if they do not fit.
    Source of the field numbers: the format's sentencepiece_model.proto.
    """
    model = read_model(tiny)
    special = [piece for piece in model.pieces if piece[2] != NORMAL]
    if pieces < len(special):
        raise InvalidInput(f"vocab_size leaves {pieces} pieces, at least {len(special)} were expected")
    texts = dict.fromkeys(itertools.chain((t for t, _, kind in model.pieces if kind == NORMAL), _fillers()))
    normal = itertools.islice(texts, pieces - len(special))
    ranked = [*special, *((text, float(-rank), NORMAL) for rank, text in enumerate(normal))]
    if len(ranked) < pieces:
        raise InvalidInput(f"vocab_size leaves {pieces} pieces, at most {len(ranked)} can be made")
    messages = [_field(1, _field(1, t.encode()) + _field(2, score) + _field(3, kind)) for t, score, kind in ranked]
    trainer = _field(3, 2) + _field(4, pieces) + _field(35, int(model.byte_fallback)) + _field(40, 0)
    names = b"".join(_field(45 + i, special[i][0].encode()) for i in range(3))  # of the pieces for unknown, bos, eos
    trainer += _field(41, 1) + _field(42, 2) + _field(43, 2**64 - 1) + names
    normalizer = _field(1, b"identity") + _field(3, int(model.add_dummy_prefix))
    normalizer += _field(4, int(model.remove_extra_whitespaces))
    file.write_bytes(b"".join(messages) + _field(2, trainer) + _field(3, normalizer))


def _fillers() -> Iterator[str]:
    letters = "etaoinshrdlcumwfgypbvkjxqz"
    yield from map(chr, range(0x21, 0x7F))
    yield SPACE
    yield from _joined(SPACE + letters, letters)
    yield from _joined(SPACE + letters, letters, letters)
    yield from map(chr, range(0x4E00, 0xA000))
    yield from _joined(SPACE + letters, letters, letters, letters)


def _joined(*alphabets: Iterable[str]) -> Iterator[str]:
    return map("".join, itertools.product(*alphabets))


def _field(number: int, value: int | float | bytes) -> bytes:
    """Return one protobuf field: a varint, a fixed32 float or bytes with their length."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
