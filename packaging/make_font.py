"""Make the font that overlays are labelled with: a subset of Noto Sans CJK SC under the family name "edgemed Sans".

    python packaging/make_font.py NotoSansCJK-Regular.ttc

Covers Latin, Greek, punctuation, units and every character of GB 2312 (6,763 ideographs: level 1 alone lacks words as
common in a report as bladder, hip and sacrum). Does not cover traditional Chinese. The source is SIL OFL 1.1, has no
reserved font name that we use, and asks that a changed version goes by another name; layout tables and hinting are
dropped, since edgemed draws with Pillow's basic layout at 18 px and more. The same input gives the same bytes.

Needs fonttools. The Debian package fonts-noto-cjk holds the input (Sans 2.004 was used).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTCollection, TTFont

FAMILY = "edgemed Sans"
SOURCE_FAMILY = "Noto Sans CJK SC"
TARGET = Path(__file__).resolve().parents[1] / "edgemed" / "report" / "fonts" / "edgemed-sans.otf"
WHY_CHANGED = "Subset of Noto Sans CJK SC made for edgemed; renamed as the SIL Open Font License 1.1 asks."
RANGES = (
    (0x0020, 0x007E),  # ASCII
    (0x00A0, 0x00FF),  # Latin-1
    (0x0391, 0x03C9),  # Greek
    (0x2010, 0x2027),  # dashes, quotes, ellipsis
    (0x2030, 0x203B),
    (0x2080, 0x2089),  # subscript digits
    (0x2190, 0x2193),  # arrows
    (0x3000, 0x3017),  # CJK punctuation
    (0xFF01, 0xFF5E),  # full-width forms
)
SINGLES = "²³µ×÷±≤≥≈≠∞√∅℃ⅠⅡⅢⅣⅤⅥⅦⅧⅨⅩ①②③④⑤⑥⑦⑧⑨⑩■□▲△●○◆◇✓✗\ufffd"


def characters() -> set[int]:
    """Return the code points to keep."""
    rows = (bytes((row, cell)) for row in range(0xB0, 0xF8) for cell in range(0xA1, 0xFF))
    ideographs = {ord(c) for pair in rows for c in pair.decode("gb2312", "ignore")}
    return ideographs | {c for first, last in RANGES for c in range(first, last + 1)} | {ord(c) for c in SINGLES}


def open_source(path: Path) -> TTFont:
    """Return the simplified-Chinese member of a collection, or the font itself."""
    if path.suffix.lower() not in (".ttc", ".otc"):
        return TTFont(path, recalcTimestamp=False)
    for font in TTCollection(path, lazy=True).fonts:
        if font["name"].getDebugName(1) == SOURCE_FAMILY:
            font.recalcTimestamp = False
            return font
    raise SystemExit(f"{path.name} holds no font called {SOURCE_FAMILY}")


def rename(font: TTFont) -> None:
    """Give the font its own family name; keep the copyright, version and licence records."""
    names = font["name"]
    kept = {i: names.getDebugName(i) for i in (0, 5, 13, 14)}
    names.names = []
    values = {**kept, 1: FAMILY, 2: "Regular", 3: "edgemed-sans-regular", 4: FAMILY, 6: "edgemedSans-Regular"}
    for number, value in sorted({**values, 10: WHY_CHANGED}.items()):
        if value:
            names.setName(value, number, 3, 1, 0x409)
    top = font["CFF "].cff
    top.fontNames[0] = "edgemedSans-Regular"
    dictionary = top.topDictIndex[0]
    for key, value in (("FamilyName", FAMILY), ("FullName", FAMILY), ("Weight", "Regular")):
        if hasattr(dictionary, key):
            setattr(dictionary, key, value)
    for part in getattr(dictionary, "FDArray", ()):
        part.FontName = part.FontName.replace("NotoSansCJKjp", "edgemedSans")


def make(source: Path, target: Path) -> int:
    """Write the subset to `target`; return its size in bytes."""
    font = open_source(source)
    options = Options()
    options.hinting = False
    options.layout_features = []
    options.name_IDs = ["*"]
    options.notdef_outline = True
    options.glyph_names = False
    options.drop_tables += ["GSUB", "GPOS", "GDEF", "BASE", "VORG", "vhea", "vmtx", "DSIG"]
    subsetter = Subsetter(options)
    subsetter.populate(unicodes=characters())
    subsetter.subset(font)
    rename(font)
    target.parent.mkdir(parents=True, exist_ok=True)
    font.save(target, reorderTables=True)
    return target.stat().st_size


def main() -> None:
    """Read the command line and make the font."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="NotoSansCJK-Regular.ttc, or its SC member as .otf")
    parser.add_argument("-o", "--output", type=Path, default=TARGET)
    given = parser.parse_args()
    print(f"{given.output.name}: {make(given.source, given.output):,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
