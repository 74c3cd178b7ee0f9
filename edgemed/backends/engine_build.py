"""Builds TensorRT-RTX engines from ONNX graphs, for GPUs that need not be there, and finds those built before.

Covers parsing, the optimisation profile that a GraphSpec means, named targets, what an engine is told apart by, and
building what a folder lacks. Does not cover running them (`tensorrt_runner`), so that nothing here says that an engine
computes what its graph does; nor changing a graph's precision: an engine is built strongly typed, each value in the
type that the graph gives it.

Needs the library alone, neither a GPU nor onnx. With TensorRT in place of TensorRT-RTX there are no named targets and a
GPU is needed; that path has not been run.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from edgemed.backends.engine_cache import EngineKey, load_cached, write_cached
from edgemed.errors import (
    BackendUnavailable,
    BundleError,
    CannotRead,
    CannotWrite,
    EdgemedError,
    InvalidInput,
    OutOfMemory,
)
from edgemed.files import sha256_of
from edgemed.graphs import GraphSpec, to_json

TARGETS = {
    "sm_75": "RTX 20 series",
    "sm_80": "A100",
    "sm_86": "RTX 30 series",
    "sm_89": "RTX 40 series",
    "sm_120": "RTX 50 series",
    "sm_121": "GB10",
}
"""Compute capability -> where it is found: what TensorRT-RTX 1.7.1 builds for. It has none for sm_90 and sm_100."""

ANY = "any"
"""The name of no target: what TensorRT-RTX builds if it is told none, which runs from sm_80 on."""

Steps = Callable[[int, int], None]
"""Called with (steps done, steps in all so far)."""
Tell = Callable[[str], None]

_LIBRARIES = ("tensorrt_rtx", "tensorrt")
_ONE_AT_A_TIME = threading.Lock()
"""Graphs are opened side by side, and a build holds its graph's weights several times over."""


class _Held:
    """How many blocks of `no_collection` run, and whether collection was on before the first."""

    lock = threading.Lock()
    blocks = 0
    was_on = True


_HELD = _Held()

T = TypeVar("T")


# --- library and targets ----------------------------------------------------------------------------------------------


def find_library() -> Any:
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
    raise BackendUnavailable("engines need the 'tensorrt_rtx' package; install the extra: edgemed[gpu]")


def library_version(trt: Any) -> str:
    """Return name and version of a library."""
    return f"{trt.__name__} {trt.__version__}"


def target_name(text: str) -> str:
    """Return the name of a target in the form of this file; what is no compute capability stays as it is.

    >>> target_name("SM89"), target_name("sm_120"), target_name("any")
    ('sm_89', 'sm_120', 'any')
    """
    found = re.fullmatch(r"sm_?(\d{2,3})", text.strip().lower())
    return f"sm_{found[1]}" if found else text


def targets_of(trt: Any) -> tuple[str, ...]:
    """Return the targets that a library builds for by name; () for TensorRT, which builds for the GPU that is there."""
    names = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return tuple(f"sm_{name[2:]}" for name in names if name.startswith("SM"))


def check_target(trt: Any, target: str) -> None:
    """Raise InvalidInput where a library has no target of this name, with those it has."""
    if target not in targets_of(trt):
        known = ", ".join((*targets_of(trt), ANY))
        raise InvalidInput(f"{library_version(trt)} has no target {target!r}; choose from: {known}")


# --- building ---------------------------------------------------------------------------------------------------------


def build_engine(graph: Path, spec: GraphSpec, target: str | None = None, progress: Steps | None = None) -> bytes:
    """Return the engine of one ONNX file.

    target: one of TARGETS; None: what the library builds if it is told none. progress: called with (done, all) steps of
    the build; an exception of it, Ctrl-C too, ends the build and is raised.

    Raises BackendUnavailable where the library is missing, InvalidInput where there is no such target, BundleError
    where the library does not take the graph, with node and operator where it names them.
    """
    trt = find_library()
    if target is not None:
        check_target(trt, target)
    stop = threading.Event()
    with _ONE_AT_A_TIME, _ctrl_c_sets(stop), no_collection():
        return _build(trt, graph, spec, target, progress, stop)


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python from collecting cycles in the block, in any thread.

    The library logs with a lock held, and what Python does to log may start a collection; one that finds a Builder of
    before (in the traceback of a build that failed) asks for the same lock, and waits for ever.
    """
    with _HELD.lock:
        if not _HELD.blocks:
            _HELD.was_on = gc.isenabled()
            gc.disable()
        _HELD.blocks += 1
    try:
        yield
    finally:
        with _HELD.lock:
            _HELD.blocks -= 1
            if not _HELD.blocks and _HELD.was_on:
                gc.enable()


@contextmanager
def _ctrl_c_sets(stop: threading.Event) -> Iterator[None]:
    """Let Ctrl-C set `stop` in the block and raise KeyboardInterrupt at its end.

    Raised at once, it would go through the library where that calls back, which takes it for an error of its own.
    """
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        if stop.is_set():
            raise KeyboardInterrupt


def _build(
    trt: Any, graph: Path, spec: GraphSpec, target: str | None, progress: Steps | None, stop: threading.Event
) -> bytes:
    messages: list[str] = []
    logger = error_logger(trt, messages)
    builder = trt.Builder(logger)
    if not builder:
        raise BackendUnavailable(f"{library_version(trt)} cannot build here: {last_of(messages)}")
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
        config.set_compute_capability(getattr(trt.ComputeCapability, target.replace("_", "").upper()), 0)
    config.progress_monitor = monitor = _monitor(trt, progress, stop)
    engine = builder.build_serialized_network(network, config)
    if monitor.stopped_by is not None:
        raise monitor.stopped_by
    if engine is None:
        reason = last_of(messages)
        if is_memory(reason):
            raise OutOfMemory(f"graph {spec.role}: {library_version(trt)} ran out of memory: {reason}")
        place = f" for {target}" if target else ""
        raise BundleError(f"graph {spec.role} ({graph.name}): {library_version(trt)} cannot build it{place}: {reason}")
    return bytes(engine)


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
    start = f"graph {role} ({graph.name}): {library_version(trt)}"
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    named = next((e for e in errors if e.node_operator()), None)
    if named is None:
        return BundleError(f"{start} cannot read it: {first_line(errors[0].desc()) if errors else last_of(messages)}")
    return BundleError(
        f"{start} does not take operator {named.node_operator()} of node {named.node_name() or named.node()}: "
        f"{first_line(named.desc())}. Make a bundle for it with `edgemed export --target tensorrt`"
    )


def _monitor(trt: Any, progress: Steps | None, stop: threading.Event) -> Any:
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
                if progress:
                    progress(self.done, max(self.done, self.total))
            except BaseException as error:  # noqa: BLE001 (it must not pass through the library, and is raised after it)
                self.stopped_by = error
            return self.stopped_by is None and not stop.is_set()

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()


# --- what the library says --------------------------------------------------------------------------------------------


def error_logger(trt: Any, messages: list[str]) -> Any:
    """Return a logger that keeps errors in `messages` and prints nothing."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # the library's types are not known
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                messages.append(message)

    return Logger()


def first_line(text: str) -> str:
    """Return the first line of a message of the library, at most 300 characters."""
    return next((line for line in text.splitlines() if line.strip()), "no reason given")[:300].rstrip(" .")


def last_of(messages: Sequence[str]) -> str:
    """Return the last message in one line."""
    return first_line(messages[-1]) if messages else "no reason given"


def is_memory(reason: str) -> bool:
    """Return whether the library says that memory is short, the host's or the GPU's."""
    lowered = reason.lower()
    return any(sign in lowered for sign in ("out of memory", "outofmemory", "could not be allocated", "bad_alloc"))


# --- engines that were built before -----------------------------------------------------------------------------------


def graph_key(graph: Path, spec: GraphSpec, target: str = ANY, library: str | None = None) -> EngineKey:
    """Return what an engine of a graph must be made from to be used.

    Digests and precision are those of the manifest beside a bundle's graph, since whoever opened the bundle has checked
    its files against them (gigabytes that are not read twice); a graph without one is read.
    library: name and version; None: of what is installed.

    Raises BackendUnavailable where no library is installed, CannotRead where there is no graph.
    """
    digests, precision = _in_manifest(graph, spec.role)
    if not digests:
        weights = graph.with_name(f"{graph.name}.data")
        digests = [sha256_of(file) for file in (graph, weights) if file == graph or file.is_file()]
    profile = json.dumps(to_json(spec), sort_keys=True)
    return EngineKey(
        role=spec.role,
        graph=hashlib.sha256(" ".join(digests).encode()).hexdigest(),
        library=library or library_version(find_library()),
        target=target,
        precision=precision,
        profile=hashlib.sha256(profile.encode()).hexdigest(),
    )


def _in_manifest(graph: Path, role: str) -> tuple[list[str], str]:
    """Return (digests of the graph's files, its precision) of the bundle it is in; ([], "own") where it is in none."""
    try:
        values = json.loads((graph.parent.parent / "bundle.json").read_bytes())
        names = (f"{graph.parent.name}/{graph.name}{end}" for end in ("", ".data"))
        return [str(values["files"][name]) for name in names if name in values["files"]], values["precision"][role]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return [], "own"


def held(folder: Path, key: EngineKey, tell: Tell | None = None) -> bytes | None:
    """Return the engine that is there, or None where there is none that may be used; tell: gets the reason."""
    try:
        return load_cached(folder, key)
    except CannotRead:
        return None
    except BundleError as error:
        if tell:
            tell(str(error))
        return None


def open_or_build(
    graph: Path,
    spec: GraphSpec,
    targets: Sequence[str],
    folder: Path,
    deserialize: Callable[[bytes], T | None],
    tell: Tell,
) -> T | None:
    """Return what `deserialize` makes of the first engine of `targets` in `folder`, else of one built for the first.

    A folder that cannot be written does not stop it: the engine is then built again the next time, and `tell` says so.
    None: `deserialize` takes not even what was just built. Raises what `build_engine` raises.
    """
    trt = find_library()
    keys = [graph_key(graph, spec, target, library_version(trt)) for target in targets]
    for key in keys:
        engine = held(folder, key, tell)
        if engine is not None:
            opened = deserialize(engine)
            if opened is not None:
                return opened
            tell(f"{key.file_name} cannot be opened on this GPU and is built again")
    start = time.perf_counter()
    tell(f"building the engine of {spec.role} for {targets[0]}, once; `edgemed compile` does it beforehand")
    engine = build_engine(graph, spec, targets[0] if targets[0] in targets_of(trt) else None)
    tell(f"built the engine of {spec.role} in {time.perf_counter() - start:.0f} s")
    try:
        write_cached(folder, keys[0], engine)
    except CannotWrite as error:
        tell(f"{error}; the engine will be built again the next time")
    return deserialize(engine)
