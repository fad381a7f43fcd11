"""What the pushes did, as ``metrics.jsonl`` tells."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from protopush.errors import InputError
from protopush.report.context import Chart, Push, Series

SCORES = {"balanced_accuracy": "balanced accuracy", "auroc": "AUROC", "accuracy": "accuracy"}
FINAL = {
    "hard": "onto the patch itself",
    "momentum": "part of the way",
    "none": "anchors alone: nothing moved",
    "live": "live anchors: their images embedded once more in full precision",
}
WIDTH, HEIGHT = 640.0, 220.0
TICKS = 4


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``; none where there is no such file.

    Raises:
        InputError: a line is damaged.
    """
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [_row(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1)]


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise InputError(f"damaged file: {where} ({error}); take it from a copy of the run") from error


def pushes_of(rows: Sequence[Mapping[str, Any]]) -> list[Push]:
    """The pushes among the lines, first to last.

    Example:
        >>> (push,) = pushes_of([{"epoch": 1}, {"push": 5, "use_local": True, "momentum": 0.9, "min_dist": 0.25}])
        >>> push.when, push.how, push.min_dist
        ('epoch 5', 'patches, momentum 0.9', 0.25)
    """
    return [_push(row) for row in rows if "push" in row or "final" in row]


def _push(row: Mapping[str, Any]) -> Push:
    final = row.get("final")
    words = []
    if "momentum" in row:
        words = ["patches" if row.get("use_local") else "whole images", f"momentum {row['momentum']:g}"]
    if final:
        words.append(FINAL.get(final, str(final)))
    before, after = row.get("val_before") or {}, row.get("val_after") or {}
    return Push(
        when="after training" if final else f"epoch {row['push']}" if row["push"] else "by command",
        how=", ".join(words),
        min_dist=_known(row.get("min_dist")),
        mean_before=_known(row.get("mean_dist")),
        mean_after=_known(row.get("mean_dist_after")),
        scores=[(name, _known(before.get(key)), _known(after.get(key))) for key, name in SCORES.items()],
        notes=_notes(row),
    )


def _known(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _notes(row: Mapping[str, Any]) -> list[str]:
    notes = []
    if row.get("weights"):
        notes.append(f"from the weights of {row['weights']}, the best on validation images")
    if avoided := row.get("duplicates_avoided"):
        notes.append(f"{avoided} prototypes took a second choice, because another one stands for their nearest patch")
    if guard := row.get("guard"):
        notes.append(f"guard {guard['guard']}: {guard['action']}, cost {guard['cost']:+.3f} (budget {guard['budget']})")
    for key, done in (("pruning", "removed"), ("growth", "added")):
        if changed := (row.get(key) or {}).get(done):
            notes.append(f"{key}: {len(changed)} prototypes {done}")
    refitted = row.get("val_refitted") or row.get("val_connections") or {}
    if (value := _known(refitted.get("balanced_accuracy"))) is not None:
        notes.append(f"then refitted to the prototypes: balanced accuracy {value:.3f}")
    return notes + [str(note) for note in row.get("notes") or []]


def chart_of(pushes: Sequence[Push]) -> Chart | None:
    """Distances by push, from 0 upwards; None with fewer than two pushes, which make no line."""
    lines = {
        "mean distance before": [push.mean_before for push in pushes],
        "mean distance after": [push.mean_after for push in pushes],
        "smallest distance before (min_dist)": [push.min_dist for push in pushes],
    }
    known = [value for values in lines.values() for value in values if value is not None]
    if sum(push.min_dist is not None for push in pushes) < 2:
        return None
    top = _round_up(max(known))
    places = [WIDTH * (i + 0.5) / len(pushes) for i in range(len(pushes))]
    series = []
    for name, values in lines.items():
        there = [(x, value) for x, value in zip(places, values, strict=True) if value is not None]
        points = [(round(x, 1), round(HEIGHT * (1 - value / top), 1)) for x, value in there]
        series.append(Series(name, points, [value for _, value in there]))
    step = -(-len(pushes) // 12)  # a label for each of at most twelve
    return Chart(
        width=WIDTH,
        height=HEIGHT,
        x_ticks=[(round(x, 1), push.when) for x, push in list(zip(places, pushes, strict=True))[::step]],
        y_ticks=[(round(HEIGHT * (1 - i / TICKS), 1), f"{top * i / TICKS:.3g}") for i in range(TICKS + 1)],
        series=series,
    )


def _round_up(value: float) -> float:
    """The next number that four ticks divide well: 0.4, 0.8, 1.2, 2 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if value <= step * power * (1 + 1e-9))
