"""What pictures are made of: boxes, tiles, words. Pillow only.

Pages are made of blocks: pictures on paper, one beside or above the other, so that nothing can lie over anything.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Rect = tuple[float, float, float, float]

# Okabe and Ito's colours for the colour-blind (2008), in an order in which neighbours differ in brightness too.
COLOURS: tuple[Colour, ...] = (
    (0, 114, 178), (240, 228, 66), (213, 94, 0), (0, 158, 115), (86, 180, 233), (204, 121, 167), (230, 159, 0),
)  # fmt: skip
INK, MUTED, RULE, TILE, PAPER = (27, 31, 36), (87, 96, 106), (208, 215, 222), (240, 242, 245), (255, 255, 255)


def draw_box(picture: Image.Image, box: Rect, colour: Colour, line: int = 3) -> None:
    """Frame a box (x0, y0, x1, y1; x1 and y1 exclusive) of an RGB picture, in place.

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
    for out, ink in ((2, (0, 0, 0)), (1, (255, 255, 255))):
        draw.rectangle((x0 - out, y0 - out, x1 + out, y1 + out), outline=ink)
    draw.rectangle((x0, y0, x1, y1), outline=colour, width=line)


def fit_text(text: str, size: int, width: float) -> str:
    """The text on one line, its middle replaced by an ellipsis where it is wider than ``width`` pixels.

    The end stays because names of files and classes often differ there.

    Example:
        >>> fit_text("a_very_long_name_of_an_image_0024306.jpg", 16, 200)
        'a_very_long_...0024306.jpg'
    """
    text = printable(text)
    font = _font(size, text)
    if font.getlength(text) <= width:
        return text

    def cut(keep: int) -> str:
        return text[: (keep + 1) // 2] + "..." + text[len(text) - keep // 2 :]

    fitting = bisect_right(range(len(text)), width, key=lambda keep: font.getlength(cut(keep)))
    return cut(max(fitting - 1, 0))


def wrapped(text: str, size: int, width: float, most: int) -> list[str]:
    """The text on at most so many lines, broken between words; what has no room is cut as in :func:`fit_text`.

    Example:
        >>> wrapped("hiding the outlined part takes it away", 16, 150, most=2)
        ['hiding the outlined', 'part takes it away']
    """
    lines, left = list[str](), printable(text).split()
    while left and len(lines) < most - 1:
        fitting = (n for n in range(len(left), 1, -1) if text_width(" ".join(left[:n]), size) <= width)
        taken = next(fitting, 1)
        lines.append(fit_text(" ".join(left[:taken]), size, width))
        left = left[taken:]
    return [*lines, fit_text(" ".join(left), size, width)] if left else lines


def text_width(text: str, size: int) -> float:
    """The width of one line of text in pixels."""
    text = printable(text)
    return _font(size, text).getlength(text)


def printable(text: str) -> str:
    """The text on one line, without what would turn or break it: names of files and classes may hold anything."""
    return "".join(" " if letter.isspace() else letter if letter.isprintable() else "?" for letter in text)


def part_tile(picture: Image.Image, box: Rect, colour: Colour, side: int) -> Image.Image:
    """A square tile: the box, framed, with half its size around it on every side where the picture has that."""
    reach = 2 * max(box[2] - box[0], box[3] - box[1])
    starts, spans = [], []
    for low, high, limit in ((box[0], box[2], picture.width), (box[1], box[3], picture.height)):
        spans.append(min(reach, limit))
        starts.append(min(max((low + high - spans[-1]) / 2, 0), limit - spans[-1]))
    scale = side / max(spans)
    size = (max(1, round(spans[0] * scale)), max(1, round(spans[1] * scale)))
    seen = (starts[0], starts[1], starts[0] + spans[0], starts[1] + spans[1])
    crop = picture.resize(size, Image.Resampling.BICUBIC, box=seen)
    shifted = (box[0] - seen[0], box[1] - seen[1], box[2] - seen[0], box[3] - seen[1])
    draw_box(crop, scaled(shifted, (spans[0], spans[1]), size), colour)
    return tile(crop, side, side)


def resized(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The picture as large as it can be within width x height, its aspect ratio kept."""
    scale = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def scaled(box: Rect, size: tuple[float, float], to: tuple[float, float]) -> Rect:
    """A box of a picture of one (width, height), in the same picture of another."""
    x, y = to[0] / size[0], to[1] / size[1]
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def tile(picture: Image.Image, width: int, height: int, along: float = 0.5) -> Image.Image:
    """The picture on paper: ``along`` is 0 for the left side, 0.5 for the middle."""
    tile = Image.new("RGB", (width, height), PAPER)
    tile.paste(picture, (round((width - picture.width) * along), (height - picture.height) // 2))
    return tile


def empty_tile(width: int, height: int, words: str, size: int = 14) -> Image.Image:
    """A grey tile with a few words, where there is no picture; ``size`` is that of the text."""
    blank = Image.new("RGB", (width, height), TILE)
    draw = ImageDraw.Draw(blank)
    draw.rectangle((0, 0, width - 1, height - 1), outline=RULE)
    lines = wrapped(words, size, width - 12, most=3)
    for i, line in enumerate(lines):
        write(draw, (width / 2, height / 2 + (i - (len(lines) - 1) / 2) * 1.35 * size), line, size, width, MUTED, "mm")
    return blank


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    width: float,
    fill: Colour = INK,
    anchor: str = "la",
) -> None:
    """One line of text, at most ``width`` pixels wide; ``anchor`` as in Pillow's ``ImageDraw.text``."""
    draw.text(at, fit_text(text, size, width), font=_font(size, printable(text)), fill=fill, anchor=anchor)


# Pillow's own font knows little more than ASCII. Matplotlib's, which is there, has the rest of Europe; for Chinese,
# Japanese and Korean names the usual fonts of Linux, Windows and macOS are tried, wherever Pillow finds them.
_WIDER = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-zenhei.ttc",
    "msyh.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
)


def _font(size: int, text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's font, or one that has the text's characters, where there is one."""
    if text.isascii():
        return _font_of("", size)
    for name in _WIDER:
        with suppress(OSError):
            font = _font_of(name, size)
            if isinstance(font, ImageFont.FreeTypeFont) and _has(font, text):
                return font
    return _font_of("", size)


@lru_cache(maxsize=64)
def _font_of(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if not name:
        return ImageFont.load_default(size)
    package = find_spec("matplotlib")
    own = (
        Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / name if package and package.origin else Path(name)
    )
    return ImageFont.truetype(str(own) if own.is_file() else name, size)


def _has(font: ImageFont.FreeTypeFont, text: str) -> bool:
    missing = bytes(font.getmask("\uffff"))
    return all(bytes(font.getmask(letter)) != missing for letter in set(text) if not letter.isspace())


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
