"""Published checkpoints as they lie on a disk: one tensor at a time, whatever files they are spread over.

Covers safetensors (one file, or shards with or without an index), torch pickles (`.bin`, `.pth`; the same), files that
lie beside the folder (a projector, a SAM), and low-rank adapters (LoRA), which are merged when a tensor is read. Does
not cover what the tensors mean (`edgemed.families`), or quantized and legacy (before torch 1.6) files.

Opening reads headers only; a tensor is mapped when it is asked for and nothing is kept, so that a checkpoint larger
than the memory can be converted. No code of a checkpoint is run: pickles go through torch's `weights_only` reader.

Build half: needs torch, which is imported inside functions.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed.errors import CannotRead, InvalidInput, NoInput

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""dtype in a safetensors header -> name of the torch dtype, bytes of an element."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format; a larger number is no header."""

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.(safetensors|bin)")
_PREFERRED = ("safetensors", "bin")  # the published MedPLIB folder has the same weights in both
_WRAPPERS = ("module", "model", "state_dict")  # what trainers put a state dict under
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_LORA = re.compile(r"(?P<target>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight")
_SHOWN = 3


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: its file and its key there. `offset` is None in a pickle, else bytes from the start."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int | None


@dataclass(frozen=True)
class Adapter:
    """The two factors of a low-rank addition: scale * up [rows, rank] @ down [rank, columns]."""

    down: Stored
    up: Stored
    scale: float


@dataclass(frozen=True)
class Scaling:
    """How a low-rank addition is scaled: alpha over the rank, or over its root; without alpha, twice."""

    alpha: float | None
    by_root: bool = False

    def of(self, rank: int) -> float:
        """Return the factor for one rank."""
        if self.alpha is None:
            return 2.0
        return self.alpha / (math.sqrt(rank) if self.by_root else rank)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its config and its tensors by name, adapters merged, wrapper parts taken out of the names.

    `replaced` names the tensors of the folder in whose place one of an extra file is read.
    """

    folder: Path
    config: dict[str, Any]
    stored: Mapping[str, Stored] = field(repr=False)
    adapters: Mapping[str, Adapter] = field(repr=False)
    replaced: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self.stored))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises InvalidInput if there is no such tensor."""
        return self._find(name).shape

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype as torch calls it: float32, bfloat16. Raises InvalidInput if there is none."""
        return self._find(name).dtype

    def read(self, name: str) -> Tensor:
        """Return one tensor in its stored dtype, mapped from the file; with an adapter, merged in float32 and rounded.

        Writing to it never changes the file. Raises InvalidInput if there is no such tensor, CannotRead if the file
        went away since the checkpoint was opened.
        """
        tensor = _read(self._find(name))
        adapter = self.adapters.get(name)
        if adapter is None:
            return tensor
        low_rank = _read(adapter.up).float() @ _read(adapter.down).float()
        return (tensor.float() + adapter.scale * low_rank).to(tensor.dtype)

    def _find(self, name: str) -> Stored:
        if name not in self.stored:
            raise InvalidInput(f"checkpoint {self.folder}: there is no tensor {name} among its {len(self.stored)}")
        return self.stored[name]


def open_checkpoint(
    folder: str | Path,
    *,
    extra: Mapping[str, Path] | None = None,
    model_types: Collection[str] = (),
    lora_alpha: float | None = None,
) -> Checkpoint:
    """Return the checkpoint in a folder after its headers were read and found whole.

    extra: prefix -> file beside the folder; its tensors get the prefix before their names and replace those of the
    folder. model_types: what `model_type` in config.json may be (any, if empty). lora_alpha: scale of LoRA factors
    (over their rank) where no adapter_config.json or config.json says it.

    Raises NoInput if the folder holds no weights, CannotRead if a file is missing or cut off, InvalidInput if one is
    not what it must be.
    """
    root = Path(folder)
    config = read_json(root / "config.json")
    found = config.get("model_type")
    if model_types and found not in model_types:
        raise InvalidInput(
            f"checkpoint {root}: model_type in config.json is {found!r}, expected "
            f"{' or '.join(map(repr, model_types))}; this is the checkpoint of another family"
        )
    files, weight_map = _weight_files(root)
    found_tensors = _collect(root, files)
    _check_index(root, weight_map, found_tensors)
    tensors = _unwrapped(root, found_tensors)
    saved_beside = [("", root / name) for name in _ADAPTERS if (root / name).is_file()]
    sources = [*saved_beside[:1], *((prefix, Path(path)) for prefix, path in (extra or {}).items())]
    replaced: list[str] = []
    for prefix, path in sources:
        own = _unwrapped(root, {prefix + key: tensor for key, tensor in _stored_in(path).items()})
        replaced += sorted(set(own) & set(tensors))
        tensors |= own
    factors = _take_factors(root, tensors)
    if not factors:
        return Checkpoint(root, config, tensors, {}, tuple(replaced))
    scaling = _scaling(root, [root, *(path.parent for _, path in sources)], config, lora_alpha)
    return Checkpoint(root, config, tensors, _adapters(root, tensors, factors, scaling), tuple(replaced))


def check_keys(names: Iterable[str], expected: Iterable[str], ignorable: Iterable[str] = ()) -> None:
    """Raise InvalidInput, naming the first keys and how many, if `names` lacks an expected key or has one too many.

    Keys in `ignorable` may be there or not.

    >>> check_keys(["a", "b.inv_freq"], ["a"], ignorable=["b.inv_freq"])
    >>> check_keys(["a", "c"], ["a", "b"])
    Traceback (most recent call last):
    edgemed.errors.InvalidInput: the checkpoint does not fit its config.json: 1 tensor is missing (b), 1 is unknown (c)
    """
    there, wanted, free = set(names), set(expected), set(ignorable)
    missing, unknown = sorted(wanted - there - free), sorted(there - wanted - free)
    parts: list[str] = []
    for keys, what in ((missing, "missing"), (unknown, "unknown")):
        if keys:
            noun = "" if parts else "tensor " if len(keys) == 1 else "tensors "
            parts.append(f"{len(keys)} {noun}{'is' if len(keys) == 1 else 'are'} {what} ({_some(keys)})")
    if parts:
        raise InvalidInput(f"the checkpoint does not fit its config.json: {', '.join(parts)}")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises CannotRead, or InvalidInput if it holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CannotRead(f"{path} cannot be read: {error.strerror or 'refused'}; a checkpoint has it") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidInput(f"{path} holds a {type(content).__name__}, an object was expected")
    return content


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")


def _weight_files(root: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the weight files of a folder, safetensors before pickles, and tensor -> file of their index, if any."""
    there = {file.name: file for file in sorted(root.iterdir()) if file.is_file()}
    choices = []
    for suffix in _PREFERRED:
        weight_map = _weight_map(root, [file for name, file in there.items() if name.endswith(f".{suffix}.index.json")])
        names = sorted(set(weight_map.values())) or _shards(root, there, suffix)
        if names:
            choices.append((names, weight_map))
    if not choices:
        raise NoInput(
            f"checkpoint {root}: no weights; expected model.safetensors, pytorch_model.bin or their shards "
            "(model-00001-of-00002.safetensors)"
        )
    names, weight_map = next((choice for choice in choices if any(name in there for name in choice[0])), choices[0])
    missing = [name for name in names if name not in there]
    if missing:
        raise CannotRead(
            f"checkpoint {root}: {len(missing)} of {len(names)} shards missing ({_some(missing)}); fetch the rest"
        )
    return [there[name] for name in names], weight_map


def _weight_map(root: Path, indexes: list[Path]) -> dict[str, str]:
    if len(indexes) > 1:
        raise InvalidInput(f"checkpoint {root}: {len(indexes)} indexes, expected one; take away all but its own")
    if not indexes:
        return {}
    weight_map = read_json(indexes[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidInput(f"{indexes[0]} has no weight_map, an object from tensor to file was expected")
    for name in weight_map.values():
        if not isinstance(name, str) or name != Path(name).name:
            raise InvalidInput(f"{indexes[0]}: weight_map names {name!r}, a file of the same folder was expected")
    return weight_map


def _shards(root: Path, there: Mapping[str, Path], suffix: str) -> list[str]:
    """Return the names of the weight files where no index says them: numbered shards, all of them, or one file."""
    numbered = [match for name in there if (match := _SHARD.fullmatch(name)) and name.endswith(suffix)]
    series = sorted({(match["stem"], match["count"]) for match in numbered})
    if len(series) > 1:
        found = ", ".join(f"{stem} of {count}" for stem, count in series)
        raise InvalidInput(f"checkpoint {root}: shards of {len(series)} series ({found}), expected one")
    if series:
        match = numbered[0]
        width = len(match["number"])
        return [
            f"{match['stem']}-{number:0{width}}-of-{match['count']}.{suffix}"
            for number in range(1, int(match["count"]) + 1)
        ]
    return [name for name in (f"model.{suffix}", f"pytorch_model.{suffix}") if name in there][:1]


def _collect(root: Path, files: Iterable[Path]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for file in files:
        for key, tensor in _stored_in(file).items():
            if key in tensors:
                raise InvalidInput(
                    f"checkpoint {root}: tensor {key} is in {tensors[key].file.name} and in {file.name}, "
                    "expected in one of them"
                )
            tensors[key] = tensor
    return tensors


def _check_index(root: Path, weight_map: Mapping[str, str], tensors: Mapping[str, Stored]) -> None:
    for key, name in weight_map.items():
        if key not in tensors:
            raise InvalidInput(f"checkpoint {root}: the index puts tensor {key} in {name}, but no shard has it")
        if tensors[key].file.name != name:
            raise InvalidInput(
                f"checkpoint {root}: the index puts tensor {key} in {name}, but it is in {tensors[key].file.name}"
            )


def _stored_in(file: Path) -> dict[str, Stored]:
    """Return what one weight file holds, by key. Raises CannotRead or InvalidInput."""
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
    except OSError as error:
        raise CannotRead(f"{file} cannot be read: {error.strerror or 'refused'}") from error
    if start.startswith(b"version https://git-lfs"):
        raise CannotRead(f"{file} is a Git LFS pointer, the weights were expected; fetch them with 'git lfs pull'")
    if file.suffix == ".safetensors":
        return _safetensors_header(file)
    return {
        key: Stored(file, key, _name_of(tensor.dtype), tuple(tensor.shape), None)
        for key, tensor in _pickled(file).items()
    }


def _safetensors_header(file: Path) -> dict[str, Stored]:
    """Return what a safetensors file holds. Layout: uint64 little endian n, n bytes of JSON, the tensors' bytes.

    Source: the format's description in the safetensors repository, README.md, "Format".
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES:
            raise InvalidInput(f"{file} is no safetensors file: its {size} bytes do not start with a header's length")
        header = stream.read(length)
    if len(header) < length:
        raise CannotRead(
            f"{file} is cut off in its header: {size} bytes, at least {8 + length} expected; fetch it again"
        )
    try:
        entries = json.loads(header, object_pairs_hook=_unique)
        entries.pop("__metadata__", None)
        tensors = {key: _entry(file, key, entry, 8 + length) for key, entry in entries.items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{file}: the safetensors header does not hold: {error}") from error
    end = max((_end(tensor) for tensor in tensors.values()), default=8 + length)
    if size < end:
        raise CannotRead(f"{file} is cut off: {size} bytes, {end} expected; fetch it again")
    if size > end:
        raise InvalidInput(f"{file}: {size - end} bytes follow the last tensor, none were expected")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key is there twice")
    return content


def _entry(file: Path, key: str, entry: Mapping[str, Any], data_start: int) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"tensor {key} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}")
    dtype, width = DTYPES[entry["dtype"]]
    shape = tuple(int(side) for side in entry["shape"])
    first, last = entry["data_offsets"]
    if min(shape, default=0) < 0 or first < 0 or last - first != math.prod(shape) * width:
        raise ValueError(
            f"tensor {key} has {last - first} bytes, expected {math.prod(shape) * width}: {list(shape)} {dtype}"
        )
    return Stored(file, key, dtype, shape, data_start + first)


def _bytes(tensor: Stored) -> int:
    return math.prod(tensor.shape) * next(width for name, width in DTYPES.values() if name == tensor.dtype)


def _end(tensor: Stored) -> int:
    assert tensor.offset is not None
    return tensor.offset + _bytes(tensor)


def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _pickled(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that torch.save wrote, mapped, without running code in it.

    They may lie in a dict under one of `_WRAPPERS`, as trainers save them; what lies beside that is left.
    """
    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"names {found[1]}, which could run code" if found else "holds more than tensors"
        raise InvalidInput(
            f"{file}: the pickle {what}; only tensors are read. Convert it to safetensors on a machine that may run it"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it is empty"
        if "mmap can only be used" in reason:
            raise InvalidInput(
                f"{file} was not saved by torch 1.6 or later; save it again with torch.save, or as safetensors"
            ) from error
        raise CannotRead(f"{file} is cut off or damaged ({reason}); fetch it again") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not content:
        raise InvalidInput(f"{file} holds a {type(content).__name__}, a dict from name to tensor was expected")
    for key, tensor in content.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            raise InvalidInput(f"{file}: entry {key!r} is a {type(tensor).__name__}, a tensor was expected")
    return content


def _read(tensor: Stored) -> Tensor:
    import torch

    try:
        if tensor.offset is None:
            return _pickled(tensor.file)[tensor.key]
        count = _bytes(tensor)
        if not count:
            return torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
        # "c", copy on write: torch warns of memory that it may not write to.
        raw: np.ndarray[Any, Any] = np.memmap(tensor.file, np.uint8, "c", tensor.offset, (count,))
    except (OSError, ValueError, KeyError) as error:
        raise CannotRead(f"{tensor.file} changed after the checkpoint was opened ({error}); open it again") from error
    if raw.ctypes.data % 8:
        raw = np.array(raw)  # an odd header length: typed views need aligned memory
    return torch.from_numpy(raw).view(getattr(torch, tensor.dtype)).reshape(tensor.shape)


def _unwrapped(root: Path, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return the tensors under the names the model had before a trainer wrapped it.

    Taken out: a leading `module.` that all have, `base_model.model.` after any prefix, `base_layer`, and the original
    of a module that was trained whole beside an adapter.
    """
    everywhere = all(name.startswith("module.") for name in tensors)
    result: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("module.") if everywhere else name
        plain = re.sub(r"(^|\.)base_model\.model\.", r"\1", plain).replace(".base_layer.", ".")
        if ".original_module." in plain:
            continue
        plain = re.sub(r"\.modules_to_save\.[^.]+\.", ".", plain)
        if plain in result:
            raise InvalidInput(
                f"checkpoint {root}: {result[plain].key} and {tensor.key} both are {plain}, expected one"
            )
        result[plain] = tensor
    return result


def _take_factors(root: Path, tensors: dict[str, Stored]) -> dict[str, dict[str, Stored]]:
    """Take the LoRA factors out of `tensors`; return them, A and B, by the name of the tensor they are added to."""
    factors: dict[str, dict[str, Stored]] = {}
    for name in [name for name in tensors if ".lora_" in name]:
        match = _LORA.fullmatch(name)
        if not match:
            raise InvalidInput(
                f"checkpoint {root}: {name} is no lora_A or lora_B of a linear layer; merge the adapter with the tool "
                "that trained it"
            )
        both = factors.setdefault(f"{match['target']}.weight", {})
        if match["side"] in both:
            raise InvalidInput(f"checkpoint {root}: more than one adapter for {match['target']}.weight, expected one")
        both[match["side"]] = tensors.pop(name)
    return factors


def _adapters(
    root: Path, tensors: Mapping[str, Stored], factors: Mapping[str, Mapping[str, Stored]], scaling: Scaling
) -> dict[str, Adapter]:
    adapters: dict[str, Adapter] = {}
    for target, both in factors.items():
        base, down, up = tensors.get(target), both.get("A"), both.get("B")
        if base is None or down is None or up is None:
            absent = "the tensor itself" if base is None else "its lora_A" if down is None else "its lora_B"
            raise InvalidInput(f"checkpoint {root}: there is an adapter for {target}, but {absent} is missing")
        rank = down.shape[0]
        if len(base.shape) != 2 or up.shape != (base.shape[0], rank) or down.shape != (rank, base.shape[1]):
            raise InvalidInput(
                f"checkpoint {root}: lora_B {list(up.shape)} times lora_A {list(down.shape)} does not fit {target} "
                f"{list(base.shape)}"
            )
        adapters[target] = Adapter(down, up, scaling.of(rank))
    return adapters


def _scaling(root: Path, folders: Iterable[Path], config: Mapping[str, Any], given: float | None) -> Scaling:
    """Return how LoRA factors are scaled. Sources, in this order: the caller, adapter_config.json, config.json.

    The InternVL configs (`use_llm_lora`, `use_backbone_lora`: ranks) do not say alpha; their trainer takes 2 * rank.
    """
    if given is not None:
        return Scaling(given)
    for path in (folder / "adapter_config.json" for folder in folders):
        if path.is_file():
            adapter = read_json(path)
            for key in ("alpha_pattern", "rank_pattern", "fan_in_fan_out", "use_dora"):
                if adapter.get(key):
                    raise InvalidInput(
                        f"{path}: {key} is set, which is not supported; merge the adapter with the tool that trained it"
                    )
            return Scaling(_number(path, adapter.get("lora_alpha")), bool(adapter.get("use_rslora")))
    if config.get("lora_alpha"):
        return Scaling(_number(root / "config.json", config["lora_alpha"]))
    if config.get("use_llm_lora") or config.get("use_backbone_lora"):
        return Scaling(None)
    raise InvalidInput(
        f"checkpoint {root}: it has LoRA factors, but neither adapter_config.json nor config.json says lora_alpha; "
        "add the adapter_config.json of the training, or say the number"
    )


def _number(path: Path, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise InvalidInput(f"{path}: lora_alpha is {value!r}, a number above 0 was expected")
    return float(value)
