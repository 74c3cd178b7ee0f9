"""Tags stay inside, apart, and near their box."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from edgemed.report.placement import Field, overlap, place_tags


@st.composite
def boxes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    x, y = draw(st.integers(0, 380)), draw(st.integers(0, 280))
    return (x, y, draw(st.integers(x + 1, 400)), draw(st.integers(y + 1, 300)))


@settings(deadline=None, max_examples=50)
@given(st.lists(boxes(), max_size=25))
def test_tags_never_overlap_nor_leave_the_image(placed_on: list[tuple[int, int, int, int]]) -> None:
    tags = place_tags(placed_on, [(70, 18)] * len(placed_on), Field(400, 300, 3))
    rects = [tag.rect for tag in tags if tag is not None]
    assert all(x0 >= 0 and y0 >= 0 and x1 <= 400 and y1 <= 300 for x0, y0, x1, y1 in rects)
    assert all(overlap(a, b) == 0 for i, a in enumerate(rects) for b in rects[:i])


def test_lone_tag_sits_above_its_box() -> None:
    (tag,) = place_tags([(100, 100, 200, 200)], [(60, 20)], Field(400, 300, 4))
    assert tag is not None
    assert (tag.rect, tag.led) == ((100, 76, 160, 96), False)


def test_tag_of_a_box_that_fills_the_image_lies_inside() -> None:
    (tag,) = place_tags([(0, 0, 400, 300)], [(60, 20)], Field(400, 300, 4))
    assert tag is not None
    assert tag.rect == (4, 4, 64, 24)


def test_cheapest_place_is_taken() -> None:
    (tag,) = place_tags([(100, 100, 200, 200)], [(60, 20)], Field(400, 300, 4, cost=lambda rect: -rect[1]))
    assert tag is not None
    assert tag.rect == (100, 204, 160, 224)


def test_crowded_tags_are_led_to_free_room() -> None:
    same = [(190, 140, 210, 160)] * 30
    tags = place_tags(same, [(60, 20)] * 30, Field(400, 300, 4))
    assert all(tag is not None for tag in tags)
    assert any(tag is not None and tag.led for tag in tags)


def test_no_room_gives_no_tag() -> None:
    assert place_tags([(0, 0, 50, 10)], [(60, 20)], Field(50, 10, 2)) == [None]
