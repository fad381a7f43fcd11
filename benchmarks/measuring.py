"""Paired measurements, their medians, and the goals that they are held against."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch

Side = Callable[[], float]  # does the work once and tells what it took
Repetition = Mapping[str, float]  # what each side took in one repetition


@dataclass(frozen=True)
class Goal:
    """A limit that a median must not pass, or, with ``at_least``, must reach."""

    limit: float
    at_least: bool = False

    def reached(self, value: float) -> bool:
        """Whether a value keeps to the limit."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


@dataclass(frozen=True)
class Result:
    """A number made of what the sides took, once for each repetition."""

    name: str
    unit: str
    values: list[float]
    goal: Goal | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        middle = median(self.values)
        return {
            "name": self.name,
            "unit": self.unit,
            "values": self.values,
            "median": middle,
            "goal": str(self.goal) if self.goal else None,
            "reached": self.goal.reached(middle) if self.goal else None,
        }


@dataclass(frozen=True)
class Comparison:
    """What several sides took, side by side.

    Attributes:
        setting: what they worked on.
        unit: of the timings.
        timings: a value per repetition for each side.
        results: made of them by :meth:`add`.
        remarks: what a reader must know of a side or of the whole.
    """

    setting: str
    unit: str
    timings: dict[str, list[float]]
    results: list[Result] = field(default_factory=list)
    remarks: dict[str, str] = field(default_factory=dict)

    def add(
        self, name: str, value: Callable[[Repetition], float], unit: str = "", goal: Goal | None = None
    ) -> Comparison:
        """Add a result: ``value`` is taken within each repetition, because what slows one side slows its pair too."""
        repetitions = [dict(zip(self.timings, row, strict=True)) for row in zip(*self.timings.values(), strict=True)]
        self.results.append(Result(name, unit, [value(repetition) for repetition in repetitions], goal))
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "setting": self.setting,
            "unit": self.unit,
            "timings": self.timings,
            "medians": {side: median(values) for side, values in self.timings.items()},
            "results": [result.to_dict() for result in self.results],
            "remarks": self.remarks,
        }


def timed(
    work: Callable[[], object], per: float = 1.0, before: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Side:  # fmt: skip
    """A side that tells the seconds of ``work``, divided by ``per``; ``before`` isn't counted."""

    def side() -> float:
        if before is not None:
            before()
        gc.collect()
        synchronize()
        started = clock()
        work()
        synchronize()
        return (clock() - started) / per

    return side


def synchronize() -> None:
    """Wait until a GPU has done all that it was given; on a CPU there is nothing to wait for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def clock_of(device: str) -> tuple[str, Callable[[], float]]:
    """The time that counts: the processors' on a CPU that others use too, the clock's where a GPU does the work."""
    return ("processors", time.process_time) if device == "cpu" else ("clock", time.perf_counter)


def paired(setting: str, unit: str, sides: Mapping[str, Side], repetitions: int, warm_up: bool = True) -> Comparison:
    """Let the sides work one after the other, in the reversed order every other time; the first round isn't counted."""
    for side in sides.values() if warm_up else ():
        side()
    timings: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(repetitions):
        for name in sides if repetition % 2 == 0 else reversed(list(sides)):
            timings[name].append(sides[name]())
    return Comparison(setting, unit, timings)


def spread(values: Sequence[float]) -> list[float]:
    """Mean and standard deviation; 0 where there is one value."""
    return [fmean(values), stdev(values) if len(values) > 1 else 0.0]


def save(values: Mapping[str, Any], path: Path) -> None:
    """Write JSON; a reader sees the old file or the new one, never half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
