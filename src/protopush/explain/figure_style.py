"""Numbers, words, fonts, colours and sizes: one way to write and to colour a thing, in pictures, report and app."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

from protopush.data.transforms import View
from protopush.nn.prototypes import Anchor

if TYPE_CHECKING:
    from protopush.explain.checked_region import Region
    from protopush.explain.explanation import Match

Colour = tuple[int, int, int]
Rect = tuple[float, float, float, float]  # x0, y0, x1, y1; x1 and y1 exclusive
Map = Sequence[Sequence[float]]  # similarities, rows of the model's grid

# Okabe and Ito's colours for the colour-blind (2008), in an order in which neighbours differ in brightness too.
COLOURS: tuple[Colour, ...] = (
    (0, 114, 178), (240, 228, 66), (213, 94, 0), (0, 158, 115), (86, 180, 233), (204, 121, 167), (230, 159, 0),
)  # fmt: skip
INK, MUTED, RULE, TILE, PAPER = (27, 31, 36), (87, 96, 106), (208, 215, 222), (240, 242, 245), (255, 255, 255)

# Viridis (Smith and van der Walt, 2015), perceptually uniform and safe for the colour-blind, at 17 even steps; linear
# between them it differs from the full table by at most 5 levels of 255.
_VIRIDIS = np.array(
    [
        [68, 72, 71, 66, 59, 51, 44, 38, 33, 31, 40, 63, 94, 132, 173, 216, 253],
        [1, 24, 45, 64, 82, 99, 114, 130, 145, 160, 174, 188, 201, 212, 220, 226, 231],
        [84, 106, 123, 134, 139, 141, 142, 142, 140, 136, 128, 115, 98, 75, 48, 25, 37],
    ]
)
OPACITY = 0.25, 0.65  # how much of the picture a map hides where the similarity is lowest and highest


def map_colours(even: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The colours of a similarity map and how much they hide.

    Args:
        even: values of any shape, 0 for the lowest similarity of the map and 1 for its highest.

    Returns:
        uint8 RGBA (..., 4).

    Example:
        >>> map_colours(np.array([0.0, 1.0])).tolist()
        [[68, 1, 84, 64], [253, 231, 37, 166]]
    """
    steps = np.linspace(0, 1, _VIRIDIS.shape[1])
    colours = [np.interp(even, steps, channel) for channel in _VIRIDIS]
    return np.stack([*colours, 255 * np.interp(even, (0, 1), OPACITY)], axis=-1).round().astype(np.uint8)


def upsampled(
    similarities: Map, view: View, size: tuple[int, int] | None = None, even: bool = False
) -> NDArray[np.float32]:
    """A similarity map over the original picture, bilinear, as ProtoPNet (Chen et al., 2019) draws it.

    The values stand at the centres of the cells; beyond the outer centres the nearest one holds. What resizing and the
    centre crop did is undone: where the model saw nothing, the value is NaN.

    Args:
        similarities: (rows, columns).
        view: the geometry of the picture.
        size: (width, height) of the result, the original's by default; a smaller copy of it has the same map.
        even: each cell has its value up to its edges: of windows, each pixel the largest of those that cover it.

    Returns:
        float32 (height, width).

    Example:
        >>> wide = View.of((300, 100), (200, 200))
        >>> upsampled([[0.0, 1.0]], wide, size=(6, 2))
        array([[nan, nan,  0.,  1., nan, nan],
               [nan, nan,  0.,  1., nan, nan]], dtype=float32)
    """
    values = np.asarray(similarities, dtype=np.float64)
    width, height = size or view.original
    across = _weights(width, values.shape[1], view, 0, even)
    down = _weights(height, values.shape[0], view, 1, even)
    return (down @ values @ across.T).astype(np.float32)


def _weights(pixels: int, cells: int, view: View, axis: int, even: bool) -> NDArray[np.float64]:
    """How much of each cell's value is in each pixel along an axis, (pixels, cells); NaN where nothing was seen."""
    resized = (np.arange(pixels) + 0.5) * view.resized[axis] / pixels  # centres of the pixels, in the resized picture
    seen = resized - view.offset[axis]
    place = seen * cells / view.crop[axis]
    place = (np.floor(place) if even else place - 0.5).clip(0, cells - 1)
    weights = np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(cells)))
    weights[(seen < 0) | (seen > view.crop[axis])] = np.nan
    return weights


def unseen_share(view: View) -> float:
    """The share of the original picture that the model did not see.

    Example:
        >>> round(unseen_share(View.of((300, 100), (200, 200))), 2)
        0.67
    """
    seen = view.crop[0] * view.crop[1] / (view.resized[0] * view.resized[1])
    return 1 - seen


def colour(number: int) -> Colour:
    """The colour of a class, or of a numbered match, from 0."""
    return COLOURS[number % len(COLOURS)]


def percent(share: float) -> str:
    """A share of 1 with one digit after the point; only exactly 0 and 1 are written as nothing and all.

    Example:
        >>> percent(0.6081), percent(0.99999), percent(0.00001), percent(0), percent(1)
        ('60.8%', '>99.9%', '<0.1%', '0%', '100%')
    """
    if share in (0, 1):
        return f"{share:.0%}"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def decimal(value: float, sign: str = "") -> str:
    """Two digits after the point; with the sign ``"+"`` a number that is added to others.

    Example:
        >>> decimal(-0.001), decimal(-1.5), decimal(0.25, "+")
        ('0.00', '-1.50', '+0.25')
    """
    return f"{round(value, 2) + 0.0:{sign}.2f}"  # + 0.0: never "-0.00"


def file_name(anchor: Anchor | None) -> str:
    """An anchor's training image, in short."""
    if anchor is None:
        return "no training image yet"
    name = PurePath(anchor.file).name if anchor.file is not None else f"sample {anchor.sample_id}"
    return name if anchor.verified else f"{name} (unverified)"


def likeness(anchor: Anchor | None) -> str:
    """How like an anchor its prototype is; empty where the prototype is the part itself, as after a hard push."""
    if anchor is None or anchor.similarity_after > 0.995:
        return ""
    return f"its similarity to the prototype: {decimal(anchor.similarity_after)}"


def region_words(region: Region) -> str:
    """What hiding a region showed.

    Example:
        >>> from protopush.explain.checked_region import Region
        >>> region_words(Region(0, 1, [(0, 0, 8, 8)], 0.06, 1.0, 0.81, 0.42, 0.1, True))
        'hiding the outlined 6.0% (100% of it in the box) takes the similarity from 0.81 to 0.42'
    """
    before, after, blurred = (decimal(value) for value in (region.similarity, region.hidden, region.blurred))
    if not region.reached:
        return f"no region explains it: the blurred picture is as similar ({blurred})"
    share = percent(region.share)
    if before == after:
        return f"hiding the outlined {share} hardly matters: the blurred picture is as similar ({blurred})"
    inside = "" if region.in_box is None else f" ({percent(region.in_box)} of it in the box)"
    return f"hiding the outlined {share}{inside} takes the similarity from {before} to {after}"


# DejaVu Sans is part of the package (LICENSE_DEJAVU): all of Europe, Arabic, Hebrew and more, the same on every
# machine. For Chinese, Japanese and Korean the usual fonts of Linux, Windows and macOS are tried.
FONTS = (
    str(Path(__file__).with_name("DejaVuSans.ttf")), "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "msyh.ttc",
    "PingFang.ttc", "Hiragino Sans GB.ttc",
)  # fmt: skip


def font_of(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The first font that has all letters of the text; DejaVu Sans where there is none."""
    for name in FONTS:
        with suppress(OSError):
            if all(_has(name, letter) for letter in set(text)):
                return _font(name, size)
    return _font(FONTS[0], size)


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(name, size)


@lru_cache(maxsize=4096)
def _has(name: str, letter: str) -> bool:
    font = _font(name, 16)
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))


def printable(text: str) -> str:
    """The text on one line, without what would turn or break it: names of files and classes may hold anything."""
    return "".join(" " if letter.isspace() else letter if letter.isprintable() else "?" for letter in text)


def text_width(text: str, size: int) -> float:
    """The width of one line of text in pixels."""
    text = printable(text)
    return font_of(text, size).getlength(text)


def fit_text(text: str, size: int, width: float) -> str:
    """The text on one line, its middle replaced by dots where it is wider than ``width`` pixels.

    The end stays because names of files and classes often differ there.

    Example:
        >>> fit_text("a_very_long_name_of_an_image_0024306.jpg", 16, 200)
        'a_very_lon...024306.jpg'
    """
    text = printable(text)
    font = font_of(text, size)
    if font.getlength(text) <= width:
        return text

    def cut(keep: int) -> str:
        return text[: (keep + 1) // 2] + "..." + text[len(text) - keep // 2 :]

    fitting = bisect_right(range(len(text)), width, key=lambda keep: font.getlength(cut(keep)))
    return cut(max(fitting - 1, 0))


def wrapped(text: str, size: int, width: float, most: int) -> list[str]:
    """The text on at most so many lines, broken between words; what has no room is cut as in :func:`fit_text`.

    Example:
        >>> wrapped("hiding the outlined part takes it away", 16, 180, most=2)
        ['hiding the outlined', 'part takes it away']
    """
    lines, left = list[str](), printable(text).split()
    while left and len(lines) < most - 1:
        fitting = (n for n in range(len(left), 1, -1) if text_width(" ".join(left[:n]), size) <= width)
        taken = next(fitting, 1)
        lines.append(fit_text(" ".join(left[:taken]), size, width))
        left = left[taken:]
    return [*lines, fit_text(" ".join(left), size, width)] if left else lines


def scaled(box: Rect, size: tuple[float, float], to: tuple[float, float]) -> Rect:
    """A box of a picture of one (width, height), in the same picture of another."""
    x, y = to[0] / size[0], to[1] / size[1]
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def overlap(a: Rect, b: Rect) -> float:
    """The area that two boxes have in common.

    Example:
        >>> overlap((0, 0, 4, 4), (2, 1, 9, 3)), overlap((0, 0, 1, 1), (2, 2, 3, 3))
        (4, 0)
    """
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def surroundings(box: Rect, size: tuple[float, float], sees: Rect | None = None) -> Rect:
    """What is shown of a box in a picture of ``size``.

    A box that is all that was seen is shown alone. Of another one the square around all that was seen, or, where that
    is the whole picture (None), half the box's size around it on every side.

    Example:
        >>> surroundings((10, 0, 20, 10), (100, 15))
        (5.0, 0, 25.0, 15)
        >>> surroundings((10, 0, 20, 10), (100, 15), sees=(10, 0, 20, 10))
        (10, 0, 20, 10)
    """
    if sees == box:
        return box
    x0, y0, x1, y1 = sees or box
    reach = (1.1 if sees else 2) * max(x1 - x0, y1 - y0)
    wide, high = min(reach, size[0]), min(reach, size[1])
    left = min(max((x0 + x1 - wide) / 2, 0), size[0] - wide)
    top = min(max((y0 + y1 - high) / 2, 0), size[1] - high)
    return left, top, left + wide, top + high


class Place(Protocol):
    """A patch that is drawn: of a match, an anchor or a neighbour."""

    @property
    def sees(self) -> Rect | None:
        """All that its similarity can depend on."""


def drawn_sees(place: Place, reach: str, size: tuple[float, float], to: tuple[float, float]) -> Rect | None:
    """What a patch of a picture of one size sees, in the picture of another; None where that is the whole picture."""
    return scaled(place.sees, size, to) if place.sees is not None and reach != "all" else None


def window_shares(match: Match, view: View, reach: str) -> tuple[float, float]:
    """How much of their tiles windows fill, a match's and its anchor's: 1 the larger one, so that both have one scale.

    Other parts fill theirs.
    """
    if reach != "box" or match.anchor is None:
        return 1.0, 1.0
    here = (match.box[2] - match.box[0]) * view.resized[0] / view.original[0]
    ratio = here / (match.anchor.region[2] - match.anchor.region[0])
    return (
        (1.0, 1.0) if 0.9 < ratio < 1.1 else (min(ratio, 1.0), min(1 / ratio, 1.0))
    )  # whole pixels of small originals


REACH = {
    "box": "The model sees each box alone: nothing outside it can change its similarity.",
    "more": "The thin frame is all that the model sees for a box: nothing outside that can change its similarity.",
    "all": "A box only says where: the model sees the whole image, and what lies outside a box counts as well.",
}


class Sizes(NamedTuple):
    """The sizes of a page in pixels: text, tiles, the numbers of boxes, and whether things stack."""

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


WIDE = Sizes(1480, 32, 12, title=30, head=19, body=15, small=14, side=164, badge=24, narrow=False)
NARROW = Sizes(800, 24, 16, title=36, head=27, body=23, small=22, side=240, badge=36, narrow=True)  # 2x a phone's 400
