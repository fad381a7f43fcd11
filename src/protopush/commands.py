"""What the commands do, once their words are parsed. (Heavy imports live here, so that ``--help`` needn't wait.)"""

from __future__ import annotations

import os
import shlex
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from protopush.data.audit import SMALL, Audit, Pair, audit, check_threshold
from protopush.data.dataset import ImageDataset
from protopush.data.features import inference_batch_size
from protopush.data.files import write_atomic, write_json
from protopush.data.images import check_images, read_image
from protopush.data.manifest import Catalog
from protopush.data.sources import load_catalog
from protopush.errors import InputError, listing
from protopush.explain import draw_panel, explain_image
from protopush.push import PushReport, check_momentum
from protopush.push.assign import check_unique
from protopush.push.certificate import AnchorCheck, verify_anchors
from protopush.push.guard import check_guard
from protopush.review.allowed import allow_of
from protopush.review.decisions import FILE, Decision, load_decisions
from protopush.review.forbid import Wish, forbid
from protopush.training.config import DataConfig
from protopush.training.evaluate import evaluate, in_short
from protopush.training.finish import push_row
from protopush.training.launch import make_fabric
from protopush.training.prepare import open_split
from protopush.training.progress import bar
from protopush.training.run import Run, append_metrics, clear_folder, fresh_folder, open_run, same_weights, save_run

SHOWN = 20  # pairs of images that a table shows


def push_run(options: Namespace) -> PushReport:
    """Push a run's prototypes once more and write the result as a new run."""
    out = Path(options.out)
    if out.resolve() == Path(options.run).resolve():
        raise InputError(f"--out is the run itself: {out}; choose another folder, the first run stays as it is")
    check_momentum(options.momentum)
    check_unique(options.unique)
    check_guard(options.guard, options.guard_budget)
    guarded = options.guard != "off"
    run, device = _open(options)
    fresh_folder(out, options.overwrite)
    dataset, catalog = _split(run, options)
    val = open_split(DataConfig(**_data(run, options)), "val", run.class_names, run.transform)[0] if guarded else None
    report: PushReport = run.model.push_prototypes(
        _loader(dataset, options, device),
        device,
        use_local=options.use_local,
        momentum=options.momentum,
        max_patches_per_class=options.max_patches_per_class,
        unique=options.unique,
        interpolation=options.interpolation,
        guard=options.guard,
        guard_budget=options.guard_budget,
        val_loader=None if val is None else _loader(val, options, device),
        allow=allow_of(load_decisions(run.folder), dataset),
    )
    pushed = replace(run, model=run.model.cpu(), folder=out, root=catalog.root.resolve(), data=_data(run, options))
    clear_folder(out)
    for name in ("config.yaml", FILE):
        if (run.folder / name).is_file():
            shutil.copyfile(run.folder / name, out / name)
    save_run(pushed)
    append_metrics(out, push_row(report, 0, None, None))
    return report


def evaluate_run(options: Namespace) -> dict[str, Any]:
    """The metrics of a run on a split."""
    run, device = _open(options)
    dataset, _ = _split(run, options)
    return evaluate(run.model, _loader(dataset, options, device), device, run.class_names)


def explain_images(options: Namespace) -> list[dict[str, Any]]:
    """Panels (PNG) and their data (JSON) for image files; every file is checked before the first is explained."""
    run, device = _open(options)
    paths = [Path(image) for image in options.images]
    check_images(paths)
    return [
        explain_to(run, path, Path(options.out), name, device, options.rows, options.top_classes)
        for path, name in zip(paths, _distinct_names(paths), strict=True)
    ]


def explain_to(
    run: Run, path: Path, out: Path, name: str, device: torch.device, rows: int = 5, top_classes: int = 3
) -> dict[str, Any]:
    """Write ``name.png`` and ``name.json`` for one image; returns what the JSON holds."""
    explanation = explain_image(run.model, path, run.transform, run.class_names, device, top_classes)
    panel, data = out / f"{name}.png", out / f"{name}.json"
    picture = draw_panel(explanation, read_image(path), run.picture, rows)
    write_atomic(panel, lambda temporary: picture.save(temporary, format="PNG"))
    values = explanation.to_dict() | {"panel": str(panel)}
    write_json(data, values)
    return values


def verify_run(options: Namespace) -> list[AnchorCheck]:
    """Whether each anchor of a run still holds."""
    run, device = _open(options, check_weights=False)
    root = Path(options.root) if options.root else run.root
    if not root.is_dir():
        raise InputError(f"no such folder: {root}; expected the training images; say where they are with --root")
    return verify_anchors(
        run.model,  # type: ignore[arg-type]
        run.head.proto_manager,
        run.transform,
        root,
        run.class_names,
        device,
        same_weights=same_weights(run.folder),
    )


def forbid_run(options: Namespace) -> Decision:
    """Forbid a patch, an image or a region, and replace the anchors there in the run itself."""
    wish = Wish(
        options.prototype, options.image, options.mask_column, options.min_share, options.reason, options.who or ""
    )
    wish.kind()  # a wish that says nothing is refused before the run is opened
    run, device = _open(options)
    return forbid(run, wish, _data(run, options), device, options.data.num_workers)


def audit_data(options: Namespace) -> Audit:
    """What is wrong with a data set; groups in several splits are told, not refused."""
    check_threshold(options.threshold)
    catalog = load_catalog(options.path, options.source, seed=options.split_seed, refuse_leaks=False)
    with bar("Auditing images", 2 * len(catalog.samples)) as advance:
        return audit(catalog, options.threshold, advance)


def metrics_table(metrics: dict[str, Any]) -> str:
    """The metrics of a run for people."""
    sums = Table(show_header=False, box=None)
    for name in ("n", "accuracy", "balanced_accuracy", "macro_f1", "auroc"):
        sums.add_row(name, _number(metrics[name]))
    table = Table("class", "n", "recall", "precision", "f1", "auroc", box=None)
    for name, row in metrics["per_class"].items():
        table.add_row(name, *(_number(row[key]) for key in ("n", "recall", "precision", "f1", "auroc")))
    return _text(sums) + "\n" + _text(table)


def anchors_table(checks: Sequence[AnchorCheck]) -> str:
    """What no longer holds, or that everything does."""
    wrong = [check for check in checks if not check.holds]
    if not wrong:
        return f"All {len(checks)} anchors hold: each prototype is where its record says."
    table = Table("class", "prototype", "file", "recorded", "measured", "problem", box=None)
    for check in wrong:
        told = (check.class_name, str(check.prototype), check.file)
        table.add_row(*told, _number(check.recorded, 6), _number(check.measured, 6), check.problem)
    return f"{len(wrong)} of {len(checks)} anchors do not hold:\n" + _text(table)


def decision_table(decision: Decision, run: str) -> str:
    """What was forbidden, which anchors took the places, what that cost, and what to do next."""
    free = f" ({decision.unmasked} training images have no mask: unrestricted)" if decision.unmasked else ""
    subject = {
        "prototype": f"{decision.file} cell {decision.cell} (was {decision.class_name}:{decision.prototype})",
        "image": f"every patch of {decision.file}",
        "mask": f"patches with less than {decision.min_share} of their box inside the image's mask{free}",
    }[decision.kind]
    lines = [f"Decision {decision.id} by {decision.who} forbids {subject}: {decision.reason}"]
    table = Table("prototype", "stood for", "stands for", "similarity", box=None)
    for one in decision.replaced:
        places = (f"{anchor.file} cell {anchor.cell}" for anchor in (one.old, one.new))
        table.add_row(f"{one.class_name}:{one.prototype}", *places, _number(one.new.similarity))
    lines.append(_text(table) if decision.replaced else "No anchor was there: every prototype stays as it is.")
    if decision.val_before and decision.val_after:
        lines.append(f"validation before: {in_short(decision.val_before)}; after: {in_short(decision.val_after)}")
    return "\n".join([*lines, f"Next: protopush verify {shlex.quote(run)}"])


def audit_table(found: Audit) -> str:
    """What an audit has found, for people."""
    counts = Table("split", "images", *next(iter(found.counts.values())), box=None)
    for split, row in found.counts.items():
        counts.add_row(split, str(sum(row.values())), *map(str, row.values()))
    sums = Table("check", "found", "such as", box=None)
    for what, names in _findings(found).items():
        sums.add_row(what, str(len(names)), listing(names, 2))
    parts = [_text(counts), _text(sums)]
    if found.across or found.contradictions:
        both = dict.fromkeys((*found.across, *found.contradictions))
        parts.append("Duplicates across splits, or with different labels:\n" + _pairs_table(list(both)))
    if found.alike_by_nature:
        parts.append("So many near duplicates are hardly copies: look at some, and raise --threshold above them.")
    if found.closest:
        parts.append(f"Nearest across splits below {found.threshold}, for a look:\n" + _pairs_table(found.closest))
    parts.append("Leaks: what is in one split is in another." if found.leaks else "No leak between the splits.")
    return "\n\n".join(parts)


def _findings(found: Audit) -> dict[str, list[str]]:
    def names(pairs: Sequence[Pair]) -> list[str]:
        return [f"{pair.first} = {pair.second}" for pair in pairs]

    within = [pair for pair in found.duplicates if not pair.across]
    return {
        "groups in several splits": [f"{name} ({', '.join(row)})" for name, row in found.shared_groups.items()],
        "identical files across splits": names([pair for pair in found.across if pair.identical]),
        "near duplicates across splits": names([pair for pair in found.across if not pair.identical]),
        "identical files in one split": names([pair for pair in within if pair.identical]),
        "near duplicates in one split": names([pair for pair in within if not pair.identical and not pair.same_group]),
        "near duplicates in one group": names([pair for pair in within if not pair.identical and pair.same_group]),
        "duplicates with different labels": names(found.contradictions),
        "unreadable files": [f"{name} ({reason})" for name, reason in found.unreadable.items()],
        f"images with a side below {SMALL} pixels": list(found.small),
    }


def _pairs_table(pairs: Sequence[Pair]) -> str:
    table = Table("image", "split", "label", "image", "split", "label", "similarity", box=None)
    for pair in pairs[:SHOWN]:
        one, two = zip(pair.splits, pair.labels, strict=True)
        table.add_row(pair.first, *one, pair.second, *two, "identical" if pair.identical else _number(pair.similarity))
    rest = len(pairs) - SHOWN
    return _text(table) + (f"\nand {rest} more; --json tells all" if rest > 0 else "")


def _open(options: Namespace, check_weights: bool = True) -> tuple[Run, torch.device]:
    run = open_run(options.run, check_weights=check_weights)
    device = make_fabric(options.device).device
    run.model.to(device)
    return run, device


def _data(run: Run, options: Namespace) -> dict[str, Any]:
    """The run's own data, or what the options say."""
    if options.data.path is None and options.data.source is None:
        return run.data
    source = options.data.source or ("auto" if options.data.path else run.data["source"])
    path = os.path.abspath(options.data.path) if options.data.path else ""
    return run.data | {"path": path, "source": source}


def _split(run: Run, options: Namespace) -> tuple[ImageDataset, Catalog]:
    data = DataConfig(**_data(run, options))
    return open_split(data, options.data.split, run.class_names, run.transform)


def _loader(dataset: ImageDataset, options: Namespace, device: torch.device) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=inference_batch_size(device), num_workers=options.data.num_workers)


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The files' stems; where two are alike, with a number."""
    names: list[str] = []
    for path in paths:
        name, number = path.stem, 2
        while name in names:
            name, number = f"{path.stem}-{number}", number + 1
        names.append(name)
    return names


def _number(value: float | int | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def _text(table: Table) -> str:
    console = Console(file=StringIO(), width=160, color_system=None, soft_wrap=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())  # type: ignore[attr-defined]
