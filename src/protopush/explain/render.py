"""Pictures for people: "this part looks like that part of that training image". Pillow only; no file is written.

All boxes come in pixels of the original pictures and are scaled to whatever size a picture is drawn at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePath

from PIL import Image, ImageDraw

from protopush.errors import InputError
from protopush.explain.drawing import (
    COLOURS,
    INK,
    MUTED,
    PAPER,
    RULE,
    TILE,
    Colour,
    Rect,
    draw_box,
    empty_tile,
    fit_text,
    part_tile,
    resized,
    scaled,
    tile,
    write,
)
from protopush.explain.explanation import ClassEvidence, Explanation, Match
from protopush.prototypes import Anchor

SourceOf = Callable[[int, int], Image.Image | None]
MARGIN = 32
GAP = 16
LEFT = 560  # the panel's large picture
PART = 168  # a part, and the height of a whole training picture beside it
SOURCE = 216  # the width of that
LOOKS = 96
TEXT = 344
SMALL_PART, SMALL_SOURCE = 136, 160  # the same in the gallery
COLUMNS = 5  # of the gallery


def draw_panel(explanation: Explanation, image: Image.Image, source_of: SourceOf, rows: int = 5) -> Image.Image:
    """The predicted class's strongest prototypes: this part of the picture looks like that part of a training picture.

    Args:
        explanation: of the picture.
        image: the upright original, or a smaller copy of it.
        source_of: (class, prototype) to the training picture of its anchor, or a smaller copy, or None.
        rows: how many prototypes to show, the largest contribution first.

    Raises:
        InputError: ``rows`` is below 1.
    """
    if rows < 1:
        raise InputError(f"rows is {rows}; expected at least 1 prototype to show")
    image = image.convert("RGB")
    evidence = explanation.classes[0]
    shown = evidence.matches[:rows]
    large = _large(explanation, image, shown, max(LEFT, len(shown) * (PART + GAP) - GAP))
    right = MARGIN + LEFT + 2 * GAP
    left_height = large.height + 40 + 38 * len(explanation.classes)
    top = 148
    bottom = top + max(left_height, len(shown) * (PART + GAP) - GAP) + GAP
    canvas = Image.new("RGB", (right + 2 * PART + LOOKS + SOURCE + TEXT + 3 * GAP + MARGIN, bottom + 92), PAPER)
    draw = ImageDraw.Draw(canvas)
    _draw_title(draw, explanation, canvas.width - 2 * MARGIN)
    _draw_headings(draw, right, top - 10, evidence.class_name)
    canvas.paste(large, (MARGIN, top))
    _draw_classes(draw, explanation.classes, top + large.height + 36)
    strongest = max(abs(match.contribution) for match in shown)
    for i, match in enumerate(shown):
        here = part_tile(image, scaled(match.box, explanation.image_size, image.size), COLOURS[i % len(COLOURS)], PART)
        picture = source_of(match.class_index, match.prototype) if match.anchor is not None else None
        corner = (right, top + i * (PART + GAP))
        _draw_row(canvas, corner, i, match, evidence.class_name, here, picture, strongest)
    _draw_footer(draw, evidence, len(shown), bottom + GAP, canvas.width - 2 * MARGIN)
    return canvas


def draw_gallery(
    class_names: Sequence[str],
    anchors: Callable[[int, int], Anchor | None],
    source_of: SourceOf,
    num_classes: int,
    slots: int,
    per_class: int = 5,
) -> Image.Image:
    """What the prototypes of all classes stand for: each part beside the whole training picture that it comes from.

    Args:
        class_names: in label order.
        anchors: (class, prototype) to the anchor; None where the slot is not in use or was never pushed.
        source_of: (class, prototype) to the anchor's training picture, or a smaller copy, or None.
        num_classes: how many classes.
        slots: prototypes per class to ask ``anchors`` for.
        per_class: the most to show of one class, five to a line.

    Raises:
        InputError: ``per_class`` is below 1.
    """
    if per_class < 1:
        raise InputError(f"per_class is {per_class}; expected at least 1 prototype to show")
    found = [[(k, anchor) for k in range(slots) if (anchor := anchors(c, k)) is not None] for c in range(num_classes)]
    columns = min(COLUMNS, max([3, *(min(len(some), per_class) for some in found)]))
    pair = SMALL_PART + 6 + SMALL_SOURCE
    line = SMALL_PART + 64
    heights = [44 + (-(-min(len(some), per_class) // columns) * line or 44) + GAP for some in found]
    width = 2 * MARGIN + columns * pair + (columns - 1) * 2 * GAP
    top = 116
    canvas = Image.new("RGB", (width, top + sum(heights) + GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    write(draw, (MARGIN, 28), "Prototypes, and the training images that they come from", 28, width - 2 * MARGIN)
    legend = "Left the part, right its whole image; similarity is that of the prototype and the part."
    write(draw, (MARGIN, 70), legend, 16, width - 2 * MARGIN, MUTED)
    for c, some in enumerate(found):
        _draw_band(canvas, top, heights[c] - GAP, c, class_names[c], len(some), per_class)
        for place, (k, anchor) in enumerate(some[:per_class]):
            corner = (MARGIN + place % columns * (pair + 2 * GAP), top + 44 + place // columns * line)
            _draw_pair(canvas, corner, k, anchor, source_of(c, k), COLOURS[c % len(COLOURS)])
        top += heights[c]
    return canvas


# The panel's parts, from top to bottom.


def _draw_title(draw: ImageDraw.ImageDraw, explanation: Explanation, width: int) -> None:
    others = [f"{some.class_name} {_percent(some.probability)}" for some in explanation.classes[1:2]]
    runner_up = f"   |   runner-up: {others[0]}" if others else ""
    chance = _percent(explanation.probability)
    name = fit_text(explanation.predicted_name, 32, width - 320)
    write(draw, (MARGIN, 26), f"Predicted: {name}, {chance}", 32, width)
    file = fit_text(PurePath(explanation.file).name, 18, width * 0.6)
    write(draw, (MARGIN, 72), file + runner_up, 18, width, MUTED)


def _draw_headings(draw: ImageDraw.ImageDraw, x: int, y: int, class_name: str) -> None:
    write(draw, (MARGIN, y), "the image", 15, LEFT, MUTED, "ls")
    write(draw, (x, y), "this part", 15, PART, MUTED, "ls")
    write(draw, (x + PART + LOOKS, y), "that part", 15, PART, MUTED, "ls")
    write(draw, (x + 2 * PART + LOOKS + GAP, y), "of this training image", 15, SOURCE, MUTED, "ls")
    at = x + 2 * PART + LOOKS + SOURCE + 3 * GAP
    write(draw, (at, y), f"evidence for {class_name}", 15, TEXT, MUTED, "ls")


def _large(explanation: Explanation, image: Image.Image, shown: Sequence[Match], height: int) -> Image.Image:
    """The picture with the numbered boxes of the matches; boxes of the same cell lie within each other."""
    large = resized(image, LEFT, height)
    boxes = [scaled(match.box, explanation.image_size, large.size) for match in shown]
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        inset = max(0, min(4 * boxes[:i].count(boxes[i]), (min(x1 - x0, y1 - y0) - 8) // 2))
        alone = boxes.count(boxes[i]) == 1
        draw_box(large, (x0 + inset, y0 + inset, x1 - inset, y1 - inset), COLOURS[i % len(COLOURS)], 3 if alone else 2)
    draw, placed = ImageDraw.Draw(large), list[Rect]()
    for i, box in enumerate(boxes):
        placed.append(_free_place(box, boxes, placed, large.size))
        _draw_badge(draw, placed[-1], i)
    return large


BADGE = 24


def _free_place(box: Rect, boxes: Sequence[Rect], placed: Sequence[Rect], size: tuple[int, int]) -> Rect:
    """Where to put a box's number: beside it, over no other number, over as little of the boxes as can be."""
    x0, y0, x1, y1 = box
    steps = [i * (BADGE + 1) for i in range(8)]
    along = [x0 + step for step in steps if step < max(x1 - x0, BADGE + 2)]  # a small cell has room for two
    down = [y0 + step for step in steps if step < max(y1 - y0, BADGE + 2)]
    places = [(x, y) for y in (y0 - BADGE - 2, y1 + 2) for x in along]
    places += [(x, y) for x in (x1 + 2, x0 - BADGE - 2) for y in down] + [(x, y) for y in down for x in along]
    inside = [
        (x, y, x + BADGE, y + BADGE)
        for x, y in places
        if x >= 0 and y >= 0 and x + BADGE <= size[0] and y + BADGE <= size[1]
    ]
    cost = {
        place: 9 * sum(_overlap(place, other) for other in placed) + sum(_overlap(place, other) for other in boxes)
        for place in inside
    }
    return min(inside, key=lambda place: cost[place], default=(x0, y0, x0 + BADGE, y0 + BADGE))


def _overlap(a: Rect, b: Rect) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _draw_badge(draw: ImageDraw.ImageDraw, at: Rect, number: int) -> None:
    colour = COLOURS[number % len(COLOURS)]
    x, y = round(at[0]), round(at[1])
    draw.rectangle((x, y, x + BADGE - 1, y + BADGE - 1), fill=colour, outline=(0, 0, 0))
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 130
    write(draw, (x + BADGE / 2, y + BADGE / 2), str(number + 1), 16, BADGE, INK if bright else PAPER, "mm")


def _draw_classes(draw: ImageDraw.ImageDraw, classes: Sequence[ClassEvidence], top: int) -> None:
    for i, some in enumerate(classes):
        y = top + i * 38
        write(draw, (MARGIN, y), some.class_name, 16, 200, INK, "lm")
        draw.rectangle((MARGIN + 216, y - 9, MARGIN + LEFT - 160, y + 9), fill=TILE)
        length = round((LEFT - 376) * some.probability)
        draw.rectangle((MARGIN + 216, y - 9, MARGIN + 216 + length, y + 9), fill=MUTED)
        write(draw, (MARGIN + LEFT - 88, y), _percent(some.probability), 16, 72, INK, "rm")
        write(draw, (MARGIN + LEFT, y), f"logit {_number(some.logit)}", 13, 86, MUTED, "rm")


def _draw_row(
    canvas: Image.Image,
    corner: tuple[int, int],
    number: int,
    match: Match,
    class_name: str,
    here: Image.Image,
    picture: Image.Image | None,
    strongest: float,
) -> None:
    """One prototype: the part, the part that it looks like, its training picture, and the numbers."""
    x, y = corner
    draw, colour = ImageDraw.Draw(canvas), COLOURS[number % len(COLOURS)]
    canvas.paste(here, (x, y))
    write(draw, (x + PART + LOOKS / 2, y + PART / 2), "looks like", 16, LOOKS - 4, INK, "mm")
    x += PART + LOOKS
    part, whole = _part_and_whole(picture, match.anchor, colour, PART, SOURCE)
    canvas.paste(part, (x, y))
    canvas.paste(whole, (x + PART + GAP, y))
    x, y = x + PART + SOURCE + 3 * GAP, y + 10
    _draw_badge(draw, (x, y, x + BADGE, y + BADGE), number)
    name = fit_text(class_name, 20, TEXT - BADGE - 80)
    write(draw, (x + BADGE + 10, y + BADGE / 2), f"{name} #{match.prototype}", 20, TEXT - BADGE - 10, INK, "lm")
    write(draw, (x, y + 38), _file_name(match.anchor), 15, TEXT, MUTED)
    write(draw, (x, y + 60), _likeness(match.anchor), 15, TEXT, MUTED)
    numbers = f"similarity {_number(match.similarity)}  x  weight {_number(match.weight)}"
    write(draw, (x, y + 92), numbers, 16, TEXT)
    length = round((TEXT - 76) * abs(match.contribution) / strongest) if strongest else 0
    fill = colour if match.contribution >= 0 else PAPER  # hollow: it speaks against
    draw.rectangle((x, y + 124, x + max(length, 1), y + 144), fill=fill, outline=INK)
    write(draw, (x + length + 10, y + 134), f"{match.contribution:+.2f}", 18, 70, INK, "lm")


def _draw_footer(draw: ImageDraw.ImageDraw, evidence: ClassEvidence, shown: int, y: int, width: int) -> None:
    some = sum(match.contribution for match in evidence.matches[:shown])
    rest = sum(match.contribution for match in evidence.matches[shown:])
    name = fit_text(evidence.class_name, 17, 300)
    text = (
        f"Shown {shown} of {len(evidence.matches)} prototypes of {name}: their contributions sum to {_number(some)};  "
        + (f"the rest {_number(rest)};  " if shown < len(evidence.matches) else "")
        + f"bias {_number(evidence.bias)};  logit {_number(evidence.logit)}."
    )
    draw.line((MARGIN, y - 4, MARGIN + width, y - 4), fill=RULE)
    write(draw, (MARGIN, y + 10), text, 17, width)
    write(draw, (MARGIN, y + 38), "Boxes show the grid cell; the model's receptive field is larger.", 14, width, MUTED)


# The gallery's parts.


def _draw_band(canvas: Image.Image, top: int, height: int, c: int, name: str, found: int, per_class: int) -> None:
    draw, width = ImageDraw.Draw(canvas), canvas.width - 2 * MARGIN
    draw.line((MARGIN, top, MARGIN + width, top), fill=RULE)
    draw.rectangle((MARGIN, top + 12, MARGIN + 7, top + 32), fill=COLOURS[c % len(COLOURS)])
    write(draw, (MARGIN + 18, top + 22), name, 21, width - 360, INK, "lm")
    count = f"{min(found, per_class)} of {found} prototypes" if found > per_class else f"{found} prototypes"
    write(draw, (MARGIN + width, top + 22), "1 prototype" if found == 1 else count, 15, 320, MUTED, "rm")
    if not found:
        write(draw, (MARGIN + 18, top + 60), "None stands for a training image yet.", 15, width, MUTED, "lm")


def _draw_pair(
    canvas: Image.Image, corner: tuple[int, int], k: int, anchor: Anchor, picture: Image.Image | None, colour: Colour
) -> None:
    x, y = corner
    width = SMALL_PART + 6 + SMALL_SOURCE
    part, whole = _part_and_whole(picture, anchor, colour, SMALL_PART, SMALL_SOURCE)
    canvas.paste(part, (x, y))
    canvas.paste(whole, (x + SMALL_PART + 6, y))
    draw = ImageDraw.Draw(canvas)
    write(draw, (x, y + SMALL_PART + 8), f"#{k}  {_file_name(anchor)}", 15, width)
    write(draw, (x, y + SMALL_PART + 29), f"similarity {_number(anchor.similarity_after)}", 14, width, MUTED)


def _part_and_whole(
    picture: Image.Image | None, anchor: Anchor | None, colour: Colour, height: int, width: int
) -> tuple[Image.Image, Image.Image]:
    """Two tiles: an anchor's part (height x height) and its whole picture (width x height)."""
    if picture is None or anchor is None:
        words = "no picture" if anchor is not None else "not pushed yet"
        return empty_tile(height, height, words), empty_tile(width, height, words)
    picture = picture.convert("RGB")
    if anchor.box is None:
        return empty_tile(height, height, "place unknown"), tile(resized(picture, width, height), width, height, 0)
    whole = resized(picture, width, height)
    original = anchor.image_size or picture.size
    draw_box(whole, scaled(anchor.box, original, whole.size), colour, line=2)
    part = part_tile(picture, scaled(anchor.box, original, picture.size), colour, height)
    return part, tile(whole, width, height, 0)


def _file_name(anchor: Anchor | None) -> str:
    if anchor is None:
        return "no training image yet"
    name = PurePath(anchor.file).name if anchor.file is not None else f"sample {anchor.sample_id}"
    return name if anchor.verified else f"{name} (unverified)"


def _likeness(anchor: Anchor | None) -> str:
    """Silent where the prototype is the part itself, as after a hard push."""
    if anchor is None or anchor.similarity_after > 0.995:
        return ""
    return f"its similarity to the prototype: {_number(anchor.similarity_after)}"


def _percent(probability: float) -> str:
    if 0.9995 <= probability < 1:
        return ">99.9%"
    return "<0.1%" if 0 < probability < 0.0005 else f"{100 * probability:.1f}%"


def _number(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # + 0.0: never "-0.00"
