"""One self-contained page: pictures and styles inside, no script, nothing asked of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from protopush.data.audit import Audit
from protopush.data.files import write_atomic
from protopush.explain.neighbours import Neighbours
from protopush.push.certificate import AnchorCheck
from protopush.report.content import Content
from protopush.report.gather import gather
from protopush.report.measure import Measured
from protopush.training.run import Run

FILE = "report.html"
SECTIONS = (
    ("summary", "In short"),
    ("numbers", "Numbers"),
    ("confusion", "Confusion"),
    ("prototypes", "Prototypes"),
    ("cases", "Cases"),
    ("pushes", "Pushes"),
    ("comparison", "Parts against whole images"),
    ("certificate", "Certificate"),
    ("audit", "Data audit"),
    ("reproduce", "Reproduce"),
)


def build_report(
    run: Run,
    measured: Measured,
    neighbours: Sequence[Sequence[Neighbours | None]] | None = None,
    checks: Sequence[AnchorCheck] | None = None,
    audit: Audit | None = None,
    comparison: Mapping[str, Any] | None = None,
    path: str | Path | None = None,
    root: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> Path:
    """Write ``report.html``; what is not given is told to be missing, with the command that gives it.

    Args:
        run: its model is on ``device``.
        measured: its numbers on a split.
        neighbours: by class and slot, as :func:`protopush.explain.neighbours.find_neighbours` finds them.
        checks: of the anchors, as :func:`protopush.push.certificate.verify_anchors` makes them.
        audit: of the data.
        comparison: of this run with others, as ``protopush compare --json`` tells it.
        path: where to write; by default ``report.html`` in the run's folder.
        root: where the training images are now; by default where they were in training.
        device: where the model is.

    Returns:
        the path that was written.

    Raises:
        InputError: an image of the split can't be read, or the page can't be written.
    """
    content = gather(run, measured, neighbours, checks, audit, comparison, Path(root or run.root), device)
    return write_report(content, Path(path) if path else run.folder / FILE)


def write_report(content: Content, path: Path) -> Path:
    """The page, whole or not at all."""
    text = render(content)
    # A file name may hold bytes that are no text; the page shows a question mark for them.
    write_atomic(path, lambda temporary: temporary.write_bytes(text.encode("utf-8", errors="replace")))
    return path


def render(content: Content) -> str:
    """The page's HTML."""
    return _environment().get_template("report.html.j2").render(page=content, sections=SECTIONS)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """Every template escapes what it is given, whatever its name ends in."""
    environment = Environment(
        loader=PackageLoader("protopush.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "signed": signed}
    return environment


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many digits after the point; a dash where there is none.

    Example:
        >>> number(0.12345), number(-1.0, 1), number(None)
        ('0.123', '−1.0', '–')
    """
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float) -> str:
    """A number with its sign.

    Example:
        >>> signed(0.126), signed(-2.0)
        ('+0.13', '−2.00')
    """
    return f"{value:+.2f}".replace("-", "−")


def percent(share: float) -> str:
    """A share in percent; 100 and 0 are only said where they are so.

    Example:
        >>> percent(0.123), percent(0.9999), percent(1.0), percent(0.001)
        ('12 %', '> 99 %', '100 %', '< 1 %')
    """
    rounded = round(100 * share)
    if rounded == 100 and share < 1:
        return "> 99 %"
    return "< 1 %" if rounded == 0 and share > 0 else f"{rounded} %"
