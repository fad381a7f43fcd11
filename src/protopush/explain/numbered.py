"""A picture with a numbered box for each match, each number where it hides no other."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from protopush.explain.drawing import COLOURS, INK, PAPER, Rect, draw_box, resized, scaled, write
from protopush.explain.explanation import Explanation, Match
from protopush.explain.overlay import with_unseen


def numbered(
    explanation: Explanation, image: Image.Image, shown: Sequence[Match], size: tuple[int, int], badge: int
) -> Image.Image:
    """The picture with the boxes of the matches; boxes of the same cell lie within each other.

    Args:
        explanation: of the picture.
        image: RGB, the upright original or a smaller copy.
        shown: numbered from 1 in this order.
        size: (width, height) within which the picture is as large as it can be.
        badge: side of a number.
    """
    large = with_unseen(resized(image, *size), explanation.view)
    boxes = [scaled(match.box, explanation.image_size, large.size) for match in shown]
    for i, (x0, y0, x1, y1) in reversed([*enumerate(boxes)]):  # the outer over the inner: its lines lie outside
        others = boxes.count(boxes[i]) - 1
        room = max(0, (min(x1 - x0, y1 - y0) - 8) / 2)
        inset = boxes[:i].count(boxes[i]) * min(4, room / max(others, 1))
        draw_box(large, (x0 + inset, y0 + inset, x1 - inset, y1 - inset), colour(i), 2 if others else 3)
    draw, placed = ImageDraw.Draw(large), list[Rect]()
    for i, box in enumerate(boxes):
        placed.append(_free_place(box, boxes, placed, large.size, badge))
        draw_badge(draw, (placed[-1][0], placed[-1][1]), i, badge)
    return large


def colour(number: int) -> tuple[int, int, int]:
    """The colour of a match's box and bar, by its place from 0."""
    return COLOURS[number % len(COLOURS)]


def draw_badge(draw: ImageDraw.ImageDraw, corner: tuple[float, float], number: int, side: int) -> None:
    """A match's number in its colour; ``number`` counts from 0."""
    fill = colour(number)
    x, y = round(corner[0]), round(corner[1])
    draw.rectangle((x, y, x + side - 1, y + side - 1), fill=fill, outline=(0, 0, 0))
    bright = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 130
    ink = INK if bright else PAPER
    write(draw, (x + side / 2, y + side / 2), str(number + 1), round(side * 0.66), side, ink, "mm")


def _free_place(box: Rect, boxes: Sequence[Rect], placed: Sequence[Rect], size: tuple[int, int], badge: int) -> Rect:
    """Where to put a box's number: beside it, over no other number, over as little of the boxes as can be."""
    x0, y0, x1, y1 = box
    steps = [i * (badge + 1) for i in range(8)]
    along = [x0 + step for step in steps if step < max(x1 - x0, badge + 2)]  # a small cell has room for two
    down = [y0 + step for step in steps if step < max(y1 - y0, badge + 2)]
    places = [(x, y) for y in (y0 - badge - 2, y1 + 2) for x in along]
    places += [(x, y) for x in (x1 + 2, x0 - badge - 2) for y in down] + [(x, y) for y in down for x in along]
    inside = [
        (x, y, x + badge, y + badge)
        for x, y in places
        if x >= 0 and y >= 0 and x + badge <= size[0] and y + badge <= size[1]
    ]
    cost = {
        place: 9 * sum(_overlap(place, other) for other in placed) + sum(_overlap(place, other) for other in boxes)
        for place in inside
    }
    return min(inside, key=lambda place: cost[place], default=(x0, y0, x0 + badge, y0 + badge))


def _overlap(a: Rect, b: Rect) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
