"""Pictures of an explanation: the panel "this part looks like that part", and why not another class.

All boxes come in pixels of the original pictures and are scaled to whatever size a picture is drawn at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import PurePath

from PIL import Image

from protopush.errors import InputError
from protopush.explain import figure_canvas as canvas
from protopush.explain import figure_style as style
from protopush.explain.checked_region import Region
from protopush.explain.explanation import ClassEvidence, Explanation, Match, WhyNot

LEFT, BETWEEN = 372, 40  # of wide pages: the panel's picture column, and from column to column


def draw_panel(
    explanation: Explanation,
    image: Image.Image,
    source_of: canvas.SourceOf,
    rows: int = 5,
    regions: Sequence[Region] | None = None,
    narrow: bool = False,
) -> Image.Image:
    """The predicted class's strongest prototypes: this part of the picture looks like that part of a training picture.

    Args:
        explanation: of the picture.
        image: the upright original, or a smaller copy of it.
        source_of: (class, prototype) to what its anchor is drawn from: the training picture, or its crop, or None.
        rows: how many prototypes to show, the largest contribution first.
        regions: of the prototypes that were checked, in any order.
        narrow: for a phone: 800 pixels wide, not 1480, and things stack.

    Raises:
        InputError: ``rows`` is below 1.
    """
    first = explanation.classes[0]
    page = _Evidence(explanation, image, source_of, [first], rows, regions or (), narrow)
    sizes, x, width = page.sizes, page.sizes.margin, page.sizes.content if narrow else LEFT
    name = style.fit_text(first.class_name, sizes.title, sizes.content - 10 * sizes.title)
    others = [f", runner-up: {some.class_name} {style.percent(some.probability)}" for some in explanation.classes[1:2]]
    top = page.heading(f"Predicted: {name}, {style.percent(first.probability)}", *others)
    y = page.note(x, top, "the image", width) + 4
    y = page.picture(x, y, page.numbered(first, width, 900 if narrow else 560)) + sizes.gap
    for some in explanation.classes:
        y = page.class_bar(x, y, some, width)
    if narrow:
        return page.done(page.guide(x, page.sums(page.rows(first, x, y, width, sizes.side)), width))
    y, x = page.guide(x, y, width), x + LEFT + BETWEEN
    rows_end = page.rows(first, x, top, sizes.content - LEFT - BETWEEN, sizes.side)
    return page.done(page.sums(max(y, rows_end)))


def draw_why_not(
    explanation: Explanation,
    class_name: str,
    image: Image.Image,
    source_of: canvas.SourceOf,
    rows: int = 4,
    narrow: bool = False,
) -> Image.Image:
    """The strongest prototypes of the predicted class and of another one, and the difference of their logits.

    Args:
        explanation: of the picture; it has the other class too (``explain_image(..., also=[class_name])``).
        class_name: the other class.
        image, source_of, rows, narrow: as for :func:`draw_panel`; the rows are those of each class.

    Raises:
        InputError: ``rows`` is below 1, or the class is the predicted one or wasn't explained.
    """
    why = explanation.why_not(class_name)
    both = [why.said, why.other]
    page = _Evidence(explanation, image, source_of, both, rows, (), narrow)
    sizes, x = page.sizes, page.sizes.margin
    width = sizes.content if narrow else (sizes.content - BETWEEN) // 2
    names = [style.fit_text(some.class_name, sizes.title, sizes.content * 0.36) for some in both]
    top = bottom = page.heading(f"Why {names[0]} and not {names[1]}?")
    for some in both:
        y = page.bar(x, bottom if narrow else top, width, 2, style.INK) + sizes.gap
        y = page.class_bar(x, y, some, width)
        shown, name = len(some.matches[:rows]), style.fit_text(some.class_name, sizes.small, width * 0.3)
        text = f"The strongest {shown} of {len(some.matches)} prototypes of {name}, and where each is found:"
        y = page.note(x, y, text, width, most=2) + sizes.gap // 2
        y = page.picture(x, y, page.numbered(some, width, 600 if narrow else 400)) + sizes.gap
        bottom = max(bottom, page.rows(some, x, y, width, sizes.side if narrow else 132, maps=False))
        x += 0 if narrow else width + BETWEEN
    if not page.whole:
        bottom = page.note(sizes.margin, bottom + sizes.gap, style.REACH[explanation.reach], sizes.content, most=4)
    return page.done(page.difference(why, page.rule(bottom + sizes.gap), width))


class _Evidence(canvas.Page):
    """A page about one picture, with rows about its prototypes."""

    def __init__(
        self,
        explanation: Explanation,
        image: Image.Image,
        source_of: canvas.SourceOf,
        classes: Sequence[ClassEvidence],
        most: int,
        regions: Sequence[Region],
        narrow: bool,
    ) -> None:
        if most < 1:
            raise InputError(f"rows is {most}; expected at least 1 prototype to show")
        super().__init__(style.NARROW if narrow else style.WIDE)
        self.explanation, self.image, self.source_of, self.most = explanation, image.convert("RGB"), source_of, most
        self.small = canvas.resized(self.image, self.sizes.side, self.sizes.side)
        matches = [match for some in classes for match in some.matches]
        self.longest = max((abs(match.contribution) for match in matches), default=0.0) or 1.0  # fills a bar's width
        self.whole = any(_compares_whole(match) for match in matches)  # the model compares whole pictures
        shown = {(match.class_index, match.prototype) for some in classes for match in some.matches[:most]}
        places = {(region.class_index, region.prototype): region for region in regions}
        self.regions = {place: region for place, region in places.items() if place in shown}

    def region_of(self, match: Match) -> Region | None:
        return self.regions.get((match.class_index, match.prototype))

    def place(self, match: Match, size: tuple[int, int]) -> tuple[style.Rect, style.Rect | None]:
        """A match's box, and what it sees where that is to be drawn, in the picture of this size."""
        original = self.explanation.image_size
        sees = style.drawn_sees(match, self.explanation.reach, original, size)
        return style.scaled(match.box, original, size), sees

    def heading(self, title: str, *more: str) -> int:
        sizes, x = self.sizes, self.sizes.margin
        y = self.text(x, x - 6, title, sizes.title, sizes.content)
        file = style.fit_text(PurePath(self.explanation.file).name, sizes.body, sizes.content // 2)
        return self.text(x, y, "".join([file, *more]), sizes.body, sizes.content, style.MUTED) + sizes.gap

    def class_bar(self, x: int, y: int, evidence: ClassEvidence, width: int) -> int:
        """A class's name, score and probability over a bar."""
        sizes, (name, logit) = self.sizes, (width * 48 // 100, width * 28 // 100)
        self.text(x, y, evidence.class_name, sizes.body, name)
        self.note(x + name, y, f"logit {style.decimal(evidence.logit)}", logit, along=1)
        chance = style.percent(evidence.probability)
        y = self.text(x + name + logit, y, chance, sizes.body, width - name - logit, along=1) + 2
        self.bar(x, y, width, sizes.body // 2, style.TILE)
        return self.bar(x, y, round(width * evidence.probability), sizes.body // 2, style.MUTED) + sizes.gap

    def numbered(self, evidence: ClassEvidence, width: int, height: int) -> Image.Image:
        """The picture with a numbered box for each match."""
        large = canvas.with_unseen(canvas.resized(self.image, width, height), self.explanation.view)
        places = [self.place(match, large.size) for match in evidence.matches[: self.most]]
        for i, (box, sees) in enumerate(places):
            canvas.draw_sees(large, box, sees, style.colour(i))
        boxes = [box for box, _ in places]
        return canvas.with_numbers(large, boxes, self.sizes.badge)

    def rows(self, evidence: ClassEvidence, x: int, y: int, width: int, side: int, maps: bool = True) -> int:
        """The prototypes of a class: where each is similar, this part and that part, words and numbers."""
        sizes, gap, one = self.sizes, self.sizes.gap, "image" if self.whole else "part"
        where = ["the image" if self.whole else "where it is similar"] * maps
        parts = [f"this {one}", f"looks like that {one}" if maps else "looks like that", "of this image"]
        beside = x + len(where) * (side + gap)  # the map
        aside = x if sizes.narrow else beside + 3 * (side + gap)
        if not evidence.matches:
            return self.text(x, y, "No prototype of this class is in use.", sizes.body, width)
        if not sizes.narrow:
            self.note(aside, y, f"evidence for {evidence.class_name}", x + width - aside)
            y = self.columns(x, y, where + parts, side, gap)
        for i, match in enumerate(evidence.matches[: self.most]):
            tiles, top = self.tiles(match, i, side), self.rule(y) if sizes.narrow else y
            text_top = self.name(aside, top, match, evidence.class_name, i, x + width - aside)
            if sizes.narrow:
                top = self.columns(x, self.columns(x, text_top, parts, side, gap), tiles, side, gap) + gap
                text_top = top = self.columns(x, top, where, side, gap)
            bottom = top if sizes.narrow else self.columns(beside, y, tiles, side, gap)
            if maps:
                bottom = max(bottom, self.map(x, top, match, style.colour(i)))
            left = beside if sizes.narrow else aside
            y = max(bottom, self.words(left, text_top, match, i, x + width - left)) + gap
        return y

    def tiles(self, match: Match, number: int, side: int) -> list[Image.Image]:
        """This part of the picture, that part of the training picture, and the training picture."""
        ink, anchor = style.colour(number), match.anchor
        source = self.source_of(match.class_index, match.prototype) if anchor is not None else None
        box, sees = self.place(match, self.image.size)
        reach = self.explanation.reach
        here, there = style.window_shares(match, self.explanation.view, reach)
        part = canvas.part_tile(self.image, box, ink, side, sees, here)
        return [part, *canvas.part_and_whole(source, anchor, ink, side, self.sizes.small, reach, there)]

    def map(self, x: int, y: int, match: Match, ink: style.Colour) -> int:
        """The whole picture, small: how similar each place is, those that count, and the region that was checked."""
        sizes, side, view = self.sizes, self.sizes.side, self.explanation.view
        mapped, region = bool(match.map) and not _compares_whole(match), self.region_of(match)
        even = self.explanation.reach == "box"
        shown = canvas.with_map(self.small, match.map, view, even) if mapped else canvas.with_unseen(self.small, view)
        for box in (match.box, *match.more) if match.more else ():
            canvas.draw_thin(shown, style.scaled(box, self.explanation.image_size, shown.size), ink)
        if region is not None:
            shown = canvas.with_outline(shown, region.boxes, self.explanation.image_size, 3 if sizes.narrow else 2)
        y += 0 if sizes.narrow else (side - shown.height) // 2
        y = self.picture(x + (side - shown.width) // 2, y, shown) + 4
        if not mapped:
            return self.note(x, y, "the whole picture", side)
        values, room = [value for row in match.map for value in row], 3 * sizes.small
        self.note(x, y, style.decimal(min(values)), room)
        self.picture(x + room, y + sizes.small // 4, canvas.colour_bar(side - 2 * room, sizes.small - 2))
        return self.note(x + side - room, y, style.decimal(max(values)), room, along=1)

    def name(self, x: int, y: int, match: Match, class_name: str, number: int, width: int) -> int:
        """A match's number in its colour, its class and slot."""
        badge, size, aside = self.sizes.badge, self.sizes.head, self.sizes.badge + 10
        name = style.fit_text(class_name, size, width - aside - 3 * size)  # the slot stays, however long the name
        middle = y + (badge - round(1.35 * size)) // 2
        self.text(x + aside, middle, f"{name} #{match.prototype}", size, width - aside)
        canvas.draw_badge(self.paper, (x, y), number, badge)
        return y + badge + self.sizes.gap // 2

    def words(self, x: int, y: int, match: Match, number: int, width: int) -> int:
        """A match in words and numbers, with its contribution as a bar, and what hiding its region showed."""
        sizes, gap, region = self.sizes, self.sizes.gap // 4, self.region_of(match)
        y = self.note(x, y, style.file_name(match.anchor), width) + gap
        y = self.note(x, y, style.likeness(match.anchor), width, most=2)
        mean = f" (mean of {1 + len(match.more)} places)" if match.more else ""
        product = f"similarity {style.decimal(match.similarity)}{mean} × weight {style.decimal(match.weight)}"
        y = self.text(x, y, product, sizes.body, width, most=2) + gap
        length = max(round((width - 4 * sizes.body) * abs(match.contribution) / self.longest), 2)
        fill = style.colour(number) if match.contribution >= 0 else style.PAPER  # hollow: it is against the class
        self.bar(x, y, length, sizes.body + 4, fill, style.INK)
        contribution = style.decimal(match.contribution, "+")
        y = self.text(x + length + 8, y, contribution, sizes.body, 4 * sizes.body - 8) + gap
        return self.text(x, y, style.region_words(region), sizes.small, width, most=4) if region is not None else y

    def sums(self, y: int) -> int:
        """How what is shown adds up to the score."""
        sizes, first = self.sizes, self.explanation.classes[0]
        shown, rest = first.matches[: self.most], first.matches[self.most :]
        name = style.fit_text(first.class_name, sizes.body, 300)
        text = (
            f"Shown {len(shown)} of {len(first.matches)} prototypes of {name}: their contributions sum to "
            f"{style.decimal(_sum(shown))};  "
            + (f"the rest {style.decimal(_sum(rest))};  " if rest else "")
            + f"bias {style.decimal(first.bias)};  logit {style.decimal(first.logit)}."
        )
        return self.text(sizes.margin, self.rule(y), text, sizes.body, sizes.content, most=4)

    def guide(self, x: int, y: int, width: int) -> int:
        """How to read it, for somebody who sees it for the first time."""
        sizes, unseen = self.sizes, style.unseen_share(self.explanation.view)
        name = style.fit_text(self.explanation.classes[0].class_name, sizes.small, 180)
        windows = ", of the boxes that cover it the most similar" if self.explanation.reach == "box" else ""
        texts = [
            f"Each row is a prototype: a part of a training image of {name}. The box with its number is the place in "
            f"this image that is most similar to it. {style.REACH[self.explanation.reach]}",
            f"Colours show how similar each place is{windows}. Each map has its own scale, written below it.",
        ]
        if self.whole:
            texts = [f"Each row is a prototype: a training image of {name}. This model compares images as a whole."]
        most = max((len(match.more) for match in self.explanation.classes[0].matches), default=0)
        if most:
            texts.append(f"A similarity is the mean of the {1 + most} most similar places, which each map frames.")
        texts.append(f"Similarity × weight is the contribution: what a row adds to the score (logit) of {name}.")
        if any(region.boxes for region in self.regions.values()):
            texts.append("White outline: these pixels were blurred, and the similarity measured again.")
        if unseen > 0.005:
            texts.append(f"Hatched: the model did not see it ({style.percent(unseen)}).")
        y = self.text(x, y + sizes.gap // 2, "How to read it", sizes.body, width) + 4
        for text in texts:
            y = self.note(x, y, text, width, most=8) + sizes.gap // 2
        return y

    def difference(self, why: WhyNot, y: int, width: int) -> int:
        """Both logits and their difference, term by term, and what follows for the probabilities."""
        sizes, x, both = self.sizes, self.sizes.margin, (why.said, why.other)
        shown, rest = ([some.matches[part] for some in both] for part in (slice(self.most), slice(self.most, None)))
        sums = {f"shown above ({len(shown[0])}, {len(shown[1])})": [_sum(some) for some in shown]}
        if any(rest):
            sums[f"the others ({len(rest[0])}, {len(rest[1])})"] = [_sum(some) for some in rest]
        sums |= {"bias": [some.bias for some in both], "score (logit)": [some.logit for some in both]}
        table = [("", why.said.class_name, why.other.class_name, "difference")]
        for name, (a, b) in sums.items():
            table.append((name, style.decimal(a), style.decimal(b), style.decimal(a - b, "+")))
        top, first, column = y, width * 40 // 100, width * 20 // 100
        for line in table:
            ink = style.MUTED if line is table[0] else style.INK
            y = self.bar(x, y, width, 1, style.RULE) + sizes.gap // 2 if line is table[-1] else y
            self.text(x, y, line[0], sizes.body, first, ink)
            for left, text in zip(range(x + first + sizes.gap, x + width, column), line[1:], strict=True):
                self.text(left, y, text, sizes.body, column - sizes.gap, ink, along=1)
            y += round(1.35 * sizes.body) + sizes.gap // 2
        names = [style.fit_text(some.class_name, sizes.head, width * 0.5) for some in both]
        said, other = (f"{name} ({style.percent(some.probability)})" for name, some in zip(names, both, strict=True))
        times = _times(why.difference)
        x, below = (x, y + sizes.gap) if sizes.narrow else (x + width + BETWEEN, top)
        below = self.text(x, below, f"So {said} is {times} times as probable as {other}.", sizes.head, width, most=4)
        note = f"exp({style.decimal(why.difference)}) = {times}; all numbers are rounded"
        return max(y, self.note(x, below, note, width))


def _compares_whole(match: Match) -> bool:
    return len(match.map) == len(match.map[0]) == 1 if match.map else False


def _times(difference: float) -> str:
    if difference > math.log(1e6):
        return "more than a million"
    times = math.exp(difference)
    return f"{times:.2f}" if times < 10 else f"{times:,.0f}"


def _sum(matches: Sequence[Match]) -> float:
    return math.fsum(match.contribution for match in matches)
