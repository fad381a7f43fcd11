"""What a row about one prototype is made of: the tiles of its training image, its numbers, its bar, its words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath
from typing import NamedTuple

from PIL import Image, ImageDraw

from protopush.explain.checked_region import Region
from protopush.explain.drawing import (
    INK,
    MUTED,
    PAPER,
    Colour,
    Look,
    above,
    draw_box,
    empty_tile,
    fit_text,
    part_tile,
    resized,
    scaled,
    space,
    tile,
    words,
    write,
)
from protopush.explain.explanation import ClassEvidence, Explanation, Match
from protopush.explain.overlay import colour, draw_badge
from protopush.nn.prototypes import Anchor

SourceOf = Callable[[int, int], Image.Image | None]


def part_and_whole(
    picture: Image.Image | None, anchor: Anchor | None, ink: Colour, side: int, text: int
) -> tuple[Image.Image, Image.Image]:
    """Two square tiles: an anchor's part, and its whole picture.

    Args:
        picture: the anchor's training picture, or a smaller copy, or None.
        anchor: None where there was no push yet.
        ink: of the boxes.
        side: of a tile.
        text: the size of the words where there is no picture.
    """
    if picture is None or anchor is None:
        blank = empty_tile(side, side, "no picture" if anchor is not None else "not pushed yet", text)
        return blank, blank
    picture = picture.convert("RGB")
    whole = resized(picture, side, side)
    if anchor.box is None:
        return empty_tile(side, side, "place unknown", text), tile(whole, side, side)
    original = anchor.image_size or picture.size
    draw_box(whole, scaled(anchor.box, original, whole.size), ink, line=2)
    part = part_tile(picture, scaled(anchor.box, original, picture.size), ink, side)
    return part, tile(whole, side, side)


class Rows(NamedTuple):
    """What all rows of a page share.

    Attributes:
        explanation: of the picture.
        image: RGB, the upright original or a smaller copy.
        source_of: (class, prototype) to the training picture of its anchor, or a smaller copy, or None.
        longest: the contribution whose bar fills its width.
        look: sizes.
    """

    explanation: Explanation
    image: Image.Image
    source_of: SourceOf
    longest: float
    look: Look

    def tiles(self, match: Match, number: int, side: int) -> tuple[Image.Image, Image.Image, Image.Image]:
        """This part of the picture, that part of the training picture, and the training picture."""
        picture = self.source_of(match.class_index, match.prototype) if match.anchor is not None else None
        box = scaled(match.box, self.explanation.image_size, self.image.size)
        here = part_tile(self.image, box, colour(number), side)
        return here, *part_and_whole(picture, match.anchor, colour(number), side, self.look.small)

    def heading(self, match: Match, class_name: str, number: int, width: int) -> Image.Image:
        """A match's number in its colour, its class and slot."""
        badge, size = self.look.badge, self.look.head
        block = space(width, badge + self.look.gap // 2)
        draw = ImageDraw.Draw(block)
        draw_badge(draw, (0, 0), number, badge)
        room = width - badge - 10
        name = fit_text(class_name, size, room - 3 * size)  # the slot stays, however long the name
        write(draw, (badge + 10, badge / 2), f"{name} #{match.prototype}", size, room, INK, "lm")
        return block

    def words(self, match: Match, number: int, width: int, region: Region | None = None) -> Image.Image:
        """A match in words and numbers, with its contribution as a bar, and what hiding its region showed."""
        look = self.look
        lines = [words(file_name(match.anchor), look.small, width, MUTED)]
        if likeness(match.anchor):
            lines.append(words(likeness(match.anchor), look.small, width, MUTED, most=2))
        product = f"similarity {decimal(match.similarity)}  x  weight {decimal(match.weight)}"
        lines += [words(product, look.body, width, most=2), self._bar(match.contribution, number, width)]
        if region is not None:
            lines.append(words(region_words(region), look.small, width, most=4))
        return above(lines, look.gap // 4)

    def _bar(self, contribution: float, number: int, width: int) -> Image.Image:
        size = self.look.body
        block = space(width, size + 4 + self.look.gap // 2)
        room = 4 * size
        length = max(round((width - room) * abs(contribution) / self.longest), 1) if self.longest else 1
        fill = colour(number) if contribution >= 0 else PAPER  # hollow: it speaks against
        draw = ImageDraw.Draw(block)
        draw.rectangle((0, 0, length, size + 3), fill=fill, outline=INK)
        write(draw, (length + 8, size / 2 + 2), f"{contribution:+.2f}", size, room - 8, INK, "lm")
        return block


def strongest(*classes: ClassEvidence) -> float:
    """The largest contribution, for or against: what the bars are measured by."""
    return max((abs(match.contribution) for evidence in classes for match in evidence.matches), default=0.0)


def region_words(region: Region) -> str:
    """What hiding a region showed.

    Example:
        >>> region_words(Region(0, 1, [(0, 0, 8, 8)], 0.06, 1.0, 0.81, 0.42, 0.1, True))
        'hiding the outlined 6% (100% of it in the box) takes the similarity from 0.81 to 0.42'
    """
    if not region.reached:
        return f"no region explains it: the blurred picture is as similar ({decimal(region.blurred)})"
    share = f"{100 * region.share:.0f}%" if region.share >= 0.01 else "<1%"
    before, after = decimal(region.similarity), decimal(region.hidden)
    if before == after:
        blurred = decimal(region.blurred)
        return f"hiding the outlined {share} hardly matters: the blurred picture is as similar ({blurred})"
    inside = "" if region.in_box is None else f" ({100 * region.in_box:.0f}% of it in the box)"
    return f"hiding the outlined {share}{inside} takes the similarity from {before} to {after}"


def file_name(anchor: Anchor | None) -> str:
    """Of an anchor's training image, in short."""
    if anchor is None:
        return "no training image yet"
    name = PurePath(anchor.file).name if anchor.file is not None else f"sample {anchor.sample_id}"
    return name if anchor.verified else f"{name} (unverified)"


def likeness(anchor: Anchor | None) -> str:
    """Of an anchor and its prototype; silent where the prototype is the part itself, as after a hard push."""
    if anchor is None or anchor.similarity_after > 0.995:
        return ""
    return f"its similarity to the prototype: {decimal(anchor.similarity_after)}"


def percent(probability: float) -> str:
    """A probability for people.

    Example:
        >>> percent(0.6081), percent(0.99999), percent(0.00001), percent(0)
        ('60.8%', '>99.9%', '<0.1%', '0.0%')
    """
    if 0.9995 <= probability < 1:
        return ">99.9%"
    return "<0.1%" if 0 < probability < 0.0005 else f"{100 * probability:.1f}%"


def decimal(value: float) -> str:
    """Two digits after the point.

    Example:
        >>> decimal(-0.001), decimal(-1.5)
        ('0.00', '-1.50')
    """
    return f"{round(value, 2) + 0.0:.2f}"  # + 0.0: never "-0.00"
