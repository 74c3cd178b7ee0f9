"""The panel beside an overlay's image: what is shown, one entry a mark, what made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemed.core import Answer, Prompt, Scan
from edgemed.report.fonts import open_font
from edgemed.report.style import BACKGROUND, QUIET, SHORT_SIDE_PX, TEXT, Mark, Style, draw_box, draw_point, line_height
from edgemed.report.words import WORDS, shorten

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont


def render_legend(
    answer: Answer, scan: Scan, prompt: Prompt, marks: Sequence[Mark], image_height: int, style: Style
) -> Image:
    """Return the panel right of the image: what is shown, one entry a mark, what made it.

    Entries have two lines, or one small line where they would make the panel higher than the image.
    """
    from PIL import Image as PILImage
    from PIL import ImageDraw as PILDraw

    words = WORDS[prompt.language]
    small = open_font(style.small)
    line, margin = line_height(small), 2 * style.gap
    head, foot = _facts(scan, prompt), _made_by(answer)
    fixed = (len(head) + len(foot) + 1) * line + 4 * margin
    roomy, compact = Entry.two_lines(style), Entry.one_line(style)
    entry = roomy if fixed + len(marks) * roomy.height <= image_height else compact
    wanted = max([entry.width(mark) for mark in marks] + [small.getlength(text) for text in [*head, *foot]])
    inner = round(min(max(wanted, 11 * style.text), 20 * style.text))
    height = max(image_height, min(fixed + len(marks) * entry.height, 2 * SHORT_SIDE_PX))
    panel = PILImage.new("RGB", (inner + 2 * margin, height), BACKGROUND)
    draw = PILDraw.Draw(panel)

    def write(lines: Sequence[str], y: int) -> None:
        for i, text in enumerate(lines):
            draw.text((margin, y + i * line), shorten(text, inner, small.getlength), font=small, fill=QUIET)

    write(head, margin)
    top = 2 * margin + len(head) * line
    shown = marks[: max((height - fixed) // entry.height, 0)]
    for i, mark in enumerate(shown):
        entry.draw(draw, mark, margin, top + i * entry.height, inner)
    if not marks:
        write([words.nothing], top)
    elif len(shown) < len(marks):
        write([words.more.format(len(marks) - len(shown))], top + len(shown) * entry.height)
    write(foot, height - margin - len(foot) * line)
    return panel


@dataclass(frozen=True, eq=False)
class Entry:
    """How one mark is written in the legend: swatch and name, then the details below it or at the right end."""

    style: Style
    font: FreeTypeFont
    below: bool
    height: int

    @staticmethod
    def two_lines(style: Style) -> Entry:
        font, small = open_font(style.text), open_font(style.small)
        return Entry(style, font, True, line_height(font) + line_height(small) + style.gap)

    @staticmethod
    def one_line(style: Style) -> Entry:
        small = open_font(style.small)
        return Entry(style, small, False, line_height(small) + style.gap // 2)

    @property
    def indent(self) -> int:
        return self.style.text + 2 * self.style.gap

    def width(self, mark: Mark) -> float:
        name, details = self.font.getlength(mark.name), open_font(self.style.small).getlength(mark.details)
        return self.indent + (max(name, details) if self.below else name + 3 * self.style.gap + details)

    def draw(self, draw: ImageDraw, mark: Mark, x: int, y: int, inner: int) -> None:
        """Draw the entry with its top left corner at (x, y), at most `inner` wide; a long name is cut."""
        line, small = line_height(self.font), open_font(self.style.small)
        self._swatch(draw, mark, x, y + (line - self.style.text) // 2)
        room = inner - self.indent
        details = shorten(mark.details, room, small.getlength)
        if self.below:
            draw.text((x + self.indent, y + line), details, font=small, fill=QUIET)
        else:
            draw.text((x + inner, y), details, font=small, fill=QUIET, anchor="ra")
            room -= round(small.getlength(details)) + self.style.gap
        draw.text((x + self.indent, y), shorten(mark.name, room, self.font.getlength), font=self.font, fill=TEXT)

    def _swatch(self, draw: ImageDraw, mark: Mark, x: int, y: int) -> None:
        side, thickness = self.style.text, self.style.line
        if mark.is_point:
            draw_point(draw, x + side // 2, y + side // 2, mark.colour, self.style)
            return
        draw_box(draw, (x, y, x + side, y + side), mark.colour, thickness, side // 5 if mark.asked else 0)
        if not mark.asked:
            a, b = thickness + 2, side - thickness - 3
            draw.rectangle((x + a, y + a, x + b, y + b), fill=mark.colour)


def _facts(scan: Scan, prompt: Prompt) -> list[str]:
    """Return what is shown, without anything of the patient."""
    words = WORDS[prompt.language]
    first = scan.modality
    if scan.frames > 1:
        first += f" · {words.frame} {prompt.frame} (0-{scan.frames - 1})"
    if scan.window is None:
        return [first]
    return [first, words.window.format(center=scan.window.center, width=scan.window.width)]


def _made_by(answer: Answer) -> list[str]:
    p = answer.provenance
    return [f"edgemed {p.edgemed} · {p.bundle} {p.bundle_sha256[:8]}", f"{p.backend} · {p.device}"]
