"""The report of a run: one self-contained page.

Pictures and styles are inside, there is no script, and nothing is fetched from a network.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from protopush import __version__
from protopush.data.audit import Audit
from protopush.data.files import write_atomic
from protopush.evaluation.locality import Locality
from protopush.evaluation.measure import Measured
from protopush.explain.figure_style import decimal, percent
from protopush.explain.neighbours import Neighbours
from protopush.metrics.glossary import metric_text
from protopush.models.model_folder import Run
from protopush.push.certificate import AnchorCheck
from protopush.report.number_sections import ReportData
from protopush.report.sections import SECTIONS
from protopush.runs.progress import bar

FILE = "report.html"


def build_report(
    run: Run, measured: Measured, neighbours: Sequence[Sequence[Neighbours | None]] | None = None,
    checks: Sequence[AnchorCheck] | None = None, audit: Audit | None = None,
    comparison: Mapping[str, Any] | None = None, path: str | Path | None = None, root: str | Path | None = None,
    device: str | torch.device = "cpu", locality: Sequence[Locality] | None = None,
) -> Path:  # fmt: skip
    """Write ``report.html``, whole or not at all; what is not given is named as missing, with the command for it.

    Args:
        run: its model is on ``device``.
        measured: its numbers on a split.
        neighbours: by class and slot, as :func:`protopush.explain.neighbours.find_neighbours` finds them.
        checks: of the anchors, as :func:`protopush.push.certificate.verify_anchors` makes them.
        audit: of the data.
        comparison: of this run with others, as ``protopush compare --json`` prints it.
        path: where to write, and what is returned; by default ``report.html`` in the run's folder.
        root: where the training images are now; by default where they were in training.
        device: where the model is.
        locality: how much is decided outside the boxes, as :func:`protopush.evaluation.locality.measure_run` finds it.

    Raises:
        InputError: an image of the split can't be read, or the page can't be written.
    """
    data = ReportData(run, measured, neighbours, checks, audit, comparison, Path(root or run.root), device, locality)
    text, file = render(data), Path(path) if path else run.folder / FILE
    # A file name may hold bytes that are no text; the page shows a question mark for them.
    write_atomic(file, lambda temporary: temporary.write_bytes(text.encode("utf-8", errors="replace")))
    return file


def render(data: ReportData) -> str:
    """The page's HTML: each section's template with its context, one below the other."""
    templates = environment()
    sections = []
    with bar("Writing the page", len(SECTIONS)) as advance:
        for name, (title, context) in SECTIONS.items():
            sections.append((name, title, Markup(templates.get_template(f"{name}.html.j2").render(context(data)))))
            advance(1)
    page = templates.get_template("report.html.j2")
    today = datetime.now(timezone.utc).date().isoformat()
    return page.render(title=data.run.folder.resolve().name, sections=sections, written=today, version=__version__)


@cache
def environment(package: str = "protopush.report") -> Environment:
    """The templates of a package, with the macros of the report; each escapes what it is given."""
    made = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("protopush.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"percent": percent, "decimal": decimal, "metric": metric_text, "date": date, "shell": shell}
    return made


def date(time: str) -> str:
    """A time for people.

    Example:
        >>> date("2026-03-01T09:05:00+00:00")
        '1 March 2026, 09:05 UTC'
    """
    try:
        moment = datetime.fromisoformat(time)
    except ValueError:
        return time
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def shell(words: Sequence[str]) -> str:
    """A command of protopush as a shell takes it."""
    return shlex.join(["protopush", *words])
