"""The answer for a person at a terminal: its text, a short table of regions, the notice of the bundle.

Plain characters without colour, so that it reads the same in a file or a pipe.
"""

from __future__ import annotations

from edgemed.core import Answer, Prompt, Scan
from edgemed.report.words import WORDS, area_of, cells, printable, score_of, shorten

LABEL_CELLS = 32
"""Longest label the table shows in full, in terminal columns."""


def to_text(answer: Answer, scan: Scan | None, prompt: Prompt, *, notice: str = "") -> str:
    """Return the answer, the labels it means and the table of its regions if there are any, and `notice` at the end.

    The language of the headings is the prompt's; columns line up in a terminal that shows CJK two columns wide. Boxes
    are whole pixels here; the JSON has the fractions. Area is in mm2 where the scan has a spacing, else in pixels.
    """
    blocks = [printable(answer.text).strip()]
    if answer.labels:
        blocks.append(", ".join(printable(label) for label in answer.labels))
    if answer.regions and scan is not None:
        blocks.append("\n".join(_table(answer, scan, prompt)))
    if notice.strip():
        blocks.append(" ".join(printable(notice).split()))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _table(answer: Answer, scan: Scan, prompt: Prompt) -> list[str]:
    words = WORDS[prompt.language]
    rows = [(words.region, words.box, words.score, words.area)]
    for region in answer.regions:
        label = shorten(" ".join(printable(region.label).split()), LABEL_CELLS, cells)
        box = ", ".join(f"{v:.0f}" for v in region.box)
        rows.append((label, box, score_of(region, words) or "-", area_of(region, scan) or "-"))
    widths = [max(cells(row[i]) for row in rows) for i in range(4)]
    return ["  ".join(_padded(row[i], widths[i], right=i >= 2) for i in range(4)).rstrip() for row in rows]


def _padded(text: str, width: int, *, right: bool) -> str:
    blank = " " * (width - cells(text))
    return blank + text if right else text + blank
