"""From measured numbers to what the page shows of them. What it doesn't know, it shows under its own name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from protopush.report.context import Bin, ClassRow, Confusion, Interval, Number, NumberGroup
from protopush.report.glossary import GROUPS, PER_CLASS, TERMS, Term

APART = {"n", "confusion", "per_class", "intervals"}  # shown elsewhere, at whatever depth
LARGEST_TABLE = 30  # classes; a larger confusion matrix nobody reads
MISTAKES = 12  # of the most frequent, told where there is no table
BINS = 10


def number_groups(numbers: Mapping[str, Any]) -> list[NumberGroup]:
    """All metrics by kind; a kind that was not measured is left out.

    Example:
        >>> (group,) = number_groups({"classification": {"n": 9, "accuracy": 0.5, "novel": 2.0}, "faithfulness": None})
        >>> [(number.name, number.text) for number in group.numbers]
        [('accuracy', '0.500'), ('novel', '2.000')]
    """
    found = []
    for kind, values in numbers.items():
        if isinstance(values, Mapping):
            title, about = GROUPS.get(kind, (kind, ""))
            found.append(NumberGroup(title, about, list(named_numbers(values, kind).values())))
    return found


def named_numbers(values: Mapping[str, Any], kind: str) -> dict[str, Number]:
    """The metrics of one kind by key, in the glossary's order; those that it doesn't know come last."""
    terms = TERMS.get(kind, {})
    flat = dict(_flat(values))
    intervals = dict(_flat(values.get("intervals") or {}))
    chances = flat | {"one_of_classes": 1 / len(values["per_class"]) if values.get("per_class") else None}
    known = [key for key in terms if key in flat]
    found = {}
    for key in [*known, *(key for key in flat if key not in terms)]:
        term = terms.get(key, Term(key, "", "", share=False))
        chance = chances.get(term.chance) if isinstance(term.chance, str) else term.chance
        value = _finite(flat[key])
        found[key] = Number(
            name=term.name,
            meaning=term.meaning,
            value=value,
            text=_text(flat[key]),
            interval=_interval(intervals.get(key)),
            better=term.better,
            chance=_finite(chance),
            share=term.share and value is not None and 0 <= value <= 1,
        )
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if key in APART:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}"
    return ", ".join(_text(one) for one in value) if isinstance(value, (list, tuple)) else str(value)


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _interval(value: Any) -> Interval:
    if not value:
        return None
    low, high = (_finite(edge) for edge in value)
    return None if low is None or high is None else (low, high)


def class_rows(classification: Mapping[str, Any]) -> list[ClassRow]:
    """One row for each class, with the columns of :data:`PER_CLASS`."""
    rows = []
    for name, row in (classification.get("per_class") or {}).items():
        intervals = row.get("intervals") or {}
        cells = [(_finite(row.get(key)), _interval(intervals.get(key))) for key in PER_CLASS]
        rows.append(ClassRow(name, int(row["n"]), cells))
    return rows


def confusion_of(counts: Sequence[Sequence[int]] | None, names: Sequence[str]) -> Confusion | None:
    """The confusion matrix; of very many classes the most frequent mistakes alone.

    Example:
        >>> confusion_of([[3, 1], [0, 2]], ["a", "b"]).common
        [('a', 'b', 1, 0.25)]
    """
    if counts is None:
        return None
    mistakes = [
        (names[true], names[guess], count, count / sum(row))
        for true, row in enumerate(counts)
        for guess, count in enumerate(row)
        if count and true != guess
    ]
    common = sorted(mistakes, key=lambda one: -one[2])[:MISTAKES]
    if len(names) > LARGEST_TABLE:
        return Confusion([], [], common)
    return Confusion(list(names), [list(row) for row in counts], common)


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> list[Bin]:
    """How often answers of like confidence are right; empty bins are left out (Niculescu-Mizil and Caruana, 2005).

    Args:
        probabilities: (N, C).
        labels: (N,).
        bins: of equal width, closed above; the first holds 0 too.

    Example:
        >>> import torch
        >>> reliability(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8]]), torch.tensor([0, 0, 0]), bins=2)
        [Bin(confidence=0.83..., accuracy=0.66..., count=3)]
    """
    confidence, predicted = probabilities.double().max(dim=1)
    right = (predicted == labels).double()
    places = (confidence * bins).ceil().long().clamp(1, bins)
    found = []
    for place in sorted(set(places.tolist())):
        here = places == place
        found.append(Bin(float(confidence[here].mean()), float(right[here].mean()), int(here.sum())))
    return found
