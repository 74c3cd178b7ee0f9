"""What kind of file is this? Decided from its first bytes, before anything is parsed.

Policy for DICOM without the "DICM" mark: accepted if the file starts with a data element of group 0002 or 0008 (little
or big endian, with a valid VR or an implicit length that fits the file). Everything else is not DICOM.
"""

from __future__ import annotations

import os
import stat
from typing import Literal

from edgemed.dicom.codestream import JPEG_START, PNG_START, TIFF_STARTS
from edgemed.errors import CannotRead, InvalidInput, NoInput

Kind = Literal["dicom", "bare-dicom", "picture"]

_VRS = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
)
_KNOWN = (
    (b"\x1f\x8b", "a gzip file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"%PDF", "a PDF"),
    (b"BM", "a BMP picture"),
    (b"GIF8", "a GIF picture"),
    (b"NRRD", "an NRRD volume"),
    (b"ObjectType = Image", "a MetaImage volume"),
    (b"\x5c\x01\x00\x00", "a NIfTI volume"),
)
_PROGRAMS = (
    b"MZ", b"\x7fELF", b"#!", b"\xca\xfe\xba\xbe",
    b"\xfe\xed\xfa\xce", b"\xfe\xed\xfa\xcf", b"\xce\xfa\xed\xfe", b"\xcf\xfa\xed\xfe",
)  # fmt: skip
"""Windows, Linux, a script; macOS for several processors, and for one in either byte order."""


def sniff(path: str) -> Kind:
    """Return the kind of the file at `path`.

    Raises CannotRead (20) if it is missing or may not be read, NoInput (21) for a folder or an empty file, InvalidInput
    (22) if it is not a plain file, neither DICOM nor a PNG, JPEG or TIFF picture, or a program as well as DICOM (any
    128 bytes may precede "DICM": CVE-2019-11687).
    """
    try:
        facts = os.stat(path)
        if stat.S_ISDIR(facts.st_mode):
            raise NoInput(f"{path} is a folder; pass the files in it, for example {os.path.join(path, '*.dcm')}")
        if not stat.S_ISREG(facts.st_mode):
            raise InvalidInput(f"{path} is not a plain file; a DICOM, PNG, JPEG or TIFF file was expected")
        if facts.st_size == 0:
            raise NoInput(f"{path} is empty; a DICOM, PNG, JPEG or TIFF file was expected")
        with open(path, "rb") as file:
            head = file.read(132)
    except FileNotFoundError:
        raise CannotRead(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its name is not valid"
        raise CannotRead(f"{path} cannot be opened: {reason}") from None
    kind = kind_of(head, facts.st_size)
    if kind is None:
        looks = next((f" (it looks like {what})" for magic, what in _KNOWN if head.startswith(magic)), "")
        raise InvalidInput(f"{path} is not a DICOM file or a PNG, JPEG or TIFF picture{looks}")
    if kind == "dicom" and head.startswith(_PROGRAMS):
        raise InvalidInput(f"{path} is a program as well as a DICOM file: its preamble starts like one; not opened")
    return kind


def kind_of(head: bytes, size: int) -> Kind | None:
    """Return the kind of a file of `size` bytes that starts with `head` (132 bytes or all of it), None if unknown."""
    if head[128:132] == b"DICM":
        return "dicom"
    if head.startswith((PNG_START, JPEG_START, *TIFF_STARTS)):
        return "picture"
    if head[:4] == b"DICM":
        return "bare-dicom"
    for order in ("little", "big"):
        group = int.from_bytes(head[0:2], order)
        if len(head) >= 8 and group in (0x0002, 0x0008):
            explicit = head[4:6] in _VRS
            implicit = order == "little" and 0 < int.from_bytes(head[4:8], "little") <= size - 8
            if explicit or implicit:
                return "bare-dicom"
    return None
