"""Why this class and not that one: the evidence for both, side by side, and how it sums up."""

from __future__ import annotations

import math
from pathlib import PurePath

from PIL import Image

from protopush.errors import InputError
from protopush.explain.drawing import INK, MUTED, NARROW, WIDE, Colour, Look, above, beside, fit_text, page, rule, words
from protopush.explain.explanation import ClassEvidence, Explanation, Match, WhyNot
from protopush.explain.overlay import numbered
from protopush.explain.panel import class_bar
from protopush.explain.rows import Rows, SourceOf, decimal, percent, strongest

BETWEEN = 48  # the two classes
LOGIT = "score (logit)"


def draw_why_not(
    explanation: Explanation,
    class_name: str,
    image: Image.Image,
    source_of: SourceOf,
    rows: int = 4,
    narrow: bool = False,
) -> Image.Image:
    """The strongest prototypes of the predicted class and of another one, and the difference of their logits.

    Args:
        explanation: of the picture; it has the other class too (``explain_image(..., also=[class_name])``).
        class_name: the other class.
        image: the upright original, or a smaller copy of it.
        source_of: (class, prototype) to the training picture of its anchor, or a smaller copy, or None.
        rows: how many prototypes of each class to show, the largest contribution first.
        narrow: for a phone: 800 pixels wide, not 1480, and the classes stack.

    Raises:
        InputError: ``rows`` is below 1, or the class is the predicted one or wasn't explained.
    """
    if rows < 1:
        raise InputError(f"rows is {rows}; expected at least 1 prototype of each class to show")
    look, image = NARROW if narrow else WIDE, image.convert("RGB")
    why = explanation.why_not(class_name)
    said, other = (fit_text(some.class_name, look.title, look.content * 0.36) for some in (why.said, why.other))
    title = [
        words(f"Why {said} and not {other}?", look.title, look.content),
        words(PurePath(explanation.file).name, look.body, look.content, MUTED),
    ]
    width = look.content if narrow else (look.content - BETWEEN) // 2
    shared = Rows(explanation, image, source_of, strongest(why.said, why.other), look)
    sides = [_side(shared, evidence, rows, width) for evidence in (why.said, why.other)]
    body = sides if narrow else [beside(sides, BETWEEN)]
    sums = [_table(why, rows, look), _conclusion(why, look)]
    return page([*title, *body, rule(look.content), *(sums if narrow else [beside(sums, BETWEEN, across=0.5)])], look)


def _side(shared: Rows, evidence: ClassEvidence, rows: int, width: int) -> Image.Image:
    """One class: where its prototypes are found, and a row for each."""
    look, shown = shared.look, evidence.matches[:rows]
    picture = numbered(shared.explanation, shared.image, shown, (width * 55 // 100, 400), look.badge)
    name = fit_text(evidence.class_name, look.body, width * 0.3)
    told = f"The strongest {len(shown)} of {len(evidence.matches)} prototypes of {name}, and where each is found."
    head = beside([picture, words(told, look.body, width - picture.width - look.gap, MUTED, most=8)], look.gap)
    side = 160 if look.narrow else 128
    captions = [words(text, look.small, side, MUTED) for text in ("this part", "looks like that", "of this image")]
    found = [_row(shared, evidence, i, match, side, width) for i, match in enumerate(shown)]
    return above(
        [rule(width, INK, 2), class_bar(evidence, width, look), head, beside(captions, look.gap), *found], look.gap
    )


def _row(shared: Rows, evidence: ClassEvidence, number: int, match: Match, side: int, width: int) -> Image.Image:
    look = shared.look
    room = width - 3 * (side + look.gap)
    head = shared.heading(match, evidence.class_name, number, room)
    said = above([head, shared.words(match, number, room)], 0)
    return beside([*shared.tiles(match, number, side), said], look.gap)


def _table(why: WhyNot, rows: int, look: Look) -> Image.Image:
    """Both logits and their difference, term by term."""
    parts = [evidence.matches[:rows] for evidence in (why.said, why.other)]
    rests = [evidence.matches[rows:] for evidence in (why.said, why.other)]
    sums = {f"shown above ({len(parts[0])}, {len(parts[1])})": [_sum(some) for some in parts]}
    if any(rests):
        sums[f"the others ({len(rests[0])}, {len(rests[1])})"] = [_sum(some) for some in rests]
    sums |= {"bias": [why.said.bias, why.other.bias], LOGIT: [why.said.logit, why.other.logit]}
    lines = [_line("", [why.said.class_name, why.other.class_name, "difference"], look, MUTED)]
    for name, (said, other) in sums.items():
        if name == LOGIT:
            lines.append(rule(lines[0].width))
        lines.append(_line(name, [decimal(said), decimal(other), f"{round(said - other, 2) + 0.0:+.2f}"], look))
    return above(lines, look.gap // 2)


def _line(name: str, values: list[str], look: Look, ink: Colour = INK) -> Image.Image:
    label, column = (290, 138) if look.narrow else (270, 120)
    return beside(
        [words(name, look.body, label, ink), *(words(value, look.body, column, ink, along=1) for value in values)],
        look.gap,
    )


def _conclusion(why: WhyNot, look: Look) -> Image.Image:
    width = look.content if look.narrow else (look.content - BETWEEN) // 2
    said, other = (
        f"{fit_text(some.class_name, look.head, width * 0.5)} ({percent(some.probability)})"
        for some in (why.said, why.other)
    )
    times = _times(why.difference)
    return above(
        [
            words(f"So {said} is {times} times as probable as {other}.", look.head, width, most=4),
            words(f"exp({decimal(why.difference)}) = {times}; all numbers are rounded", look.small, width, MUTED),
        ],
        look.gap // 2,
    )


def _times(difference: float) -> str:
    if difference > math.log(1e6):
        return "more than a million"
    times = math.exp(difference)
    return f"{times:.2f}" if times < 10 else f"{times:,.0f}"


def _sum(matches: list[Match]) -> float:
    return math.fsum(match.contribution for match in matches)
