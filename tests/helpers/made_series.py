"""Made-up DICOM series: headers as scanners write them around small pictures.

write_series(folder, count=5, spacing=2.0)        five axial slices, uniform
write_slice(folder / "a.dcm", pixels, position=(0, 0, 4), InstanceNumber=3)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SERIES = "1.2.826.0.1.3680043.8.498.1"


def number(value: float) -> str:
    """Return a decimal string of at most 16 letters."""
    return f"{value:.10g}"[:16]


def write_slice(
    path: Path,
    pixels: np.ndarray[Any, Any] | None = None,
    *,
    position: Sequence[float] | None = (0, 0, 0),
    orientation: Sequence[float] | None = AXIAL,
    spacing: Sequence[float] | None = (0.8, 0.5),
    series: str | None = SERIES,
    **elements: Any,
) -> Path:
    """Write one file; every other keyword is an element, None removes it."""
    pixels = np.zeros((6, 8), np.uint16) if pixels is None else pixels
    instance = elements.pop("SOPInstanceUID", f"{SERIES}.{abs(hash((str(path), str(position)))) % 10**12}")
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = UID(elements.get("SOPClassUID", CTImageStorage))
    meta.MediaStorageSOPInstanceUID = UID(instance)
    ds = Dataset()
    ds.file_meta = meta
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, instance
    ds.Modality, ds.PatientName, ds.PatientID = "CT", "Planted^Name", "PLANTED-ID"
    ds.StudyInstanceUID, ds.FrameOfReferenceUID = f"{SERIES}.1", f"{SERIES}.2"
    if series is not None:
        ds.SeriesInstanceUID = series
    if position is not None:
        ds.ImagePositionPatient = [number(v) for v in position]
    if orientation is not None:
        ds.ImageOrientationPatient = [number(v) for v in orientation]
    if spacing is not None:
        ds.PixelSpacing = [number(v) for v in spacing]
    ds.Rows, ds.Columns, ds.SamplesPerPixel = pixels.shape[-2], pixels.shape[-1], 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, 0
    ds.PixelData = pixels.astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    for keyword, value in elements.items():
        if value is not None:
            setattr(ds, keyword, value)
        elif keyword in ds:
            delattr(ds, keyword)
    path.parent.mkdir(parents=True, exist_ok=True)
    dcmwrite(path, ds, enforce_file_format=True)
    return path


def write_series(
    folder: Path,
    count: int = 5,
    spacing: float = 2.0,
    *,
    depths: Iterable[float] | None = None,
    lean: Sequence[float] = (0, 0),
    pixels: Sequence[np.ndarray[Any, Any]] | None = None,
    prefix: str = "s",
    **more: Any,
) -> list[Path]:
    """Write axial slices at `depths`, each moved by `lean` (x, y) mm against the last; named in reverse order."""
    positions = [k * spacing for k in range(count)] if depths is None else list(depths)
    return [
        write_slice(
            folder / f"{prefix}{len(positions) - k:04d}.dcm",
            None if pixels is None else pixels[k],
            position=(k * lean[0], k * lean[1], z),
            InstanceNumber=len(positions) - k,
            **more,
        )
        for k, z in enumerate(positions)
    ]


def write_enhanced(path: Path, frames: Sequence[tuple[float, int]], **elements: Any) -> Path:
    """Write one enhanced MR file with a frame for each (depth in mm, temporal position)."""
    groups = []
    for depth, phase in frames:
        place, content, group = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [0, 0, number(depth)]
        content.TemporalPositionIndex = phase
        group.PlanePositionSequence, group.FrameContentSequence = Items([place]), Items([content])
        groups.append(group)
    measures, plane, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = ["0.8", "0.5"]
    plane.ImageOrientationPatient = list(AXIAL)
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Items([measures]), Items([plane])
    return write_slice(
        path,
        np.zeros((len(frames), 6, 8), np.uint16),
        position=None,
        orientation=None,
        spacing=None,
        SOPClassUID=EnhancedMRImageStorage,
        Modality="MR",
        NumberOfFrames=len(frames),
        SharedFunctionalGroupsSequence=Items([shared]),
        PerFrameFunctionalGroupsSequence=Items(groups),
        **elements,
    )
