"""How much memory a bundle needs for a prompt, told before a graph is loaded, and whether that much is free.

Covers the estimate (`MemoryPlan`), what is free on the host (less than the machine has, in a container) and on a GPU,
and refusing what cannot fit. Does not cover the child process that reads scans (72 MiB), training, or building engines.

The parts of an estimate: weights, from the types and sizes in the graph files; the cache, exactly, from the GraphSpec;
the rest from the sizes in the GraphSpec times factors that were measured with onnxruntime 1.31 on Linux x86-64,
2026-11-22 (tests/bench/bench_memory.py). On a GPU nothing was measured: there the estimate is weights and cache alone.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgemed import nvidia
from edgemed.backends import Device, device_from_text
from edgemed.bundle import Bundle, graph_file
from edgemed.errors import BundleError, DeviceOutOfMemory, OutOfMemory
from edgemed.graphs import GraphSpec, TensorSpec
from edgemed.triton_kernels.head_file import is_head

MIB = 1 << 20

CERTAIN = 0.8
"""Share of an estimate that is surely needed: no measured peak was below it. Only what exceeds this is refused."""

BASE_BYTES = 80 * MIB
"""Python, NumPy, onnxruntime and four small graphs: 74 MiB once loaded, 90 after an answer of a 2.6 MB bundle."""

TORCH_BASE_BYTES = 340 * MIB
"""The same with torch (2.13, CPU) in place of onnxruntime."""

INSIDE = 1.5
"""Weights in the graph file itself are held more than once while it loads (1.4 to 1.9); those beside it are mapped."""

MAP, TOKEN_WIDTHS, PASSES, DECODER_WIDTHS = 75, 11, 5, 16
"""Peak of what a graph computes, over: the bytes of an output that is an image-like map (vision encoder: 78); a token's
bytes at the output's width (feed-forward and attention of a ViT); the bytes of all inputs and outputs (projector: 3 to
5); a token's bytes (decoder: 14 to 25)."""

HEAD_WIDTH = 64
"""Usual width of an attention head; a ViT holds one score for each head and pair of tokens."""

PER_PROMPT = 7
"""The mask decoder's peak for one prompt, over the bytes of the features (28 MiB over 4)."""

QUESTION_TOKENS = 64
"""Tokens of a usual question, beside those of the image."""

_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "int8": 1, "uint8": 1, "int32": 4, "int64": 8}


# --- the estimate -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPlan:
    """The memory in bytes that a bundle needs for a prompt of `tokens` and its answer, by part.

    base: the program itself. weights, activations: of each graph, by role. cache: of keys and values, whole, as it is
    allocated whatever the prompt's length.
    """

    tokens: int
    base: int
    weights: Mapping[str, int]
    cache: int
    activations: Mapping[str, int]

    @property
    def total(self) -> int:
        """All parts together; on a CPU within 20 % of what was measured."""
        return self.base + sum(self.weights.values()) + self.cache + sum(self.activations.values())


def plan_memory(
    bundle: Bundle,
    tokens: int | None = None,
    *,
    kind: str = "cpu",
    roles: Collection[str] | None = None,
    float32_bytes: int | None = None,
) -> MemoryPlan:
    """Return what the bundle needs for a prompt of `tokens` (default: the image's and a short question's).

    kind: "cpu", or "gpu" for the memory of the GPU. roles: the only graphs that are loaded. float32_bytes: of all
    weights together, where the bundle is an opened checkpoint without graph files.

    Raises BundleError where a graph file is missing or is no ONNX file.
    """
    specs = {role: spec for role, spec in bundle.manifest.graphs.items() if roles is None or role in roles}
    weights = {"checkpoint": float32_bytes or 0}
    if float32_bytes is None:
        weights = {role: _weight_bytes(bundle.path / graph_file(role), kind) for role in specs}
        second = [bundle.file(name).stat().st_size for name in bundle.manifest.files if is_head(name)]
        if kind == "gpu" and "decoder" in specs and second:
            weights["head"] = sum(second)  # beside the decoder's own, for the kernels
    tokens = usual_tokens(bundle.manifest.graphs) if tokens is None else tokens
    base = BASE_BYTES if float32_bytes is None else TORCH_BASE_BYTES
    return MemoryPlan(
        tokens=tokens,
        base=base if kind == "cpu" else 0,
        weights=weights,
        cache=sum(cache_bytes(spec) for spec in specs.values()),
        activations={role: _activation_bytes(spec, tokens) for role, spec in specs.items()} if kind == "cpu" else {},
    )


def usual_tokens(specs: Mapping[str, GraphSpec]) -> int:
    """Return the length of a short question about one image, in tokens; 0 without a decoder."""
    if "decoder" not in specs:
        return 0
    dims = specs["decoder"].dims
    most = dims["sequence"].max if "sequence" in dims else QUESTION_TOKENS
    return min(most, QUESTION_TOKENS + (dims["rows"].opt if "rows" in dims else 0))


def cache_bytes(spec: GraphSpec) -> int:
    """Return what the state takes: dynamic dims at their largest, as a Runner allocates them."""
    kept = {name for _, name in spec.state}
    return sum(_bytes(t, {name: dim.max for name, dim in spec.dims.items()}) for t in spec.inputs if t.name in kept)


def _bytes(tensor: TensorSpec, sizes: Mapping[str, int]) -> int:
    return math.prod(d if isinstance(d, int) else sizes[d] for d in tensor.shape) * _ITEM_BYTES.get(tensor.dtype, 4)


def _activation_bytes(spec: GraphSpec, tokens: int) -> int:
    """Return the peak of what a graph computes, its outputs included, for one image and a prompt of `tokens`."""
    sizes = {name: dim.opt for name, dim in spec.dims.items()}
    outputs = spec.returned_outputs
    if spec.role == "vision_encoder":
        maps = [MAP * _bytes(t, sizes) for t in outputs if len(t.shape) == 4]
        rows = [_vit_bytes(t, sizes) for t in outputs if len(t.shape) == 3]
        return sum(maps) + max(rows, default=0)  # outputs of one tower are held once
    if spec.role == "decoder":
        sizes |= {"sequence": tokens}
        width = max((t.shape[-1] for t in outputs if t.name == "hidden" and isinstance(t.shape[-1], int)), default=0)
        return tokens * width * 4 * DECODER_WIDTHS + sum(_bytes(t, sizes) for t in outputs)
    ends = [_bytes(t, sizes) for t in (*spec.fed_inputs, *outputs)]
    return max(ends, default=0) * PER_PROMPT if spec.role == "mask_decoder" else sum(ends) * PASSES


def _vit_bytes(tensor: TensorSpec, sizes: Mapping[str, int]) -> int:
    """Return what a ViT holds at once for an output [images, tokens, width]: its widest layer, and the scores."""
    images, tokens, width = (d if isinstance(d, int) else sizes[d] for d in tensor.shape)
    heads = max(1, width // HEAD_WIDTH)
    return images * tokens * 4 * (TOKEN_WIDTHS * width + heads * tokens)


# --- weights in a graph file ------------------------------------------------------------------------------------------

_FLOAT, _FLOAT16, _DOUBLE, _BFLOAT16 = 1, 10, 11, 16  # TensorProto.DataType
_BITS = {_FLOAT: 32, 5: 16, 4: 16, 6: 32, 12: 32, 7: 64, 13: 64, _FLOAT16: 16, _BFLOAT16: 16, _DOUBLE: 64} | {
    21: 4, 22: 4, 23: 4, 25: 2, 26: 2,
}  # fmt: skip
"""DataType -> bits of a value; 8 where it is not here."""


def _weight_bytes(graph: Path, kind: str) -> int:
    """Return what the weights of an ONNX file take once loaded.

    On a CPU numbers of 16 bits become float32, since onnxruntime computes in no other. Raises BundleError.
    """
    total = 0.0
    try:
        with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for dims, dtype, inside in _tensors(data):
                bits = 32 if kind == "cpu" and dtype in (_FLOAT16, _BFLOAT16) else _BITS.get(dtype, 8)
                factor = INSIDE if kind == "cpu" and inside else 1.0
                total += math.prod(dims) * bits / 8 * factor
    except (OSError, ValueError, IndexError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no ONNX file"
        raise BundleError(
            f"cannot read the sizes in {graph.name}: {reason or 'refused'}; get the bundle anew"
        ) from error
    return round(total)


def _tensors(data: mmap.mmap) -> Iterator[tuple[list[int], int, bool]]:
    """Yield (dims, data type, whether its bytes are in this file) of every weight, without touching their bytes.

    Source of the field numbers: onnx.proto3 (ModelProto.graph 7, GraphProto.initializer 5, TensorProto.dims 1,
    data_type 2, data_location 14).
    """
    for model_field, _, start, end in _fields(data, 0, len(data)):
        if model_field != 7:
            continue
        for graph_field, _, first, last in _fields(data, start, end):
            if graph_field != 5:
                continue
            dims: list[int] = []
            dtype = location = 0
            for field, wire, at, stop in _fields(data, first, last):
                if field == 1:
                    dims += [at] if wire == 0 else _varints(data, at, stop)
                elif field == 2:
                    dtype = at
                elif field == 14:
                    location = at
            yield dims, dtype, location == 0


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (number, wire type, value or start, end) of the fields of a protobuf message. Raises ValueError."""
    while at < end:
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, wire, value, at
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > end:
            raise ValueError("cut short")
        yield key >> 3, wire, at, at + size
        at += size


def _varints(data: mmap.mmap, at: int, end: int) -> list[int]:
    found = []
    while at < end:
        value, at = _varint(data, at)
        found.append(value)
    return found


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number without an end")


# --- what is free -----------------------------------------------------------------------------------------------------


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """Return what this process may still take of the host's memory, or None where the system does not tell.

    The least of: what the machine has available, what the control groups that this process is in (versions 1 and 2)
    leave, and what its own limit of address space leaves. Files in the page cache count as free.
    """
    try:
        lines = (root / "proc/meminfo").read_text("ascii").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    return max(0, min([available, *_group_room(root), *_address_room(root)]))


def _group_room(root: Path) -> Iterator[int]:
    """Yield what is left in each control group above this process that has a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, usage, prefix = root / "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, prefix = root / "sys/fs/cgroup/memory", "total_"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inside = Path(path.lstrip("/"))
        for group in (top / inside, *(top / parent for parent in inside.parents)):  # inside a container: only the top
            try:
                most, used = (group / limit).read_text("ascii").strip(), int((group / usage).read_text("ascii"))
                stat = dict(entry.split() for entry in (group / "memory.stat").read_text("ascii").splitlines())
            except (OSError, ValueError):
                continue
            cached = sum(int(stat.get(f"{prefix}{name}", 0)) for name in ("active_file", "inactive_file"))
            if most.isdecimal():
                yield int(most) - used + cached


def _address_room(root: Path) -> Iterator[int]:
    """Yield what a limit of this process's address space (ulimit -v) leaves."""
    try:
        lines = (root / "proc/self/limits").read_text("ascii").splitlines()
        soft = next(line[len("Max address space") :].split()[0] for line in lines if line.startswith("Max address"))
        pages = int((root / "proc/self/statm").read_text("ascii").split()[0])
    except (OSError, StopIteration, IndexError, ValueError):
        return
    if soft.isdecimal():
        yield int(soft) - pages * mmap.PAGESIZE


def place_of(backend: str, device: str) -> Device:
    """Return where a back end would run: "cpu", "gpu", or "auto" where only running it tells.

    Raises InvalidInput where `device` is none.
    """
    wanted = device_from_text(device)
    if wanted.kind != "auto":
        return wanted
    if backend == "tensorrt":
        return Device("gpu")
    if backend == "torch":
        return Device("auto" if nvidia.ask_driver() else "cpu")
    try:
        import onnxruntime
    except ImportError:
        return Device("auto")  # opening it will tell what is missing
    return Device("gpu" if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "cpu")


def free_bytes(place: Device) -> int | None:
    """Return what is free at a place, or None where that cannot be told."""
    if place.kind == "cpu":
        return free_host_bytes()
    driver = nvidia.ask_driver() if place.kind == "gpu" else None
    gpus = driver.gpus if driver else ()
    return next((gpu.free_bytes for gpu in gpus if gpu.index == place.index), None)


def check_memory(plan: MemoryPlan, place: Device, free: int | None = None) -> None:
    """Raise OutOfMemory, for a GPU DeviceOutOfMemory, where a plan surely does not fit into what is free there.

    free: bytes; default, what the place has. Where it cannot be told (macOS, Windows, no driver) nothing is refused,
    nor is anything whose estimate times `CERTAIN` fits: it might run.
    """
    free = free_bytes(place) if free is None else free
    if free is None or plan.total * CERTAIN <= free:
        return
    needed = f"about {plan.total / MIB:.0f} MiB are needed for a prompt of {plan.tokens} tokens"
    smaller = (
        "use a bundle with int8 or int4 weights or a smaller cache (edgemed export --decoder int4 --cache TOKENS, "
        "edgemed quantize --kv-cache int8)"
    )
    if place.kind == "gpu":
        raise DeviceOutOfMemory(
            f"{needed}, GPU {place.index} has {free / MIB:.0f} MiB free: close programs that use it, {smaller}, "
            "or use --device cpu"
        )
    raise OutOfMemory(f"{needed}, {free / MIB:.0f} MiB are free: close other programs, or {smaller}")
