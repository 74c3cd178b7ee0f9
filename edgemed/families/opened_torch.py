"""A checkpoint folder, of whatever family, opened to be asked in torch or to be exported.

Covers which build half a folder belongs to, as its `config.json` says, and what a Session needs of it: a Bundle that
lies in memory but for the files a family reads, and the modules by role. Does not cover tensors (`edgemed.checkpoints`)
or what they mean (`native_torch`, `medrega_torch`, `medplib_torch`).
"""

from __future__ import annotations

import hashlib
import importlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from edgemed.bundle import Bundle, Manifest, bundle_name
from edgemed.checkpoints import Checkpoint, open_checkpoint
from edgemed.errors import InvalidInput
from edgemed.families.published_torch import Published
from edgemed.models.cached_decoder import CachedDecoder
from edgemed.models.llama import Llama


@dataclass(frozen=True)
class BuildHalf:
    """A row of the table: the module whose `describe` reads such a checkpoint, and what its config.json says.

    signs: its `family`, its `model_type`, or one of its `architectures`.
    """

    module: str
    signs: frozenset[str]


BUILD_HALVES: Mapping[str, BuildHalf] = {
    "native": BuildHalf("edgemed.families.native_torch", frozenset({"native"})),
    "medrega": BuildHalf("edgemed.families.medrega_torch", frozenset({"internvl_chat", "InternVLChatModel"})),
    "medplib": BuildHalf("edgemed.families.medplib_torch", frozenset({"medplib_moe_llama", "MedPLIBForCausalLM"})),
}
"""Family -> its build half, imported on use."""


def family_of(config: Mapping[str, Any]) -> str:
    """Return the family that a checkpoint's config.json tells. Raises InvalidInput if this version has no such family.

    >>> family_of({"model_type": "internvl_chat"})
    'medrega'
    """
    architectures = config.get("architectures")
    said = [config.get("family"), config.get("model_type"), *(architectures if isinstance(architectures, list) else ())]
    for name, half in BUILD_HALVES.items():
        if any(isinstance(sign, str) and sign in half.signs for sign in said):
            return name
    raise InvalidInput(
        f"config.json: model_type is {config.get('model_type')!r}; this version reads checkpoints of the families "
        f"{', '.join(BUILD_HALVES)}"
    )


def describe(checkpoint: Checkpoint, **options: Any) -> Published:
    """Return what the checkpoint's own build half tells of it; options: what its `describe` takes (compat, cache).

    Raises InvalidInput where the family is not known, or config, weights and tokenizer do not fit each other.
    """
    half = importlib.import_module(BUILD_HALVES[family_of(checkpoint.config)].module)
    published: Published = half.describe(checkpoint, **options)
    return published


def open_folder(folder: str | Path) -> tuple[Bundle, Callable[[str], Callable[[], nn.Module]]]:
    """Return (a Bundle over the checkpoint in a folder, a function role -> what loads that role's module).

    The Bundle has no graph files; what a family reads lies in a temporary folder that goes when the Bundle does. Its
    digest tells checkpoints apart by config.json and by names and sizes of the files: hashing 80 GB takes minutes.

    Raises CannotRead, NoInput or InvalidInput where the folder holds no checkpoint that this version knows.
    """
    checkpoint = open_checkpoint(folder)
    published = describe(checkpoint)
    bundle = bundle_over(published, bundle_name(checkpoint.folder.resolve()), digest(checkpoint.folder))
    return bundle, lambda role: partial(load_module, published, role)


def bundle_over(published: Published, name: str, digest_hex: str) -> Bundle:
    """Return a Bundle without graph files over what `describe` told; its other files go when it does."""
    manifest = Manifest(
        name=name,
        family=published.family,
        graphs=published.specs,
        files={name: hashlib.sha256(content).hexdigest() for name, content in published.files.items()},
        precision=dict.fromkeys(published.specs, "fp32"),
        settings=published.settings,
    )
    place = Path(tempfile.mkdtemp(prefix="edgemed-"))
    bundle = Bundle(place, manifest, digest_hex)
    weakref.finalize(bundle, shutil.rmtree, place, ignore_errors=True)
    for name, content in published.files.items():
        file = bundle.file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return bundle


def load_module(published: Published, role: str) -> nn.Module:
    """Return a role's module with its weights in float32, as its GraphSpec calls it: the decoder has its cache."""
    module, spec = published.load(role), published.specs[role]
    if not spec.state:
        return module
    assert isinstance(module, Llama)
    return CachedDecoder(module, spec.dims["cache"].max).eval()


def digest(folder: Path) -> str:
    """Return the SHA-256, in hex, of config.json and of name and size of every file in `folder`, by name."""
    state = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        state.update(f"\n{file.name} {file.stat().st_size}".encode())
    return state.hexdigest()
