"""`edgemed compile`: a bundle in, engines for its graphs or cubins of the kernels out. No GPU is needed or used."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from edgemed.cli.extras import need
from edgemed.cli.verbs import debug_option
from edgemed.errors import BackendUnavailable, EdgemedError, InvalidInput

if TYPE_CHECKING:
    from edgemed.bundle import Bundle

Tell = Callable[[str], None]


@click.command("compile", short_help="Build engines for GPUs from a bundle.")
@click.argument("bundle", metavar="BUNDLE")
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME",
    help="A compute capability such as sm_89 (RTX 40), or any; repeatable. Default: the GPU that is there, else any.",
)
@click.option(
    "--backend",
    type=click.Choice(["tensorrt", "triton"]),
    default="tensorrt",
    show_default=True,
    help="tensorrt: an engine for each graph. triton: a copy of BUNDLE with cubins of the kernels.",
)
@click.option(
    "-o",
    "output",
    metavar="FOLDER",
    help="Where to write (default: the user's folder of engines; triton needs one for the copy).",
)
@click.option("-q", "--quiet", is_flag=True, help="No notes and no progress on stderr.")
@debug_option
def command(bundle: str, output: str | None, targets: tuple[str, ...], backend: str, quiet: bool) -> None:
    """Build what BUNDLE (a name or a folder) needs to run fast on GPUs, which need not be there.

    Engines that are there and still hold are kept. Engines from another machine are used once they are copied into the
    user's folder.
    """

    def tell(line: str) -> None:
        if not quiet:
            print(f"note: {line}", file=sys.stderr)

    from edgemed.bundle import open_bundle

    if backend == "triton":
        if output is None:
            raise EdgemedError("--backend triton writes a copy of the bundle: say where with -o FOLDER")
        _write_kernels(open_bundle(bundle), output, targets, tell)
    else:
        _write_engines(open_bundle(bundle), output, targets, tell, quiet)


def _write_engines(bundle: Bundle, output: str | None, targets: Sequence[str], tell: Tell, quiet: bool) -> None:
    """Build the engines and print a line for each."""
    from edgemed.backends.engine_build import find_library, target_name
    from edgemed.backends.engine_cache import engines_folder
    from edgemed.export.engine import build_engines

    library = find_library()
    wanted = tuple(dict.fromkeys(target_name(t) for t in targets)) or (_default_target(library, tell),)
    _check_without_names(library, wanted)
    shown = not quiet and sys.stderr.isatty()
    try:
        built = build_engines(bundle, output or engines_folder(), wanted, _show if shown else None, tell)
    finally:
        if shown:
            print(file=sys.stderr)
    for engine in built:
        how = "kept" if engine.reused else f"{engine.seconds:.1f} s"
        print(f"{engine.path}  {engine.size / 1e6:.1f} MB  {how}")


def _default_target(library: Any, tell: Tell) -> str:
    """Return the target of the GPU that is there, as the tensorrt back end looks it up; without one, any.

    Raises BackendUnavailable where the library does not run on that GPU, or builds on a GPU only and there is none.
    """
    from edgemed.backends.cuda_device import find_gpu
    from edgemed.backends.engine_build import ANY, targets_of
    from edgemed.backends.tensorrt_runner import targets_for

    try:
        gpu = find_gpu()
    except BackendUnavailable as error:
        if not targets_of(library):
            raise
        reason = str(error).split(". ")[0].split(", or")[0]
        tell(f"{reason}; building for any GPU from sm_80 on, name others with --target")
        return ANY
    return targets_for(library, gpu)[0]


def _check_without_names(library: Any, targets: Sequence[str]) -> None:
    """Raise InvalidInput where another GPU's engines are wanted of a library that builds for the one that is there."""
    from edgemed.backends.cuda_device import find_gpu
    from edgemed.backends.engine_build import library_version, targets_of

    if targets_of(library):
        return
    own = find_gpu().target
    if other := [target for target in targets if target != own]:
        raise InvalidInput(
            f"{library_version(library)} builds for the GPU that is there, {own}, and not for {other[0]}; "
            "TensorRT-RTX (edgemed[gpu]) builds for others"
        )


def _write_kernels(bundle: Bundle, output: str, targets: Sequence[str], tell: Tell) -> None:
    """Write the copy with cubins and print where it is."""
    from edgemed.backends.engine_build import ANY, target_name
    from edgemed.bundle import SIGNATURE
    from edgemed.export.engine import with_kernels
    from edgemed.triton_kernels.variants import TARGETS

    known = {f"sm_{number}": number for number in TARGETS}
    names = [target_name(t) for t in targets if t != ANY]
    if wrong := [name for name in names if name not in known]:
        raise InvalidInput(f"kernels have no target {wrong[0]!r}; choose from: {', '.join((*known, ANY))}")
    need(("triton",), "export", "compile --backend triton")
    numbers = [number for name, number in known.items() if name in names]
    every = not names or ANY in targets
    tell(f"compiling kernels for {', '.join(known if every else names)}; this takes some minutes")
    made = with_kernels(bundle, output, TARGETS if every else numbers, tell)
    if (bundle.path / SIGNATURE).is_file():
        tell("the copy is another bundle, and not signed")
    cubins = sum(bool(re.fullmatch(r"kernels/sm_\d+/.*\.cubin", name)) for name in made.manifest.files)
    print(f"wrote {made.path} with {cubins} kernels, sha256 {made.digest}")


def _show(name: str, done: int, total: int) -> None:
    """Show how far the engine that is being built is; the number of steps is only known as they come."""
    print(f"\r{name}: step {done} of {total}   ", end="", file=sys.stderr, flush=True)
