"""Sections of numbers: metrics, confusion, other runs beside this one, the pushes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protopush.data.audit import Audit
from protopush.data.files import read_rows
from protopush.evaluation.compare import ROWS
from protopush.evaluation.locality import Locality
from protopush.evaluation.measure import Measured
from protopush.explain.neighbours import Neighbours
from protopush.metrics import glossary
from protopush.metrics.glossary import PER_CLASS, finite, metric_name, metric_text
from protopush.models.model_folder import Run
from protopush.push.certificate import AnchorCheck
from protopush.report.prototype_cards import MOST, SHARP, Cards

NOT_MEASURED = {
    "localization": "not measured: the data have no masks (a column mask in the manifest).",
    "faithfulness": "not measured for this report (--faithfulness 48).",
}
LARGEST_TABLE = 30  # classes; a larger confusion matrix nobody reads
MISTAKES = 12  # of the most frequent, listed where there is no table
BINS = 10
FULL = 200  # prototypes up to which pictures are sharp


@dataclass(frozen=True)
class ReportData:
    """What a report is made of; see :func:`protopush.report.build.build_report`."""

    run: Run
    measured: Measured
    neighbours: Sequence[Sequence[Neighbours | None]] | None
    checks: Sequence[AnchorCheck] | None
    audit: Audit | None
    comparison: Mapping[str, Any] | None
    root: Path
    device: str | torch.device
    locality: Sequence[Locality] | None = None

    @cached_property
    def cards(self) -> Cards:
        """The prototypes; of very many, smaller pictures and no neighbours, so that the page stays about as large."""
        count = int(self.run.head.proto_manager.valid_mask.sum())
        rows = self.neighbours if self.neighbours is not None and count <= MOST else []
        near = {(c, k): found for c, row in enumerate(rows) for k, found in enumerate(row) if found is not None}
        sharp = SHARP * min(1.0, math.sqrt(FULL / count))
        return Cards(self.run, self.root, near, self.checks or (), self.measured.numbers["prototypes"], sharp=sharp)


def numbers(data: ReportData) -> dict[str, Any]:
    """All metrics, and class by class."""
    found = data.measured.numbers
    return {
        "split": data.measured.split,
        "images": len(data.measured.labels),
        "drawn": drawn_groups(data.measured.dataset.groups),
        "groups": glossary.number_groups(found),
        "not_measured": [
            (glossary.GROUPS[kind][0], words) for kind, words in NOT_MEASURED.items() if not found.get(kind)
        ],
        "columns": list(PER_CLASS.values()),
        "classes": class_rows(found["classification"]),
    }


def drawn_groups(groups: Sequence[str | None]) -> int:
    """How many groups, or images alone, a bootstrap draws from; 0 where each image is a group of its own."""
    named = [group for group in groups if group]
    return len(set(named)) + len(groups) - len(named) if len(set(named)) < len(named) else 0


def class_rows(classification: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each class, with (value, interval) by column of :data:`PER_CLASS`."""
    rows = []
    for name, row in (classification.get("per_class") or {}).items():
        intervals = row.get("intervals") or {}
        cells = [(finite(row.get(key)), glossary.finite_interval(intervals.get(key))) for key in PER_CLASS]
        rows.append({"name": name, "n": int(row["n"]), "cells": cells})
    return rows


def confusion(data: ReportData) -> dict[str, Any]:
    """Which class is taken for which, and whether the model is as sure as it should be."""
    counts = data.measured.numbers["classification"].get("confusion")
    return {
        "classes": len(data.run.class_names),
        "images": len(data.measured.labels),
        "matrix": confusion_matrix(counts, data.run.class_names),
        "reliability": reliability(data.measured.probabilities, data.measured.labels),
    }


def confusion_matrix(counts: Sequence[Sequence[int]] | None, names: Sequence[str]) -> dict[str, Any] | None:
    """The confusion matrix; of very many classes the most frequent mistakes alone.

    ``names`` and ``rows`` (true class by predicted class) are empty where there are too many classes for a table;
    ``common`` has (true, predicted, images, share of the true class) of the most frequent mistakes.

    Example:
        >>> confusion_matrix([[3, 1], [0, 2]], ["a", "b"])["common"]
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
    small = len(names) <= LARGEST_TABLE
    return {"names": list(names) if small else [], "rows": list(counts) if small else [], "common": common}


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> list[tuple[float, float, int]]:
    """How often answers of like confidence are right (Niculescu-Mizil and Caruana, 2005).

    From probabilities (N, C) and labels (N,): (mean confidence, accuracy, images) of each bin that isn't empty. Bins
    are of equal width, closed above; the first holds 0 too.

    Example:
        >>> reliability(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8]]), torch.tensor([0, 0, 0]), bins=2)
        [(0.83..., 0.66..., 3)]
    """
    confidence, predicted = probabilities.double().max(dim=1)
    right = (predicted == labels).double()
    places = (confidence * bins).ceil().long().clamp(1, bins)
    inside = [places == place for place in sorted(set(places.tolist()))]
    return [(float(confidence[here].mean()), float(right[here].mean()), int(here.sum())) for here in inside]


def comparison(data: ReportData) -> dict[str, Any]:
    """Runs side by side as ``protopush compare`` has them, under the glossary's names; the best of a row is marked."""
    names = {words: metric_name(".".join(keys), kind) for _, words, _, (kind, *keys) in ROWS}
    values = data.comparison or {"runs": [], "rows": []}
    rows = [row | {"name": names.get(row["metric"], row["metric"]), "cells": _cells(row)} for row in values["rows"]]
    return {
        "command": ["report", str(data.run.folder), "--against", "OTHER_RUN"],
        "runs": [(run["name"], _kind(run)) for run in values["runs"]],
        "rows": rows,
    }


def _kind(run: Mapping[str, Any]) -> str:
    match = {"local": "compares parts", "global": "compares whole images"}.get(run.get("match", ""), "")
    live = "live anchors" if run.get("anchoring") == "live" else ""
    return ", ".join(words for words in (match, live, run.get("backbone") or "") if words)


def _cells(row: Mapping[str, Any]) -> list[tuple[str, Any, bool]]:
    """(text, interval, whether it is the best) of each run."""
    known = [value for value in row["values"] if value is not None]
    best = {"higher": max, "lower": min}.get(row["better"])
    top = best(known) if best and len(set(known)) > 1 else None
    intervals = row.get("intervals") or [None] * len(row["values"])
    pairs = zip(row["values"], intervals, strict=True)
    return [(metric_text(value), interval, value is not None and value == top) for value, interval in pairs]


SCORES = ("balanced_accuracy", "auroc", "accuracy")
FINAL = {
    "hard": "onto the patch itself",
    "momentum": "part of the way",
    "none": "anchors alone: nothing moved",
    "live": "live anchors: their images embedded once more in full precision",
}
LINES = {
    "mean distance before": "mean_before",
    "mean distance after": "mean_after",
    "smallest distance before (min_dist)": "min_dist",
}
WIDTH, HEIGHT = 640.0, 220.0
TICKS = 4


def pushes(data: ReportData) -> dict[str, Any]:
    """What the pushes did, as ``metrics.jsonl`` has it."""
    found = pushes_of(read_rows(data.run.folder / "metrics.jsonl"))
    return {"pushes": found, "chart": chart_of(found)}


def pushes_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The pushes among the lines, first to last.

    Example:
        >>> (push,) = pushes_of([{"epoch": 1}, {"push": 5, "use_local": True, "momentum": 0.9, "min_dist": 0.25}])
        >>> push["when"], push["how"], push["min_dist"]
        ('epoch 5', 'patches, momentum 0.9', 0.25)
    """
    return [_push(row) for row in rows if "push" in row or "final" in row]


def _push(row: Mapping[str, Any]) -> dict[str, Any]:
    final, words = row.get("final"), []
    if "momentum" in row:
        words = ["patches" if row.get("use_local") else "whole images", f"momentum {row['momentum']:g}"]
    if final:
        words.append(FINAL.get(final, str(final)))
    before, after = row.get("val_before") or {}, row.get("val_after") or {}
    return {
        "when": "after training" if final else f"epoch {row['push']}" if row["push"] else "by command",
        "how": ", ".join(words),
        "min_dist": finite(row.get("min_dist")),
        "mean_before": finite(row.get("mean_dist")),
        "mean_after": finite(row.get("mean_dist_after")),
        "scores": [(metric_name(key), finite(before.get(key)), finite(after.get(key))) for key in SCORES],
        "notes": _notes(row),
    }


def _notes(row: Mapping[str, Any]) -> list[str]:
    notes = []
    if row.get("weights"):
        notes.append(f"from the weights of {row['weights']}, the best on validation images")
    if avoided := row.get("duplicates_avoided"):
        notes.append(f"{avoided} prototypes took a second choice, because another one stands for their nearest patch")
    if guard := row.get("guard"):
        notes.append(f"guard {guard['guard']}: {guard['action']}, cost {guard['cost']:+.3f} (budget {guard['budget']})")
    for key, done in (("pruning", "removed"), ("growth", "added"), ("choice", "removed")):
        if changed := (row.get(key) or {}).get(done):
            notes.append(f"{key}: {len(changed)} prototypes {done}")
    refitted = row.get("val_refitted") or row.get("val_connections") or {}
    if (value := finite(refitted.get("balanced_accuracy"))) is not None:
        notes.append(f"then refitted to the prototypes: balanced accuracy {metric_text(value)}")
    fitted = row.get("val_prior") or {}
    if (value := finite(fitted.get("balanced_accuracy"))) is not None:
        notes.append(f"then fitted to a prior: balanced accuracy {metric_text(value)} on images not seen by a fit")
    return notes + [str(note) for note in row.get("notes") or []]


def chart_of(pushes: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Distances by push, from 0 upwards; None with fewer than two pushes, which make no line."""
    if sum(push["min_dist"] is not None for push in pushes) < 2:
        return None
    known = [push[key] for push in pushes for key in LINES.values() if push[key] is not None]
    top = _round_up(max(known))
    places = [round(WIDTH * (i + 0.5) / len(pushes), 1) for i in range(len(pushes))]
    series = []
    for name, key in LINES.items():
        there = [(x, push[key]) for x, push in zip(places, pushes, strict=True) if push[key] is not None]
        series.append({"name": name, "points": [(x, round(HEIGHT * (1 - y / top), 1), y) for x, y in there]})
    step = -(-len(pushes) // 12)  # a label for each of at most twelve
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "x_ticks": [(x, push["when"]) for x, push in zip(places, pushes, strict=True)][::step],
        "y_ticks": [(round(HEIGHT * (1 - i / TICKS), 1), f"{top * i / TICKS:.3g}") for i in range(TICKS + 1)],
        "series": series,
    }


def _round_up(value: float) -> float:
    """The next number that four ticks divide well: 0.4, 0.8, 1.2, 2 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if value <= step * power * (1 + 1e-9))
