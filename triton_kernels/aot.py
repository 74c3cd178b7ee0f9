"""Compiles the kernels ahead of time: a cubin for each variant and GPU generation, and a description beside them.

    python -m edgemed.triton_kernels.aot FOLDER [--target 90 ...]

    FOLDER/sm_90/kernels.json              what `launch` needs, and which Triton made it
    FOLDER/sm_90/box_head.int8.p1.cubin    ...

Needs triton (extra: edgemed[export]), no GPU and no torch. The same sources and Triton give the same bytes: line
information, which holds paths, is left out, and no cache is read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import re
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from edgemed.errors import BackendUnavailable, InvalidInput
from edgemed.triton_kernels.triton_launcher import kernel
from edgemed.triton_kernels.variants import ALIGNMENT, DESCRIPTION, TARGETS, Variant

OPS = ("box_head", "masked_argmax", "accept_draft", "expert_gemv")


@dataclass(frozen=True, eq=False)
class Compiled:
    """One variant for one target: the machine code, its PTX, and its entry in `kernels.json`."""

    cubin: bytes
    ptx: str
    entry: dict[str, Any]


def variants_for(target: int) -> list[Variant]:
    """Return every variant that `target` (compute capability times 10) can run; fp8 from 89 on."""
    return [v for op in OPS for v in import_module(f"edgemed.triton_kernels.{op}").variants() if v.lowest <= target]


def compile_variant(name: str, target: int) -> Compiled:
    """Return the variant `name`, compiled for `target`.

    Raises InvalidInput where `target` has no such variant, BackendUnavailable without triton or in its interpreter.
    """
    found = [variant for variant in variants_for(target) if variant.name == name]
    if not found:
        raise InvalidInput(f"no kernel '{name}' for sm_{target}; `variants_for({target})` lists what there is")
    triton = _triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = found[0]
    source = ASTSource(
        fn=kernel(variant.op, variant.kernel, variant.uses),
        signature={**variant.arguments, **dict.fromkeys(variant.constants, "constexpr")},
        constexprs=dict(variant.constants),
        attrs={
            (index,): [["tt.divisibility", ALIGNMENT]]
            for index, (argument, kind) in enumerate(variant.arguments.items())
            if kind.startswith("*") or argument in variant.divisible
        },
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    knobs = triton.knobs
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = cache
        knobs.compilation.disable_line_info = True
        built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return Compiled(built.asm["cubin"], built.asm["ptx"], _entry(variant, target, built, triton.__version__))


def build_kernels(folder: Path, targets: Sequence[int] = TARGETS, processes: int | None = None) -> list[Compiled]:
    """Write the cubins of all variants for `targets` to `folder` and return them, in the order of the table.

    Raises InvalidInput where a target is unknown, BackendUnavailable without triton.
    """
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown:
        raise InvalidInput(f"targets {unknown}; some of {list(TARGETS)} were expected")
    _triton()
    jobs = [(variant.name, target) for target in targets for variant in variants_for(target)]
    # A process each: compiling holds the interpreter's lock, and a fresh process has no TRITON_INTERPRET modules.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        built = list(pool.map(compile_variant, *zip(*jobs, strict=True)))
    for target in targets:
        write_target(folder, target, [one for one in built if one.entry["target"] == target])
    return built


def write_target(folder: Path, target: int, built: Iterable[Compiled]) -> None:
    """Write `folder`/sm_`target`: the cubins and `kernels.json`."""
    place = folder / f"sm_{target}"
    place.mkdir(parents=True, exist_ok=True)
    entries = []
    for one in built:
        (place / one.entry["file"]).write_bytes(one.cubin)
        entries.append(one.entry)
    text = json.dumps({"target": target, "kernels": entries}, indent=1) + "\n"
    (place / DESCRIPTION).write_text(text, encoding="utf-8", newline="\n")


def _entry(variant: Variant, target: int, built: Any, version: str) -> dict[str, Any]:
    cubin, metadata = built.asm["cubin"], built.metadata
    return {
        "name": variant.name,
        "target": target,
        "file": f"{variant.name}.cubin",
        "sha256": hashlib.sha256(cubin).hexdigest(),
        "bytes": len(cubin),
        "entry": metadata.name,
        "arguments": dict(variant.arguments),
        "divisible_by_16": list(variant.divisible),
        "extra_pointers": _parameters(built.asm["ptx"]) - len(variant.arguments),
        "constants": dict(variant.constants),
        "dtype": variant.constants.get("form", "int32" if variant.op == "accept_draft" else "fp32"),
        "grid": {"over": variant.grid.over, "tile": variant.grid.tile},
        "num_warps": variant.warps,
        "shared_bytes": metadata.shared,
        "scratch_bytes": metadata.global_scratch_size + metadata.profile_scratch_size,
        "triton": version,
    }


def _parameters(ptx: str) -> int:
    """Return how many parameters the kernel takes: Triton appends pointers to scratch memory of its own."""
    return len(re.findall(r"^\s*\.param\s", ptx.split(".entry", 1)[1].split(")", 1)[0], re.MULTILINE))


def _triton() -> Any:
    try:
        import triton
    except ImportError as error:
        raise BackendUnavailable("compiling kernels needs the 'triton' package (extra: edgemed[export])") from error
    if triton.knobs.runtime.interpret:
        raise BackendUnavailable("TRITON_INTERPRET is set, and nothing compiles then; unset it")
    return triton


def main() -> None:
    """Compile what the command line says and list it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", type=int, action="append", choices=TARGETS, help="again for more; default: all")
    arguments = parser.parse_args()
    for one in build_kernels(arguments.folder, arguments.target or TARGETS):
        print(f"sm_{one.entry['target']:<4} {one.entry['bytes']:8,} {one.entry['name']}")


if __name__ == "__main__":
    main()
