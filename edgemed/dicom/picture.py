"""PNG, JPEG and TIFF pictures -> what a Scan holds: modality OT, no spacing, EXIF orientation applied.

Grey pictures become float32 with the window over their whole range (8 bit: 127.5, 255; 16 bit: 32767.5, 65535; 32 bit
and floating point: that of their values); others uint8 RGB, transparency over black. A page of a TIFF is a frame. The
size is read from the header and checked before Pillow decodes anything.

Does not cover TIFF with 16 bits for each colour, and tiles of slides in pyramids beyond the limit of one picture.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from edgemed.core import Window
from edgemed.dicom.codestream import PNG_START, TIFF_STARTS, FrameSize, jpeg_size, png_size
from edgemed.dicom.decode import check_size
from edgemed.dicom.limits import Limits
from edgemed.dicom.values import Shown
from edgemed.errors import CannotRead, EdgemedError, InvalidInput, ResourceLimit, UnsupportedDicom

if TYPE_CHECKING:
    from PIL import Image

_HEAD = 16 << 20  # an EXIF block and a colour profile may come before the JPEG frame header
_BITS = {"I": 32, "F": 32}
_MAX_PAGES = 10_000
"""Of a TIFF; each is a jump in the file."""


def read_picture(path: str, limits: Limits, page: int = 0) -> tuple[Shown, int]:
    """Return the picture at `path`, of a TIFF page `page` (from 0), and how many there are.

    Raises CannotRead if it is truncated, InvalidInput if it is damaged or has no such page, UnsupportedDicom for a TIFF
    of a kind that Pillow cannot read, ResourceLimit if its header asks for too much.
    """
    from PIL import Image, UnidentifiedImageError

    packed = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    tiff = head.startswith(TIFF_STARTS)
    if not tiff:
        _check(png_size(head) if head.startswith(PNG_START) else jpeg_size(head), packed, limits)
        if page:
            raise InvalidInput(f"frame {page} was asked for; a picture has one (0)")
    Image.MAX_IMAGE_PIXELS = None  # the limit is `limits`, applied to the header that Pillow has read or is about to
    try:
        # A file, not its name: Pillow 13 maps a named one, and then turns uncompressed TIFF after Orientation wrongly.
        with open(path, "rb") as file, Image.open(file, formats=("TIFF",) if tiff else ("PNG", "JPEG")) as image:
            pages = 1
            if tiff:
                pages = _pages(image, page)
                bits = _BITS.get(image.mode, 16 if image.mode.startswith("I;16") else 8)
                _check(FrameSize(image.height, image.width, len(image.getbands()), bits), packed, limits)
            image.load()
            return _shown(image), pages
    except (MemoryError, EdgemedError):
        raise
    except UnidentifiedImageError:
        raise UnsupportedDicom("the TIFF is damaged, or of a kind that is not supported (16 bits a colour)") from None
    except Exception as error:  # noqa: BLE001  Pillow raises OSError, SyntaxError, ValueError, struct.error ...
        if "too large" in str(error):  # of a text or a colour profile, which Pillow unpacks up to a limit
            raise ResourceLimit("the picture's notes unpack to too much") from None
        if "truncated" in str(error):
            raise CannotRead("the picture is truncated") from None
        raise InvalidInput(f"the picture cannot be decoded ({type(error).__name__})") from None


def _check(size: FrameSize, packed: int, limits: Limits) -> None:
    check_size(size, limits)
    unpacked = size.rows * size.columns * size.samples * max(size.bits, 8) // 8
    if unpacked > limits.expansion_floor_bytes and unpacked > limits.max_expansion * packed:
        raise ResourceLimit(f"the picture's {packed} bytes ask for {unpacked >> 20} MiB")


def _pages(image: Image.Image, page: int) -> int:
    """Go to a page of a TIFF and return how many there are; nothing is decoded."""
    count = 0
    try:
        while count <= _MAX_PAGES:
            image.seek(count)
            count += 1
    except EOFError:
        pass
    if count > _MAX_PAGES:
        raise ResourceLimit(f"the TIFF has more than {_MAX_PAGES} pages")
    if page >= count:
        raise InvalidInput(f"frame {page} was asked for; the picture has {count} (0 to {count - 1})")
    image.seek(page)
    return count


def _shown(image: Image.Image) -> Shown:
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("1", "L", "I", "F") or upright.mode.startswith("I;16"):
        # A PNG of 16 bits may be opened as "I".
        wide = upright.mode in ("I", "F") and image.format == "TIFF"
        deep = upright.mode == "I" or upright.mode.startswith("I;16")
        grey = np.asarray(upright.convert("L") if upright.mode == "1" else upright).astype(np.float32)
        if wide:
            grey = np.nan_to_num(grey, nan=0.0, posinf=0.0, neginf=0.0)
            low, high = float(grey.min()), float(grey.max())
            return Shown(grey, Window((low + high) / 2, max(high - low, 1e-6)))
        top = 65535.0 if deep else 255.0
        return Shown(grey, Window(top / 2, top))
    if "A" in upright.getbands() or "transparency" in upright.info:
        over = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", over.size, (0, 0, 0, 255)), over)
    return Shown(np.array(upright.convert("RGB")), None)
