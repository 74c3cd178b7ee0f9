"""The font that ships with the package, edgemed Sans: Latin, Greek and every character of GB 2312 (SIL OFL 1.1).

Made by packaging/make_font.py. Drawn with Pillow's basic layout, so that text looks the same on every machine.
"""

from __future__ import annotations

import io
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

FILE = "fonts/edgemed-sans.otf"


@cache
def open_font(size_px: int) -> FreeTypeFont:
    """Return the font at `size_px` pixels per em; a character it lacks is drawn as a crossed box."""
    from PIL import ImageFont

    return ImageFont.truetype(io.BytesIO(_bytes()), size_px, layout_engine=ImageFont.Layout.BASIC)


@cache
def _bytes() -> bytes:
    return resources.files("edgemed.report").joinpath(FILE).read_bytes()
