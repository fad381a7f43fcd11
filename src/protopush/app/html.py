"""Pieces of the page as HTML; whatever comes from files or people is escaped by the way it is put in."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence

from markupsafe import Markup
from PIL import Image

from protopush.explain.explanation import ClassEvidence, Explanation
from protopush.explain.figure_style import decimal, file_name, percent


def message(text: str, kind: str = "note") -> str:
    """A line in a box: ``note``, ``good`` or ``bad``."""
    return Markup('<div class="pp-message pp-{}" role="{}">{}</div>').format(
        kind, "alert" if kind == "bad" else "status", text
    )


def picture(image: Image.Image, alt: str, side: int) -> Markup:
    """A picture within the page, at most so many pixels wide and high."""
    shown = image.convert("RGB")
    shown.thumbnail((2 * side, 2 * side))
    data = io.BytesIO()
    shown.save(data, format="JPEG", quality=85)
    uri = "data:image/jpeg;base64," + b64encode(data.getvalue()).decode("ascii")
    return Markup('<img src="{}" alt="{}" style="max-width:min(100%,{}px)">').format(uri, alt, side)


def prediction(explanation: Explanation, note: str) -> str:
    """What the model says, and how sure it is of each class."""
    first = explanation.classes[0]
    rows = Markup("").join(_chance(evidence) for evidence in explanation.classes)
    return Markup(
        '{}<h2 class="pp-said">The model says: {} <span class="pp-muted">({})</span></h2>'
        '<p class="pp-muted">for {}</p>'
        '<div class="pp-bars" role="table" aria-label="Probability of each class">{}</div>'
        '<p class="pp-muted">The model gives a probability to every class; they add up to 100%. It is not a diagnosis.'
        "</p>"
    ).format(
        Markup(message(note)) if note else "", first.class_name, percent(first.probability), explanation.file, rows
    )


def _chance(evidence: ClassEvidence) -> Markup:
    return _bar(evidence.class_name, percent(evidence.probability), evidence.probability)


def contributions(evidence: ClassEvidence, most: int = 10) -> str:
    """What each prototype adds to the score of a class, and that this is the whole score."""
    shown, rest = evidence.matches[:most], evidence.matches[most:]
    longest = max((abs(match.contribution) for match in shown), default=0.0) or 1.0
    rows = [
        _bar(
            f"{evidence.class_name} #{match.prototype}",
            f"{match.contribution:+.2f}",
            abs(match.contribution) / longest,
            f"{file_name(match.anchor)} · similarity {decimal(match.similarity)} × weight {decimal(match.weight)}",
        )
        for match in shown
    ]
    if rest:
        rows.append(_bar(f"{len(rest)} others", f"{sum(m.contribution for m in rest):+.2f}", 0))
    return Markup(
        "<h3>What adds up to the score of {}</h3>"
        "<p>Each line is a prototype: a part of a training image. The more this image looks like it, the more it "
        "adds.</p>"
        '<div class="pp-bars" role="table" aria-label="Contribution of each prototype">{}</div>'
        "<p>Sum of the prototypes {} + starting value of the class {} = score {}</p>"
    ).format(
        evidence.class_name,
        Markup("").join(rows),
        decimal(evidence.contributions_sum),
        decimal(evidence.bias),
        decimal(evidence.logit),
    )


def _bar(name: str, value: str, share: float, detail: str = "") -> Markup:
    aside = Markup('<span class="pp-detail">{}</span>').format(detail) if detail else ""
    return Markup(
        '<div class="pp-bar" role="row"><span class="pp-name" role="cell">{}</span>'
        '<span class="pp-value" role="cell">{}</span>'
        '<span class="pp-track"><span style="width:{:.1f}%"></span></span>{}</div>'
    ).format(name, value, 100 * min(max(share, 0.0), 1.0), aside)


def facts(pairs: Sequence[tuple[str, str]]) -> Markup:
    """Names and what they are, one below the other."""
    rows = (Markup("<dt>{}</dt><dd>{}</dd>").format(name, value) for name, value in pairs)
    return Markup('<dl class="pp-facts">{}</dl>').format(Markup("").join(rows))
