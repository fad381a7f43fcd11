"""What benchmarks of speed share: their words, what they ran on, and their tables."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from statistics import median
from typing import Any, NoReturn

import torch
from measuring import Comparison
from rich.table import Table

import protopush


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def count(text: str) -> int:
    """A number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def device_name(text: str) -> str:
    """A device that is here: cpu or cuda."""
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if text not in here:
        raise argparse.ArgumentTypeError(f"{text!r} is no device that is here; expected {' or '.join(here)}")
    return text


def surroundings(device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on; ``load`` is how many processes were busy before we began."""
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "protopush": protopush.__version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def table(title: str, comparisons: Sequence[Comparison]) -> Table:
    """All sides and results of a case."""
    shown = Table("setting", "what", "median", "range", "goal", title=title, title_justify="left")
    for comparison in comparisons:
        setting = comparison.setting
        for side, values in comparison.timings.items():
            shown.add_row(setting, side, *_numbers(values, comparison.unit))
            setting = ""
        for result in comparison.results:
            reached = result.goal is not None and result.goal.reached(median(result.values))
            goal = "" if result.goal is None else f"{result.goal}: {'reached' if reached else 'missed'}"
            shown.add_row("", result.name, *_numbers(result.values, result.unit), goal, style="bold")
        for what, remark in comparison.remarks.items():
            shown.add_row("", what, remark)
        shown.add_section()
    return shown


def _numbers(values: Sequence[float], unit: str) -> tuple[str, str]:
    return f"{median(values):.4g} {unit}", f"{min(values):.4g} - {max(values):.4g}"
