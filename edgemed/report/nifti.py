"""Masks as a label volume, NIfTI or NRRD, with the table of its labels, placed in patient millimetres.

Images that do not lie evenly one behind the other, or do not tell where they lie, become one file each.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from edgemed.files import Write
from edgemed.report.dicom_object import WARNING, ResultOptions, library
from edgemed.report.dicom_source import Group, Image
from edgemed.report.findings import Finding
from edgemed.report.style import PALETTE

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
UNKNOWN, SCANNER = 0, 1
"""NIfTI's code of the space: not known, that of the scanner."""


def to_volumes(group: Group, findings: Sequence[Finding], options: ResultOptions) -> Iterator[tuple[str, Write]]:
    """Yield (end of the file name, what writes it): the volumes, a slice in memory at a time, then the label table.

    Findings that overlap are told to `options.tell`; the smaller one is on top.
    """
    masked = tuple(finding for finding in findings if finding.masked_images)
    if group.first.rows == 0:
        return
    table = label_table(masked)
    stacks = [group.images] if affine_of(group.images) is not None else [(image,) for image in group.images]
    by_size = sorted(enumerate(masked, 1), key=lambda pair: -_pixels(pair[1]))
    head_of, end = (_nrrd_head, "seg.nrrd") if options.nrrd else (_nifti_head, "nii.gz")
    for number, images in enumerate(stacks, 1):
        dtype = np.dtype(np.uint8 if len(masked) < 256 else np.uint16)
        head = head_of((images[0].columns, images[0].rows, len(images)), dtype, images, table)
        yield (
            f"labels.{end}" if len(stacks) == 1 else f"labels-{number}.{end}",
            partial(_write, head, _slices(images, by_size, dtype, options), packed=not options.nrrd),
        )
    yield "labels.json", lambda stream: stream.write(json.dumps(table, ensure_ascii=False, indent=1).encode() + b"\n")


def label_table(masked: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return a row for each label value, from 1 on."""
    return [
        {
            "value": value,
            "key": finding.concept.key,
            "en": finding.concept.en,
            "zh": finding.concept.zh,
            "category": finding.concept.category.value,
            "type": finding.concept.type.value,
            "meaning": finding.concept.type.meaning,
            "side": None if finding.concept.side is None else finding.concept.side.value,
            "site": None if finding.concept.site is None else finding.concept.site.value,
            "rgb": list(PALETTE[(finding.number - 1) % len(PALETTE)]),
        }
        for value, finding in enumerate(masked, 1)
    ]


def affine_of(images: Sequence[Image]) -> npt.NDArray[np.float64] | None:
    """Return the map (column, row, slice) -> patient mm, LPS, [4, 4]; None if the images are no even stack.

    One image is as thick as it says, 1 mm where it does not. Without a place (and for one image only) the first pixel
    is at the origin and the axes are those of the image; without a spacing, pixels are 1 by 1.
    """
    first = images[0]
    row_mm, column_mm = first.spacing_mm or (1.0, 1.0)
    affine = np.eye(4)
    if first.plane is None:
        affine[:3, :3] = np.diag([column_mm, row_mm, first.thickness_mm or 1.0])
        return affine if len(images) == 1 else None
    step = first.plane.normal * (first.thickness_mm or 1.0)
    if len(images) > 1:
        places = np.array([image.plane.position for image in images if image.plane is not None])
        step = (places[-1] - places[0]) / (len(images) - 1)
        even = places[0] + np.arange(len(places))[:, None] * step
        length = float(np.linalg.norm(step))
        # 1 % of a step, at least 0.01 mm: headers round positions.
        if len(places) != len(images) or not length or np.abs(places - even).max() > max(0.01 * length, 0.01):
            return None
    affine[:3, 0] = first.plane.along_row * column_mm
    affine[:3, 1] = first.plane.down_column * row_mm
    affine[:3, 2] = step
    affine[:3, 3] = first.plane.position
    return affine


def _slices(
    images: Sequence[Image], by_size: Sequence[tuple[int, Finding]], dtype: np.dtype[Any], options: ResultOptions
) -> Iterator[npt.NDArray[Any]]:
    """Yield the label values of each slice [rows, columns]."""
    overlap = False
    for image in images:
        labels = np.zeros((image.rows, image.columns), dtype)
        for value, finding in by_size:
            mask = finding.mask(image)
            if mask is not None:
                overlap |= bool(labels[mask].any())
                labels[mask] = value
        yield labels
    if overlap:
        options.tell("findings overlap; in the label volume the smaller one is on top")


def _pixels(finding: Finding) -> int:
    masks = (finding.mask(image) for image in finding.masked_images)
    return sum(int(np.count_nonzero(mask)) for mask in masks if mask is not None)


def _write(head: bytes, slices: Iterable[npt.NDArray[Any]], stream: IO[bytes], *, packed: bool) -> None:
    """Write a header and the label values as gzip. packed: the header is inside of it, too, as in .nii.gz."""
    pack = zlib.compressobj(9, wbits=zlib.MAX_WBITS | 16)
    stream.write(pack.compress(head) if packed else head)
    for labels in slices:
        stream.write(pack.compress(labels.astype(labels.dtype.newbyteorder("<")).tobytes()))
    stream.write(pack.flush())


Shape = tuple[int, int, int]


def _nifti_head(shape: Shape, dtype: np.dtype[Any], images: Sequence[Image], table: Sequence[dict[str, Any]]) -> bytes:
    """Return all that is before the label values [columns, rows, slices] in a .nii file."""
    nibabel = library("nibabel")
    affine = affine_of(images)
    assert affine is not None
    image = nibabel.Nifti1Image(np.broadcast_to(np.zeros((), dtype), shape), LPS_TO_RAS @ affine)  # of no size
    code = UNKNOWN if images[0].plane is None else SCANNER
    image.set_sform(image.affine, code)
    # A quaternion cannot hold the shear of a tilted gantry: such a file has the sform alone.
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    sheared = np.abs(axes.T @ axes - np.eye(3)).max() > 1e-4
    image.set_qform(image.affine, UNKNOWN if sheared else code)
    image.header.set_xyzt_units("mm" if images[0].spacing_mm else "unknown")
    image.header["descrip"] = WARNING["en"].encode()
    image.header.set_slope_inter(1, 0)
    note = json.dumps({"notice": WARNING["en"], "labels": table}, ensure_ascii=False).encode()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", note))
    stream = io.BytesIO()
    image.header.write_to(stream)
    return stream.getvalue()


def _nrrd_head(shape: Shape, dtype: np.dtype[Any], images: Sequence[Image], table: Sequence[dict[str, Any]]) -> bytes:
    """Return the header of a .seg.nrrd as 3D Slicer reads it: the segments and their colours are in it."""
    nrrd = library("nrrd")
    affine = affine_of(images)
    assert affine is not None
    header: dict[str, Any] = {
        "space": "left-posterior-superior",
        "space directions": affine[:3, :3].T,
        "space origin": affine[:3, 3],
        "kinds": ["domain"] * 3,
        "encoding": "gzip",
        "content": WARNING["en"],
    }
    for index, row in enumerate(table):
        header |= {
            f"Segment{index}_ID": _ascii(row["key"], row["value"]),
            f"Segment{index}_Name": _ascii(row["en"], row["value"]),
            f"Segment{index}_NameAutoGenerated": "0",
            f"Segment{index}_LabelValue": str(row["value"]),
            f"Segment{index}_Layer": "0",
            f"Segment{index}_Color": " ".join(f"{c / 255:.4f}" for c in row["rgb"]),
            f"Segment{index}_Tags": f"SNOMED:{row['type']}|side:{row['side'] or 'none'}|",
        }
    # pynrrd writes header and values in one: those of a single voxel are cut off, and its sizes made right.
    stream = io.BytesIO()
    nrrd.write(stream, np.zeros((1, 1, 1), dtype), header)
    head = stream.getvalue().partition(b"\n\n")[0] + b"\n\n"
    return head.replace(b"\nsizes: 1 1 1\n", b"\nsizes: %d %d %d\n" % shape, 1)


def _ascii(text: str, value: int) -> str:
    """Return `text`, or where an NRRD header cannot hold it a name that leads to it in the label table."""
    return text if text.isascii() else f"label {value}"
