"""Progress bars on a terminal; elsewhere, of a command, a line every ten seconds."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from types import SimpleNamespace

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger("protopush.runs")

# One console for bars and log lines, on stderr: what a machine reads goes to stdout.
console = Console(stderr=True)

EVERY = 10.0  # seconds between lines, over all bars of a command
_LINES = SimpleNamespace(due=math.inf)  # when the next one is; never for those who import protopush


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar from 0 to ``total``; the block gets a function that advances it. Its clock moves also where steps are long.

    Where nothing can be drawn, a command's log has a line every ten seconds.
    """
    if not _can_draw():
        with _lines(what, total) as advance:
            yield advance
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda steps: progress.update(task, advance=steps)


@contextmanager
def _lines(what: str, total: int) -> Iterator[Callable[[int], None]]:
    done, ended = [0], Event()

    def write() -> None:
        while not ended.wait(max(0.0, _LINES.due - time.monotonic())):
            _LINES.due = time.monotonic() + EVERY
            logger.info("%s: %d of %d", what, sum(done), total)

    writer = Thread(target=write, daemon=True)
    if _LINES.due < math.inf:
        writer.start()
    try:
        yield done.append
    finally:
        ended.set()
        if writer.ident:
            writer.join()


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
    _LINES.due = time.monotonic() + EVERY


def _can_draw() -> bool:
    """Whether stderr is a terminal that can move its cursor (TERM=dumb cannot; NO_COLOR is rich's own matter)."""
    return console.is_terminal and not console.is_dumb_terminal
