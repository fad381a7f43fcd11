"""The canvas of all pictures: the page, parts and whole pictures, maps and boxes over them; each resampled once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from protopush.data.transforms import Box, View
from protopush.explain import figure_style as style
from protopush.explain.figure_style import INK, MUTED, PAPER, RULE, TILE, Colour, Map, Rect
from protopush.nn.prototypes import Anchor


class Crop(NamedTuple):
    """The crop of a local prototype, where its training picture is not shared."""

    picture: Image.Image


Source = Image.Image | Crop | None
"""What a prototype is drawn from: its training picture, or a smaller copy; its crop; or nothing."""
SourceOf = Callable[[int, int], Source]


class Page:
    """Paper of a fixed width that grows downwards. Each call draws at a place and returns the y below what it drew."""

    def __init__(self, sizes: style.Sizes) -> None:
        self.sizes = sizes
        self.paper = Image.new("RGB", (sizes.width, 1), PAPER)

    def _reach(self, bottom: int) -> ImageDraw.ImageDraw:
        if bottom > self.paper.height:
            longer = Image.new("RGB", (self.sizes.width, 2 * bottom), PAPER)
            longer.paste(self.paper)
            self.paper = longer
        return ImageDraw.Draw(self.paper)

    def text(
        self, x: int, y: int, text: str, size: int, width: int, ink: Colour = INK, most: int = 1, along: float = 0.0
    ) -> int:
        """Text on at most so many lines; ``along`` is 0 for the left, 0.5 for the middle, 1 for the right."""
        lines, step = style.wrapped(text, size, width, most), round(1.35 * size)
        draw, anchor = self._reach(y + step * len(lines)), "lmr"[round(2 * along)] + "m"
        for i, line in enumerate(lines):
            font = style.font_of(line, size)
            start = max(0, -font.getbbox(line)[0]) if along == 0 else 0  # a T or j begins left of its place
            at = (x + width * along + start, y + (i + 0.5) * step)
            draw.text(at, line, fill=ink, font=font, anchor=anchor)
        return y + step * len(lines)

    def note(self, x: int, y: int, text: str, width: int, most: int = 1, along: float = 0.0) -> int:
        """Small grey text."""
        return self.text(x, y, text, self.sizes.small, width, MUTED, most, along)

    def picture(self, x: int, y: int, picture: Image.Image) -> int:
        """A picture, pixel by pixel."""
        self._reach(y + picture.height)
        self.paper.paste(picture, (x, y))
        return y + picture.height

    def columns(self, x: int, y: int, things: Sequence[Image.Image | str], width: int, gap: int) -> int:
        """Pictures, or small words, in columns of one width."""
        bottom = y
        for left, thing in zip(range(x, x + len(things) * (width + gap), width + gap), things, strict=True):
            one = self.note(left, y, thing, width) + 4 if isinstance(thing, str) else self.picture(left, y, thing)
            bottom = max(bottom, one)
        return bottom

    def bar(self, x: int, y: int, width: int, height: int, fill: Colour | None, outline: Colour | None = None) -> int:
        """A rectangle; a frame where nothing fills it."""
        draw, bottom = self._reach(y + height), y + height
        if width > 0:
            draw.rectangle((x, y, x + width - 1, bottom - 1), fill, outline, width=1 if fill else 2)
        return bottom

    def rule(self, y: int) -> int:
        """A line from margin to margin."""
        return self.bar(self.sizes.margin, y, self.sizes.content, 1, RULE) + self.sizes.gap

    def done(self, bottom: int) -> Image.Image:
        """The page down to its margin."""
        self._reach(bottom + self.sizes.margin)
        return self.paper.crop((0, 0, self.sizes.width, bottom + self.sizes.margin))


def draw_badge(picture: Image.Image, corner: Sequence[float], number: int, side: int) -> None:
    """Draw a match's number, from 0, in its colour, into a picture."""
    draw = ImageDraw.Draw(picture)
    (x, y), fill, text = (round(corner[0]), round(corner[1])), style.colour(number), str(number + 1)
    bright = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 130
    font = style.font_of(text, round(side * (0.66 if len(text) < 3 else 0.45)))
    draw.rectangle((x, y, x + side - 1, y + side - 1), fill=fill, outline=(0, 0, 0))
    draw.text((x + side / 2, y + side / 2), text, font=font, fill=INK if bright else PAPER, anchor="mm")


def draw_box(picture: Image.Image, box: Rect, ink: Colour, line: int = 3) -> None:
    """Frame a box of an RGB picture, in place.

    The colour lies on the outermost pixels of the box, with a white and a black line around it: on any picture one of
    the three stands out, and what is in the box stays free.

    Example:
        >>> picture = Image.new("RGB", (40, 40))
        >>> draw_box(picture, (10, 10, 30, 30), (0, 114, 178))
        >>> picture.getpixel((10, 29)), picture.getpixel((9, 29)), picture.getpixel((20, 20))
        ((0, 114, 178), (255, 255, 255), (0, 0, 0))
    """
    draw = ImageDraw.Draw(picture)
    x0, y0, x1, y1 = (round(edge) for edge in box)
    x1, y1 = max(x1 - 1, x0), max(y1 - 1, y0)
    for out, around in ((2, (0, 0, 0)), (1, (255, 255, 255))):
        draw.rectangle((x0 - out, y0 - out, x1 + out, y1 + out), outline=around)
    draw.rectangle((x0, y0, x1, y1), outline=ink, width=line)


def draw_sees(picture: Image.Image, box: Rect, sees: Rect | None, ink: Colour) -> None:
    """Frame, in a thin line, all that was seen for a box, where that is more than it and not the whole picture."""
    if sees is not None and sees != box:
        draw_thin(picture, sees, ink)


def draw_thin(picture: Image.Image, box: Rect, ink: Colour) -> None:
    """Frame a box in a thin line."""
    x0, y0, x1, y1 = (round(edge) for edge in box)
    for inset, around in ((0, ink), (1, PAPER)):
        x, y = max(x1 - 1 - inset, x0 + inset), max(y1 - 1 - inset, y0 + inset)
        ImageDraw.Draw(picture).rectangle((x0 + inset, y0 + inset, x, y), outline=around)


def resized(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The picture as large as it can be within width x height, its aspect ratio kept."""
    scale = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def tile(picture: Image.Image, side: int) -> Image.Image:
    """The picture in the middle of a square of paper."""
    square = Image.new("RGB", (side, side), PAPER)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def empty_tile(side: int, words: str, size: int) -> Image.Image:
    """A grey square with a few words, where there is no picture; ``size`` is that of the text."""
    square = Image.new("RGB", (side, side), TILE)
    draw, lines = ImageDraw.Draw(square), style.wrapped(words, size, side - 12, most=3)
    draw.rectangle((0, 0, side - 1, side - 1), outline=RULE)
    for i, line in enumerate(lines):
        at = (side / 2, side / 2 + (i - (len(lines) - 1) / 2) * 1.35 * size)
        draw.text(at, line, fill=MUTED, font=style.font_of(line, size), anchor="mm")
    return square


def part_tile(
    picture: Image.Image, box: Rect, ink: Colour, side: int, sees: Rect | None = None, share: float = 1.0
) -> Image.Image:
    """A square tile: the box, framed, with its surroundings (:func:`protopush.explain.figure_style.surroundings`).

    It fills ``share`` of the side.
    """
    shown = left, top, right, bottom = style.surroundings(box, picture.size, sees)
    wide, high = right - left, bottom - top
    scale = side * share / max(wide, high)
    size = (max(1, round(wide * scale)), max(1, round(high * scale)))
    crop = picture.resize(size, Image.Resampling.BICUBIC, box=shown)
    here, seen = (
        style.scaled((x0 - left, y0 - top, x1 - left, y1 - top), (wide, high), size)
        for x0, y0, x1, y1 in (box, sees or box)
    )
    draw_sees(crop, here, seen, ink)
    draw_box(crop, here, ink, 3 if sees is None else 2 if sees == box else 1)  # little is in the cell of a stage
    return tile(crop, side)


class Part(NamedTuple):
    """A part in a picture: its box there, and what it sees (:func:`protopush.explain.figure_style.drawn_sees`)."""

    picture: Image.Image
    box: Rect
    sees: Rect | None


def anchor_part(source: Source, anchor: Anchor | None, reach: str) -> Part | None:
    """The part that a prototype stands for, in its training picture or alone; None where there is none to draw.

    Args:
        source: of the prototype.
        anchor: None where there was no push yet.
        reach: what the model sees of a picture for a patch (:attr:`protopush.data.regions.Regions.reach`).
    """
    if source is None or anchor is None:
        return None
    if isinstance(source, Crop):
        box = 0, 0, *source.picture.size
        return Part(source.picture, box, box)
    if anchor.box is None:
        return None
    original = anchor.image_size or source.size
    sees = style.drawn_sees(anchor, reach, original, source.size)
    return Part(source.convert("RGB"), style.scaled(anchor.box, original, source.size), sees)


def part_and_whole(
    source: Source, anchor: Anchor | None, ink: Colour, side: int, text: int, reach: str = "all", share: float = 1.0
) -> tuple[Image.Image, Image.Image]:
    """Two square tiles: an anchor's part, and its whole picture.

    Args:
        source: what the prototype is drawn from.
        anchor: None where there was no push yet.
        ink: of the boxes.
        side: of a tile.
        text: the size of the words where there is no picture.
        reach: what the model sees of a picture for a patch (:attr:`protopush.data.regions.Regions.reach`).
        share: of its tile that the part fills.
    """
    if source is None or anchor is None:
        blank = empty_tile(side, "no picture" if anchor is not None else "not pushed yet", text)
        return blank, blank
    found = anchor_part(source, anchor, reach)
    part = empty_tile(side, "place unknown", text)
    if found is not None:
        part = part_tile(found.picture, found.box, ink, side, found.sees, share)
    if isinstance(source, Crop):
        return part, empty_tile(side, "whole image not shared", text)
    whole = resized(source.convert("RGB"), side, side)
    if found is not None:
        box = style.scaled(found.box, source.size, whole.size)
        draw_sees(whole, box, found.sees and style.scaled(found.sees, source.size, whole.size), ink)
        draw_box(whole, box, ink, line=2 if found.sees in (None, found.box) else 1)
    return part, tile(whole, side)


def with_map(picture: Image.Image, similarities: Map, view: View, even: bool = False) -> Image.Image:
    """A similarity map over its picture, from its lowest to its highest value, the denser the higher.

    The picture is grey below, so that every colour is the map's; what the model did not see is dark and hatched.

    Args:
        picture: the whole upright original, or a copy of any size.
        similarities: (rows, columns), the model's grid.
        view: the geometry of the original.
        even: up to the edges of the cells (:func:`protopush.explain.figure_style.upsampled`).

    Example:
        >>> grey = Image.new("RGB", (60, 20), (128, 128, 128))
        >>> shown = with_map(grey, [[0.0, 1.0]], View.of((300, 100), (200, 200)))
        >>> shown.getpixel((39, 10))  # yellow: the right side of the middle third
        (209, 195, 69)
    """
    values = style.upsampled(similarities, view, picture.size, even)
    low, high, hidden = np.min(similarities), np.max(similarities), np.isnan(values)
    layer = style.map_colours(np.nan_to_num((values - low) / max(high - low, 1e-9)).clip(0, 1))
    layer[hidden] = (0, 0, 0, 166)
    layer[hidden & _lines(hidden.shape)] = (160, 160, 160, 166)
    grey = picture.convert("L").convert("RGBA")
    return Image.alpha_composite(grey, Image.fromarray(layer)).convert("RGB")


def colour_bar(width: int, height: int) -> Image.Image:
    """The map's colours from the lowest value to the highest, as they are over a grey picture."""
    grey, size = Image.new("L", (width, height), 128), (height, width)
    return with_map(grey, [range(width)], View.of(grey.size, size))


def with_unseen(picture: Image.Image, view: View) -> Image.Image:
    """The whole picture, of any size, paler and hatched where the model did not see it."""
    hidden = np.isnan(style.upsampled([[0.0]], view, picture.size))
    shown = np.array(picture, dtype=np.float64)
    shown[hidden] = 0.5 * shown[hidden] + 0.5 * 255
    shown[hidden & _lines(hidden.shape)] *= 0.7
    return Image.fromarray(shown.round().astype(np.uint8))


def _lines(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Diagonals, as many whatever the size."""
    pitch = max(6, max(shape) // 24)
    lines: NDArray[np.bool_] = np.indices(shape).sum(axis=0) % pitch <= pitch // 10
    return lines


def with_outline(picture: Image.Image, boxes: Sequence[Box], size: tuple[int, int], line: int = 2) -> Image.Image:
    """The outline of the union of boxes, white between black lines; where boxes touch there is none.

    Args:
        picture: the whole upright original, or a copy of any size.
        boxes: in pixels of the original.
        size: (width, height) of the original.
        line: the white line's width in pixels.
    """
    shown, inside = picture.copy(), np.zeros(picture.size[::-1], dtype=np.uint8)
    for box in boxes:
        x0, y0, x1, y1 = (round(edge) for edge in style.scaled(box, size, picture.size))
        inside[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = 255
    for ink, grown, shrunk in (((0, 0, 0), 1, line + 1), ((255, 255, 255), 0, line)):
        wide, slim = _over_squares(inside, grown, np.max), _over_squares(inside, shrunk, np.min)
        shown.paste(ink, mask=Image.fromarray(wide & ~slim))
    return shown


def _over_squares(
    inside: NDArray[np.uint8], reach: int, extreme: Callable[..., NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """The extreme over a square around each pixel; beyond the picture nothing is inside: its edge is a border too."""
    found = np.pad(inside, reach)
    for axis in (0, 1):
        found = extreme(sliding_window_view(found, 2 * reach + 1, axis=axis), axis=-1)
    return found


def with_numbers(picture: Image.Image, boxes: Sequence[Rect], badge: int) -> Image.Image:
    """The picture with numbered boxes, in its pixels; equal boxes lie within each other, no number over another.

    Args:
        picture: RGB.
        boxes: numbered from 1 in this order.
        badge: side of a number in pixels.
    """
    shown, placed = picture.copy(), list[Rect]()
    for i, (x0, y0, x1, y1) in reversed([*enumerate(boxes)]):  # the outer over the inner: its lines lie outside
        others, room = boxes.count(boxes[i]) - 1, max(0, (min(x1 - x0, y1 - y0) - 8) / 2)
        inset = boxes[:i].count(boxes[i]) * min(4, room / max(others, 1))
        draw_box(shown, (x0 + inset, y0 + inset, x1 - inset, y1 - inset), style.colour(i), 2 if others else 3)
    for i, box in enumerate(boxes):
        places = _places(box, shown.size, badge)
        costs = [
            9 * sum(style.overlap(place, other) for other in placed) + sum(style.overlap(place, box) for box in boxes)
            for place in places
        ]
        placed.append(places[costs.index(min(costs))])
        draw_badge(shown, placed[-1][:2], i, badge)
    return shown


def _places(box: Rect, size: tuple[int, int], badge: int) -> list[Rect]:
    """Where the number of a box may stand: above, below, right or left of it, at last within; never off the picture."""
    x0, y0, x1, y1 = box
    steps = [i * (badge + 1) for i in range(8)]
    along = [x0 + step for step in steps if step < max(x1 - x0, badge + 2)]  # a small cell has room for two
    down = [y0 + step for step in steps if step < max(y1 - y0, badge + 2)]
    found = [(x, y) for y in (y0 - badge - 2, y1 + 2) for x in along]
    found += [(x, y) for x in (x1 + 2, x0 - badge - 2) for y in down] + [(x, y) for y in down for x in along]
    inside = [(x, y) for x, y in found if 0 <= x <= size[0] - badge and 0 <= y <= size[1] - badge]
    return [(x, y, x + badge, y + badge) for x, y in inside or [(x0, y0)]]
