"""What a bundle is compiled to: engines for its graphs in a folder, or a copy of it with cubins of the kernels.

One graph's engine is built by `edgemed.backends.engine_build`, a kernel by `edgemed.triton_kernels.aot`. Does not cover
running either.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgemed.backends.engine_build import (
    ANY,
    build_engine,
    check_target,
    find_library,
    graph_key,
    held,
    library_version,
    targets_of,
)
from edgemed.backends.engine_cache import EngineKey, write_cached
from edgemed.bundle import Bundle, write_bundle
from edgemed.errors import CannotWrite
from edgemed.families.specs import has_split_head
from edgemed.triton_kernels.head_file import KERNELS, check_head, write_head

Progress = Callable[[str, int, int], None]
"""Called with (what is built, steps done, steps in all)."""


@dataclass(frozen=True)
class Built:
    """One engine of `build_engines`: its key, its file, its size, how long it took; reused: it was there already."""

    key: EngineKey
    path: Path
    size: int
    seconds: float
    reused: bool


def build_engines(
    bundle: Bundle,
    folder: str | Path,
    targets: Sequence[str] = (ANY,),
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> tuple[Built, ...]:
    """Return the engines of every graph of a bundle for every target, each in a file of `folder`.

    One that is there and still holds is kept. targets: with TensorRT in place of TensorRT-RTX, the one of the GPU that
    is there. progress: called with (role and target, done, all). tell: gets a line for every file that is there and is
    built again, with the reason.

    Raises what `build_engine` raises, and CannotWrite; engines that were finished before stay.
    """
    trt, folder = find_library(), Path(folder)
    named = [target for target in targets if target != ANY and targets_of(trt)]
    for target in named:
        check_target(trt, target)
    built = []
    for target in targets:
        for role, spec in bundle.manifest.graphs.items():
            start, path, name = time.perf_counter(), bundle.graph_path(role), f"{role} for {target}"

            def advance(done: int, total: int, name: str = name) -> None:
                if progress:
                    progress(name, done, total)

            key = graph_key(path, spec, target, library_version(trt))
            engine = held(folder, key, tell)
            reused = engine is not None
            if engine is None:
                engine = build_engine(path, spec, target if target in named else None, advance)
                write_cached(folder, key, engine)
            seconds = time.perf_counter() - start
            built.append(Built(key, folder / key.file_name, len(engine), seconds, reused))
    return tuple(built)


def with_kernels(
    bundle: Bundle,
    output: str | Path,
    targets: Sequence[int] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Bundle:
    """Return a copy of a bundle in `output` with the cubins of all kernels and the LM head that they read, in place of
    those it had.

    targets: compute capabilities times 10; None: all that kernels are compiled for. tell: gets a line on the head. A
    signature is not copied.

    Raises InvalidInput where a target is unknown, BackendUnavailable without triton, BundleError where the decoder's
    head cannot be read, CannotWrite.
    """
    from edgemed.triton_kernels.aot import build_kernels
    from edgemed.triton_kernels.variants import TARGETS

    manifest, place = bundle.manifest, Path(output)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):  # told before minutes of compiling
        raise CannotWrite(f"cannot write a bundle to {place}: it exists already; choose another folder")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        said = _add_head(bundle, folder)
        if tell:
            tell(said)
        compiled = build_kernels(folder, targets or TARGETS)
        files: dict[str, bytes | Path] = {n: bundle.file(n) for n in manifest.files if not n.startswith(f"{KERNELS}/")}
        made = sorted(path for path in folder.rglob("*") if path.is_file())
        files.update({f"{KERNELS}/{path.relative_to(folder).as_posix()}": path for path in made})
        return write_bundle(
            output,
            name=manifest.name,
            family=manifest.family,
            graphs=manifest.graphs,
            files=files,
            precision=manifest.precision,
            calibration_digest=manifest.calibration_digest,
            versions={**manifest.versions, "triton": compiled[0].entry["triton"]},
            licences=manifest.licences,
            settings=manifest.settings,
        )


def _add_head(bundle: Bundle, folder: Path) -> str:
    """Write the head of the bundle's decoder into `folder`, where a decoder can end in the hidden state; say so."""
    from edgemed.export.head_matrix import packed_head

    spec = bundle.manifest.graphs.get("decoder")
    if spec is None or not has_split_head(spec):
        return (
            "the decoder of this bundle computes its logits itself, so that no session will use the kernels: export "
            "the checkpoint again with --target tensorrt"
        )
    head = packed_head(bundle.graph_path("decoder"))
    check_head(head)
    write_head(folder, head)
    return f"the head for the kernels is {head.format}, {head.rows} x {head.width}"
