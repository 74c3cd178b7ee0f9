"""What an overlay is drawn with: colours, sizes, the marks, and the two shapes that image and legend share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemed.core import Box, Mask
from edgemed.report.placement import Rect

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

Colour = tuple[int, int, int]

SHORT_SIDE_PX = 768
"""The shown image is enlarged until its short side has this many pixels; sizes of text and lines go with it."""
PALETTE: tuple[Colour, ...] = (
    (86, 180, 233),  # sky blue
    (230, 159, 0),  # orange
    (0, 190, 140),  # bluish green, brighter than the original (0, 158, 115) to stand on black
    (240, 228, 66),  # yellow
    (213, 94, 0),  # vermilion
    (224, 141, 187),  # reddish purple, brighter than the original (204, 121, 167)
)
ASKED: Colour = (255, 255, 255)
BACKGROUND: Colour = (18, 18, 20)
STRIP: Colour = (58, 44, 10)
STRIP_TEXT: Colour = (255, 222, 140)
TEXT: Colour = (238, 238, 238)
QUIET: Colour = (165, 168, 172)
CASING_ALPHA = 0.55


@dataclass(frozen=True)
class Style:
    """Sizes in shown pixels, all from the short side of the shown image."""

    text: int
    tag: int
    small: int
    line: int
    gap: int
    dash: int

    @staticmethod
    def of(short_side: int) -> Style:
        unit = max(min(short_side, 2048), 480) / SHORT_SIDE_PX
        return Style(*(max(round(n * unit), 1) for n in (20, 17, 16, 2, 6, 9)))


@dataclass(frozen=True, eq=False)
class Mark:
    """One thing to draw: an answered region, or (asked) a place of the prompt. A point is a box without extent."""

    name: str
    details: str
    colour: Colour
    box: Box | None
    mask: Mask | None
    asked: bool

    @property
    def is_point(self) -> bool:
        return self.box is not None and self.box[0] == self.box[2]


def draw_box(draw: ImageDraw, rect: Rect, colour: Colour, thickness: int, dash: int) -> None:
    """Draw the frame of half-open `rect` on its inner side with a dark rim around it; dash 0 is an unbroken line."""
    x0, y0, x1, y1 = rect
    draw.rectangle((x0 - 1, y0 - 1, x1, y1), outline=(0, 0, 0, round(255 * CASING_ALPHA)))
    w = thickness
    if not dash:
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=w)
        return
    for a in range(x0, x1, 2 * dash):
        b = min(a + dash, x1) - 1
        draw.rectangle((a, y0, b, y0 + w - 1), fill=colour)
        draw.rectangle((a, y1 - w, b, y1 - 1), fill=colour)
    for a in range(y0, y1, 2 * dash):
        b = min(a + dash, y1) - 1
        draw.rectangle((x0, a, x0 + w - 1, b), fill=colour)
        draw.rectangle((x1 - w, a, x1 - 1, b), fill=colour)


def draw_point(draw: ImageDraw, x: int, y: int, colour: Colour, style: Style) -> None:
    """Draw cross hairs that leave the point itself free to see."""
    near, far = style.gap // 2, 2 * style.gap
    for width, ink in ((style.line + 2, (0, 0, 0)), (style.line, colour)):
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            draw.line((x + dx * near, y + dy * near, x + dx * far, y + dy * far), fill=ink, width=width)


def line_height(font: FreeTypeFont) -> int:
    """Return the distance of two lines of text in pixels."""
    ascent, descent = font.getmetrics()
    return ascent + descent
