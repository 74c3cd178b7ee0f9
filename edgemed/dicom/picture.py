"""PNG and JPEG pictures -> what a Scan holds: modality OT, no spacing, EXIF orientation applied.

Grey pictures become float32 with the window over their whole range (8 bit: 127.5, 255); others uint8 RGB, transparency
over black. The size is read from the header and checked before Pillow decodes anything.
"""

from __future__ import annotations

import os

import numpy as np

from edgemed.core import Window
from edgemed.dicom.codestream import PNG_START, jpeg_size, png_size
from edgemed.dicom.decode import check_size
from edgemed.dicom.limits import Limits
from edgemed.dicom.values import Shown
from edgemed.errors import CannotRead, InvalidInput, ResourceLimit

_HEAD = 16 << 20  # an EXIF block and a colour profile may come before the JPEG frame header


def read_picture(path: str, limits: Limits) -> Shown:
    """Return the picture at `path`.

    Raises CannotRead if it is truncated, InvalidInput if it is damaged, ResourceLimit if its header asks for too much.
    """
    from PIL import Image, ImageOps

    packed = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    size = png_size(head) if head.startswith(PNG_START) else jpeg_size(head)
    check_size(size, limits)
    unpacked = size.rows * size.columns * size.samples * max(size.bits, 8) // 8
    if unpacked > limits.expansion_floor_bytes and unpacked > limits.max_expansion * packed:
        raise ResourceLimit(f"the picture's {packed} bytes ask for {unpacked >> 20} MiB")
    Image.MAX_IMAGE_PIXELS = None  # the limit above has already been applied, to the header Pillow is about to read
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        if "truncated" in str(error):
            raise CannotRead("the picture is truncated") from None
        raise InvalidInput(f"the picture cannot be decoded ({type(error).__name__})") from None
    if upright.mode in ("1", "L", "I", "F") or upright.mode.startswith("I;16"):
        grey = np.asarray(upright.convert("L") if upright.mode == "1" else upright).astype(np.float32)
        top = 65535.0 if size.bits == 16 else 255.0
        return Shown(grey, Window(top / 2, top))
    if "A" in upright.getbands() or "transparency" in upright.info:
        over = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", over.size, (0, 0, 0, 255)), over)
    return Shown(np.array(upright.convert("RGB")), None)
