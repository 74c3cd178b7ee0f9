"""MetaImage headers (.mha, .mhd): lines of `Key = Value` up to ElementDataFile, then the voxels or their file's name.

Directions, spacing and origin are those of ITK: millimetres in LPS, one column of the matrix for each axis of the file.

Does not cover text voxels, several channels, lists and patterns of files, or other compressions than zlib and gzip.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgemed.errors import CannotRead, InvalidInput, ResourceLimit, UnsupportedDicom

START = b"ObjectType"
_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
_MAX_LINES, _MAX_LINE = 1000, 1 << 16


@dataclass(frozen=True)
class MetaHeader:
    """What a header says: voxels along each axis, their type, affine (voxel -> LPS mm), where the data is.

    data_file: beside the header; "" for behind it, from `offset` on. offset: in bytes; -1: the data ends with the file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    affine: npt.NDArray[np.float64]
    data_file: str
    offset: int
    compressed: bool


def read_meta(file: BinaryIO) -> MetaHeader:
    """Return the header at the start of `file`, which is then at its end.

    Raises CannotRead if the file ends inside it, InvalidInput if it is damaged, UnsupportedDicom for a form that the
    module does not cover, ResourceLimit for one without end.
    """
    fields = _fields(file)
    try:
        return _header(fields, file.tell())
    except (ValueError, KeyError, OverflowError) as error:
        raise InvalidInput(f"the MetaImage header is damaged ({type(error).__name__})") from None


def _fields(file: BinaryIO) -> dict[str, str]:
    fields: dict[str, str] = {}
    for _ in range(_MAX_LINES):
        line = file.readline(_MAX_LINE)
        if not line.endswith(b"\n") and "ElementDataFile" not in line.decode("latin-1"):
            raise CannotRead("the file is truncated: it ends inside its header")
        key, equals, value = line.decode("latin-1").partition("=")
        if not equals and key.strip():
            raise InvalidInput("the MetaImage header is damaged; lines of Key = Value were expected")
        fields[key.strip()] = value.strip()
        if key.strip() == "ElementDataFile":
            return fields
    raise ResourceLimit(f"the MetaImage header has more than {_MAX_LINES} lines")


def _header(fields: dict[str, str], end: int) -> MetaHeader:
    axes = int(fields["NDims"])
    shape = tuple(int(n) for n in fields["DimSize"].split())
    kind = _TYPES.get(fields["ElementType"])
    if axes not in (2, 3) or len(shape) != axes:
        raise UnsupportedDicom(f"the MetaImage has {axes} axes; two or three were expected")
    if kind is None or int(fields.get("ElementNumberOfChannels", 1)) != 1:
        raise UnsupportedDicom("the MetaImage has voxels that are no single numbers; it is not supported")
    if not _true(fields.get("BinaryData", "True")):
        raise UnsupportedDicom("a MetaImage with voxels in text is not supported; write it as binary")
    spacing = _numbers(fields.get("ElementSpacing") or fields.get("ElementSize"), axes, np.ones(axes))
    origin = _numbers(_first(fields, "Offset", "Position", "Origin"), axes, np.zeros(axes))
    turn = _numbers(_first(fields, "TransformMatrix", "Rotation", "Orientation"), axes * axes, np.eye(axes).ravel())
    affine = np.eye(4)
    affine[:axes, :axes] = turn.reshape(axes, axes).T * spacing
    affine[:axes, 3] = origin
    big = _true(fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", str(sys.byteorder == "big"))))
    compressed = _true(fields.get("CompressedData", "False"))
    name = fields["ElementDataFile"]
    skip = int(fields.get("HeaderSize", 0))
    if name.upper() == "LOCAL":
        return MetaHeader(shape, np.dtype(f"{'>' if big else '<'}{kind}"), affine, "", end, compressed)
    if name.upper() == "LIST" or "%" in name:
        raise UnsupportedDicom("a MetaImage with a file for each slice is not supported; join them")
    if name != os.path.basename(name) or set(name) & set("/\\\0:") or name in ("", ".", ".."):
        raise InvalidInput("the MetaImage header names a file that is not beside it")
    if skip < -1 or (compressed and skip):
        raise UnsupportedDicom("the MetaImage's HeaderSize is not supported; -1, 0 or a number of bytes is")
    return MetaHeader(shape, np.dtype(f"{'>' if big else '<'}{kind}"), affine, name, skip, compressed)


def _first(fields: dict[str, str], *names: str) -> str | None:
    return next((fields[name] for name in names if name in fields), None)


def _true(text: str) -> bool:
    return text.lower() in ("true", "1", "yes")


def _numbers(text: str | None, count: int, default: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if text is None:
        return default
    numbers = np.array([float(part) for part in text.split()])
    if len(numbers) != count:
        raise ValueError
    return numbers
