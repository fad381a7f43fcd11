"""What can be checked of a run: its certificate, what people forbade, the audit of its data, how to make it again."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from protopush import __version__
from protopush.data.audit import SMALL, Audit, Pair
from protopush.data.files import read_json
from protopush.models.model_folder import Run
from protopush.models.versions import recorded_versions
from protopush.push.certificate import AnchorCheck
from protopush.report.context import (
    Badge,
    Certificate,
    Command,
    ComparedRow,
    Comparison,
    DataAudit,
    Fact,
    Fault,
    Finding,
    Reproduce,
    Ruling,
)
from protopush.report.glossary import GROUPS
from protopush.report.prototype_cards import ident
from protopush.runs.decisions import Decision, load_decisions

EXAMPLES = 5
NOT_MEASURED = {
    "localization": "not measured: the data have no masks (a column mask in the manifest).",
    "faithfulness": "not measured for this report (--faithfulness 48).",
}
PACKAGES = ("torch", "torchvision", "timm", "lightning-fabric", "numpy", "pillow")


def certificate_of(run: Run, checks: Sequence[AnchorCheck] | None) -> Certificate:
    """The state of the anchors, and what was forbidden."""
    number = {name: c for c, name in enumerate(run.class_names)}
    faults = [
        Fault(
            prototype=f"{check.class_name}:{check.prototype}",
            ident=ident(number[check.class_name], check.prototype),
            file=check.file,
            recorded=check.recorded,
            measured=check.measured,
            problem=check.problem,
        )
        for check in checks or []
        if not check.holds
    ]
    badge, told = _state(run, checks)
    rulings = [_ruling(decision) for decision in load_decisions(run.folder)]
    return Certificate(badge, told, faults, rulings, read_json(run.folder / "config.json")["weights_sha256"])


def _state(run: Run, checks: Sequence[AnchorCheck] | None) -> tuple[Badge, str]:
    manager = run.head.proto_manager
    used = int(manager.valid_mask.sum())
    pushed = sum(anchor is not None for anchor in manager.anchors)
    if not pushed:
        return Badge("warn", "Never pushed"), (
            "The prototypes of this model were never set on training images: they are points that training has found, "
            "and nothing can be shown for them."
        )
    if checks is None:
        return Badge("unknown", "Not checked"), (
            "Each prototype's training image, place and similarity are on record, but this report was written without "
            "checking that they still hold."
        )
    broken = sum(not check.holds and check.fault != "no_anchor" for check in checks)
    if broken:
        return Badge("bad", f"{broken} of {used} anchors do not hold"), (
            "Every training image was read again and its part compared with the prototype. Where the record does not "
            "hold any more, the picture shown for the prototype may not be what the model compares with."
        )
    if pushed < used:
        return Badge("warn", f"{pushed} of {used} anchors hold, {used - pushed} were never pushed"), (
            "Every training image on record was read again, and its part compared with the prototype as the record "
            "says. The others stand for no training image."
        )
    return Badge("good", f"All {used} anchors hold"), (
        "Every prototype's training image was read again: it is the file on record, byte for byte, and its part is as "
        "similar to the prototype as the record says."
    )


def _ruling(decision: Decision) -> Ruling:
    what = {
        "prototype": f"{decision.file}, cell {decision.cell} (was {decision.class_name}:{decision.prototype})",
        "image": f"every part of {decision.file}",
        "mask": f"parts with less than {decision.min_share} of them inside the image's mask",
        "keep": f"nothing: {decision.class_name}:{decision.prototype} is kept ({decision.file}, cell {decision.cell})",
        "undo": f"nothing: decision {decision.undoes} was undone",
    }[decision.kind]
    effect = [f"{len(decision.replaced)} prototypes got another anchor"]
    before, after = decision.val_before or {}, decision.val_after or {}
    if before.get("balanced_accuracy") is not None and after.get("balanced_accuracy") is not None:
        change = f"{before['balanced_accuracy']:.3f} → {after['balanced_accuracy']:.3f}"
        effect.append(f"balanced accuracy on validation images {change}")
    return Ruling(decision.id, decision.time, decision.who, what, decision.reason, "; ".join(effect))


def audit_of(found: Audit | None) -> DataAudit | None:
    """What the audit has found, as counts with examples."""
    if found is None:
        return None
    classes = list(next(iter(found.counts.values()), {}))
    note = ""
    if found.alike_by_nature:
        note = (
            "So many near duplicates are hardly copies: pictures of one machine in one pose look alike by nature. Look "
            "at some of them before you believe it is a leak."
        )
    badge = Badge("bad", "Leaks between the splits") if found.leaks else Badge("good", "No leak between the splits")
    if found.alike_by_nature and not found.shared_groups and not any(pair.identical for pair in found.across):
        badge = Badge("warn", "Many images of different splits look alike")
    return DataAudit(
        badge=badge,
        splits=list(found.counts),
        counts=[(name, [row[name] for row in found.counts.values()]) for name in classes],
        findings=[Finding(name, len(some), some[:EXAMPLES]) for name, some in _findings(found).items()],
        note=note,
    )


def _findings(found: Audit) -> dict[str, list[str]]:
    across, within = found.across, [pair for pair in found.duplicates if not pair.across]
    return {
        "groups (lesions, patients) in several splits": [
            f"{g} ({', '.join(s)})" for g, s in found.shared_groups.items()
        ],
        "identical files across splits": _pairs([pair for pair in across if pair.identical]),
        "near duplicates across splits": _pairs([pair for pair in across if not pair.identical]),
        "identical files in one split": _pairs([pair for pair in within if pair.identical]),
        "near duplicates in one split": _pairs([pair for pair in within if not pair.identical]),
        "duplicates with different labels": _pairs(found.contradictions),
        "unreadable files": [f"{name} ({reason})" for name, reason in found.unreadable.items()],
        f"images with a side below {SMALL} pixels": list(found.small),
    }


def _pairs(pairs: Sequence[Pair]) -> list[str]:
    return [f"{pair.first} ({pair.labels[0]}, {pair.splits[0]}) = {pair.second} ({pair.labels[1]}, {pair.splits[1]})"
            for pair in pairs]  # fmt: skip


def comparison_of(values: Mapping[str, Any] | None) -> Comparison | None:
    """Runs side by side as ``protopush compare`` tells them; the best of each row is marked."""
    if values is None:
        return None
    runs = [(run["name"], _kind(run)) for run in values["runs"]]
    return Comparison(runs, [_compared(row) for row in values["rows"]])


def _kind(run: Mapping[str, Any]) -> str:
    match = {"local": "compares parts", "global": "compares whole images"}.get(run.get("match", ""), "")
    live = "live anchors" if run.get("anchoring") == "live" else ""
    return ", ".join(words for words in (match, live, run.get("backbone") or "") if words)


def _compared(row: Mapping[str, Any]) -> ComparedRow:
    known = [value for value in row["values"] if value is not None]
    best = {"higher": max, "lower": min}.get(row["better"])
    top = best(known) if best and len(set(known)) > 1 else None
    cells = []
    for value, interval in zip(row["values"], row.get("intervals") or [None] * len(row["values"]), strict=True):
        told = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
        text = "–" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
        cells.append((text, told, value is not None and value == top))
    return ComparedRow(row["group"], row["metric"].strip(), row["better"], cells)


def reproduce_of(run: Run, split: str) -> Reproduce:
    """The commands, versions and seed."""
    folder = str(run.folder)
    config = run.folder / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    commands = [
        Command("look for leaks and duplicates in the data", _words("data", "audit", *data_words(run))),
        Command("measure the model again", _words("evaluate", folder, "--data.split", split)),
        Command("check every prototype against its training image", _words("verify", folder)),
        Command("write this report again", _words("report", folder)),
    ]
    if text:
        again = ("train", "--config", str(config), "--out", f"{folder}-again")
        commands.insert(1, Command("train it again", _words(*again)))
    stored = read_json(run.folder / "config.json")
    facts = [
        Fact("trained with", ", ".join(f"{name} {found}" for name, found in recorded_versions(stored).items())),
        Fact("seed", _seed(text)),
        Fact("data", run.data.get("path") or f"source {run.data.get('source', '')}"),
        Fact("weights (SHA-256)", stored["weights_sha256"]),
        Fact("this report was written with", ", ".join(_versions())),
    ]
    missing = "" if text else "The run keeps no config.yaml, so that how it was trained is not on record."
    return Reproduce(commands, facts, text, missing)


def data_words(run: Run) -> list[str]:
    """How the run's data are named on the command line."""
    path, source = run.data.get("path") or "", run.data.get("source") or "auto"
    seed = run.data.get("split_seed") or 0
    words = [path] if path else []
    words += ["--data.source", source] if source != "auto" else []
    return [*words, "--data.split_seed", str(seed)] if seed else words


def _words(*words: str) -> str:
    return shlex.join(["protopush", *(os.fspath(word) for word in words)])


def _seed(config: str) -> str:
    try:
        return str(yaml.safe_load(config)["train"]["seed"])
    except (yaml.YAMLError, TypeError, KeyError):
        return "not on record"


def _versions() -> list[str]:
    return [f"protopush {__version__}", f"Python {platform.python_version()}", *map(_version, PACKAGES)]


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} of unknown version"


def hints_of(run: Run, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """How to get what a report may lack."""
    folder = str(run.folder)
    return {
        "not_measured": [(GROUPS[kind][0], NOT_MEASURED[kind]) for kind in NOT_MEASURED if not numbers.get(kind)],
        "audit": _words("report", folder, "--audit", "true"),
        "verify": _words("verify", folder),
        "compare": _words("report", folder, "--against", "OTHER_RUN"),
    }
