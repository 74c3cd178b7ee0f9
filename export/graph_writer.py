"""Collects the nodes and weights of one ONNX graph; large weights go straight to a file as they come.

Covers storing weights in the smallest type that holds them exactly, matrices rounded or as integers with scales, and
going on with a weight file that an earlier run left unfinished. Does not cover what a graph computes (`decoder_graph`,
`traced_graph`).

A weight is given as its name, its shape and a function that reads it, so that a matrix which is in the file already is
not read again, and none is held longer than it takes to write it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgemed.blocks import as_float32, pack_rows
from edgemed.errors import CannotWrite, InvalidInput
from edgemed.graphs import GraphSpec, TensorSpec

Array = npt.NDArray[Any]
Read = Callable[[], Array]
Computed = Literal["fp32", "fp16", "bf16"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]

FUSED = "com.microsoft"
OPSET = 21
IR_VERSION = 10

BITS = {"int8": 8, "int4": 4}
TYPES: Mapping[str, np.dtype[Any]] = {
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp32": np.dtype(np.float32),
}
"""Precision -> the type that is computed in."""
_CHUNK = 1 << 22  # weights held as float32 at a time
_LARGE = 1024  # bytes from which on a weight goes to the weight file
_ALIGNMENT = 4096  # of every weight in the file, so that it can be mapped


@dataclass(frozen=True)
class MatrixFormat:
    """How matrices are stored.

    fp32: as they are, computed in fp32. fp16, bf16: rounded. int8, int4: blocks of `block` weights with a scale each.
    accuracy_level: 4 lets the runtime round activations to 8 bits block by block (fastest), 0 computes in fp32.
    standard: integers for standard operators, computed in fp16; int8 then has one scale for each output.
    """

    precision: Precision = "fp32"
    block: int = 32
    accuracy_level: int = 4
    standard: bool = False

    def __post_init__(self) -> None:
        if self.precision in BITS and (self.block < 16 or self.block & (self.block - 1)):
            raise InvalidInput(f"{self.precision} in blocks of {self.block}; a power of two from 16 on was expected")

    @property
    def packed(self) -> bool:
        """Whether matrices are integers."""
        return self.precision in BITS

    @property
    def computed(self) -> Computed:
        """The precision of what is multiplied and is no packed matrix."""
        if self.precision == "int8" or self.precision == "int4":
            return "fp16" if self.standard else "fp32"
        return self.precision

    def packed_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes that the integers and scales of a matrix [rows, columns] take in a weight file."""
        share = BITS[self.precision] / 8
        if self.standard:
            scales = rows * (1 if self.precision == "int8" else columns // self.block_of(columns))
            return room(rows * columns, share) + room(scales, 2)
        blocks = rows * -(-columns // self.block)
        return room(blocks * self.block, share) + room(blocks, 4)

    def block_of(self, columns: int) -> int:
        """Return the largest power of two up to `block` that divides the inputs: TensorRT takes whole blocks only.

        Raises InvalidInput where that is below 16.
        """
        fitting = min(self.block, columns & -columns)
        if fitting < 16:
            raise InvalidInput(f"int4 needs matrices whose inputs are a multiple of 16; one has {columns}. Choose int8")
        return fitting


class WeightFile:
    """A file of tensors for the graph beside it (ONNX external data), written one after the other.

    A line in `<file>.journal` says where each one lies. A file that was left unfinished is cut after the last tensor
    with a line and written on from there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal_path = path.with_name(f"{path.name}.journal")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            self._done, journaled = _read_journal(self._journal_path, path.stat().st_size)
            end = max((offset + length for _, _, offset, length in self._done.values()), default=0)
            # Without a buffer, so that closing has nothing left to write after the disk refused.
            self._file = path.open("r+b", buffering=0)
            self._file.truncate(end)
            self._file.seek(end)
            self._journal = self._journal_path.open("ab", buffering=0)
            self._journal.truncate(journaled)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def has(self, name: str) -> bool:
        """Return whether the tensor is in the file."""
        return name in self._done

    def add(self, name: str, array: Array) -> None:
        """Write a tensor. Raises CannotWrite."""
        try:
            start = _aligned(self._file.tell())
            self._file.seek(start)
            left = _bytes_of(array)
            entry = (str(array.dtype), list(array.shape), start, len(left))
            while left:  # the system takes 2 GiB at a time
                left = left[self._file.write(left) :]
            self._journal.write(json.dumps([name, *entry]).encode() + b"\n")
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._done[name] = entry

    def proto(self, name: str) -> onnx.TensorProto:
        """Return the tensor as a graph names it: type, shape, and where its bytes lie."""
        dtype, shape, offset, length = self._done[name]
        tensor = TensorProto(name=name, dims=shape, data_location=TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
        for key, value in (("location", self.path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def finish(self) -> None:
        """Close the file and remove its journal; a file without a tensor goes, too. Raises CannotWrite."""
        try:
            self.close()
            self._journal_path.unlink()
            if not self._done:
                self.path.unlink()
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the file as it is, to be gone on with."""
        self._file.close()
        self._journal.close()


def _bytes_of(array: Array) -> memoryview:
    """Return an array's bytes as ONNX stores them: of two 4-bit values, the first is the lower half of a byte."""
    flat: Array = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if array.dtype == ml_dtypes.int4:
        flat = np.append(flat, np.zeros(flat.size % 2, np.uint8)) & 15
        flat = flat[0::2] | flat[1::2] << 4
    return flat.data


def room(size: int, itemsize: float) -> int:
    """Return the bytes that a tensor of `size` elements takes, the gap behind it in a weight file included."""
    needed = math.ceil(size * itemsize)
    return needed if _is_small(size) else _aligned(needed)


def _is_small(size: int) -> bool:
    """Return whether a tensor of `size` elements lies in the graph itself."""
    return size * 4 < _LARGE


def _aligned(end: int) -> int:
    return -(-end // _ALIGNMENT) * _ALIGNMENT


def _read_journal(path: Path, size: int) -> tuple[dict[str, tuple[str, list[int], int, int]], int]:
    """Return (tensors that lie whole in a file of `size` bytes, bytes of the journal that tell of them)."""
    done: dict[str, tuple[str, list[int], int, int]] = {}
    read = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            name, dtype, shape, offset, length = json.loads(line)
        except ValueError:  # the line that was being written when the run ended
            break
        if not line.endswith(b"\n") or offset + length > size:
            break
        done[name] = (dtype, shape, offset, length)
        read += len(line)
    return done, read


def _cannot_write(path: Path, error: OSError) -> CannotWrite:
    return CannotWrite(f"cannot write {path}: {error.strerror or 'refused'}; free space there or choose another folder")


class GraphWriter:
    """Nodes, constants and weights of one graph. A method adds one part and returns the name of what it computes.

    weights: where large weights go; without it everything is held in the graph.
    progress: called with the number of weights (elements) after each one that was written.
    """

    def __init__(
        self,
        matrices: MatrixFormat | None = None,
        weights: WeightFile | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.matrices = matrices or MatrixFormat()
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._weights = weights
        self._progress = progress

    def model(self, spec: GraphSpec) -> onnx.ModelProto:
        """Return the ONNX model with the inputs and outputs of `spec`."""
        graph = helper.make_graph(
            self.nodes,
            spec.role,
            [value_info(t) for t in spec.inputs],
            [value_info(t) for t in spec.outputs],
            list(self.initializers.values()),
        )
        opsets = [helper.make_opsetid("", OPSET)]
        if not self.matrices.standard:
            opsets.append(helper.make_opsetid(FUSED, 1))
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgemed")

    def node(
        self, op: str, inputs: Sequence[str], output: str, *, more_outputs: Sequence[str] = (), **attributes: Any
    ) -> str:
        """Add one node, named after its first output, and return that output."""
        self.nodes.append(helper.make_node(op, inputs, [output, *more_outputs], name=output, **attributes))
        return output

    def constant(self, name: str, value: Array) -> str:
        """Store a small `value` under `name` unless it is there already, and return the name."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def stored(self, name: str, size: int, read: Read) -> str:
        """Store what `read` gives, in its own type, and return the name; size: its number of elements."""
        if name not in self.initializers:
            if self._weights is None or _is_small(size):
                self.constant(name, read())
            else:
                if not self._weights.has(name):
                    self._weights.add(name, read())
                self.initializers[name] = self._weights.proto(name)
            self._advance(size)
        return name

    def weight(self, name: str, size: int, read: Read) -> str:
        """Store a float weight; return the name of its float32 value.

        In a weight file it has the smallest type that holds it exactly, in the graph itself it is float32.
        """
        self.stored(name, size, (lambda: smallest(read())) if self._weights else (lambda: as_float32(read())))
        if self.initializers[name].data_type == TensorProto.FLOAT:
            return name
        return self.as_float(name)

    def factor(self, name: str, size: int, read: Read) -> str:
        """Store a weight that is multiplied, rounded to the writer's format; return the name of its float32 value.

        Raises InvalidInput where the format does not hold a value.
        """
        if self.matrices.computed == "fp32":
            return self.weight(name, size, read)
        self.stored(name, size, lambda: rounded(read(), self.matrices.computed, name))
        return self.as_float(name)

    def as_float(self, name: str) -> str:
        """Return the float32 value of a tensor of another type; the runtime computes it once, when it loads."""
        return self._once("Cast", [name], f"{name}.float", to=TensorProto.FLOAT)

    def dequantized(self, name: str, rows: int, columns: int, read: Read) -> str:
        """Store the weight [rows, columns] that `read` gives as integers; return its float16 value [columns, rows].

        It is computed where the node stands: in a branch that is not taken, not at all.
        """
        form = self.matrices
        values, scales = f"{name}.{form.precision}", f"{name}.scales"
        block = form.block_of(columns) if form.precision == "int4" else columns
        both: dict[str, Array] = {}

        def quantize(wanted: str) -> Array:
            if not both:
                both[values], both[scales] = quantized(read(), block, form.precision)
            return both[wanted]

        self.stored(values, rows * columns, lambda: quantize(values))
        self.stored(scales, rows * (columns // block), lambda: quantize(scales))
        how = {"axis": 0, "block_size": block} if form.precision == "int4" else {"axis": 1}
        return self._once("DequantizeLinear", [values, scales], f"{name}.fp16", **how)

    def _once(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node unless it is there, and return its output."""
        if not any(node.output[0] == output for node in self.nodes):
            self.node(op, inputs, output, **attributes)
        return output

    def matmul(self, x: str, name: str, rows: int, columns: int, read: Read, output: str) -> str:
        """Return x [..., columns] @ weight.T; `read` gives weight [rows, columns], stored in the writer's format."""
        form = self.matrices
        if not form.packed:
            matrix = self.factor(name, rows * columns, lambda: read().T)
            return self.node("MatMul", [x, matrix], output)
        if form.standard:
            low = self.node("Cast", [x], f"{output}.given", to=TensorProto.FLOAT16)
            product = self.node("MatMul", [low, self.dequantized(name, rows, columns, read)], f"{output}.product")
            return self.node("Cast", [product], output, to=TensorProto.FLOAT)
        bits = BITS[form.precision]
        packed, scales = f"{name}.{form.precision}", f"{name}.scales"
        blocks = -(-columns // form.block)
        both: dict[str, Array] = {}

        def pack(wanted: str) -> Array:
            if not both:
                both[packed], both[scales] = pack_rows(read(), form.block, bits)
            return both[wanted]

        self.stored(packed, rows * columns, lambda: pack(packed))
        self.stored(scales, rows * blocks, lambda: pack(scales))
        return self.node(
            "MatMulNBits", [x, packed, scales], output, domain=FUSED, K=columns, N=rows, bits=bits,
            block_size=form.block, accuracy_level=form.accuracy_level,
        )  # fmt: skip

    def _advance(self, size: int) -> None:
        if self._progress:
            self._progress(size)


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def rounded(array: Array, precision: Computed, name: str) -> Array:
    """Return `array` in the type of fp16, bf16 or fp32; `name` is for the message.

    Raises InvalidInput where a value is not finite or beyond what the type holds.
    """
    dtype = TYPES[precision]
    out = np.empty(array.shape, dtype)
    given, made = (array.T, out.T) if array.flags.f_contiguous else (array, out)  # by rows as they lie in the memory
    for part in _chunks(len(given), given[:1].size) if given.ndim else (...,):
        with np.errstate(over="ignore"):
            made[part] = as_float32(given[part]).astype(dtype)
        if not np.isfinite(made[part]).all():
            advice = "" if precision != "fp16" else "choose bf16 or fp32 (a decoder), fp32 (another graph), or "
            raise InvalidInput(
                f"tensor {name} has a value that {precision} does not hold; {advice}get the checkpoint again"
            )
    return out


def quantized(matrix: Array, block: int, precision: Precision) -> tuple[Array, Array]:
    """Return (int8 or int4 values [inputs, outputs], float16 scales) of a matrix [outputs, inputs]; value = q * scale.

    int8: scales [outputs], `block` being all inputs. int4: [inputs / block, outputs]; -8 is used, so that no scale is
    larger than it needs to be. Symmetric, round to nearest, in chunks of rows: a large matrix is never held as float32.

    Raises InvalidInput where a weight is not finite or a scale is beyond float16.
    """
    outputs, inputs = matrix.shape
    lowest, highest = (-127, 127) if precision == "int8" else (-8, 7)
    values = np.empty((inputs, outputs), np.int8)
    scales = np.empty((inputs // block, outputs), np.float16)
    for part in _chunks(outputs, inputs):
        grouped = as_float32(matrix[part]).reshape(-1, inputs // block, block)  # [some outputs, blocks, block]
        bound = np.maximum(grouped.max(axis=2) / np.float32(highest), grouped.min(axis=2) / np.float32(lowest))
        with np.errstate(over="ignore"):
            scale = np.maximum(bound, np.finfo(np.float16).tiny).astype(np.float16)
        if not np.isfinite(scale).all():  # of a NaN too: the largest of some numbers and a NaN is a NaN
            raise InvalidInput("a weight is not a finite number, or too large for fp16; the checkpoint is damaged")
        whole = np.rint(grouped / scale.astype(np.float32)[..., None]).clip(lowest, highest)
        values[:, part] = whole.reshape(-1, inputs).T
        scales[:, part] = scale.T
    if precision == "int8":
        return values, scales[0]
    return values.astype(ml_dtypes.int4), scales


def smallest(array: Array) -> Array:
    """Return `array` if it has 2 bytes a value, else in bfloat16 if that changes no value, else in float32.

    Raises InvalidInput if a value is not finite.
    """
    if not np.isfinite(array).all():
        raise InvalidInput("a weight is not a finite number; the checkpoint is damaged")
    if array.dtype.itemsize == 2:
        return array
    whole = array.astype(np.float32, copy=False)
    half = whole.astype(ml_dtypes.bfloat16)
    return half if np.array_equal(as_float32(half), whole) else whole


def value_info(tensor: TensorSpec) -> onnx.ValueInfoProto:
    """Return the ONNX description of one input or output."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, kind, list(tensor.shape))
