"""Builds TensorRT-RTX engines from ONNX graphs, for GPUs that need not be there.

Covers parsing, the optimisation profile that a GraphSpec means, named targets, and the graphs of a bundle into a
folder of engines. Does not cover running them, which needs a GPU, so that nothing here says that an engine computes
what its graph does; nor changing a graph's precision: an engine is built strongly typed, each value in the type that
the graph gives it.

Needs the library alone, neither a GPU nor onnx. With TensorRT in place of TensorRT-RTX there are no named targets and a
GPU is needed; that path has not been run.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemed.backends.engine_cache import EngineKey, load_cached, write_cached
from edgemed.bundle import Bundle, graph_file
from edgemed.errors import BackendUnavailable, BundleError, CannotRead, EdgemedError, InvalidInput, OutOfMemory
from edgemed.graphs import GraphSpec, to_json

__all__ = ["ANY", "TARGETS", "Built", "build_engine", "build_engines", "engine_key", "load_cached"]

TARGETS = {
    "sm75": "RTX 20 series",
    "sm80": "A100",
    "sm86": "RTX 30 series",
    "sm89": "RTX 40 series",
    "sm120": "RTX 50 series",
    "sm121": "GB10",
}
"""Compute capability -> where it is found: what TensorRT-RTX 1.7.1 builds for. It has none for sm90 and sm100."""

ANY = "any"
"""The name of no target: what the library builds if it is told none."""

Progress = Callable[[str, int, int], None]
"""Called with (what is built, steps done, steps in all)."""

_LIBRARIES = ("tensorrt_rtx", "tensorrt")


def build_engine(
    graph: Path, spec: GraphSpec, target: str | None = None, progress: Callable[[int, int], None] | None = None
) -> bytes:
    """Return the engine of one ONNX file.

    target: one of TARGETS; None: what the library builds if it is told none. progress: called with (done, all) steps of
    the build; an exception of it, Ctrl-C too, ends the build and is raised.

    Raises BackendUnavailable where the library is missing, InvalidInput where there is no such target, BundleError
    where the library does not take the graph, with node and operator where it names them.
    """
    trt = _library()
    if target is not None and not (target in TARGETS and hasattr(trt, "ComputeCapability")):
        raise InvalidInput(f"{_version(trt)} has no target {target!r}; choose from: {', '.join((*TARGETS, ANY))}")
    messages: list[str] = []
    logger = _logger(trt, messages)
    builder = trt.Builder(logger)
    if not builder:
        raise BackendUnavailable(f"{_version(trt)} cannot build here: {_last(messages)}")
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise _parse_error(graph, spec.role, trt, parser, messages)
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, network, spec, graph))
    if hasattr(trt.BuilderFlag, "TF32"):  # set unless told otherwise: fp32 products would keep 10 bits of 23
        config.clear_flag(trt.BuilderFlag.TF32)
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
    monitor = _monitor(trt, progress) if progress else None
    if monitor is not None:
        config.progress_monitor = monitor
    engine = builder.build_serialized_network(network, config)
    if monitor is not None and monitor.stopped_by is not None:
        raise monitor.stopped_by
    if engine is None:
        reason = _last(messages)
        if "out of memory" in reason.lower():
            raise OutOfMemory(f"graph {spec.role}: {_version(trt)} ran out of memory: {reason}")
        place = f" for {target}" if target else ""
        raise BundleError(f"graph {spec.role} ({graph.name}): {_version(trt)} cannot build it{place}: {reason}")
    return bytes(engine)


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

    One that is there and still holds is kept. progress: called with (role and target, done, all). tell: gets a line for
    every file that is there and is built again, with the reason.

    Raises what `build_engine` raises, and CannotWrite; engines that were finished before stay.
    """
    version = _version(_library())
    built = []
    for target in targets:
        for role, spec in bundle.manifest.graphs.items():
            start, path, name = time.perf_counter(), bundle.graph_path(role), f"{role} for {target}"

            def advance(done: int, total: int, name: str = name) -> None:
                if progress:
                    progress(name, done, total)

            key = engine_key(bundle, role, target, version)
            engine, reused = _held(folder, key, tell), True
            if engine is None:
                engine, reused = build_engine(path, spec, None if target == ANY else target, advance), False
                write_cached(folder, key, engine)
            seconds = time.perf_counter() - start
            built.append(Built(key, Path(folder) / key.file_name, len(engine), seconds, reused))
    return tuple(built)


def engine_key(bundle: Bundle, role: str, target: str = ANY, library: str | None = None) -> EngineKey:
    """Return what an engine of one graph of a bundle must be made from to be used.

    library: name and version; None: of what is installed, raising BackendUnavailable where nothing is.
    """
    name = graph_file(role)
    bundle.spec(role)
    digests = [bundle.manifest.files[file] for file in (name, f"{name}.data") if file in bundle.manifest.files]
    profile = json.dumps(to_json(bundle.spec(role)), sort_keys=True)
    return EngineKey(
        role=role,
        graph=hashlib.sha256(" ".join(digests).encode()).hexdigest(),
        library=library or _version(_library()),
        target=target,
        precision=bundle.manifest.precision.get(role, "fp32"),
        profile=hashlib.sha256(profile.encode()).hexdigest(),
    )


def _held(folder: str | Path, key: EngineKey, tell: Callable[[str], None] | None) -> bytes | None:
    """Return the engine that is there, or None where there is none that may be used."""
    try:
        return load_cached(folder, key)
    except CannotRead:
        return None
    except BundleError as error:
        if tell:
            tell(str(error))
        return None


def _library() -> Any:
    """Return the first library that is installed. Raises BackendUnavailable."""
    for name in _LIBRARIES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError) as error:
            raise BackendUnavailable(
                f"{name} is installed and does not load ({error}); install the extra again: edgemed[gpu]"
            ) from error
    raise BackendUnavailable("building engines needs the 'tensorrt_rtx' package; install the extra: edgemed[gpu]")


def _version(trt: Any) -> str:
    return f"{trt.__name__} {trt.__version__}"


def _profile(builder: Any, network: Any, spec: GraphSpec, graph: Path) -> Any:
    """Return the optimisation profile: the dims of the spec; for an input whose values make shapes, its values.

    Such an input (logits_from) counts positions, so its values go from 0 to below the largest dim.
    """
    given = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    if set(given) != {t.name for t in spec.inputs}:
        raise BundleError(
            f"{graph.name} has inputs {', '.join(sorted(given))}; the bundle's description says "
            f"{', '.join(sorted(t.name for t in spec.inputs))}. Get the bundle again"
        )
    profile = builder.create_optimization_profile()
    for tensor in spec.inputs:
        if given[tensor.name].is_shape_tensor:
            if any(size != 1 for size in tensor.shape):
                raise BundleError(f"{graph.name}: input {tensor.name} makes shapes and has {list(tensor.shape)}, not 1")
            most = max(dim.max for dim in spec.dims.values()) - 1
            profile.set_shape_input(tensor.name, (0,), (0,), (most,))
        elif -1 in tuple(given[tensor.name].shape):
            ranges = [spec.dims[d] if isinstance(d, str) else d for d in tensor.shape]
            shapes = [
                tuple(r if isinstance(r, int) else getattr(r, bound) for r in ranges) for bound in ("min", "opt", "max")
            ]
            profile.set_shape(tensor.name, *shapes)
    return profile


def _parse_error(graph: Path, role: str, trt: Any, parser: Any, messages: list[str]) -> EdgemedError:
    """Return the error to raise where the parser refuses a file: of the first node that it names."""
    if not graph.is_file():
        return CannotRead(f"cannot read {graph}: there is no such file")
    start = f"graph {role} ({graph.name}): {_version(trt)}"
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    named = next((e for e in errors if e.node_operator()), None)
    if named is None:
        return BundleError(f"{start} cannot read it: {_line(errors[0].desc()) if errors else _last(messages)}")
    return BundleError(
        f"{start} does not take operator {named.node_operator()} of node {named.node_name() or named.node()}: "
        f"{_line(named.desc())}. Export the bundle in its portable form"
    )


def _line(text: str) -> str:
    """Return the first line of a message of the library, at most 300 characters."""
    return next((line for line in text.splitlines() if line.strip()), "no reason given")[:300].rstrip(" .")


def _last(messages: list[str]) -> str:
    return _line(messages[-1]) if messages else "no reason given"


def _logger(trt: Any, messages: list[str]) -> Any:
    """Return a logger that keeps errors in `messages` and prints nothing."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the library's types are not known
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                messages.append(message)

    return Logger()


def _monitor(trt: Any, progress: Callable[[int, int], None]) -> Any:
    """Return a progress monitor: one step for each step of any phase, in all as many as the phases announced so far."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the library's types are not known
        def __init__(self) -> None:
            super().__init__()
            self.done, self.total = 0, 0
            self.stopped_by: BaseException | None = None

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.total += steps

        def step_complete(self, name: str, step: int) -> bool:
            self.done += 1
            try:
                progress(self.done, max(self.done, self.total))
            except BaseException as error:  # noqa: BLE001 (it must not pass through the library, and is raised after it)
                self.stopped_by = error
            return self.stopped_by is None

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()
