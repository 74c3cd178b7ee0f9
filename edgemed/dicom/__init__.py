"""Reading scans: a DICOM file, PNG, JPEG or TIFF -> `Scan`, decoded in a child process within limits.

    scan = read_scan("scan.dcm", frame=0, window="lung")

What a file that cannot be read ends in (class, exit code):

    missing, not readable, input/output error                           CannotRead        20
    truncated: ends inside its header, frame, or picture                CannotRead        20
    a folder; an empty file                                             NoInput           21
    neither DICOM nor PNG, JPEG, TIFF; not a plain file                 InvalidInput      22
    a program as well as DICOM, by its preamble                         InvalidInput      22
    damaged: codestream, palette, tables; required elements missing     InvalidInput      22
    a file on which a decoder crashes                                   InvalidInput      22
    codestream and header disagree on the size; no such frame           InvalidInput      22
    no pixels: SR, RT plan and structures, waveforms, DICOMDIR ...      UnsupportedDicom  85
    transfer syntax, colour space or bit depth not supported            UnsupportedDicom  85
    more pixels, memory, elements, nesting or time than the limits      ResourceLimit     86
    a window that is neither a preset nor CENTER,WIDTH                  EdgemedError       1

Importing this costs nothing beyond NumPy: pydicom, highdicom, Pillow and imagecodecs are imported in the child only.
Messages hold paths, sizes and names from the standard, never the value of an element that could identify a patient.

Series are found by `series`, chosen by `select`, judged by `geometry_verdict`; NIfTI and NRRD come in by `volume_file`.

Does not cover: overlays, shutters, Real World Value Maps, video transfer syntaxes.
"""

from __future__ import annotations

from edgemed.dicom.limits import DEFAULT_LIMITS, Limits
from edgemed.dicom.reader import Reader, read_scan, read_scans
from edgemed.dicom.voi import PRESETS, parse_window

__all__ = ["DEFAULT_LIMITS", "PRESETS", "Limits", "Reader", "parse_window", "read_scan", "read_scans"]
