"""Sections of the report: each is a function from the data to a plain context, and a template of the same name."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import yaml

from protopush.backbones.create import Backbone
from protopush.data.audit import audit_findings, audit_verdict
from protopush.data.files import read_json
from protopush.evaluation.locality import TOLERANCE
from protopush.explain.figure_canvas import colour_bar
from protopush.explain.figure_style import decimal
from protopush.metrics.glossary import HEADLINE, named_numbers
from protopush.models.model_folder import Run
from protopush.models.stored_run import current_versions, recorded_versions
from protopush.nn.priors import prior_in_words
from protopush.nn.prototypes import Anchor
from protopush.push.certificate import anchors_verdict
from protopush.report.cases import make_cases
from protopush.report.number_sections import ReportData, comparison, confusion, numbers, pushes
from protopush.report.prototype_cards import embed, ident
from protopush.runs.decisions import load_decisions

EXACT = 1 - 1e-4  # a prototype this similar to its patch is that patch, up to rounding


def summary(data: ReportData) -> dict[str, Any]:
    """What the model is, for a reader who knows images but not networks, and what it is worth."""
    found = named_numbers(data.measured.numbers["classification"], "classification")
    return {
        "lead": [*_lead(data.run), *_local(data), _prior(data.run)],
        "verdict": _anchors(data)[:2],
        "classes": data.run.class_names,
        "facts": _facts(data.run),
        "images": len(data.measured.labels),
        "split": data.measured.split,
        "headline": [found[key] for key in HEADLINE if key in found],
    }


def _lead(run: Run) -> list[str]:
    manager, whole = run.head.proto_manager, run.head.match == "global"
    counts = manager.mask().sum(dim=1).tolist()
    each = f"{counts[0]} for each class" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)} for each class"
    anchors = [anchor for anchor in manager.anchors if anchor is not None]
    regions = run.model.backbone.regions
    rows, columns = regions.raster
    divides = f"divides the image into {len(regions)} parts ({rows} by {columns})"
    if regions.is_local:
        divides = f"cuts the image into {len(regions)} windows, each of which is seen alone,"
    return [
        f"The model sorts an image into one of {len(run.class_names)} classes. It "
        f"{'takes the image as a whole' if whole else divides} and compares {'it' if whole else 'each part'} "
        f"with {sum(counts)} prototypes, {each}. {_stands_for(anchors, sum(counts))}",
        "The more the image is like a prototype, and the more that prototype weighs, the more it adds to the score of "
        "its class. Nothing else goes into a score but one fixed number for each class, its bias. The class with the "
        "highest score is the answer, so that every answer can be read as a sum: this part looks like that part of "
        "that training image.",
    ]


def _prior(run: Run) -> str:
    model = run.model
    return prior_in_words(model.prior, model.train_shares, run.class_names)


def _local(data: ReportData) -> list[str]:
    """What lies behind a box, in a sentence and, where that was measured, numbers."""
    head, regions, found = data.run.head, data.run.model.backbone.regions, data.locality
    if head.match == "global":
        return []
    width, height = (int(max(sees[i + 2] - sees[i] for sees in regions.sees)) for i in (0, 1))
    words = {
        "box": "Each part is seen alone: nothing outside the box can change this.",
        "more": "For each part the model sees more than its box: what is in the thin frame, at most "
        f"{width} × {height} pixels of the input. Nothing outside the frame can change this.",
        "all": "A box says where a part lies, not all that counts: for each part the model sees the whole image.",
    }[regions.reach]
    if not found:
        return [words]
    largest = max(one.largest for one in found)
    if regions.is_local and largest > TOLERANCE:
        words = "The model claims that nothing outside a box can change this, but that is not so."
    changes = [change for one in found for change in one.changes.values()]
    by = f"{decimal(fmean(changes))} in the mean, at most {decimal(largest)}"
    if regions.reach == "more":
        by += f"; outside the frame: at most {max(one.beyond for one in found):.1g}"
    if largest <= TOLERANCE:
        by = f"at most {largest:.1g}, which is rounding" if largest else "0"
    return [
        f"{words} Measured in {len(found)} places, with noise, black or another image in place of everything outside "
        f"the box: the similarity changes by {by}."
    ]


def _stands_for(anchors: Sequence[Anchor], total: int) -> str:
    if not anchors:
        return "The prototypes were never set on training images: nothing can be shown for them."
    similarities = [anchor.similarity_after for anchor in anchors]
    whose = "Each prototype" if len(anchors) == total else f"Each of {len(anchors)} prototypes"
    if min(similarities) >= EXACT:
        words = f"{whose} is exactly what the model sees in one part of one training image."
    else:
        words = (
            f"{whose} stands for one part of one training image, to which it is close but not equal (mean similarity "
            f"{decimal(fmean(similarities))}, lowest {decimal(min(similarities))}; 1 is equal)."
        )
    rest = total - len(anchors)
    return words + (f" The other {rest} stand for none." if rest else "")


def _facts(run: Run) -> list[tuple[str, str]]:
    backbone, head = run.model.backbone, run.head
    height, width = run.transform.preprocessing.size
    live = head.anchoring == "live"
    return [
        ("network", backbone.name if isinstance(backbone, Backbone) else type(backbone).__name__),
        ("input", f"{width} × {height} pixels"),
        ("compares", "whole images" if head.match == "global" else "parts of images"),
        ("prototypes", f"{int(head.proto_manager.valid_mask.sum())} of {head.proto_manager.dim} numbers each"),
        ("anchoring", "live: prototypes are real parts throughout training" if live else "by push"),
    ]


def prototypes(data: ReportData) -> dict[str, Any]:
    """Each prototype with its part, its training image, and the nearest parts of other images."""
    return {"classes": data.cards.classes(), "searched": data.neighbours is not None}


def cases(data: ReportData) -> dict[str, Any]:
    """Images with the reasons for their answers."""
    right = data.measured.probabilities.argmax(dim=1) == data.measured.labels
    cases = make_cases(data.measured, data.cards, data.device)
    ramp = embed(colour_bar(108, 12), 72, 8, "from the lowest to the highest similarity")
    return {"split": data.measured.split, "cases": cases, "all_right": bool(right.all()), "ramp": ramp}


CERTAIN = {
    "good": "Every prototype's training image was read again: it is the file on record, byte for byte, and its part is "
    "as similar to the prototype as the record says.",
    "bad": "Every training image was read again and its part compared with the prototype. Where the record does not "
    "hold any more, the picture shown for the prototype may not be what the model compares with.",
    "warn": "Every training image on record was read again, and its part compared with the prototype as the record "
    "says. The others stand for no training image.",
    "unknown": "Each prototype's training image, place and similarity are on record, but this report was written "
    "without checking that they still hold.",
    "never": "The prototypes of this model were never set on training images: they are points that training has found, "
    "and nothing can be shown for them.",
}


def _anchors(data: ReportData) -> tuple[str, str, str]:
    """The state of the anchors, that in words, and what it means."""
    checks = data.checks
    if not any(data.run.head.proto_manager.anchors):
        return *anchors_verdict([]), CERTAIN["never"]
    state, words = ("unknown", "Not checked") if checks is None else anchors_verdict(checks)
    return state, words, CERTAIN[state]


def certificate(data: ReportData) -> dict[str, Any]:
    """Whether the prototypes still are what their record says, and what people have decided about them."""
    state, words, about = _anchors(data)
    number = {name: c for c, name in enumerate(data.run.class_names)}
    faults = [
        {"name": f"{check.class_name} #{check.prototype}", "ident": ident(number[check.class_name], check.prototype)}
        | check.to_dict()
        for check in data.checks or []
        if not check.holds
    ]
    return {
        "verdict": (state, words),
        "about": about,
        "command": ["verify", str(data.run.folder)],
        "faults": faults,
        "weights": read_json(data.run.folder / "config.json")["weights_sha256"],
        "decisions": load_decisions(data.run.folder),
    }


def audit(data: ReportData) -> dict[str, Any]:
    """What the audit of the data has found, as counts with examples."""
    found = data.audit
    return {
        "audit": found,
        "command": ["report", str(data.run.folder), "--audit", "true"],
        "verdict": audit_verdict(found) if found else None,
        "findings": audit_findings(found) if found else [],
    }


def reproduce(data: ReportData) -> dict[str, Any]:
    """The commands, versions and seed that give the same again."""
    run, folder, config = data.run, str(data.run.folder), data.run.folder / "config.yaml"
    path, source, seed = (run.data.get(key) for key in ("path", "source", "split_seed"))
    named = [path] if path else []
    named += ["--data.source", source] if source and source != "auto" else []
    named += ["--data.split_seed", str(seed)] if seed else []
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    train = [("train it again", ["train", "--config", str(config), "--out", f"{folder}-again"])] if text else []
    stored = read_json(run.folder / "config.json")
    here = {"Python": platform.python_version()} | current_versions()
    return {
        "config": text,
        "commands": [
            ("search for leaks and duplicates in the data", ["data", "audit", *named]),
            *train,
            ("measure the model again", ["evaluate", folder, "--data.split", data.measured.split]),
            ("check every prototype against its training image", ["verify", folder]),
            ("write this report again", ["report", folder]),
        ],
        "facts": [
            ("trained with", _in_words(recorded_versions(stored))),
            ("seed", _seed(text)),
            ("data", path or f"source {source or ''}"),
            ("weights (SHA-256)", stored["weights_sha256"]),
            ("this report was written with", _in_words(here)),
        ],
    }


def _seed(config: str) -> str:
    try:
        return str(yaml.safe_load(config)["train"]["seed"])
    except (yaml.YAMLError, TypeError, KeyError):
        return "not on record"


def _in_words(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


# A section: its title and its context. ``templates/NAME.html.j2`` shows it; its text is escaped there.
SECTIONS: dict[str, tuple[str, Callable[[ReportData], dict[str, Any]]]] = {
    "summary": ("In short", summary),
    "numbers": ("Numbers", numbers),
    "confusion": ("Confusion", confusion),
    "prototypes": ("Prototypes", prototypes),
    "cases": ("Cases", cases),
    "pushes": ("Pushes", pushes),
    "comparison": ("Parts against whole images", comparison),
    "certificate": ("Certificate", certificate),
    "audit": ("Data audit", audit),
    "reproduce": ("Reproduce", reproduce),
}
