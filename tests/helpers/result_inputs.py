"""Real DICOM files, made series, and answers about them, for the tests of results; and the outside validators."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread, dcmwrite
from pydicom.data import get_charset_files, get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset

from edgemed.core import Answer, Mask, Prompt, Provenance, Region
from edgemed.geometry import box_of
from edgemed.report.results import Analysed, ResultOptions

REAL = {
    "chest X-ray, MONOCHROME1": "RG1_UNCR.dcm",
    "CT head, no frame of reference": "693_UNCR.dcm",
    "CT, negative column direction": "explicit_VR-UN.dcm",
    "CT spine, no series and study UID": "bad_sequence.dcm",
    "enhanced CT": "eCT_Supplemental.dcm",
    "enhanced MR without places": "emri_small.dcm",
    "MR, oblique": "MR2_UNCR.dcm",
    "MR with overlay planes": "MR-SIEMENS-DICOM-WithOverlays.dcm",
    "ultrasound, RGB": "US1_UNCR.dcm",
    "ultrasound, JPEG 2000 YBR": "US1_J2KR.dcm",
    "ultrasound, 120 frames": "color3d_jpeg_baseline.dcm",
    "ultrasound, palette": "OBXXXX1A.dcm",
    "bone scan": "JPEG-LL.dcm",
    "CT small": "CT_small.dcm",
    "MR, big endian": "MR_small_bigendian.dcm",
    "CT, tilted": "J2K_pixelrep_mismatch.dcm",
    "Chinese name, GB18030": "chrX2.dcm",
}
"""What is special about it -> file of pydicom or pydicom-data."""

PROVENANCE = Provenance("0.1.0", "native", "nano", "ab" * 32, "onnxruntime", "CPU", {}, "auto", {}, {})


def real_file(name: str) -> Path:
    """Return the path of a file of REAL, or skip where pydicom-data is not installed."""
    found = get_charset_files(name) if name.startswith("chr") else [get_testdata_file(name, download=False)]
    if not found or found[0] is None:
        pytest.skip(f"{name} is not there; install pydicom-data")
    return Path(found[0])


def ellipse(rows: int, columns: int, x: float, y: float, width: float, height: float) -> Mask:
    """Return a mask; centre and half axes are shares of the image."""
    down, across = np.mgrid[:rows, :columns]
    inside = ((across + 0.5 - columns * x) / (columns * width)) ** 2 + ((down + 0.5 - rows * y) / (rows * height)) ** 2
    return np.asarray(inside < 1)


def masked(label: str, mask: Mask, frame: int = 0) -> Region:
    """Return a region with a mask and the box around it."""
    box = box_of(mask)
    assert box is not None
    return Region(label, box, frame, mask, 0.9)


def answer(text: str, regions: Sequence[Region]) -> Answer:
    """Return an answer of a bundle that is not there."""
    return Answer(text, text, tuple(regions), PROVENANCE)


def analyse(path: Path, *, frames: Sequence[int] | None = None, text: str = "肝脏可见。") -> list[Analysed]:
    """Return answers about one file: two masks, one box, on its first and its middle frame."""
    ds = dcmread(path, stop_before_pixels=True, force=True)
    rows, columns, count = int(ds.Rows), int(ds.Columns), int(ds.get("NumberOfFrames") or 1)
    liver, kidney = ellipse(rows, columns, 0.4, 0.5, 0.2, 0.15), ellipse(rows, columns, 0.8, 0.3, 0.1, 0.1)
    made = []
    for frame in sorted({0, count // 2}) if frames is None else frames:
        box = (0.5, 1.0, columns * 0.25, rows * 0.25)
        regions = (masked("liver", liver, frame), masked("左肾", kidney, frame), Region("polyp", box, frame))
        made.append(Analysed(path, frame, answer(text, regions)))
    return made


def options(**changes: Any) -> ResultOptions:
    """Return options that collect notes in a list under `.tell.__self__`."""
    notes: list[str] = []
    return ResultOptions(
        **{"prompt": Prompt("Where is the liver?"), "notice": "nano is a demo.", "tell": notes.append, **changes}
    )


def tool(name: str) -> str:
    """Return the path of a validator, from EDGEMED_TEST_TOOLS (folders) or PATH; skips the test if it is not there."""
    folders = os.environ.get("EDGEMED_TEST_TOOLS", "").split(os.pathsep)
    for folder in folders:
        if folder and (Path(folder) / name).is_file():
            return str(Path(folder) / name)
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not there; install dicom3tools, dcmtk and dcmqi, or name them in EDGEMED_TEST_TOOLS")
    return found


def run_tool(name: str, *arguments: object) -> str:
    """Return what a tool prints on both streams. Its exit code is not read: dciodvfy's tells nothing."""
    done = subprocess.run([tool(name), *map(str, arguments)], capture_output=True, timeout=120, check=False)
    return (done.stdout + done.stderr).decode("utf-8", "replace")


def validator_errors(path: Path) -> list[str]:
    """Return the errors that dciodvfy reports."""
    return [line for line in run_tool("dciodvfy", path).splitlines() if line.startswith("Error")]


def write_series(
    folder: Path,
    count: int,
    *,
    rows: int = 16,
    columns: int = 12,
    spacing: tuple[float, float] = (0.8, 0.5),
    step: Sequence[float] = (0.0, 0.0, 2.5),
    first: Sequence[float] = (-30.0, 12.5, 7.0),
    orientation: Sequence[float] = (1, 0, 0, 0, 1, 0),
    **elements: Any,
) -> list[Path]:
    """Write a CT series of `count` slices, each `step` mm from the last, and return the paths in that order."""
    paths = []
    for index in range(count):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
        ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", f"1.2.3.4.{index + 1}"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3", "1.2.3.5", "1.2.3.6"
        ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Doe^Jane", "42", "19700101", "F"
        ds.StudyDate, ds.StudyTime, ds.AccessionNumber, ds.StudyID = "20260101", "120000", "A1", "S1"
        ds.ReferringPhysicianName, ds.Modality, ds.InstanceNumber = "Who^Doctor", "CT", str(index + 1)
        ds.InstitutionName, ds.StationName, ds.ProtocolName = "Hidden Hospital", "CT7", "secret"
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = rows, columns, 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.RescaleSlope, ds.RescaleIntercept, ds.WindowCenter, ds.WindowWidth = "1", "-1024", "40", "400"
        ds.PixelSpacing = [f"{s:.12g}" for s in spacing]
        ds.SliceThickness = f"{float(np.linalg.norm(step)):.10g}"
        ds.ImageOrientationPatient = [f"{v:.10f}"[:16] for v in orientation]
        place = np.array(first, float) + index * np.array(step, float)
        ds.ImagePositionPatient = [f"{v:.10f}"[:16] for v in place]
        ds.PixelData = np.arange(rows * columns, dtype="<u2").tobytes()
        for keyword, value in elements.items():
            if value is None:
                ds.pop(keyword, None)
            else:
                setattr(ds, keyword, value)
        paths.append(folder / f"slice{index}.dcm")
        dcmwrite(paths[-1], ds, enforce_file_format=True)
    return paths
