"""The few words a report adds to an answer, in both languages, and how they fit a line.

Covers labels, sizes, widths of Chinese text in a terminal, wrapping. Does not cover the notice of a bundle: that comes
from its manifest.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from edgemed.core import Language, Region, Scan
from edgemed.report.answer_json import area_mm2


@dataclass(frozen=True)
class Words:
    """The fixed words of a report in one language."""

    region: str
    box: str
    score: str
    uncertain: str
    area: str
    asked: str
    kinds: dict[str, str]
    frame: str
    window: str
    nothing: str
    more: str
    image: str
    masks: str
    overlaid: str


WORDS: dict[Language, Words] = {
    "en": Words(
        region="region",
        box="box (px)",
        score="score",
        uncertain="uncertain",
        area="area",
        asked="asked about",
        kinds={"box": "box", "point": "point", "mask": "mask"},
        frame="frame",
        window="W {width:g}  L {center:g}",
        nothing="no region marked",
        more="and {} more",
        image="image",
        masks="mask",
        overlaid="overlay",
    ),
    "zh": Words(
        region="区域",
        box="框（像素）",
        score="得分",
        uncertain="不确定",
        area="面积",
        asked="所问区域",
        kinds={"box": "框", "point": "点", "mask": "掩膜"},
        frame="帧",
        window="窗宽 {width:g}  窗位 {center:g}",
        nothing="未标出区域",
        more="另有 {} 个",
        image="图像",
        masks="掩膜",
        overlaid="叠加",
    ),
}


def printable(text: str) -> str:
    """Return `text` with control characters, the terminal's escape among them, shown as U+FFFD; line breaks stay.

    A model may write any bytes; a terminal must not obey them.
    """
    return "".join(c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "\ufffd" for c in text)


def cells(text: str) -> int:
    """Return how many terminal columns `text` takes: 2 for a wide character, 0 for a combining one.

    >>> cells("liver"), cells("肝脏 liver")
    (5, 10)
    """
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def area_of(region: Region, scan: Scan) -> str:
    """Return the area of a region's mask: "39,358 mm²", "41,233 px" where the spacing is not known, "" without mask."""
    if region.mask is None:
        return ""
    pixels = int(region.mask.sum())
    millimetres = area_mm2(pixels, scan)
    if millimetres is None:
        return f"{pixels:,} px"
    return f"{millimetres:,.0f} mm²" if millimetres >= 10 else f"{millimetres:.1f} mm²"


def score_of(region: Region, words: Words) -> str:
    """Return the score of a region and, where it is below what was asked for, that it is uncertain; "" without one."""
    if region.score is None:
        return ""
    return f"{region.score:.2f} {words.uncertain}" if region.uncertain else f"{region.score:.2f}"


def shorten(text: str, limit: float, width: Callable[[str], float]) -> str:
    """Return `text`, or its longest beginning that with "..." is at most `limit` wide.

    >>> shorten("right adrenal gland", 10, cells)
    'right a...'
    """
    if width(text) <= limit:
        return text
    kept = text
    while kept and width(kept.rstrip() + "...") > limit:
        kept = kept[:-1]
    return kept.rstrip() + "..."


def wrap(text: str, limit: float, width: Callable[[str], float]) -> list[str]:
    """Return the lines of `text`, each at most `limit` wide where a break allows: at blanks and beside wide characters.

    >>> wrap("仅供演示，不可用于诊断。", 10, cells)
    ['仅供演示，', '不可用于诊', '断。']
    """
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for piece in _pieces(paragraph):
            if line and width((line + piece).rstrip()) > limit:
                lines.append(line.rstrip())
                line = ""
            line += piece if line else piece.lstrip()
        lines.append(line.rstrip())
    return lines


_NEVER_FIRST = "，。、；：！？）》」』】”’,.;:!?)"


def _pieces(text: str) -> list[str]:
    """Return `text` cut where a line may break; a closing mark stays with what it closes."""
    pieces: list[str] = []
    for c in text:
        wide = unicodedata.east_asian_width(c) in "WF"
        if not pieces or (c not in _NEVER_FIRST and (wide or pieces[-1][-1] == " " or _is_wide_end(pieces[-1]))):
            pieces.append(c)
        else:
            pieces[-1] += c
    return pieces


def _is_wide_end(piece: str) -> bool:
    return piece[-1] != " " and unicodedata.east_asian_width(piece[-1]) in "WF"
