"""The pieces of the page, as plain values: pictures, numbers, prototypes and cases.

What the page shows, as plain values: what is drawn knows nothing of how it was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Interval = tuple[float, float] | None
State = Literal["good", "bad", "warn", "unknown"]


@dataclass(frozen=True)
class Frame:
    """A box over a picture, in percent of the picture; ``colour`` numbers the page's palette from 0."""

    x: float
    y: float
    width: float
    height: float
    label: str = ""
    colour: int = 0


@dataclass(frozen=True)
class Picture:
    """An inline picture.

    Attributes:
        uri: ``data:image/jpeg;base64,...``.
        width, height: as shown where there is room, in CSS pixels.
        alt: what it shows, in words.
        frames: boxes drawn over it.
    """

    uri: str
    width: int
    height: int
    alt: str
    frames: tuple[Frame, ...] = ()


@dataclass(frozen=True)
class Fact:
    """A name and what it is."""

    name: str
    value: str


@dataclass(frozen=True)
class Badge:
    """A state in colour and in words."""

    state: State
    text: str


@dataclass(frozen=True)
class Number:
    """One metric.

    Attributes:
        name, meaning: in words.
        value: None where it is undefined.
        text: the value as it is written.
        interval: 95 %.
        better: ``higher``, ``lower`` or empty.
        chance: what guessing would give, where there is such a number.
        share: whether it lies between 0 and 1, so that a bar can show it.
    """

    name: str
    meaning: str
    value: float | None
    text: str
    interval: Interval
    better: str
    chance: float | None
    share: bool


@dataclass(frozen=True)
class NumberGroup:
    """The metrics of one kind."""

    title: str
    about: str
    numbers: list[Number]


@dataclass(frozen=True)
class ClassRow:
    """How well one class is told from the others: (value, interval) by column."""

    name: str
    n: int
    cells: list[tuple[float | None, Interval]]


@dataclass(frozen=True)
class Confusion:
    """Images by true class (rows) and predicted class (columns).

    Attributes:
        names: in label order; empty where there are too many classes for a table.
        rows: counts.
        common: (true, predicted, images, share of the true class's) of the most frequent mistakes.
    """

    names: list[str]
    rows: list[list[int]]
    common: list[tuple[str, str, int, float]]


@dataclass(frozen=True)
class Bin:
    """Answers of like confidence: how sure they were, how many were right."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Near:
    """A patch of another training image that a prototype likes."""

    picture: Picture | None
    file: str
    class_name: str
    similarity: float


@dataclass(frozen=True)
class PrototypeCard:
    """One prototype and where it comes from.

    Attributes:
        ident: its anchor in the page.
        number: its slot within the class, from 0, as the commands count.
        part, source: the patch and the whole training image; None where there is no picture.
        file: of its image; empty where it was never pushed.
        facts: similarity, group, ...
        missing: why there is no picture; empty where there is one.
        own, others: the nearest patches of its class and of others.
        problem: of its certificate; empty where there is none.
    """

    ident: str
    number: int
    part: Picture | None
    source: Picture | None
    file: str
    facts: list[Fact]
    missing: str
    own: list[Near]
    others: list[Near]
    problem: str


@dataclass(frozen=True)
class PrototypeClass:
    """The prototypes of a class, and numbers about all of them; ``left_out`` more are not shown."""

    ident: str
    name: str
    facts: list[Fact]
    cards: list[PrototypeCard]
    left_out: int


@dataclass(frozen=True)
class Look:
    """This part looks like that part of that training image, and what that adds to the score."""

    number: int
    colour: int
    here: Picture
    there: Picture | None
    source: Picture | None
    ident: str
    prototype: str
    file: str
    similarity: float
    weight: float
    contribution: float
    bar: float


@dataclass(frozen=True)
class Score:
    """How a class's logit comes about."""

    name: str
    role: str
    probability: float
    contributions: float
    bias: float
    logit: float
    behind: float


@dataclass(frozen=True)
class Case:
    """One image, and why the model says what it says."""

    title: str
    file: str
    truth: str
    predicted: str
    probability: float
    right: bool
    picture: Picture
    heat: Picture | None
    heat_range: tuple[float, float]
    looks: list[Look]
    others: int
    others_sum: float
    scores: list[Score]


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
