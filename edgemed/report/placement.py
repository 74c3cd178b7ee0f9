"""Where the name tags of an overlay go: near their box, inside the image, on no other tag. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Rect = tuple[int, int, int, int]
"""left, top, right, bottom in shown pixels, half-open."""


@dataclass(frozen=True)
class Tag:
    """A placed tag. led: it lies away from its box, so a line must lead to it."""

    rect: Rect
    led: bool = False


@dataclass(frozen=True)
class Field:
    """Where tags may lie: an image of width x height shown pixels. gap: kept between tags.

    cost: how much a tag at a place would hide (any unit); the cheapest place near the box is taken.
    """

    width: int
    height: int
    gap: int
    cost: Callable[[Rect], float] = lambda rect: 0.0


def place_tags(boxes: Sequence[Rect], sizes: Sequence[tuple[int, int]], field: Field) -> list[Tag | None]:
    """Return a tag of the given size (width, height) for each box, None where there is no free place for it.

    First the places at the box's corners, outside before inside; of the free ones that which hides least. Then rings
    further out, nearest first, and there the tag is `led`. Small boxes choose first: they have fewest places near.
    """
    placed: list[Tag | None] = [None] * len(boxes)
    taken: list[Rect] = []
    for i in sorted(range(len(boxes)), key=lambda k: (_area(boxes[k]), k)):
        tag = _near(boxes[i], sizes[i], taken, field) or _far(boxes[i], sizes[i], taken, field)
        placed[i] = tag
        if tag is not None:
            taken.append(tag.rect)
    return placed


def _near(box: Rect, size: tuple[int, int], taken: Sequence[Rect], field: Field) -> Tag | None:
    x0, y0, x1, y1 = box
    w, h = size
    gap = field.gap
    outside = [
        (x0, y0 - h - gap),
        (x1 - w, y0 - h - gap),
        (x0, y1 + gap),
        (x1 - w, y1 + gap),
        (x1 + gap, y0),
        (x0 - w - gap, y0),
        (x1 + gap, y1 - h),
        (x0 - w - gap, y1 - h),
    ]
    inside = [(x0 + gap, y0 + gap), (x1 - w - gap, y0 + gap), (x0 + gap, y1 - h - gap), (x1 - w - gap, y1 - h - gap)]
    fits_inside = x1 - x0 >= w + 2 * gap and y1 - y0 >= h + 2 * gap
    rects = [(x, y, x + w, y + h) for x, y in outside + (inside if fits_inside else [])]
    free = [(field.cost(rect), k) for k, rect in enumerate(rects) if _free(rect, taken, field)]
    return Tag(rects[min(free)[1]]) if free else None


def _far(box: Rect, size: tuple[int, int], taken: Sequence[Rect], field: Field) -> Tag | None:
    w, h = size
    if w > field.width or h > field.height:
        return None
    centre_x, centre_y = (box[0] + box[2] - w) // 2, (box[1] + box[3] - h) // 2
    step = h + field.gap
    for ring in range(1, max(field.width, field.height) // step + 2):
        spots = [
            (centre_x + dx * step, centre_y + dy * step)
            for dy in range(-ring, ring + 1)
            for dx in range(-ring, ring + 1)
            if max(abs(dx), abs(dy)) == ring
        ]
        spots.sort(key=lambda s: ((s[0] - centre_x) ** 2 + (s[1] - centre_y) ** 2, s))
        for x, y in spots:
            rect = (x, y, x + w, y + h)
            if overlap(rect, box) == 0 and _free(rect, taken, field):
                return Tag(rect, led=True)
    return None


def _free(rect: Rect, taken: Sequence[Rect], field: Field) -> bool:
    x0, y0, x1, y1 = rect
    if x0 < 0 or y0 < 0 or x1 > field.width or y1 > field.height:
        return False
    grown = (x0 - field.gap, y0 - field.gap, x1 + field.gap, y1 + field.gap)
    return all(overlap(grown, other) == 0 for other in taken)


def overlap(a: Rect, b: Rect) -> int:
    """Return the area that two rectangles share, in shown pixels."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _area(box: Rect) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
