"""The answer as three pictures side by side: the shown frame, the masks alone, the frame with the masks in light blue.

The arrangement and the colour in which MedPLIB's users know its answers. All structures are white in the middle panel
and light blue in the right one: which is which, tags and a legend are the overlay's part (`overlay`). Covers one frame
and what the model answered; what the user asked about is not drawn.

Source of the colour and the arrangement: github ShawnHuang497/MedPLIB at 5ab54bc.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgemed.core import Answer, Prompt, Scan
from edgemed.report.fonts import open_font
from edgemed.report.outline import Alpha, blend, outline_of
from edgemed.report.overlay import marks_of, shown_box, shown_image, shown_scale, with_notice, write_png
from edgemed.report.style import BACKGROUND, TEXT, Colour, Mark, Style, draw_box, line_height
from edgemed.report.words import WORDS

if TYPE_CHECKING:
    from PIL.Image import Image

LIGHT_BLUE: Colour = (173, 216, 230)
FILL_ALPHA = 0.5


def write_panels(answer: Answer, scan: Scan, prompt: Prompt, path: str | Path, *, notice: str) -> None:
    """Write the three panels as a PNG.

    notice: what the reader must know about the model, in the answer's language; shown in full on a strip at the foot,
    which is left out only where `notice` is empty.
    Raises CannotWrite if the file cannot be written; nothing half-written is left.
    """
    write_png(path, render_panels(answer, scan, prompt, notice=notice))


def render_panels(answer: Answer, scan: Scan, prompt: Prompt, *, notice: str) -> npt.NDArray[np.uint8]:
    """Return the panels as uint8 RGB [height, width, 3], a caption above each.

    Each panel has the size at which the overlay shows the image. An answer without masks has a black middle panel.
    Raises InvalidInput if a mask has another size than the scan, or the prompt's frame was not read.
    """
    scale = shown_scale(scan)
    image = shown_image(scan, prompt.frame, scale)
    style = Style.of(min(image.shape[:2]))
    marks = [mark for mark in marks_of(answer, scan, prompt) if not mark.asked]
    covered = _covered(marks, scale, image.shape[:2], style)
    masks = np.repeat(np.rint(covered * 255).astype(np.uint8)[..., None], 3, axis=2)
    overlaid = image.copy()
    blend(overlaid, 0, 0, covered * FILL_ALPHA, LIGHT_BLUE)
    words = WORDS[prompt.language]
    row = _row(
        {words.image: image, words.masks: masks, words.overlaid: _with_boxes(overlaid, marks, scale, style)}, style
    )
    return np.asarray(with_notice(row, notice, style))


def _covered(marks: list[Mark], scale: tuple[float, float], shape: tuple[int, ...], style: Style) -> Alpha:
    """Return how much of each shown pixel lies in any mask, 0..1 [height, width]."""
    covered = np.zeros(shape, np.float32)
    for mark in marks:
        outline = None if mark.mask is None else outline_of(mark.mask, *scale, style.line)
        if outline is not None:
            part = covered[outline.top :, outline.left :][: outline.fill.shape[0], : outline.fill.shape[1]]
            np.maximum(part, outline.fill[: part.shape[0], : part.shape[1]], out=part)
    return covered


def _with_boxes(
    image: npt.NDArray[np.uint8], marks: list[Mark], scale: tuple[float, float], style: Style
) -> npt.NDArray[np.uint8]:
    from PIL import Image as PILImage
    from PIL import ImageDraw as PILDraw

    picture = PILImage.fromarray(image)
    draw = PILDraw.Draw(picture, "RGBA")
    for mark in marks:
        if mark.box is not None:
            draw_box(draw, shown_box(mark.box, scale, picture.size), LIGHT_BLUE, style.line, 0)
    return np.asarray(picture)


def _row(panels: dict[str, npt.NDArray[np.uint8]], style: Style) -> Image:
    """Return the panels from left to right, each below its caption; a panel narrower than the captions keeps space."""
    from PIL import Image as PILImage
    from PIL import ImageDraw as PILDraw

    font = open_font(style.text)
    head = line_height(font) + style.gap
    height, width = next(iter(panels.values())).shape[:2]
    widest = max(font.getlength(caption) for caption in panels)
    step = max(width, round(widest) + 2 * style.gap) + style.gap
    row = PILImage.new("RGB", (len(panels) * step - style.gap, head + height), BACKGROUND)
    draw = PILDraw.Draw(row)
    for i, (caption, panel) in enumerate(panels.items()):
        draw.text((i * step + style.gap, style.gap // 2), caption, font=font, fill=TEXT)
        row.paste(PILImage.fromarray(panel), (i * step, head))
    return row
