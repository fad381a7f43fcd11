"""Pages are made of blocks: pictures on paper, one beside or above the other, so that nothing can lie over anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from protopush.explain.drawing import INK, PAPER, RULE, Colour, wrapped, write


class Look(NamedTuple):
    """The sizes of a page, in pixels.

    Attributes:
        width: of the page.
        margin: around it.
        gap: between blocks.
        title, head, body, small: sizes of text.
        side: of a tile in the panel.
        badge: side of a box's number.
        narrow: whether things stack.
    """

    width: int
    margin: int
    gap: int
    title: int
    head: int
    body: int
    small: int
    side: int
    badge: int
    narrow: bool

    @property
    def content(self) -> int:
        """The width between the margins."""
        return self.width - 2 * self.margin


WIDE = Look(1480, 32, 12, title=32, head=20, body=16, small=15, side=152, badge=24, narrow=False)
NARROW = Look(800, 24, 16, title=38, head=28, body=24, small=22, side=240, badge=36, narrow=True)  # 2x of a phone's 400


def words(text: str, size: int, width: int, fill: Colour = INK, most: int = 1, along: float = 0.0) -> Image.Image:
    """A block of text, on at most so many lines; ``along`` is 0 for the left, 0.5 for the middle, 1 for the right."""
    lines = wrapped(text, size, width, most)
    line = line_height(size)
    block = Image.new("RGB", (width, max(1, line * len(lines))), PAPER)
    draw, anchor = ImageDraw.Draw(block), {0.0: "lm", 0.5: "mm", 1.0: "rm"}[along]
    for i, text in enumerate(lines):
        write(draw, (width * along, (i + 0.5) * line), text, size, width, fill, anchor)
    return block


def line_height(size: int) -> int:
    """From one line of text to the next."""
    return round(1.35 * size)


def beside(blocks: Sequence[Image.Image], gap: int, across: float = 0.0) -> Image.Image:
    """Blocks from left to right; ``across`` is 0 for tops on a line, 0.5 for middles."""
    height = max((block.height for block in blocks), default=1)
    row = Image.new("RGB", (max(1, sum(block.width + gap for block in blocks) - gap), height), PAPER)
    x = 0
    for block in blocks:
        row.paste(block, (x, round((height - block.height) * across)))
        x += block.width + gap
    return row


def above(blocks: Sequence[Image.Image], gap: int) -> Image.Image:
    """Blocks from top to bottom, their left sides on a line."""
    width = max((block.width for block in blocks), default=1)
    column = Image.new("RGB", (width, max(1, sum(block.height + gap for block in blocks) - gap)), PAPER)
    y = 0
    for block in blocks:
        column.paste(block, (0, y))
        y += block.height + gap
    return column


def space(width: int, height: int) -> Image.Image:
    """Empty paper."""
    return Image.new("RGB", (width, height), PAPER)


def rule(width: int, colour: Colour = RULE, thick: int = 1) -> Image.Image:
    """A line from left to right."""
    return Image.new("RGB", (width, thick), colour)


def framed(block: Image.Image, colour: Colour, pad: int, line: int = 2) -> Image.Image:
    """A block within a frame that is ``pad`` pixels away."""
    out = pad + line
    whole = Image.new("RGB", (block.width + 2 * out, block.height + 2 * out), PAPER)
    ImageDraw.Draw(whole).rectangle((0, 0, whole.width - 1, whole.height - 1), outline=colour, width=line)
    whole.paste(block, (out, out))
    return whole


def page(blocks: Sequence[Image.Image], look: Look) -> Image.Image:
    """Blocks from top to bottom within the margins."""
    body = above(blocks, look.gap)
    whole = Image.new("RGB", (look.width, body.height + 2 * look.margin), PAPER)
    whole.paste(body, (look.margin, look.margin))
    return whole
