"""Progress bars on a terminal, nothing elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# One console for bars and log lines, on stderr: what a machine reads goes to stdout.
console = Console(stderr=True)


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar from 0 to ``total``; the block gets a function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not _can_draw()) as progress:
        task = progress.add_task(what, total=total)
        yield lambda steps: progress.update(task, advance=steps)


def log_to_stderr(level: int) -> None:
    """The log as plain lines; above a progress bar where there is one."""
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if _can_draw():
        handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False, markup=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger("protopush")
    log.handlers = [handler]
    log.setLevel(level)
    log.propagate = False


def _can_draw() -> bool:
    """Whether stderr is a terminal that can move its cursor (TERM=dumb cannot; NO_COLOR is rich's own matter)."""
    return console.is_terminal and not console.is_dumb_terminal
