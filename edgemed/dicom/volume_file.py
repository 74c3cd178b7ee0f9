"""Volume files: NIfTI (.nii, .nii.gz), NRRD (.nrrd), MetaImage (.mha, .mhd), read slice by slice within limits.

    with open_volume("scan.nii.gz") as volume:
        scan = volume.read(volume.count // 2)

A volume is turned, not resampled, so that its slices lie as DICOM slices of that plane are shown: axial seen from the
feet, coronal from the front, sagittal from the left. Slices are those across the axis with much the largest distance
between voxels, else the axial ones. A gzip or zlib stream is unpacked once to a private temporary file, counted while
it is; one slice is in memory at a time. No child process: nothing is decoded but those, and a header is short.

Values have no window of their own: HU (a file that holds air, -800 or lower, is taken for CT) gets 40, 400, everything
else its 1st to 99th percentile over nine slices. Does not cover time series, colour volumes, complex numbers, NRRD with
detached data or other encodings than raw and gzip.
"""

from __future__ import annotations

import gzip
import math
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgemed.core import Scan, Window
from edgemed.dicom.geometry_verdict import Place, Triple, Verdict, judge
from edgemed.dicom.limits import DEFAULT_LIMITS, Limits
from edgemed.dicom.metaimage import START as META_START
from edgemed.dicom.metaimage import read_meta
from edgemed.dicom.voi import parse_window
from edgemed.errors import CannotRead, CannotWrite, InvalidInput, NoInput, ResourceLimit, UnsupportedDicom

ENDINGS = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
HU_WINDOW = Window(40, 400)

_AIR_HU = -800
_FAR_MM = 1e9
"""No number of an affine is as large; those that are would overflow in what is computed from them."""
_THICK = 1.5
"""An axis whose voxels are this many times longer than the others' is the one that was scanned slice by slice."""
_CHUNK = 1 << 20
_MAX_HEADER = 1 << 20
_PLANES = ("sagittal", "coronal", "axial")  # by the patient axis that the slices are across
_SHOWN = ((1, 2), (0, 2), (0, 1))
"""Patient axis of the slices -> (patient axis along a row, patient axis down a column)."""
_DOWN_IS_FEET = 2  # the column direction of coronal and sagittal slices runs from head to feet

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Header:
    """What a file's header says: voxels [3], their type, where they start, affine (voxel -> LPS mm), rescale."""

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    offset: int
    affine: npt.NDArray[np.float64]
    slope: float = 1.0
    intercept: float = 0.0
    gzipped: bool = False


class Volume:
    """One opened volume; slices count from 0 in the direction of the patient's left, back or head.

    modality: "CT" or "OT". plane: of the slices. places: one for each slice. notes: what was assumed. data_path: the
    file that holds the voxels, which may lie beside the one with the header (.mhd).
    """

    def __init__(self, path: str, raw: str, header: _Header, data_path: str) -> None:
        self.path, self.data_path = path, data_path
        self._raw, self._header = raw, header
        data, affine = self._turned()
        columns, rows, self.count = data.shape
        self.plane = _PLANES[int(np.abs(affine[:3, 2]).argmax())]
        self.places = tuple(_places(affine, int(rows), int(columns), int(self.count)))
        sample = np.concatenate([self._values(k).ravel() for k in _spread(self.count, 9)])
        finite = sample[np.isfinite(sample)]
        low = float(finite.min()) if finite.size else 0.0
        self.modality = "CT" if low <= _AIR_HU else "OT"
        self.notes: tuple[str, ...] = (f"{self.plane} slices; taken for {_words(self.modality)}",)
        if self.modality == "CT":
            self._window = HU_WINDOW
        else:
            bottom, top = np.percentile(finite.astype(np.float64), (1, 99)) if finite.size else (0.0, 1.0)
            self._window = Window(float(bottom + top) / 2, max(float(top - bottom), 1e-6))

    @property
    def verdict(self) -> Verdict:
        return judge(self.places)

    def read(self, index: int, window: str | None = None) -> Scan:
        """Return slice `index` as a Scan of one frame, which has the slice's number.

        Raises InvalidInput if there is no such slice.
        """
        if not 0 <= index < self.count:
            raise InvalidInput(f"slice {index} was asked for; the volume has slices 0 to {self.count - 1}")
        values = np.nan_to_num(self._values(index), nan=0.0, posinf=0.0, neginf=0.0)
        return Scan(
            np.ascontiguousarray(values.T)[None],
            self.modality,
            window=parse_window(window) if window is not None else self._window,
            pixel_spacing_mm=self.places[0].spacing_mm,
            first_frame=index,
            total_frames=self.count,
        )

    def _values(self, index: int) -> npt.NDArray[np.float32]:
        """Return the values of a slice, [columns, rows]."""
        stored = self._turned()[0][:, :, index]
        with np.errstate(all="ignore"):  # what is no number of 32 bits is one that `read` makes 0
            return np.asarray(stored.astype(np.float64) * self._header.slope + self._header.intercept, np.float32)

    def _turned(self) -> tuple[Array, npt.NDArray[np.float64]]:
        """Return (voxels as [columns, rows, slices], affine), mapped anew: no page stays longer than its slice."""
        header = self._header
        return _turned(np.memmap(self._raw, header.dtype, "r", header.offset, header.shape, "F"), header.affine)


def is_volume_file(path: str | os.PathLike[str]) -> bool:
    """Tell from its name whether a file is a volume."""
    return os.fspath(path).lower().endswith(ENDINGS)


@contextmanager
def open_volume(path: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> Iterator[Volume]:
    """Give the volume in a file; what was unpacked for it is removed at the end.

    Raises CannotRead (missing, truncated), NoInput (empty), InvalidInput (damaged, another format), UnsupportedDicom
    (a form that the module does not cover), ResourceLimit (larger than `limits`, or a gzip bomb), CannotWrite (no room
    to unpack it).
    """
    name = os.fspath(path)
    with tempfile.TemporaryDirectory(prefix="edgemed-") as folder:
        try:
            with np.errstate(all="ignore"):  # of numbers without bounds in a header; `_check` looks at what comes out
                volume = _open(name, folder, limits)
        except (CannotRead, CannotWrite, InvalidInput, NoInput, ResourceLimit, UnsupportedDicom) as error:
            raise type(error)(f"{name}: {error}") from None
        except OSError as error:
            raise CannotRead(f"{name} cannot be read: {error.strerror or 'refused'}") from None
        yield volume


def _open(name: str, folder: str, limits: Limits) -> Volume:
    with open(name, "rb") as file:
        packed = os.fstat(file.fileno()).st_size
        if packed == 0:
            raise NoInput("the file is empty; a volume was expected")
        meta = file.read(len(META_START)) == META_START
        file.seek(0)
        header, stream, data = _meta(file, name) if meta else (*_read_header(file), name)
        with stream:
            if data != name:
                packed = os.path.getsize(data)
            _check(header, limits)
            raw = data
            needed = header.offset + math.prod(header.shape) * header.dtype.itemsize
            if header.gzipped:
                raw = os.path.join(folder, "volume")
                _inflate(stream, raw, needed, packed, limits)
    if os.path.getsize(raw) < needed:
        raise CannotRead(f"the file is truncated: {needed} bytes were expected")
    return Volume(name, raw, header, data)


def _check(header: _Header, limits: Limits) -> None:
    if min(header.shape) < 1:
        raise InvalidInput(f"the volume has {header.shape} voxels; at least one along each axis was expected")
    if header.dtype.kind not in "iuf" or header.dtype.itemsize > 8:
        raise UnsupportedDicom(f"voxels of type {header.dtype} are not supported; whole or real numbers are")
    if sorted(header.shape)[1] * sorted(header.shape)[2] > limits.max_pixels:
        raise ResourceLimit(f"a slice has more than {limits.max_pixels} pixels")
    if math.prod(header.shape) * header.dtype.itemsize > limits.max_declared_bytes:
        raise ResourceLimit(f"the volume has more than {limits.max_declared_bytes >> 30} GiB")
    if not (np.abs(header.affine) < _FAR_MM).all() or abs(np.linalg.det(header.affine)) < 1e-12:
        raise InvalidInput("the affine of the volume is none: its axes do not span space, or lead out of it")


def _inflate(stream: BinaryIO, target: str, needed: int, packed: int, limits: Limits) -> None:
    """Write what a gzip stream holds to `target`, at most `needed` bytes: what the header declares, and no more."""
    # A volume of zeros is legal and packs 1000:1; the header's size is bound by the same factor as a picture's.
    if needed > limits.expansion_floor_bytes and needed > limits.max_expansion * packed:
        raise ResourceLimit(f"its {packed} bytes ask for {needed >> 20} MiB")
    left = needed
    try:
        with open(target, "xb") as out:
            while left and (part := stream.read(min(_CHUNK, left))):
                try:
                    out.write(part)
                except OSError as error:
                    raise CannotWrite(f"the volume cannot be unpacked: {error.strerror or 'refused'}") from None
                left -= len(part)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CannotRead(f"the file is truncated or damaged ({type(error).__name__})") from None


def _read_header(file: BinaryIO) -> tuple[_Header, BinaryIO]:
    """Return the header and the stream of the data that its offset counts in."""
    head = file.read(4)
    file.seek(0)
    if head == b"NRRD":
        return _nrrd(file)
    if head[:2] == b"\x1f\x8b":
        unpacked = gzip.GzipFile(fileobj=file)
        try:
            start = unpacked.read(_MAX_NIFTI)
        except (EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
            raise CannotRead(f"the file is truncated or damaged ({type(error).__name__})") from None
        unpacked.seek(0)
        return replace(_nifti(start), gzipped=True), unpacked  # type: ignore[return-value]
    return _nifti(file.read(_MAX_NIFTI)), file


_MAX_NIFTI = 540
_NIFTI = {348: ("Nifti1Header", 348), 540: ("Nifti2Header", 540)}


def _nifti(start: bytes) -> _Header:
    import nibabel

    sizes = (int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big"))
    size = next((n for n in sizes if n in _NIFTI), 0)
    if size == 0 or len(start) < size:
        raise InvalidInput("it is no NIfTI, NRRD or MetaImage volume")
    name, length = _NIFTI[size]
    try:
        header = getattr(nibabel, name)(start[:length], check=False)
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype = header.get_data_dtype()
        slope, intercept = header.get_slope_inter()
        affine = np.diag((-1.0, -1.0, 1.0, 1.0)) @ header.get_best_affine()
        offset = int(header.get_data_offset())
        single = bytes(header["magic"].item())[:2] == b"n+"
    except Exception as error:  # noqa: BLE001  nibabel raises HeaderDataError, ValueError, KeyError ... on bad values
        raise InvalidInput(f"the NIfTI header is damaged ({type(error).__name__})") from None
    if not single:
        raise UnsupportedDicom("NIfTI in two files (.hdr and .img) is not supported; convert it to .nii")
    if offset < length or offset > _MAX_HEADER:
        raise InvalidInput(f"the NIfTI data start at byte {offset}; {length} to {_MAX_HEADER} was expected")
    return _Header(_three(shape), dtype, offset, affine, *_scale(slope, intercept))


def _scale(slope: Any, intercept: Any) -> tuple[float, float]:
    """Return slope and intercept; (1, 0) where the header has none."""
    sound = slope is not None and np.isfinite(slope) and slope != 0
    return (float(slope), float(intercept or 0.0)) if sound else (1.0, 0.0)


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3:
        raise UnsupportedDicom(f"the volume has the shape {list(shape)}; one with three axes was expected")
    return shape[0], shape[1], shape[2]


_TO_LPS = {"left-posterior-superior": (1, 1, 1), "right-anterior-superior": (-1, -1, 1),
           "left-anterior-superior": (1, -1, 1)}  # fmt: skip
_TO_LPS |= {"".join(word[0] for word in k.split("-")): v for k, v in tuple(_TO_LPS.items())}


def _nrrd(file: BinaryIO) -> tuple[_Header, BinaryIO]:
    import nrrd

    try:
        fields = nrrd.read_header(_Lines(file))
        if "data file" in fields or "datafile" in fields:
            raise UnsupportedDicom("an NRRD header with its data in another file is not supported; join them")
        kind = nrrd.reader._determine_datatype(fields)
        shape = tuple(int(n) for n in fields["sizes"])
    except (CannotRead, ResourceLimit, UnsupportedDicom):
        raise
    except Exception as error:  # noqa: BLE001  pynrrd raises NRRDError, KeyError, ValueError, UnicodeError ...
        raise InvalidInput(f"the NRRD header is damaged ({type(error).__name__})") from None
    encoding = str(fields.get("encoding", "")).lower()
    if encoding not in ("raw", "gzip", "gz") or fields.get("line skip") or fields.get("byte skip"):
        raise UnsupportedDicom(f"NRRD encoding {encoding[:16]!r} is not supported; raw and gzip without skips are")
    space = str(fields.get("space", "")).strip().lower()
    directions, origin = fields.get("space directions"), fields.get("space origin")
    if space not in _TO_LPS or np.shape(directions) != (3, 3) or np.shape(origin) != (3,):
        raise UnsupportedDicom("the NRRD volume does not say where it lies in the patient (space, directions, origin)")
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.asarray(directions, float).T, np.asarray(origin, float)
    affine = np.diag((*_TO_LPS[space], 1)) @ affine
    gzipped = encoding != "raw"
    offset = 0 if gzipped else file.tell()
    header = _Header(_three(shape), np.dtype(kind), offset, affine, gzipped=gzipped)
    return header, (gzip.GzipFile(fileobj=file) if gzipped else file)  # type: ignore[return-value]


def _meta(file: BinaryIO, name: str) -> tuple[_Header, BinaryIO, str]:
    """Return the header of a MetaImage, the stream of its data, and the file that this is in."""
    told = read_meta(file)
    data, offset = name, told.offset
    shape = _three(told.shape)
    stream = file
    if told.data_file:
        data = os.path.join(os.path.dirname(name), told.data_file)
        if os.path.islink(data) or not os.path.isfile(data):
            raise CannotRead("the file with the voxels, which the header names, is not beside it")
        stream = open(data, "rb")  # noqa: SIM115 (closed in _open)
    if offset < 0:
        offset = max(os.path.getsize(data) - math.prod(shape) * told.dtype.itemsize, 0)
    if not told.compressed:
        return _Header(shape, told.dtype, offset, told.affine), stream, data
    return _Header(shape, told.dtype, 0, told.affine, gzipped=True), _Deflated(stream), data  # type: ignore[return-value]


class _Deflated:
    """What a zlib or gzip stream holds, from where a file is, never more at a time than is asked for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._stream = file, zlib.decompressobj(zlib.MAX_WBITS + 32)

    def __enter__(self) -> _Deflated:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        while not self._stream.eof:
            packed = self._stream.unconsumed_tail or self._file.read(1 << 16)
            if not packed:
                raise EOFError
            if part := self._stream.decompress(packed, size):
                return part
        return b""


class _Lines:
    """The lines of a text header, of limited length together, for a parser that iterates over its file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, _MAX_HEADER

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> bytes:
        line = self._file.readline(self._left)
        self._left -= len(line)
        if not line:
            raise CannotRead("the file is truncated: it ends inside its header")
        if self._left <= 0:
            raise ResourceLimit(f"the header has more than {_MAX_HEADER >> 20} MiB")
        return line

    readline = __next__


# --- orientation ------------------------------------------------------------------------------------------------------


def _turned(data: Array, affine: npt.NDArray[np.float64]) -> tuple[Array, npt.NDArray[np.float64]]:
    """Return (data as [columns, rows, slices], its affine): axes exchanged and turned round, nothing resampled."""
    nearest = _nearest_axes(affine)  # voxel axis -> patient axis
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    thickest = int(lengths.argmax())
    others = np.delete(lengths, thickest)
    across = thickest if lengths[thickest] >= _THICK * others.max() else nearest.index(2)
    along_row, down_column = _SHOWN[nearest[across]]
    order = (nearest.index(along_row), nearest.index(down_column), across)
    data, affine = data.transpose(order), affine[:, (*order, 3)].copy()
    for axis, patient in enumerate((along_row, down_column, nearest[across])):
        wanted = -1.0 if axis == 1 and patient == _DOWN_IS_FEET else 1.0
        if affine[patient, axis] * wanted < 0:
            affine[:3, 3] += affine[:3, axis] * (data.shape[axis] - 1)
            affine[:3, axis] *= -1
            data = np.flip(data, axis)
    return data, affine


def _nearest_axes(affine: npt.NDArray[np.float64]) -> list[int]:
    """Return the patient axis (0 left, 1 back, 2 head) of each voxel axis, each given once, the clearest first."""
    cosines = np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    nearest = [-1, -1, -1]
    for _ in range(3):
        patient, voxel = np.unravel_index(int(cosines.argmax()), (3, 3))
        nearest[int(voxel)] = int(patient)
        cosines[patient, :] = cosines[:, voxel] = -1
    return nearest


def _places(affine: npt.NDArray[np.float64], rows: int, columns: int, count: int) -> Iterator[Place]:
    across, down = (float(np.linalg.norm(affine[:3, axis])) for axis in (0, 1))
    row, column = affine[:3, 0] / across, affine[:3, 1] / down
    cosines = tuple(float(v) for v in (*row, *column))
    for index in range(count):
        x, y, z = affine[:3, 3] + index * affine[:3, 2]
        position: Triple = (float(x), float(y), float(z))
        yield Place(rows, columns, (down, across), cosines, position)  # type: ignore[arg-type]


def _spread(count: int, wanted: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, count - 1, min(wanted, count)).round()})


def _words(modality: str) -> str:
    return "CT in HU" if modality == "CT" else "no CT (no value is as low as air)"
