"""What a table of predictions says in sum, read from the table itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from protopush.errors import listing
from protopush.predict.resumable_csv import read_rows
from protopush.predict.threshold import Threshold


def summary_of(out: Path, class_names: list[str], threshold: Threshold) -> dict[str, Any]:
    """Counts of a table, as plain values for JSON, however many times it was cut off while it grew."""
    rows = read_rows(out)
    header = next(rows)[0]
    predicted, error, nothing = (header.index(name) for name in ("predicted", "error", "nothing_similar"))
    said, problems, flagged, images = Counter[str](), Counter[str](), 0, 0
    for row, _ in rows:
        images += 1
        if row[error]:
            problems[row[error]] += 1
        else:
            said[row[predicted]] += 1
            flagged += row[nothing] == "1"
    return {
        "out": str(out),
        "images": images,
        "unreadable": sum(problems.values()),
        "problems": dict(problems.most_common(20)),
        "predicted": {name: said[name] for name in class_names},
        "nothing_similar": None if threshold.value is None else flagged,
        "threshold": threshold.to_dict(),
    }


def in_words(summary: dict[str, Any]) -> str:
    """The same for people."""
    counts = listing([f"{name} {count}" for name, count in summary["predicted"].items()], 20)
    lines = [f"{summary['out']}: {summary['images']} images ({counts})"]
    if summary["unreadable"]:
        problems = listing([f"{count} {problem}" for problem, count in summary["problems"].items()], 5)
        lines.append(f"{summary['unreadable']} without a prediction, see column error: {problems}")
    threshold = Threshold.from_dict(summary["threshold"])
    if threshold.value is None:
        lines.append(f"nothing_similar is empty: {threshold.problem}; give --threshold NUMBER, or --data.path")
    else:
        lines.append(
            f"Nothing similar in training: {summary['nothing_similar']} images, with no similarity of "
            f"{threshold.value:.6f} or more{_provenance(threshold)}"
        )
    if summary.get("resumed_from"):
        lines.append(f"{summary['resumed_from']} of the images were there already")
    return "\n".join(lines)


def _provenance(threshold: Threshold) -> str:
    if threshold.source == "given":
        return " (the threshold given)"
    told = (
        f"; so set that at most {threshold.share:.1%} of {threshold.set_on} are flagged "
        f"({threshold.set_flagged} of {threshold.set_images})"
    )
    if threshold.false_alarms is None:
        return f"{told}; no other images to measure false alarms on"
    return (
        f"; false alarms on {threshold.measured_on}, which it was not set on: {threshold.false_alarms:.1%} "
        f"({threshold.measured_flagged} of {threshold.measured_images}){told}"
    )
