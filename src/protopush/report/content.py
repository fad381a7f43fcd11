"""What the page shows, as plain values: what is drawn knows nothing of how it was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from protopush.report.pieces import Badge, Bin, Case, ClassRow, Confusion, Fact, Number, NumberGroup, PrototypeClass


@dataclass(frozen=True)
class Push:
    """One push: (name, before, after) of what was measured around it, and what else it did."""

    when: str
    how: str
    min_dist: float | None
    mean_before: float | None
    mean_after: float | None
    scores: list[tuple[str, float | None, float | None]]
    notes: list[str]


@dataclass(frozen=True)
class Series:
    """A line of a chart; points in the chart's units, None where there is none."""

    name: str
    points: list[tuple[float, float]]
    values: list[float]


@dataclass(frozen=True)
class Chart:
    """A line chart in a box of ``width`` x ``height``: ticks as (place, text)."""

    width: float
    height: float
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    series: list[Series]


@dataclass(frozen=True)
class ComparedRow:
    """One metric of several runs: (text, interval, whether it is the best)."""

    group: str
    name: str
    better: str
    cells: list[tuple[str, str, bool]]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side: (name, what it is)."""

    runs: list[tuple[str, str]]
    rows: list[ComparedRow]


@dataclass(frozen=True)
class Fault:
    """An anchor that doesn't hold."""

    prototype: str
    ident: str
    file: str
    recorded: float | None
    measured: float | None
    problem: str


@dataclass(frozen=True)
class Ruling:
    """What a person has forbidden."""

    number: int
    time: str
    who: str
    what: str
    reason: str
    effect: str


@dataclass(frozen=True)
class Certificate:
    """Whether the prototypes still are what their record says."""

    badge: Badge
    told: str
    faults: list[Fault]
    rulings: list[Ruling]
    weights: str


@dataclass(frozen=True)
class Finding:
    """A check of the data: how many were found, and examples."""

    name: str
    count: int
    examples: list[str]


@dataclass(frozen=True)
class DataAudit:
    """What the audit of the data has found."""

    badge: Badge
    splits: list[str]
    counts: list[tuple[str, list[int]]]
    findings: list[Finding]
    note: str


@dataclass(frozen=True)
class Command:
    """What a command does, and its words."""

    about: str
    words: str


@dataclass(frozen=True)
class Reproduce:
    """How to get the same again."""

    commands: list[Command]
    facts: list[Fact]
    config: str
    missing: str


@dataclass(frozen=True)
class Content:
    """The whole page.

    Attributes:
        title: the run's name.
        written: the day, ISO 8601.
        classes: their names.
        lead: what the model is, in sentences.
        facts: the same in technical words.
        split, images, drawn: what the numbers were measured on, and how many groups intervals draw from; 0: no groups.
        headline: the few numbers at the top.
        groups: all of them.
        columns: (name, meaning) of the per-class table.
        all_right: whether no image is classified wrongly.
        hints: how to get what is missing.
    """

    title: str
    written: str
    version: str
    classes: list[str]
    lead: list[str]
    facts: list[Fact]
    split: str
    images: int
    drawn: int
    headline: list[Number]
    groups: list[NumberGroup]
    columns: list[tuple[str, str]]
    class_rows: list[ClassRow]
    confusion: Confusion | None
    reliability: list[Bin]
    prototypes: list[PrototypeClass]
    neighbours_told: bool
    cases: list[Case]
    all_right: bool
    pushes: list[Push]
    chart: Chart | None
    comparison: Comparison | None
    certificate: Certificate
    audit: DataAudit | None
    reproduce: Reproduce
    hints: dict[str, Any]
