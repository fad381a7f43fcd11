"""Everything the page shows, from a run and what was measured of it.

One self-contained page: pictures and styles inside, no script, nothing asked of the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from protopush import __version__
from protopush.backbones.create import Backbone
from protopush.data.audit import Audit
from protopush.data.files import write_atomic
from protopush.evaluation.measure import Measured
from protopush.explain.neighbours import Neighbours
from protopush.models.model_folder import Run
from protopush.nn.prototypes import Anchor
from protopush.push.certificate import AnchorCheck
from protopush.report.cases import make_cases
from protopush.report.context import Content, Fact, Number
from protopush.report.glossary import HEADLINE, PER_CLASS
from protopush.report.metric_tables import class_rows, confusion_of, named_numbers, number_groups, reliability
from protopush.report.prototype_cards import Gallery, faults_of
from protopush.report.provenance import audit_of, certificate_of, comparison_of, hints_of, reproduce_of
from protopush.report.push_history import chart_of, pushes_of, read_rows

EXACT = 1 - 1e-4  # a prototype this similar to its patch is that patch, up to rounding


def gather(
    run: Run,
    measured: Measured,
    neighbours: Sequence[Sequence[Neighbours | None]] | None,
    checks: Sequence[AnchorCheck] | None,
    audit: Audit | None,
    comparison: Mapping[str, Any] | None,
    root: Path,
    device: str | torch.device,
) -> Content:
    """See :func:`protopush.report.build.build_report`."""
    classification = measured.numbers["classification"]
    gallery = Gallery(run, root, neighbours, faults_of(checks or [], run.class_names), measured.numbers["prototypes"])
    pushes = pushes_of(read_rows(run.folder / "metrics.jsonl"))
    return Content(
        title=run.folder.resolve().name,
        written=datetime.now(timezone.utc).date().isoformat(),
        version=__version__,
        classes=run.class_names,
        lead=_lead(run),
        facts=_facts(run),
        split=measured.split,
        images=len(measured.labels),
        drawn=drawn_groups(measured.dataset.groups),
        headline=_headline(classification),
        groups=number_groups(measured.numbers),
        columns=list(PER_CLASS.values()),
        class_rows=class_rows(classification),
        confusion=confusion_of(classification.get("confusion"), run.class_names),
        reliability=reliability(measured.probabilities, measured.labels),
        prototypes=gallery.classes(),
        neighbours_told=neighbours is not None,
        cases=make_cases(run, measured.dataset, measured.probabilities, measured.labels, gallery.training, device),
        all_right=bool((measured.probabilities.argmax(dim=1) == measured.labels).all()),
        pushes=pushes,
        chart=chart_of(pushes),
        comparison=comparison_of(comparison),
        certificate=certificate_of(run, checks),
        audit=audit_of(audit),
        reproduce=reproduce_of(run, measured.split),
        hints=hints_of(run, measured.numbers),
    )


def drawn_groups(groups: Sequence[str | None]) -> int:
    """How many groups, or images alone, a bootstrap draws from; 0 where each image is a group of its own."""
    named = [group for group in groups if group]
    return len(set(named)) + len(groups) - len(named) if len(set(named)) < len(named) else 0


def _headline(classification: Mapping[str, Any]) -> list[Number]:
    named = named_numbers(classification, "classification")
    return [named[key] for key in HEADLINE if key in named]


def _lead(run: Run) -> list[str]:
    """What the model is, for a reader who knows images but not networks."""
    manager = run.head.proto_manager
    counts = manager.mask().sum(dim=1).tolist()
    total = sum(counts)
    each = f"{counts[0]} for each class" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)} for each class"
    anchors = [anchor for anchor in manager.anchors if anchor is not None]
    looks = "looks at the image as a whole" if run.head.match == "global" else _parts(anchors)
    return [
        f"The model sorts an image into one of {len(run.class_names)} classes. It {looks} and compares "
        f"{'it' if run.head.match == 'global' else 'each part'} with {total} prototypes, {each}. "
        + _stands_for(anchors, total),
        "The more the image is like a prototype, and the more that prototype weighs, the more it adds to the score of "
        "its class. Nothing else goes into a score but one fixed number for each class, its bias. The class with the "
        "highest score is the answer, so that every answer can be read as a sum: this part looks like that part of "
        "that training image.",
    ]


def _parts(anchors: Sequence[Anchor]) -> str:
    grids = {anchor.grid for anchor in anchors}
    if len(grids) != 1:
        return "divides the image into parts"
    rows, columns = grids.pop()
    return f"divides the image into {rows * columns} parts ({rows} by {columns})"


def _stands_for(anchors: Sequence[Anchor], total: int) -> str:
    if not anchors:
        return "The prototypes were never set on training images: nothing can be shown for them."
    similarities = [anchor.similarity_after for anchor in anchors]
    whose = "Each prototype" if len(anchors) == total else f"Each of {len(anchors)} prototypes"
    if min(similarities) >= EXACT:
        told = f"{whose} is exactly what the model sees in one part of one training image."
    else:
        told = (
            f"{whose} stands for one part of one training image, to which it is close but not equal (mean similarity "
            f"{fmean(similarities):.3f}, lowest {min(similarities):.3f}; 1 is equal)."
        )
    rest = total - len(anchors)
    return told + (f" The other {rest} stand for none." if rest else "")


def _facts(run: Run) -> list[Fact]:
    backbone, head = run.model.backbone, run.head
    height, width = run.transform.preprocessing.size
    name = backbone.name if isinstance(backbone, Backbone) else type(backbone).__name__
    return [
        Fact("network", name),
        Fact("input", f"{width} × {height} pixels"),
        Fact("compares", "whole images" if head.match == "global" else "parts of images"),
        Fact("prototypes", f"{int(head.proto_manager.valid_mask.sum())} of {head.proto_manager.dim} numbers each"),
        Fact(
            "anchoring",
            "live: prototypes are real parts throughout training" if head.anchoring == "live" else "by push",
        ),
    ]


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
