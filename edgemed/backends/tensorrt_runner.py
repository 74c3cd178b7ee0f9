"""The tensorrt back end: engines on an NVIDIA GPU, by TensorRT-RTX or, where a site has installed it, TensorRT.

The engine comes from the user's folder of engines, or is built first. State lies in GPU memory; where the engine
writes a cache in place (KVCacheUpdate), past and present are one buffer. Never runs on the CPU. Does not cover building
(`engine_build`) or the GPU's memory (`cuda_device`). No engine has been run yet, for want of a GPU that TensorRT-RTX
takes; the tests put a graph over the host's memory in place of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgemed.backends import Device, Outputs, empty_state
from edgemed.backends.cuda_device import CudaStream, Gpu, Pinned, find_gpu
from edgemed.backends.engine_build import (
    ANY,
    error_logger,
    find_library,
    graph_key,
    held,
    is_memory,
    last_of,
    library_version,
    no_collection,
    open_or_build,
    targets_of,
)
from edgemed.backends.engine_cache import KernelsKey, engines_folder, write_cached
from edgemed.errors import BackendUnavailable, BundleError, CannotWrite, DeviceOutOfMemory, EdgemedError, InvalidInput
from edgemed.graphs import Feeds, GraphSpec

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32",
           "UINT8": "uint8", "INT8": "int8", "BOOL": "bool"}  # fmt: skip
"""The library's name of a type -> NumPy's, as a GraphSpec has it."""

_LEAST = 256  # bytes; an address must be there for a tensor of no elements, too


class TensorRTRunner:
    """Runs one engine; see `edgemed.backends.Runner`. threads has no meaning here; tell: see `open_runner`."""

    backend = "tensorrt"

    def __init__(
        self,
        artifact: Path,
        spec: GraphSpec,
        *,
        device: Device,
        threads: int | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        if not isinstance(artifact, Path):
            raise BackendUnavailable("the tensorrt back end runs graphs of a bundle; export the checkpoint first")
        if device.kind == "cpu":
            raise BackendUnavailable(
                "the tensorrt back end runs on NVIDIA GPUs only, device cpu was asked for: use --device gpu, or "
                "--backend onnxruntime"
            )
        trt = find_library()
        gpu = find_gpu(device.index)
        targets = targets_for(trt, gpu)
        stream = CudaStream(gpu)
        with no_collection():
            loaded = load_engine(trt, stream, artifact, spec, targets, engines_folder(), tell or _say_nothing)
        self._execution = Execution(loaded, spec, stream)
        self.spec = spec
        self.device = f"GPU {gpu.index}"

    def run(self, feeds: Feeds) -> Outputs:
        """Return the outputs that are not state. Raises InvalidInput where `feeds` do not fit the GraphSpec."""
        self.spec.check(feeds)
        check_bounds(self.spec, feeds)
        return self._execution.run(feeds)

    def reset(self) -> None:
        """Forget the state: every value of it is zero again."""
        self._execution.reset()

    def close(self) -> None:
        """Give back memory and device. The Runner cannot run afterwards."""
        self._execution.close()


def targets_for(trt: Any, gpu: Gpu) -> tuple[str, ...]:
    """Return the targets whose engines run on a GPU, its own first.

    Raises BackendUnavailable where the library builds for named targets and this GPU's is none of them.
    Source: TensorRT-RTX documentation, CPU-Only AOT: an engine of no target runs from compute capability 8.0 on.
    """
    named = targets_of(trt)
    if named and gpu.target not in named:
        raise BackendUnavailable(
            f"{library_version(trt)} does not run on GPU {gpu.index} ({gpu.name}, {gpu.target}); it has "
            f"{', '.join(named)}. Use another --device, or --backend onnxruntime with edgemed[gpu-ort]"
        )
    return (gpu.target, ANY) if named and gpu.capability >= 80 else (gpu.target,)


def check_bounds(spec: GraphSpec, feeds: Feeds) -> None:
    """Raise InvalidInput where values of `feeds` lead beyond a table: an engine would read what lies there.

    By the names of the decoder's inputs and dims: past_length and the new tokens fit into the cache, ids are below the
    vocabulary and the rows of images, logits_from is one of the new tokens, text_at and box_at count from it on.
    """
    if "input_ids" not in feeds:
        return
    ids, rows = feeds["input_ids"], len(feeds.get("image_tokens", ()))
    limits: list[tuple[str, Any, int]] = []
    if "past_length" in feeds and "cache" in spec.dims:
        limits.append(("past_length", feeds["past_length"], spec.dims["cache"].max - ids.shape[1]))
    if "logits_from" in feeds:
        limits.append(("logits_from", feeds["logits_from"], ids.shape[1] - 1))
        kept = ids.shape[1] - int(feeds["logits_from"][0])
        limits += [(name, feeds[name], kept - 1) for name in ("text_at", "box_at") if name in feeds]
    vocabulary = next((t.shape[-1] for t in spec.outputs if t.name == "logits"), None)
    if isinstance(vocabulary, int):
        limits.append(("input_ids", ids, vocabulary + rows - 1))
    for name, values, most in limits:
        if not values.size:
            continue
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > most:
            wrong = low if low < 0 else high
            raise InvalidInput(f"graph {spec.role}, input {name}: value {wrong}, expected 0 to {most}")


# --- opening ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Loaded:
    """An engine that was opened, its context, and what must live as long as they do.

    kernels: the library's store of kernels that it compiled for this GPU, or None; `key` names its file in `folder`,
    known: what the file holds.
    """

    trt: Any
    runtime: Any
    engine: Any
    context: Any
    messages: list[str]
    kernels: Any = None
    key: KernelsKey | None = None
    folder: Path = Path()
    known: bytes | None = None

    def failure(self, what: str, memory: str) -> EdgemedError:
        """Return the error to raise where the library failed; memory: how much is free."""
        reason = last_of(self.messages)
        if is_memory(reason):
            return DeviceOutOfMemory(f"{what}: {reason}; {memory}")
        return BackendUnavailable(f"{what}: {library_version(self.trt)} fails: {reason}")

    def close(self) -> None:
        """Write what was compiled for this GPU, so that the next start need not, and let go of everything."""
        if self.kernels is not None and self.key is not None:
            compiled = bytes(self.kernels.serialize() or b"")
            if compiled and compiled != self.known:
                with suppress(CannotWrite):  # the next start takes longer, and computes the same
                    write_cached(self.folder, self.key, compiled)
        self.context = self.kernels = None
        self.engine = None
        self.runtime = None


def load_engine(
    trt: Any,
    stream: CudaStream,
    graph: Path,
    spec: GraphSpec,
    targets: Sequence[str],
    folder: Path,
    tell: Callable[[str], None],
) -> Loaded:
    """Return the engine of a graph, from `folder` or built, ready to run.

    Raises what `open_or_build` raises, BackendUnavailable where the library cannot open what it built, and
    DeviceOutOfMemory.
    """
    messages: list[str] = []
    runtime = trt.Runtime(error_logger(trt, messages))
    loaded = Loaded(trt, runtime, None, None, messages)
    what = f"graph {spec.role} on GPU {stream.gpu.index}"

    def deserialize(data: bytes) -> Any:
        messages.clear()
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None and is_memory(last_of(messages)):
            raise DeviceOutOfMemory(f"{what}: the engine needs about {len(data) / 1e6:.0f} MB, {stream.memory()}")
        return engine

    loaded.engine = open_or_build(graph, spec, targets, folder, deserialize, tell)
    if loaded.engine is None:
        raise loaded.failure(what, stream.memory())
    key = graph_key(graph, spec, targets[0], library_version(trt))
    loaded.key, loaded.folder = KernelsKey(**asdict(key)), folder
    messages.clear()
    loaded.context = _create_context(loaded)
    if loaded.context is None:
        raise loaded.failure(what, stream.memory())
    return loaded


def _create_context(loaded: Loaded) -> Any:
    """Return an execution context; TensorRT-RTX compiles kernels for the GPU now, unless it is given those of before.

    Source: TensorRT-RTX documentation, Working with Runtime Cache.
    """
    config: Any = loaded.engine.create_runtime_config() if hasattr(loaded.engine, "create_runtime_config") else None
    if not hasattr(config, "create_runtime_cache"):  # TensorRT
        return loaded.engine.create_execution_context()
    assert loaded.key is not None
    loaded.kernels = config.create_runtime_cache()
    loaded.known = held(loaded.folder, loaded.key)
    if loaded.known is not None:
        loaded.kernels.deserialize(loaded.known)
    config.set_runtime_cache(loaded.kernels)
    # Its default compiles kernels for a shape in the background and changes to them when they are ready, so that the
    # same question could be rounded in two ways.
    strategy = loaded.trt.DynamicShapesKernelSpecializationStrategy
    config.dynamic_shapes_kernel_specialization_strategy = strategy.NONE
    return loaded.engine.create_execution_context(runtime_config=config)


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """What an engine says of one of its tensors: type as NumPy names it, whether it lies in the host's memory, and for
    an output the input that it is written over, or "".
    """

    is_input: bool
    dtype: str
    on_host: bool
    over: str = ""


def describe(trt: Any, engine: Any) -> dict[str, Described]:
    """Return what an engine says of its inputs and outputs, by name."""
    found = {}
    for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        kind = engine.get_tensor_dtype(name).name
        # TensorRT before 10.15 has no layer that writes in place, and does not know the question.
        over = "" if is_input else getattr(engine, "get_aliased_input_tensor", lambda _: None)(name) or ""
        on_host = engine.get_tensor_location(name) == trt.TensorLocation.HOST
        found[name] = Described(is_input, _DTYPES.get(kind, kind), on_host, over)
    return found


def check_tensors(spec: GraphSpec, found: Mapping[str, Described]) -> None:
    """Raise BundleError where names or types of an engine are not those of the spec, before an address is given."""
    wanted = {t.name: (True, t.dtype) for t in spec.inputs} | {t.name: (False, t.dtype) for t in spec.outputs}
    there = {name: (tensor.is_input, tensor.dtype) for name, tensor in found.items()}
    if wrong := sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name)):
        name = wrong[0]
        has, says = (f"{d[name][1]} {'input' if d[name][0] else 'output'}" if name in d else "nothing"
                     for d in (there, wanted))  # fmt: skip
        raise BundleError(
            f"the engine of {spec.role} has {has} {name}, the bundle's description says {says}. Get the bundle again"
        )
    sources = dict(spec.state)
    if other := sorted(name for name, tensor in found.items() if tensor.over not in ("", sources.get(name))):
        raise BundleError(
            f"the engine of {spec.role} writes {other[0]} over {found[other[0]].over}, which the bundle's description "
            "does not keep as its state; export it again"
        )
    state = {name for pair in spec.state for name in pair}
    if host := sorted(name for name in state if found[name].on_host):
        raise BundleError(f"the engine of {spec.role} keeps state {host[0]} in the host's memory; export it again")


class _Place:
    """Where a tensor lies: pinned memory of the host and, unless the engine reads that, memory of the GPU as large.

    Both grow to the largest size that was asked for, which a prefill does first, and stay.
    """

    def __init__(self, stream: CudaStream, what: str, *, on_host: bool) -> None:
        self._stream, self._what, self._on_host = stream, what, on_host
        self._size = self._device = 0
        self.host: Pinned | None = None

    def make_room(self, size: int) -> int:
        """Return the address for the engine, with room for `size` bytes. What was there is lost where it grows."""
        if self.host is None or size > self._size:
            self.free()
            size = max(size, _LEAST)
            if not self._on_host:
                self._device = self._stream.allocate(size, self._what)
            self.host = self._stream.pin(size)
            self._size = size
        return self._device or self.host.address

    def put(self, array: np.ndarray[Any, Any]) -> int:
        """Return the address for the engine, with a copy of `array` there once the stream comes to it."""
        address = self.make_room(array.nbytes)
        assert self.host is not None
        self.host.view[: array.nbytes] = array.reshape(-1).view(np.uint8)
        if not self._on_host and array.nbytes:
            self._stream.upload(address, self.host, array.nbytes)
        return address

    def fetch(self, size: int) -> None:
        """Ask for `size` bytes back."""
        assert self.host is not None
        if not self._on_host and size:
            self._stream.download(self.host, self._device, size)

    def array(self, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
        """Return a copy of what was fetched, once the stream has been waited for."""
        assert self.host is not None
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.host.view[:size].copy().view(dtype).reshape(shape)

    def free(self) -> None:
        if self._device:
            self._stream.free(self._device)
        if self.host is not None:
            self._stream.unpin(self.host)
        self.host, self._size, self._device = None, 0, 0


class _State:
    """The memory of one pair of state: one buffer where the engine writes in place, else two that take turns."""

    def __init__(self, stream: CudaStream, pair: tuple[str, str], size: int, what: str, *, in_place: bool) -> None:
        self.pair, self._stream, self._size = pair, stream, size
        self._buffers = [stream.allocate(max(size, _LEAST), what) for _ in range(1 if in_place else 2)]

    def bind(self, context: Any) -> None:
        """Give the engine the addresses of input and output."""
        output, name = self.pair
        context.set_tensor_address(name, self._buffers[0])
        context.set_tensor_address(output, self._buffers[-1])

    def turn(self) -> bool:
        """Make the output the next input; return whether addresses changed."""
        self._buffers.reverse()
        return len(self._buffers) > 1

    def zero(self) -> None:
        for buffer in self._buffers:
            self._stream.zero(buffer, self._size)

    def free(self) -> None:
        for buffer in self._buffers:
            self._stream.free(buffer)
        self._buffers = []


class Execution:
    """An engine with its memory on one stream of one GPU: what a TensorRTRunner runs once its feeds are checked."""

    def __init__(self, loaded: Loaded, spec: GraphSpec, stream: CudaStream) -> None:
        self.spec = spec
        self._loaded: Loaded | None = loaded
        self._stream = stream
        found = describe(loaded.trt, loaded.engine)
        check_tensors(spec, found)
        fed = (*spec.fed_inputs, *spec.returned_outputs)
        self._places = {
            t.name: _Place(stream, f"graph {spec.role}, tensor {t.name}", on_host=found[t.name].on_host) for t in fed
        }
        self._state: list[_State] = []
        try:
            zeros = empty_state(spec)
            for pair in spec.state:
                what, in_place = f"graph {spec.role}, state {pair[1]}", found[pair[0]].over == pair[1]
                self._state.append(_State(stream, pair, zeros[pair[1]].nbytes, what, in_place=in_place))
                self._need(loaded.context.set_input_shape(pair[1], zeros[pair[1]].shape))
                self._state[-1].bind(loaded.context)
            self.reset()
        except BaseException:
            with suppress(BackendUnavailable):
                self._free()
            raise

    def run(self, feeds: Feeds) -> Outputs:
        """Return the outputs that are not state; feeds fit the spec and lead beyond no table."""
        loaded = self._open()
        context = loaded.context
        self._stream.use()
        loaded.messages.clear()
        for name, given in feeds.items():
            array = np.asarray(given, order="C")
            self._need(context.set_input_shape(name, array.shape))
            self._need(context.set_tensor_address(name, self._places[name].put(array)))
        shapes = self._output_shapes(context)
        for tensor in self.spec.returned_outputs:
            size = int(np.prod(shapes[tensor.name])) * np.dtype(tensor.dtype).itemsize
            self._need(context.set_tensor_address(tensor.name, self._places[tensor.name].make_room(size)))
        self._need(context.execute_async_v3(self._stream.handle))
        for tensor in self.spec.returned_outputs:
            size = int(np.prod(shapes[tensor.name])) * np.dtype(tensor.dtype).itemsize
            self._places[tensor.name].fetch(size)
        self._stream.wait()
        for state in self._state:
            if state.turn():
                state.bind(context)
        return {t.name: self._places[t.name].array(shapes[t.name], t.dtype) for t in self.spec.returned_outputs}

    def reset(self) -> None:
        """Make every value of the state zero again."""
        self._open()
        self._stream.use()
        for state in self._state:
            state.zero()

    def close(self) -> None:
        """Give back memory, engine and stream; a second time nothing happens."""
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        with suppress(BackendUnavailable):  # a GPU that fails has said so before, and its memory is gone
            self._stream.use()
            self._stream.wait()
            loaded.close()
            self._free()
            self._stream.close()

    def _free(self) -> None:
        for place in self._places.values():
            place.free()
        for state in self._state:
            state.free()

    def _open(self) -> Loaded:
        if self._loaded is None:
            raise InvalidInput(f"graph {self.spec.role}: this Runner was closed")
        return self._loaded

    def _output_shapes(self, context: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what is given back, which follow from the inputs' shapes and logits_from."""
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            reason = last_of(self._open().messages or [str(error)])
            raise InvalidInput(f"graph {self.spec.role} cannot run on these inputs: {reason}") from error
        self._need(not missing)
        shapes = {t.name: tuple(context.get_tensor_shape(t.name)) for t in self.spec.returned_outputs}
        if unknown := [name for name, shape in shapes.items() if min(shape, default=0) < 0]:
            raise BundleError(
                f"graph {self.spec.role}: the size of output {unknown[0]} depends on values; use --backend onnxruntime"
            )
        return shapes

    def _need(self, done: bool) -> None:
        """Raise the library's error where it says that something was not done."""
        if not done:
            raise self._open().failure(f"graph {self.spec.role} on GPU {self._stream.gpu.index}", self._stream.memory())


def _say_nothing(line: str) -> None:
    """Take a note and drop it."""
