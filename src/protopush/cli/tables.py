"""What commands have found, as text for people."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from protopush.data.audit import Audit, Pair, audit_findings, audit_verdict
from protopush.errors import listing
from protopush.evaluation.evaluate import in_short
from protopush.evaluation.locality import TOLERANCE, Locality
from protopush.metrics.glossary import PER_CLASS, metric_name, metric_text
from protopush.push.certificate import AnchorCheck, anchors_verdict
from protopush.runs.decisions import Decision

SHOWN = 20  # pairs of images that a table shows
SCORES = ("accuracy", "balanced_accuracy", "auroc")  # of the demo


def demo_words(
    out: Path, page: Path, metrics: dict[str, Any], panels: Sequence[str], image: Path, seconds: float
) -> str:
    """What to view and what to run after the demo, with the command as it was called."""
    called = sys.argv[0] if Path(sys.argv[0]).name == "protopush" else "protopush"
    run, picture = shlex.quote(str(out)), shlex.quote(str(image))
    numbers = [f"{metric_name(key)} {metric_text(metrics[key])}" for key in SCORES if metrics[key] is not None]
    reasons = "\n".join(f"  {panel}" for panel in panels)
    return (
        f"\nDone in {seconds:.0f} s. On {metrics['n']} test images: {', '.join(numbers)}.\n\n"
        f"See\n  {page}   (all that can be shown of the run, on one page)\n"
        f"  {out / 'prototypes.png'}   (what each prototype is, and where it comes from)\n{reasons}   (why)\n\n"
        f"Then try\n  {called} verify {run}\n"
        f"  {called} evaluate {run}\n"
        f"  {called} explain {run} {picture} --out explained\n"
        f"  {called} train --data.path FOLDER_OF_CLASS_FOLDERS --out runs/mine"
    )


def metrics_table(metrics: dict[str, Any]) -> str:
    """The metrics of a run for people."""
    sums = Table(show_header=False, box=None)
    sums.add_row("images", str(metrics["n"]))
    for key in ("accuracy", "balanced_accuracy", "macro_f1", "auroc"):
        sums.add_row(metric_name(key), metric_text(metrics[key]))
    if "prior" in metrics:
        sums.add_row("shares assumed", listing([f"{name} {share:.3g}" for name, share in metrics["prior"].items()]))
    columns = ("sensitivity", "precision", "f1", "auroc")
    table = Table("class", "images", *(PER_CLASS[key][0] for key in columns), box=None)
    for name, row in metrics["per_class"].items():
        table.add_row(name, *(metric_text(row[key]) for key in ("n", *columns)))
    absent = [name for name, row in metrics["per_class"].items() if not row["n"]]
    words = f"\nno images of {listing(absent)}: means are over the other classes" if absent else ""
    return _text(sums) + "\n" + _text(table) + words


def locality_table(found: Sequence[Locality], reach: str) -> str:
    """By how much similarities change where everything outside the boxes is replaced, and what that means."""
    table = Table("in place of all outside the box", "largest change", "mean change", "mean similarity", box=None)
    for name in found[0].changes if found else ():
        changes = [one.changes[name] for one in found]
        mean = sum(one.similarity for one in found) / len(found)
        table.add_row(name, f"{max(changes):.1e}", f"{sum(changes) / len(found):.1e}", metric_text(mean))
    held = max((one.largest for one in found), default=0.0) <= TOLERANCE
    beyond = max((one.beyond for one in found), default=0.0)
    words = "The model sees more than the boxes: they show where it compares, not all that it sees."
    if reach == "more":
        words += f" With only that replaced which it does not see, the largest change is {beyond:.1e}."
    if reach == "box":
        words = "Nothing outside a box can change what is said of it." if held else "It claims to be local, but is not."
    return f"{_text(table)}\nIn {len(found)} places. {words}"


def comparison_table(found: dict[str, Any]) -> str:
    """Runs side by side, a column each, with their intervals where there are some."""
    table = Table("", "better", *(run["name"] for run in found["runs"]), box=None)
    group = ""
    for row in found["rows"]:
        if row["group"] != group:
            group = row["group"]
            table.add_row(f"{group}:", "")
        ranges = (f" ({span[0]:.3f}-{span[1]:.3f})" if span else "" for span in row["intervals"])
        cells = (metric_text(value) + span for value, span in zip(row["values"], ranges, strict=True))
        table.add_row(f"  {row['metric']}", row["better"], *cells)
    images = "; ".join(f"{run['folder']}: {n} images" for run, n in zip(found["runs"], found["images"], strict=True))
    return f"{_text(table)}\n\nsplit {found['split']}; {images}"


def anchors_table(checks: Sequence[AnchorCheck]) -> str:
    """What no longer holds, or that everything does."""
    wrong, verdict = [check for check in checks if not check.holds], anchors_verdict(checks)[1]
    if not wrong:
        return f"{verdict}: each prototype is where its record says."
    table = Table("class", "prototype", "file", "recorded", "measured", "problem", box=None)
    for check in wrong:
        cells = (check.class_name, str(check.prototype), check.file)
        table.add_row(*cells, metric_text(check.recorded, 6), metric_text(check.measured, 6), check.problem)
    return f"{verdict}:\n{_text(table)}"


def decision_table(decision: Decision, run: str, dry_run: bool) -> str:
    """What was decided, or would be, which anchors took the places, what that cost, and what to do next."""
    number = f"{'It would be decision' if dry_run else 'Decision'} {decision.id}"
    lines = [f"{number} by {decision.who}: {decision.summary}. Reason: {decision.reason}"]
    table = Table("prototype", "stood for", "stands for", "similarity", box=None)
    for one in decision.replaced:
        places = (f"{anchor.file} cell {anchor.cell}" for anchor in (one.old, one.new))
        table.add_row(f"{one.class_name}:{one.prototype}", *places, metric_text(one.new.similarity))
    lines.append(_text(table) if decision.replaced else "No anchor changes: every prototype stays as it is.")
    if decision.val_before and decision.val_after:
        lines.append(f"validation before: {in_short(decision.val_before)}; after: {in_short(decision.val_after)}")
    if decision.biases:
        lines.append("Biases were moved so that each class is as probable as before on the whole.")
    flips = [f"{one.file} ({one.label}): {one.before} -> {one.after}" for one in decision.flips]
    if flips:
        lines.append(f"Other answers for {len(flips)} of {(decision.val_after or {}).get('n')} validation images:")
        lines += [f"  {flip}" for flip in flips[:SHOWN]] + (
            [f"  and {len(flips) - SHOWN} more"] if flips[SHOWN:] else []
        )
    nothing = "Nothing was written; leave --dry_run out to decide so."
    return "\n".join([*lines, nothing if dry_run else f"Next: protopush verify {shlex.quote(run)}"])


def audit_table(found: Audit) -> str:
    """What an audit has found, for people."""
    counts = Table("split", "images", *next(iter(found.counts.values())), box=None)
    for split, row in found.counts.items():
        counts.add_row(split, str(sum(row.values())), *map(str, row.values()))
    sums = Table("check", "found", "such as", box=None)
    for check in audit_findings(found):
        sums.add_row(check.name, str(check.count), listing(check.pairs, 2))
    parts = [_text(counts), _text(sums)]
    if found.across or found.contradictions:
        both = dict.fromkeys((*found.across, *found.contradictions))
        parts.append("Duplicates across splits, or with different labels:\n" + _pairs_table(list(both)))
    if found.alike_by_nature:
        parts.append("So many near duplicates are hardly copies: view some, and raise --threshold above them.")
    if found.closest:
        parts.append(f"Nearest across splits below {found.threshold}, to be viewed:\n" + _pairs_table(found.closest))
    parts.append(f"{audit_verdict(found)[1]}.")
    return "\n\n".join(parts)


def _pairs_table(pairs: Sequence[Pair]) -> str:
    table = Table("image", "split", "label", "image", "split", "label", "similarity", box=None)
    for pair in pairs[:SHOWN]:
        one, two = zip(pair.splits, pair.labels, strict=True)
        alike = "identical" if pair.identical else metric_text(pair.similarity)
        table.add_row(pair.first, *one, pair.second, *two, alike)
    rest = len(pairs) - SHOWN
    return _text(table) + (f"\nand {rest} more; --json has all" if rest > 0 else "")


def _text(table: Table) -> str:
    # Names are never markup, nor cut off: two classes could become one.
    plain = {"markup": False, "emoji": False, "highlight": False}
    console = Console(file=StringIO(), width=10_000, color_system=None, **plain)  # type: ignore[arg-type]
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())  # type: ignore[attr-defined]
