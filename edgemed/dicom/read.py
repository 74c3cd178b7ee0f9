"""One frame of one file -> a Scan, in this process. `worker` runs it behind limits; nothing else should call it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edgemed.core import Scan, Window
from edgemed.dicom.limits import Limits
from edgemed.dicom.sniff import sniff

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_UID = re.compile(r"[0-9.]{1,64}\Z")
_MODALITY = re.compile(r"[A-Z0-9_ ]{1,16}\Z")


def read_here(path: str, frame: int, window: Window | None, limits: Limits, skip: Sequence[str] = ()) -> Scan:
    """Return frame `frame` of `path`, decoded by none of `skip`. Raises the errors listed in `edgemed.dicom`."""
    if sniff(path) == "picture":
        return _picture(path, frame, window, limits)
    return _dicom(path, frame, window, limits, skip)


def _picture(path: str, frame: int, window: Window | None, limits: Limits) -> Scan:
    from edgemed.dicom.picture import read_picture

    shown, pages = read_picture(path, limits, frame)
    window = (window or shown.window) if shown.window else None
    return Scan(shown.pixels[None], "OT", window=window, first_frame=frame, total_frames=pages)


def _dicom(path: str, frame: int, window: Window | None, limits: Limits, skip: Sequence[str]) -> Scan:
    from edgemed.dicom.decode import read_stored
    from edgemed.dicom.header import read_header
    from edgemed.dicom.values import pixel_spacing, to_shown

    with open(path, "rb") as file:
        header = read_header(file, limits)
        stored, photometric = read_stored(header, frame, limits, skip)
        shown = to_shown(stored, photometric, header, frame, window)
        uids = (_uid(header.ds.get(k)) for k in ("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"))
        series, study, reference = uids
        modality = str(header.ds.get("Modality") or "").strip().upper()
        return Scan(
            shown.pixels[None],
            modality if _MODALITY.match(modality) else "OT",
            window=shown.window,
            pixel_spacing_mm=pixel_spacing(header, frame),
            sop_instance_uid=_uid(header.sop_instance_uid),
            series_instance_uid=series,
            study_instance_uid=study,
            frame_of_reference_uid=reference,
            first_frame=frame,
            total_frames=header.frames,
            warnings=tuple(_warnings(header.ds)),
        )


def _warnings(ds: Dataset) -> Iterator[str]:
    """Yield the keys of `SCAN_WARNINGS` that the header gives a reason for."""
    from edgemed.dicom.header import OVERLAYS

    if any(tag in ds for tag in OVERLAYS):
        yield "overlay"
    if str(ds.get("BurnedInAnnotation") or "").strip().upper() == "YES":
        yield "burned in"
    if "ShutterShape" in ds:
        yield "shutter"


def _uid(value: object) -> str | None:
    """Return a UID that is one, else None: free text in a UID element must not travel on."""
    text = str(value or "").strip().strip("\0")
    return text if _UID.match(text) else None
