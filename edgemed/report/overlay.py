"""The answer as a picture: the shown frame with boxes, mask outlines and name tags, a legend, and the notice below.

Colours are those of Okabe and Ito that stand out on grey and black, so that they can be told apart by colour-blind
readers; every region carries its number too. What the user asked about is white and dashed, what the model answered is
coloured and unbroken. Covers one frame; regions of other frames are left out.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgemed.core import Answer, Box, Prompt, PromptRegion, Region, Scan
from edgemed.errors import InvalidInput
from edgemed.files import write_atomically
from edgemed.report.fonts import open_font
from edgemed.report.legend import render_legend
from edgemed.report.outline import Alpha, blend, outline_of
from edgemed.report.placement import Field, Rect, overlap, place_tags
from edgemed.report.style import (
    ASKED,
    BACKGROUND,
    CASING_ALPHA,
    PALETTE,
    SHORT_SIDE_PX,
    STRIP,
    STRIP_TEXT,
    Colour,
    Mark,
    Style,
    draw_box,
    draw_point,
    line_height,
)
from edgemed.report.words import WORDS, Words, area_of, printable, score_of, shorten, wrap

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

LARGE_SIDE_PX = 2048
"""An image whose long side has more pixels is made smaller to this, as far as the short side allows."""
LONGEST_SIDE_PX = 4096
"""No side is ever shown longer: a long thin image keeps a short side below SHORT_SIDE_PX."""
FILL_ALPHA = 0.10


def shown_scale(scan: Scan) -> tuple[float, float]:
    """Return (x, y): shown pixels per scan pixel. They differ where the spacing is known and pixels are not square."""
    down, across = scan.pixel_spacing_mm or (1.0, 1.0)
    finer = min(down, across)
    width, height = scan.columns * across / finer, scan.rows * down / finer
    scale = max(SHORT_SIDE_PX / min(width, height), min(LARGE_SIDE_PX / max(width, height), 1.0))
    scale = min(scale, LONGEST_SIDE_PX / max(width, height))
    return (max(scale * across / finer, 1 / scan.columns), max(scale * down / finer, 1 / scan.rows))


def shown_image(scan: Scan, frame: int, scale: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """Return the frame at `scale` as uint8 RGB [height, width, 3], writeable.

    Raises InvalidInput if the frame was not read.
    """
    from PIL import Image

    size = (max(round(scan.columns * scale[0]), 1), max(round(scan.rows * scale[1]), 1))
    return np.array(Image.fromarray(scan.shown(frame)).resize(size, Image.Resampling.LANCZOS))


def write_overlay(answer: Answer, scan: Scan, prompt: Prompt, path: str | Path, *, notice: str) -> None:
    """Write the overlay as a PNG.

    notice: what the reader must know about the model, in the answer's language; shown in full on a strip at the foot,
    which is left out only where `notice` is empty.
    Raises CannotWrite if the file cannot be written; nothing half-written is left.
    """
    write_png(path, render_overlay(answer, scan, prompt, notice=notice))


def write_png(path: str | Path, pixels: npt.NDArray[np.uint8]) -> None:
    """Write uint8 RGB `pixels` [height, width, 3] as a PNG that holds nothing else. Raises CannotWrite."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    write_atomically(path, stream.getvalue())


def render_overlay(answer: Answer, scan: Scan, prompt: Prompt, *, notice: str) -> npt.NDArray[np.uint8]:
    """Return the overlay as uint8 RGB [height, width, 3]; the shown image fills it from the top left corner.

    Raises InvalidInput if a mask has another size than the scan, or the prompt's frame was not read.
    """
    scale = shown_scale(scan)
    picture = shown_image(scan, prompt.frame, scale)
    style = Style.of(min(picture.shape[:2]))
    marks = marks_of(answer, scan, prompt)
    image = _draw_marks(picture, marks, scale, style)
    legend = render_legend(answer, scan, prompt, marks, image.height, style)
    body = _beside(image, legend)
    return np.asarray(with_notice(body, notice, style))


def marks_of(answer: Answer, scan: Scan, prompt: Prompt) -> list[Mark]:
    """Return what is to be drawn on the prompt's frame: the regions of the answer, then what was asked about.

    Raises InvalidInput if a mask has another size than the scan.
    """
    words = WORDS[prompt.language]
    asked = [
        Mark(f"{words.asked} ({words.kinds[r.kind]})", _place(r), ASKED, _extent(r), r.mask, asked=True)
        for r in prompt.regions
    ]
    here = [region for region in answer.regions if region.frame == prompt.frame]
    found = [_mark(region, scan, i, words) for i, region in enumerate(here)]
    for mark in asked + found:
        if mark.mask is not None and mark.mask.shape != (scan.rows, scan.columns):
            raise InvalidInput(
                f"mask is {list(mark.mask.shape)}, [{scan.rows}, {scan.columns}] as the scan was expected"
            )
    return found + asked


def _mark(region: Region, scan: Scan, index: int, words: Words) -> Mark:
    label = " ".join(printable(region.label).split())
    score = f"{words.score} {score_of(region, words)}" if region.score is not None else ""
    details = " · ".join(part for part in (score, area_of(region, scan)) if part)
    name = f"{index + 1} {label}"
    return Mark(name, details, PALETTE[index % len(PALETTE)], region.box, region.mask, asked=False)


def _extent(region: PromptRegion) -> Box | None:
    if region.point is not None:
        return (*region.point, *region.point)
    return region.box


def _place(region: PromptRegion) -> str:
    """Return where the prompt region is, in scan pixels as the user gave it."""
    if region.mask is not None:
        return f"{int(region.mask.sum()):,} px"
    return ", ".join(f"{v:g}" for v in region.box or region.point or ())


def _draw_marks(image: npt.NDArray[np.uint8], marks: Sequence[Mark], scale: tuple[float, float], style: Style) -> Image:
    """Return `image` with fills, outlines, boxes and tags, in this order, so that no fill lies over a line.

    What was asked about comes last but for the tags: it often has the very outline of what was answered.
    """
    from PIL import Image as PILImage
    from PIL import ImageDraw as PILDraw

    outlines = [
        (mark, outline_of(mark.mask, *scale, style.line, style.dash if mark.asked else 0))
        for mark in marks
        if mark.mask is not None
    ]
    drawn = [(mark, outline) for mark, outline in outlines if outline is not None]
    worth = np.zeros(image.shape[:2], np.float32)  # how much of some region a shown pixel is
    for mark, o in drawn:
        if not mark.asked:
            blend(image, o.left, o.top, o.fill * FILL_ALPHA, mark.colour)
            part = worth[o.top : o.top + o.fill.shape[0], o.left : o.left + o.fill.shape[1]]
            part += o.fill[: part.shape[0], : part.shape[1]] / max(float(o.fill.sum()), 1.0)
    for mark, o in drawn:
        blend(image, o.left, o.top, o.casing * CASING_ALPHA, (0, 0, 0))
        blend(image, o.left, o.top, o.line, mark.colour)
    picture = PILImage.fromarray(image)
    draw = PILDraw.Draw(picture, "RGBA")
    boxed = [(mark, shown_box(mark.box, scale, picture.size)) for mark in marks if mark.box is not None]
    for mark, rect in boxed:
        if mark.is_point:
            draw_point(draw, rect[0], rect[1], mark.colour, style)
        else:
            # A box around an outline is the lesser of the two: half as thick.
            thickness = style.line if mark.mask is None else max(style.line // 2, 1)
            draw_box(draw, rect, mark.colour, thickness, style.dash if mark.asked else 0)
    _draw_tags(draw, [(mark, rect) for mark, rect in boxed if not mark.asked], worth, style)
    return picture


def shown_box(box_scan_px: Box, scale: tuple[float, float], size: tuple[int, int]) -> Rect:
    """Return the box in shown pixels, clipped to an image of `size` (width, height), at least a pixel wide and high."""
    x0, x1 = (min(max(round(v * scale[0]), 0), size[0]) for v in (box_scan_px[0], box_scan_px[2]))
    y0, y1 = (min(max(round(v * scale[1]), 0), size[1]) for v in (box_scan_px[1], box_scan_px[3]))
    if box_scan_px[0] == box_scan_px[2]:  # a point
        return (x0, y0, x1, y1)
    x0, y0 = min(x0, size[0] - 1), min(y0, size[1] - 1)
    return (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))


def _draw_tags(draw: ImageDraw, boxed: Sequence[tuple[Mark, Rect]], worth: Alpha, style: Style) -> None:
    font = open_font(style.tag)
    height, width = worth.shape
    names = [shorten(mark.name, width * 0.4, font.getlength) for mark, _ in boxed]
    pad = style.gap // 2 + 1
    sizes = [(round(font.getlength(name)) + 2 * pad, line_height(font)) for name in names]
    rects = [rect for _, rect in boxed]
    tags = place_tags(rects, sizes, Field(width, height, style.gap // 2, _hidden_by(worth, rects)))
    for (mark, rect), tag in zip(boxed, tags, strict=True):
        if tag is not None and tag.led:
            _lead(draw, tag.rect, rect, mark.colour, style)
    for (mark, _), tag, name in zip(boxed, tags, names, strict=True):
        if tag is None:  # no place is left; the legend still names it
            continue
        x0, y0, x1, y1 = tag.rect
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=mark.colour)
        draw.text((x0 + pad, (y0 + y1) / 2), name, font=font, fill=(0, 0, 0), anchor="lm")


def _hidden_by(worth: Alpha, boxes: Sequence[Rect]) -> Callable[[Rect], float]:
    """Return the cost of a tag: the share of each region that it hides, summed, and a little for each box it touches.

    A share, not pixels: a name over a hundredth of the liver is better than one over half of the aorta.
    """
    step = max(min(worth.shape) // 384, 1)  # a coarse sum is enough to compare places
    coarse = worth[::step, ::step].astype(np.float64) * step * step
    sums = np.pad(coarse.cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def cost(rect: Rect) -> float:
        x0, y0, x1, y1 = (v // step for v in rect)
        hidden = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
        return float(hidden) + 0.02 * sum(overlap(rect, box) > 0 for box in boxes)

    return cost


def _lead(draw: ImageDraw, tag: Rect, box: Rect, colour: Colour, style: Style) -> None:
    """Draw a line from the middle of the tag to the nearest place of the box."""
    x, y = (tag[0] + tag[2]) // 2, (tag[1] + tag[3]) // 2
    to = (min(max(x, box[0]), box[2] - 1), min(max(y, box[1]), box[3] - 1))
    draw.line((x, y, *to), fill=(0, 0, 0), width=style.line + 2)
    draw.line((x, y, *to), fill=colour, width=style.line)


def _beside(image: Image, legend: Image) -> Image:
    from PIL import Image as PILImage

    both = PILImage.new("RGB", (image.width + legend.width, max(image.height, legend.height)), BACKGROUND)
    both.paste(image, (0, 0))
    both.paste(legend, (image.width, 0))
    return both


def with_notice(body: Image, notice: str, style: Style) -> Image:
    """Return `body` with the strip that holds the notice, all of it, under it."""
    from PIL import Image as PILImage
    from PIL import ImageDraw as PILDraw

    text = " ".join(printable(notice).split())
    if not text:
        return body
    font = open_font(style.text)
    margin = 2 * style.gap
    lines = wrap(text, body.width - 2 * margin, font.getlength)
    line = line_height(font)
    whole = PILImage.new("RGB", (body.width, body.height + len(lines) * line + 2 * style.gap), STRIP)
    whole.paste(body, (0, 0))
    draw = PILDraw.Draw(whole)
    for i, words in enumerate(lines):
        draw.text((margin, body.height + style.gap + i * line), words, font=font, fill=STRIP_TEXT)
    return whole
