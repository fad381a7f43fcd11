"""The panel: "this part of the picture looks like that part of that training image", for the predicted class.

All boxes come in pixels of the original pictures and are scaled to whatever size a picture is drawn at.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from PIL import Image

from protopush.errors import InputError
from protopush.explain.checked_region import Region
from protopush.explain.drawing import (
    MUTED,
    NARROW,
    TILE,
    WIDE,
    Look,
    above,
    beside,
    fit_text,
    page,
    resized,
    rule,
    tile,
    words,
)
from protopush.explain.explanation import ClassEvidence, Explanation, Match
from protopush.explain.overlay import colour_bar, extent, numbered, unseen_share, with_map, with_outline, with_unseen
from protopush.explain.rows import Rows, SourceOf, decimal, percent, strongest

LEFT = 380  # the picture's column where there are two
BETWEEN = 32  # the columns
LOOKS = 66  # the words "looks like" between two parts


def draw_panel(
    explanation: Explanation,
    image: Image.Image,
    source_of: SourceOf,
    rows: int = 5,
    regions: Sequence[Region] | None = None,
    narrow: bool = False,
) -> Image.Image:
    """The predicted class's strongest prototypes: this part of the picture looks like that part of a training picture.

    Args:
        explanation: of the picture.
        image: the upright original, or a smaller copy of it.
        source_of: (class, prototype) to the training picture of its anchor, or a smaller copy, or None.
        rows: how many prototypes to show, the largest contribution first.
        regions: of the prototypes that were checked, in any order.
        narrow: for a phone: 800 pixels wide, not 1480, and things stack.

    Raises:
        InputError: ``rows`` is below 1.
    """
    if rows < 1:
        raise InputError(f"rows is {rows}; expected at least 1 prototype to show")
    look = NARROW if narrow else WIDE
    shared = Rows(explanation, image.convert("RGB"), source_of, strongest(explanation.classes[0]), look)
    return _Panel(shared, rows, regions or ()).page()


class _Panel:
    def __init__(self, shared: Rows, rows: int, regions: Sequence[Region]) -> None:
        self.shared, self.explanation, self.look = shared, shared.explanation, shared.look
        self.small = resized(shared.image, self.look.side, self.look.side)
        self.evidence = self.explanation.classes[0]
        self.shown = self.evidence.matches[:rows]
        known = {(match.class_index, match.prototype) for match in self.shown}
        checked = {(region.class_index, region.prototype): region for region in regions}
        self.regions = {place: region for place, region in checked.items() if place in known}
        self.left = self.look.content if self.look.narrow else LEFT
        self.whole = any(match.grid == (1, 1) for match in self.shown)  # the model compares whole pictures

    def page(self) -> Image.Image:
        look = self.look
        large = numbered(
            self.explanation, self.shared.image, self.shown, (self.left, 900 if look.narrow else 560), look.badge
        )
        picture = [large, *(class_bar(some, self.left, look) for some in self.explanation.classes)]
        if look.narrow:
            return page([*self.title(), *picture, *self.rows(), *self.sums(), *self.guide()], look)
        left = above([words("the image", look.small, self.left, MUTED), *picture, *self.guide()], look.gap)
        right = above([self.headings(), *self.rows()], look.gap)
        return page([*self.title(), beside([left, right], BETWEEN), *self.sums()], look)

    def title(self) -> list[Image.Image]:
        look, classes = self.look, self.explanation.classes
        name = fit_text(self.evidence.class_name, look.title, look.content - 10 * look.title)
        file = fit_text(PurePath(self.explanation.file).name, look.body, look.content * 0.5)
        others = [f", runner-up: {some.class_name} {percent(some.probability)}" for some in classes[1:2]]
        return [
            words(f"Predicted: {name}, {percent(self.evidence.probability)}", look.title, look.content),
            words("".join([file, *others]), look.body, look.content, MUTED),
        ]

    def headings(self) -> Image.Image:
        """Of the columns, in the wide layout."""
        side, one = self.look.side, "image" if self.whole else "part"
        columns = [
            (self.map_title, side), (f"this {one}", side), ("", LOOKS), (f"that {one}", side),
            ("the training image" if self.whole else "of this training image", side),
            (f"evidence for {self.evidence.class_name}", self.room),
        ]  # fmt: skip
        return beside([words(text, self.look.small, width, MUTED) for text, width in columns], self.look.gap)

    @property
    def map_title(self) -> str:
        return "the image" if self.whole else "where it is similar"

    @property
    def room(self) -> int:
        """The width of the words in a row."""
        look = self.look
        if look.narrow:
            return look.content - look.side - look.gap
        return look.content - LEFT - BETWEEN - 4 * look.side - LOOKS - 5 * look.gap

    def rows(self) -> list[Image.Image]:
        if not self.shown:
            return [words("No prototype of this class is in use.", self.look.body, self.left)]
        return [self.row(i, match) for i, match in enumerate(self.shown)]

    def row(self, number: int, match: Match) -> Image.Image:
        """One prototype: where, the part, the part that it looks like, its training picture, and the numbers."""
        look, side, name = self.look, self.look.side, self.evidence.class_name
        here, part, whole = self.shared.tiles(match, number, side)
        region = self.regions.get((match.class_index, match.prototype))
        where, said = self.where(match, region), self.shared.words(match, number, self.room, region)
        if not look.narrow:
            like = tile(words("looks like", look.small, LOOKS, along=0.5), LOOKS, side)
            said = above([self.shared.heading(match, name, number, self.room), said], 0)
            return beside([where, here, like, part, whole, said], look.gap)
        one = "image" if self.whole else "part"
        captions = (f"this {one}", f"looks like that {one}", "the image" if self.whole else "of this image")
        tiles = zip(captions, (here, part, whole), strict=True)
        upper = [above([self.caption(text), shown], 4) for text, shown in tiles]
        head = self.shared.heading(match, name, number, look.content)
        lower = [above([self.caption(self.map_title), where], 4), above([self.caption(""), said], 4)]
        return above([rule(look.content), head, beside(upper, look.gap), beside(lower, look.gap)], look.gap)

    def caption(self, text: str) -> Image.Image:
        return words(text, self.look.small, self.look.side, MUTED)

    def where(self, match: Match, region: Region | None) -> Image.Image:
        """The whole picture, small: how similar each place of it is, and what was checked."""
        look, view, side = self.look, self.explanation.view, self.look.side
        placed = match.grid != (1, 1) and bool(match.map)
        shown = with_map(self.small, match.map, view) if placed else with_unseen(self.small, view)
        if region is not None:
            shown = with_outline(shown, region.boxes, self.explanation.image_size, line=3 if look.narrow else 2)
        legend = _legend(*extent(match.map), look) if placed else self.caption("the whole picture")
        block = above([tile(shown, side, shown.height), legend], 4)
        return block if look.narrow else tile(block, side, side + 4 + legend.height)

    def sums(self) -> list[Image.Image]:
        """How what is shown adds up to what the model said."""
        look, evidence, shown = self.look, self.evidence, self.shown
        rest = evidence.matches[len(shown) :]
        name = fit_text(evidence.class_name, look.body, 300)
        text = (
            f"Shown {len(shown)} of {len(evidence.matches)} prototypes of {name}: "
            f"their contributions sum to {decimal(sum(match.contribution for match in shown))};  "
            + (f"the rest {decimal(sum(match.contribution for match in rest))};  " if rest else "")
            + f"bias {decimal(evidence.bias)};  logit {decimal(evidence.logit)}."
        )
        return [rule(look.content), words(text, look.body, look.content, most=4)]

    def guide(self) -> list[Image.Image]:
        """How to read it, for somebody who sees it for the first time."""
        look, name = self.look, fit_text(self.evidence.class_name, self.look.small, 180)
        if self.whole:
            told = [f"Each row is a prototype: a training image of {name}. This model compares images as a whole."]
        else:
            told = [
                f"Each row is a prototype: a part of a training image of {name}. The box with its number is the place "
                "in this image that is most similar to it. The model has also seen what lies around a box (its "
                "receptive field is larger).",
                "Colours show how similar each place is. Each map has its own scale, written below it.",
            ]
        told.append(f"Similarity x weight is the contribution: what a row adds to the score (logit) of {name}.")
        if any(region.boxes for region in self.regions.values()):
            told.append("White outline: these pixels were blurred, and the similarity measured again.")
        if unseen_share(self.explanation.view) > 0.005:
            told.append(f"Hatched: the model did not see it ({percent(unseen_share(self.explanation.view))}).")
        blocks = [words(text, look.small, self.left, MUTED, most=8) for text in told]
        return [words("How to read it", look.body, self.left), *blocks]


def class_bar(evidence: ClassEvidence, width: int, look: Look) -> Image.Image:
    """A class's name and probability over a bar."""
    chance, logit = percent(evidence.probability), f"logit {decimal(evidence.logit)}"
    columns = (width * 48 // 100, width * 28 // 100, width - width * 48 // 100 - width * 28 // 100)
    line = [
        words(evidence.class_name, look.body, columns[0]),
        words(logit, look.small, columns[1], MUTED, along=1),
        words(chance, look.body, columns[2], along=1),
    ]
    bar = rule(width, TILE, look.body // 2)
    bar.paste(MUTED, (0, 0, round(width * evidence.probability), bar.height))
    return above([beside(line, 0), bar], 2)


def _legend(low: float, high: float, look: Look) -> Image.Image:
    """The map's colours between its lowest and its highest value."""
    room = 3 * look.small - 6
    texts = [words(decimal(value), look.small, room, MUTED, along=along) for value, along in ((low, 0.0), (high, 1.0))]
    return beside([texts[0], colour_bar(look.side - 2 * room, look.small - 3), texts[1]], 0, across=0.5)
