"""The gallery: what the prototypes of all classes stand for, and what else in the training images they like."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from protopush.errors import InputError
from protopush.explain.drawing import (
    COLOURS,
    INK,
    MUTED,
    NARROW,
    WIDE,
    Look,
    above,
    beside,
    empty_tile,
    fit_text,
    framed,
    page,
    part_tile,
    rule,
    space,
    text_width,
    words,
)
from protopush.explain.neighbours import Neighbour, Neighbours
from protopush.explain.rows import SourceOf, decimal, file_name, part_and_whole
from protopush.nn.prototypes import Anchor

NeighboursOf = Callable[[int, int], Neighbours | None]
PictureOf = Callable[[Neighbour], Image.Image | None]
OWN, OTHERS = 3, 2  # neighbours of the class, and of other classes
PAIR, GAP, PAD = 6, 10, 8  # between a part and its picture, between neighbours, and from these to their frame
FRAME = 2


def draw_gallery(
    class_names: Sequence[str],
    anchors: Callable[[int, int], Anchor | None],
    source_of: SourceOf,
    num_classes: int,
    slots: int,
    per_class: int = 5,
    neighbours: NeighboursOf | None = None,
    picture_of: PictureOf = lambda _: None,
    narrow: bool = False,
) -> Image.Image:
    """What the prototypes of all classes stand for: each part beside the whole training picture that it comes from.

    Args:
        class_names: in label order.
        anchors: (class, prototype) to the anchor; None where the slot is not in use or was never pushed.
        source_of: (class, prototype) to the anchor's training picture, or a smaller copy, or None.
        num_classes: how many classes.
        slots: prototypes per class to ask ``anchors`` for.
        per_class: the most to show of one class.
        neighbours: (class, prototype) to the training images that it likes best; then each prototype has a line of
            its own, with three of its class and two of others.
        picture_of: a neighbour to its picture, the upright original; None where there is none.
        narrow: for a phone: 800 pixels wide, not 1480.

    Raises:
        InputError: ``per_class`` is below 1.
    """
    if per_class < 1:
        raise InputError(f"per_class is {per_class}; expected at least 1 prototype to show")
    gallery = _Gallery(class_names, source_of, neighbours, picture_of, NARROW if narrow else WIDE)
    found = [[(k, anchor) for k in range(slots) if (anchor := anchors(c, k)) is not None] for c in range(num_classes)]
    return gallery.page(found, per_class)


class _Gallery:
    def __init__(
        self,
        class_names: Sequence[str],
        source_of: SourceOf,
        neighbours: NeighboursOf | None,
        picture_of: PictureOf,
        look: Look,
    ) -> None:
        self.class_names, self.source_of, self.look = class_names, source_of, look
        self.neighbours, self.picture_of = neighbours, picture_of

    def page(self, found: Sequence[Sequence[tuple[int, Anchor]]], per_class: int) -> Image.Image:
        look = self.look
        legend = "Left the part, right its whole image; similarity is that of the prototype and the part."
        if self.neighbours is not None:
            legend += (
                " Then what else the prototype finds similar in the training images: it should be the same thing in "
                "its own class. In the frame: the most similar of other classes, which may mislead it."
            )
        title = "Prototypes, and the training images that they come from"
        head = [
            words(title, look.head + 8, look.content, most=2),
            words(legend, look.body, look.content, MUTED, most=6),
        ]
        bands = [block for c, some in enumerate(found) for block in self.band(c, some, per_class)]
        return page([*head, *bands], look)

    def band(self, c: int, found: Sequence[tuple[int, Anchor]], per_class: int) -> list[Image.Image]:
        """A class: its name, and its prototypes."""
        look, shown = self.look, found[:per_class]
        count = f"{len(shown)} of {len(found)} prototypes" if len(shown) < len(found) else f"{len(found)} prototypes"
        aside = 11 * look.body
        name = beside(
            [
                Image.new("RGB", (8, look.head), COLOURS[c % len(COLOURS)]),
                words(self.class_names[c], look.head, look.content - aside - 8 - 2 * look.gap),
                words("1 prototype" if len(found) == 1 else count, look.body, aside, MUTED, along=1),
            ],
            look.gap,
            across=0.5,
        )
        head = [space(1, look.gap), rule(look.content), name]
        if not found:
            return [*head, words("None stands for a training image yet.", look.body, look.content, MUTED)]
        if self.neighbours is not None:
            return [*head, *(self.line(c, k, anchor) for k, anchor in shown)]
        columns, gap = (2, 2 * look.gap) if look.narrow else (5, 2 * look.gap)
        width = (look.content - (columns - 1) * gap) // columns
        pairs = [self.pair(c, k, anchor, width) for k, anchor in shown]
        return [*head, *(beside(pairs[i : i + columns], gap) for i in range(0, len(pairs), columns))]

    def pair(self, c: int, k: int, anchor: Anchor, width: int) -> Image.Image:
        """A prototype without neighbours."""
        tiles = self.tiles(c, k, anchor, (width - PAIR) // 2)
        return above([beside(tiles, PAIR), *self.said(k, anchor, width)], 2)

    def line(self, c: int, k: int, anchor: Anchor) -> Image.Image:
        """A prototype with its neighbours."""
        look = self.look
        found = self.neighbours(c, k) if self.neighbours is not None else None
        own, others = (found.own[:OWN], found.others[:OTHERS]) if found is not None else ([], [])
        side = 130 if look.narrow else 182
        pair = self.tiles(c, k, anchor, 200 if look.narrow else side)
        near = _lowered(self.group(f"next nearest of {self.class_names[c]}", own, OWN, side))
        far = framed(self.group("nearest of other classes", others, OTHERS, side), INK, PAD, FRAME)
        if look.narrow:
            said = above(self.said(k, anchor, look.content - 2 * pair[0].width - PAIR - look.gap), 2)
            return above([beside([beside(pair, PAIR), said], look.gap), beside([near, far], look.gap)], 4)
        width = 2 * side + PAIR
        title = words("the part, and its training image", look.small, width, MUTED)
        first = above([above([title, beside(pair, PAIR)], 4), *self.said(k, anchor, width)], 2)
        return beside([_lowered(first), near, far], 2 * look.gap)

    def group(self, title: str, found: Sequence[Neighbour], places: int, side: int) -> Image.Image:
        """Parts of other training images, with their similarities; room for so many."""
        width = places * side + (places - 1) * GAP
        tiles = [self.neighbour(one, side) for one in found] or [empty_tile(side, side, "none", self.look.small)]
        return above([words(title, self.look.small, width, MUTED), beside(tiles, GAP)], 4)

    def neighbour(self, found: Neighbour, side: int) -> Image.Image:
        look, picture = self.look, self.picture_of(found)
        colour = COLOURS[found.class_index % len(COLOURS)]
        shown = empty_tile(side, side, "no picture", look.small)
        if picture is not None:
            shown = part_tile(picture.convert("RGB"), found.box, colour, side)
        similarity = decimal(found.similarity)
        name = fit_text(
            self.class_names[found.class_index], look.small, side - text_width(f" {similarity}", look.small)
        )
        return above([shown, words(f"{name} {similarity}", look.small, side)], 2)

    def tiles(self, c: int, k: int, anchor: Anchor, side: int) -> tuple[Image.Image, Image.Image]:
        """The prototype's part, and its training picture."""
        return part_and_whole(self.source_of(c, k), anchor, COLOURS[c % len(COLOURS)], side, self.look.small)

    def said(self, k: int, anchor: Anchor, width: int) -> list[Image.Image]:
        """The prototype in words."""
        look = self.look
        similarity = f"similarity {decimal(anchor.similarity_after)}"
        return [
            words(f"#{k}  {file_name(anchor)}", look.small, width),
            words(similarity, look.small, width, MUTED),
        ]


def _lowered(block: Image.Image) -> Image.Image:
    """The block, level with one beside it that has a frame."""
    return above([space(1, PAD + FRAME), block], 0)
