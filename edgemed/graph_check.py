"""What an ONNX file may hold here, checked without any ONNX library: known operators, no code, where its weights lie.

Walks the wire format of onnx.proto (field numbers from github onnx/onnx, onnx/onnx.proto) through a memory map and
skips the weights. Covers operator domains, operators that load other programs or files, and the names of files with
weights. Does not cover whether the graph is valid or does what its specification says: loading and running it does.
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator
from pathlib import Path

from edgemed.errors import BundleError, OutOfMemory

DOMAINS = frozenset({b"", b"ai.onnx", b"com.microsoft"})
"""The operator domains that ONNX Runtime has built in and our graphs use; another one needs a library."""

REFUSED_OPERATORS = frozenset({b"EPContext", b"PythonOp", b"PythonOpGrad", b"ATen"})
"""Operators of com.microsoft that run what is in no ONNX graph: a compiled engine, Python, another library."""

MAX_FIELDS = 2_000_000
"""More fields than this are refused. A decoder of 28 layers has some 100,000; the limit takes about 2 s to reach."""

_MAX_DEPTH = 32
_MAX_TEXT = 4096

_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _TENSOR, _SPARSE, _FUNCTION, _OPSET, _ENTRY = range(9)
_CHILDREN: dict[int, dict[int, int]] = {
    _MODEL: {7: _GRAPH, 8: _OPSET, 25: _FUNCTION},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _TENSOR: {13: _ENTRY},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
    _FUNCTION: {7: _NODE, 9: _OPSET, 11: _ATTRIBUTE},
    _OPSET: {},
    _ENTRY: {},
}
"""Message -> the fields of it that are messages worth a look."""
_TEXTS = {(_NODE, 4), (_NODE, 7), (_FUNCTION, 10), (_OPSET, 1), (_ENTRY, 1), (_ENTRY, 2)}
_TRAINING_INFO = (_MODEL, 20)


def external_files(path: Path) -> frozenset[str]:
    """Return the files, relative to the graph's folder, that an ONNX file takes weights from, after checking the file.

    Raises BundleError if it is no ONNX file, needs operators that are not built in, or has more parts than a model has;
    OutOfMemory if it cannot be mapped.
    """
    found: set[str] = set()
    entry: dict[int, list[bytes]] = {}
    try:
        for message, field, text in _texts(path):
            if message == _ENTRY:  # key and value may come in any order and more than once: whatever may count, counts
                entry = {0: [], 1: [], 2: []} if field == 0 else entry
                entry[field].append(text)
                if b"location" in entry[1]:
                    found.update(value.decode("utf-8") for value in entry[2])
            elif (message, field) == (_NODE, 4):
                if text in REFUSED_OPERATORS:
                    raise BundleError(f"{path.name} has the operator {text.decode()}, which runs what is in no graph")
            elif text not in DOMAINS:
                told = text[:60].decode("utf-8", "replace")
                raise BundleError(
                    f"{path.name} uses operators of {told!r}; those of ai.onnx and com.microsoft were expected"
                )
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise BundleError(f"{path.name} is no ONNX graph: {error}; get the bundle anew") from error
    except OSError as error:
        if error.errno == errno.ENOMEM:  # the file is mapped whole
            raise OutOfMemory(f"{path.name} does not fit into memory; close other programs") from error
        raise BundleError(f"cannot read {path.name}: {error.strerror or 'refused'}") from error
    return frozenset(found)


def _texts(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (message, field, bytes) of every text that the checks need; field 0 where an entry starts.

    Raises ValueError if the wire format is broken.
    """
    if not path.stat().st_size:
        return
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        left = MAX_FIELDS
        todo = [(_MODEL, 0, len(data), 0)]
        while todo:
            message, at, end, depth = todo.pop()
            children = _CHILDREN[message]
            if message == _ENTRY:
                yield message, 0, b""  # a new one starts
            while at < end:
                left -= 1
                if left < 0:
                    raise ValueError(f"it has more than {MAX_FIELDS} fields")
                tag, at = _varint(data, at)
                field, wire = tag >> 3, tag & 7
                if wire == 2:
                    size, at = _varint(data, at)
                    if at + size > end:
                        raise ValueError("a part is longer than what holds it")
                    if field in children:
                        if depth == _MAX_DEPTH:
                            raise ValueError(f"graphs lie more than {_MAX_DEPTH} levels deep")
                        todo.append((children[field], at, at + size, depth + 1))
                    elif (message, field) in _TEXTS:
                        if size > _MAX_TEXT:
                            raise ValueError("a name has more than 4096 bytes")
                        yield message, field, data[at : at + size]
                    elif (message, field) == _TRAINING_INFO:
                        raise ValueError("it holds training graphs")
                    at += size
                elif wire == 0:
                    _, at = _varint(data, at)
                elif wire == 5:
                    at += 4
                elif wire == 1:
                    at += 8
                else:
                    raise ValueError("a part of it has an unknown kind")
                if at > end or field == 0:
                    raise ValueError("a part is longer than what holds it")


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = data[at]
    at += 1
    if value < 0x80:
        return value, at
    value &= 0x7F
    for shift in range(7, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number has more than ten bytes")
