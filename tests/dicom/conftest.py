"""Phantoms: small DICOM files written by the tests, and one decoding child for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgemed.dicom import Reader

Write = Callable[..., Path]


@pytest.fixture(scope="session")
def reader() -> Iterator[Reader]:
    with Reader() as shared:
        yield shared


@pytest.fixture
def write_dicom(tmp_path: Path) -> Write:
    """Return write(pixels, **elements) -> path.

    pixels: [rows, columns], [frames, rows, columns] with frames=True, or [rows, columns, 3], any integer type, written
    as they are; or None for no pixels. encoded: compressed frames to encapsulate instead. syntax: transfer syntax UID.
    Every other keyword is an element; None removes it.
    """
    return lambda *args, **kwargs: _write(tmp_path, *args, **kwargs)


@pytest.fixture(scope="session")
def write_phantom() -> Write:
    """Return write(folder, pixels, **elements) -> path: `write_dicom` for fixtures that live longer than a test."""
    return _write


def _write(
    folder: Path,
    pixels: np.ndarray[Any, Any] | None,
    *,
    name: str = "phantom.dcm",
    syntax: str = "1.2.840.10008.1.2.1",
    frames: bool = False,
    encoded: Sequence[bytes] = (),
    preamble: bool = True,
    **elements: Any,
) -> Path:
    from pydicom import dcmwrite
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import UID

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(syntax)
    meta.MediaStorageSOPClassUID = UID(elements.get("SOPClassUID") or "1.2.840.10008.5.1.4.1.1.7")
    meta.MediaStorageSOPInstanceUID = UID("1.2.3.4")
    ds = Dataset()
    ds.file_meta = meta
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = meta.MediaStorageSOPClassUID, "1.2.3.4", "OT"
    ds.PatientName, ds.PatientID = "Planted^Name", "PLANTED-ID"
    little = syntax != "1.2.840.10008.1.2.2"
    if pixels is not None:
        shape = pixels.shape[1:] if frames else pixels.shape
        colour = len(shape) == 3
        if frames:
            ds.NumberOfFrames = pixels.shape[0]
        ds.Rows, ds.Columns, ds.SamplesPerPixel = shape[0], shape[1], 3 if colour else 1
        ds.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
        if colour:
            ds.PlanarConfiguration = 0
        ds.BitsAllocated = ds.BitsStored = 8 * pixels.dtype.itemsize
        ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == "i")
        raw = pixels.astype(pixels.dtype.newbyteorder("<" if little else ">")).tobytes()
        ds.PixelData = encapsulate(list(encoded)) if encoded else raw + b"\0" * (len(raw) % 2)
        ds["PixelData"].VR = "OW" if ds.BitsAllocated > 8 else "OB"
        if encoded:
            ds["PixelData"].is_undefined_length = True
            ds["PixelData"].VR = "OB"
    for keyword, value in elements.items():
        if value is None:
            if keyword in ds:
                del ds[keyword]
        else:
            setattr(ds, keyword, value)
    if "BitsStored" in elements and "HighBit" not in elements:
        ds.HighBit = ds.BitsStored - 1
    path = folder / name
    implicit = syntax == "1.2.840.10008.1.2"
    dcmwrite(path, ds, implicit_vr=implicit, little_endian=little, enforce_file_format=True)
    if not preamble:
        path.write_bytes(path.read_bytes()[132:])
    return path
