"""The gallery: what the prototypes of all classes stand for, and what else in the training images they like."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from protopush.errors import InputError
from protopush.explain import figure_canvas as canvas
from protopush.explain import figure_style as style
from protopush.explain.neighbours import Neighbour, Neighbours
from protopush.nn.prototypes import Anchor

PictureOf = Callable[[Neighbour], Image.Image | None]
OWN, OTHERS = 3, 2  # neighbours of the class, and of other classes
PAIR, GAP, PAD = 6, 10, 8  # between a part and its picture, between neighbours, and from these to their frame


def draw_gallery(
    class_names: Sequence[str],
    anchors: Callable[[int, int], Anchor | None],
    source_of: canvas.SourceOf,
    num_classes: int,
    slots: int,
    per_class: int = 5,
    neighbours: Callable[[int, int], Neighbours | None] | None = None,
    picture_of: PictureOf = lambda _: None,
    narrow: bool = False,
    reach: str = "all",
) -> Image.Image:
    """What the prototypes of all classes stand for: each part beside the whole training picture that it comes from.

    Args:
        class_names: in label order.
        anchors: (class, prototype) to the anchor; None where the slot is not in use or was never pushed.
        source_of: (class, prototype) to what its anchor is drawn from: the training picture, or its crop, or None.
        num_classes: how many classes.
        slots: prototypes per class to ask ``anchors`` for.
        per_class: the most to show of one class.
        neighbours: (class, prototype) to the training images that it likes best; then each prototype has a line of
            its own, with three of its class and two of others.
        picture_of: a neighbour to its picture, the upright original; None where there is none.
        narrow: for a phone: 800 pixels wide, not 1480.
        reach: what the model sees of an image for a patch (:attr:`protopush.data.regions.Regions.reach`).

    Raises:
        InputError: ``per_class`` is below 1.
    """
    if per_class < 1:
        raise InputError(f"per_class is {per_class}; expected at least 1 prototype to show")
    every = [[(k, anchor) for k in range(slots) if (anchor := anchors(c, k)) is not None] for c in range(num_classes)]
    whole = any(every) and all(anchor.pooled for found in every for _, anchor in found)
    page = _Gallery(narrow, class_names, source_of, picture_of, reach, whole)
    sizes, x, y = page.sizes, page.sizes.margin, page.heading(neighbours is not None)
    columns, step = 2 if narrow else 5, 2 * sizes.gap
    width = (sizes.content - (columns - 1) * step) // columns
    for c, found in enumerate(every):
        y = bottom = page.title(c, y, len(found), min(len(found), per_class))
        for i, (k, anchor) in enumerate(found[:per_class]):
            if neighbours is not None:
                bottom = page.line(c, k, anchor, neighbours(c, k) or Neighbours([], []), bottom)
                continue
            left, y = x + i % columns * (width + step), y if i % columns else bottom
            below = page.tiles(c, k, anchor, left, y, (width - PAIR) // 2)
            bottom = max(bottom, page.words(k, anchor, left, below, width) + sizes.gap)
        y = bottom
    return page.done(y)


class _Gallery(canvas.Page):
    def __init__(
        self, narrow: bool, class_names: Sequence[str], source_of: canvas.SourceOf, picture_of: PictureOf, reach: str,
        whole: bool,
    ) -> None:  # fmt: skip
        super().__init__(style.NARROW if narrow else style.WIDE)
        self.class_names, self.source_of, self.picture_of, self.reach = class_names, source_of, picture_of, reach
        self.whole = whole

    def heading(self, with_neighbours: bool) -> int:
        """The title of the page and how to read it."""
        sizes, x = self.sizes, self.sizes.margin
        legend = "Left the part, right its whole image; similarity is that of the prototype and the part. "
        legend += style.REACH[self.reach]
        if self.whole:
            legend = (
                "Left what the model sees of an image, right all of it. Each prototype stands for an image as a whole."
            )
        if with_neighbours:
            legend += (
                " Then what else the prototype finds similar in the training images: it should be the same thing in "
                "its own class. In the black frame: the most similar of other classes, which may mislead it."
            )
        title = "Prototypes, and the training images that they come from"
        y = self.text(x, x - 4, title, sizes.head + 6, sizes.content, most=2) + 4
        return self.text(x, y, legend, sizes.body, sizes.content, style.MUTED, most=6) + sizes.gap

    def title(self, c: int, y: int, found: int, shown: int) -> int:
        """A class: its colour, its name and how many prototypes it has."""
        sizes, x, aside = self.sizes, self.sizes.margin, 11 * self.sizes.body
        count = "1 prototype" if found == 1 else f"{found} prototypes"
        count = count if shown == found else f"{shown} of {count}"
        y = self.rule(y + sizes.gap)
        self.bar(x, y + sizes.head // 6, 8, sizes.head, style.colour(c))
        self.text(x + sizes.content - aside, y + 3, count, sizes.body, aside, style.MUTED, along=1)
        room = sizes.content - aside - 2 * sizes.gap
        self.text(x + 8 + sizes.gap, y, self.class_names[c], sizes.head, room)
        y += round(1.35 * sizes.head) + sizes.gap
        return y if found else self.note(x, y, "None stands for a training image yet.", sizes.content)

    def tiles(self, c: int, k: int, anchor: Anchor, x: int, y: int, side: int) -> int:
        """A prototype's part beside its training picture."""
        ink, source = style.colour(c), self.source_of(c, k)
        found = canvas.part_and_whole(source, anchor, ink, side, self.sizes.small, self.reach)
        return self.columns(x, y, found, side, PAIR) + 2

    def words(self, k: int, anchor: Anchor, x: int, y: int, width: int) -> int:
        """A prototype in words."""
        y = self.text(x, y, f"#{k}  {style.file_name(anchor)}", self.sizes.small, width)
        return self.note(x, y, f"similarity {style.decimal(anchor.similarity_after)}", width)

    def line(self, c: int, k: int, anchor: Anchor, near: Neighbours, y: int) -> int:
        """A prototype with its neighbours, those of other classes in a frame."""
        sizes, x, side = self.sizes, self.sizes.margin, 130 if self.sizes.narrow else 182
        if sizes.narrow:
            left = x + 2 * 200 + PAIR + sizes.gap
            self.words(k, anchor, left, y, x + sizes.content - left)
            y = self.tiles(c, k, anchor, x, y, 200) + sizes.gap // 2
        else:
            words = f"{'what is seen' if self.whole else 'the part'}, and its training image"
            below = self.note(x, y + PAD, words, 2 * side + PAIR) + 4
            self.words(k, anchor, x, self.tiles(c, k, anchor, x, below, side), 2 * side + PAIR)
            x += 2 * side + PAIR + 2 * sizes.gap
        own, others = (places * (side + GAP) - GAP for places in (OWN, OTHERS))
        self.group(f"next nearest of {self.class_names[c]}", near.own[:OWN], x, y + PAD, own, side)
        x = sizes.margin + sizes.content - others - PAD
        bottom = self.group("nearest of other classes", near.others[:OTHERS], x, y + PAD, others, side) + PAD
        self.bar(x - PAD, y, others + 2 * PAD, bottom - y, None, style.INK)
        return bottom + 2 * sizes.gap

    def group(self, title: str, found: Sequence[Neighbour], x: int, y: int, width: int, side: int) -> int:
        """Parts of other training images, with their similarities."""
        size, y = self.sizes.small, self.note(x, y, title, width) + 4
        if not found:
            self.picture(x, y, canvas.empty_tile(side, "none", size))
        for left, one in zip(range(x, x + width, side + GAP), found, strict=False):
            picture, similarity = self.picture_of(one), style.decimal(one.similarity)
            shown = canvas.empty_tile(side, "no picture", size)
            if picture is not None:
                ink = style.colour(one.class_index)
                sees = style.drawn_sees(one, self.reach, picture.size, picture.size)
                shown = canvas.part_tile(picture.convert("RGB"), one.box, ink, side, sees)
            room = side - style.text_width(f" {similarity}", size)
            name = style.fit_text(self.class_names[one.class_index], size, room)
            self.text(left, self.picture(left, y, shown) + 2, f"{name} {similarity}", size, side)
        return y + side + 2 + round(1.35 * size)
