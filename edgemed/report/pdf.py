"""The report as a PDF page for people: notice, answer, table of findings, key pictures; English and Chinese.

The font is embedded, so that Chinese prints anywhere. No name, id or date of the patient is on the page: it belongs to
the study it is filed in. The same content always gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt

from edgemed.core import Language
from edgemed.report.dicom_object import ResultOptions, library, warning_of
from edgemed.report.dicom_sc import rendered, shown_images
from edgemed.report.dicom_source import Group
from edgemed.report.dicom_sr import texts_of
from edgemed.report.findings import Finding, Sizes, sizes_of
from edgemed.report.fonts import FILE
from edgemed.report.words import printable

MAX_PICTURES = 6
TITLE: dict[Language, str] = {"en": "AI result, not for diagnosis", "zh": "AI 结果，不可用于诊断"}
HEADS: dict[Language, tuple[str, ...]] = {
    "en": ("No.", "Finding", "Code", "Images", "Size"),
    "zh": ("序号", "所见", "编码", "图像数", "大小"),
}
UNITS: dict[Language, tuple[tuple[str, str], ...]] = {
    "en": (
        ("area_mm2", "{:,.1f} mm²"),
        ("volume_mm3", "{:,.1f} mm³"),
        ("long_axis_mm", "long axis {:,.1f} mm"),
        ("short_axis_mm", "short axis {:,.1f} mm"),
    ),
    "zh": (
        ("area_mm2", "{:,.1f} mm²"),
        ("volume_mm3", "{:,.1f} mm³"),
        ("long_axis_mm", "长径 {:,.1f} mm"),
        ("short_axis_mm", "短径 {:,.1f} mm"),
    ),
}


def to_pdf(group: Group, findings: Sequence[Finding], language: Language, options: ResultOptions) -> bytes:
    """Return the PDF file.

    Pictures are in it where the options can read pixels, at most MAX_PICTURES, spread over the images.
    """
    library("reportlab")
    library("fontTools")
    from reportlab.platypus import Paragraph, Spacer

    warning = warning_of(options, language)
    texts = list(texts_of(group, language))
    rows = [HEADS[language], *(_row(finding, group, language) for finding in findings)]
    shown = "".join((warning, TITLE[language], options.prompt.text, *texts, *(cell for row in rows for cell in row)))
    with _registered(shown) as font:
        body, large = _styles(font)
        story = [
            Paragraph(escape(warning), large),
            Spacer(1, 12),
            *(_paragraph(text, body) for text in (options.prompt.text, *texts) if text),
            Spacer(1, 12),
            *([_table(rows, body)] if findings else []),
            *(_pictures(group, language, options) if options.read is not None else []),
        ]
        return _built(story, group, language, font)


def _built(story: list[Any], group: Group, language: Language, font: str) -> bytes:
    from reportlab.lib.pagesizes import A4
    from reportlab.platypus import SimpleDocTemplate

    stream = io.BytesIO()
    p = group.provenance
    document = SimpleDocTemplate(
        stream,
        pagesize=A4,
        invariant=1,
        title=TITLE[language],
        author=f"edgemed {p.edgemed}, {p.bundle} {p.bundle_sha256[:16]}",
        subject=TITLE[language],
        initialFontName=font,
    )

    def foot(canvas: Any, _: object) -> None:
        canvas.setFont(font, 8)
        canvas.drawString(72, 36, TITLE[language])

    document.build(story, onFirstPage=foot, onLaterPages=foot)
    return stream.getvalue()


def _row(finding: Finding, group: Group, language: Language) -> tuple[str, ...]:
    concept = finding.concept
    code = f"{concept.type.scheme} {concept.type.value}" if concept.is_coded else ""
    return (
        str(finding.number),
        concept.name(language),
        code,
        str(len(finding.images)),
        words_of(sizes_of(finding, group), language),
    )


def words_of(sizes: Sizes, language: Language) -> str:
    """Return the sizes that are known, with units.

    >>> words_of(Sizes(area_mm2=12.34, long_axis_mm=5.0), "en")
    '12.3 mm², long axis 5.0 mm'
    """
    known = ((form, getattr(sizes, name)) for name, form in UNITS[language])
    return ", ".join(form.format(value) for form, value in known if value is not None)


def _styles(font: str) -> tuple[Any, Any]:
    from reportlab.lib.styles import ParagraphStyle

    body = ParagraphStyle("body", fontName=font, fontSize=11, leading=16, wordWrap="CJK", spaceAfter=6)
    return body, ParagraphStyle("large", parent=body, fontSize=13, leading=19, textColor="#B00000")


def _paragraph(text: str, style: Any) -> Any:
    from reportlab.platypus import Paragraph

    return Paragraph(escape(printable(text)).replace("\n", "<br/>"), style)


def _table(rows: Sequence[Sequence[str]], style: Any) -> Any:
    from reportlab.platypus import Table

    cells = [[_paragraph(cell, style) for cell in row] for row in rows]
    grid = [("GRID", (0, 0), (-1, -1), 0.5, "#888888"), ("BACKGROUND", (0, 0), (-1, 0), "#EEEEEE"),
            ("VALIGN", (0, 0), (-1, -1), "TOP")]  # fmt: skip
    return Table(cells, colWidths=(36, 130, 95, 55, 135), style=grid, repeatRows=1)


def _pictures(group: Group, language: Language, options: ResultOptions) -> list[Any]:
    from PIL import Image
    from reportlab.platypus import Image as Picture
    from reportlab.platypus import Spacer

    images = shown_images(group)
    chosen = [images[i] for i in np.unique(np.linspace(0, len(images) - 1, MAX_PICTURES).round().astype(int))]
    placed: list[Any] = []
    for image in chosen:
        pixels: npt.NDArray[np.uint8] = rendered(image, language, options)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        stream.seek(0)
        scale = min(450 / pixels.shape[1], 560 / pixels.shape[0])
        placed += [Spacer(1, 12), Picture(stream, pixels.shape[1] * scale, pixels.shape[0] * scale)]
    return placed


_LOCK = threading.Lock()
"""Held while a page is built: reportlab's fonts are those of the process."""


@contextmanager
def _registered(text: str) -> Iterator[str]:
    """Yield the name under which reportlab knows the package's font with the characters of `text`.

    reportlab keeps the first font of a name, by its own name and by the one in the file: each has one of its own, and
    both are taken back, so that a process that writes many reports does not keep them all.
    """
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.ttfonts import TTFont

    name = "edgemed-" + hashlib.sha256("".join(sorted(set(text))).encode()).hexdigest()[:16]
    font = TTFont(name, io.BytesIO(_quadratic(text, name)))
    with _LOCK:
        pdfmetrics.registerFont(font)
        try:
            yield name
        finally:
            font.unregister()


def _quadratic(text: str, name: str) -> bytes:
    """Return a TrueType font of this PostScript name with the characters of `text`.

    The package's font has cubic outlines (CFF), which reportlab cannot embed; those of few characters are quickly made
    quadratic, to a thousandth of an em.
    """
    from fontTools import subset
    from fontTools.pens.cu2quPen import Cu2QuPen
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from fontTools.ttLib import TTFont, newTable

    data = resources.files("edgemed.report").joinpath(FILE).read_bytes()
    font = TTFont(io.BytesIO(data), recalcTimestamp=False)
    subsetter = subset.Subsetter(subset.Options(layout_features=[], notdef_outline=True))
    subsetter.populate(unicodes={*range(0x20, 0x7F), *map(ord, text)})
    subsetter.subset(font)
    cubic = font.getGlyphSet()
    glyphs = {}
    for glyph in font.getGlyphOrder():
        pen = TTGlyphPen(None)
        cubic[glyph].draw(Cu2QuPen(pen, max_err=font["head"].unitsPerEm / 1000, reverse_direction=True))
        glyphs[glyph] = pen.glyph()
    font["loca"], font["glyf"] = newTable("loca"), newTable("glyf")
    font["glyf"].glyphOrder, font["glyf"].glyphs = font.getGlyphOrder(), glyphs
    font["maxp"].tableVersion = 0x00010000
    for limit in ("maxTwilightPoints", "maxStorage", "maxFunctionDefs", "maxInstructionDefs", "maxStackElements",
                 "maxSizeOfInstructions", "maxComponentElements", "maxPoints", "maxContours", "maxCompositePoints",
                 "maxCompositeContours", "maxComponentDepth"):  # fmt: skip
        setattr(font["maxp"], limit, 0)
    font["maxp"].maxZones = 1
    font["head"].glyphDataFormat = 0
    for table in ("CFF ", "VORG"):
        if table in font:
            del font[table]
    font["name"].setName(name, 6, 3, 1, 0x409)
    font["name"].setName(name, 6, 1, 0, 0)
    font["post"].formatType, font.sfntVersion = 3.0, "\x00\x01\x00\x00"
    stream = io.BytesIO()
    font.save(stream)
    return stream.getvalue()
