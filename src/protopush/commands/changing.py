"""What changes a run: ``protopush push`` (into a new one) and ``forbid`` (in place)."""

from __future__ import annotations

import logging
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from protopush.commands.opening import data_of, loader_of, open_with, split_of
from protopush.errors import InputError
from protopush.push import PushReport, check_momentum
from protopush.push.assign import check_unique
from protopush.push.guard import check_guard
from protopush.review.allowed import allow_of
from protopush.review.decisions import FILE, Decision, load_decisions
from protopush.review.forbid import Wish, forbid
from protopush.review.undo import undo
from protopush.review.writing import alone
from protopush.training.config import DataConfig
from protopush.training.finish import push_row
from protopush.training.prepare import open_split
from protopush.training.run import append_metrics, clear_folder, fresh_folder, save_run

logger = logging.getLogger("protopush.training")


def push_run(options: Namespace) -> PushReport:
    """Push a run's prototypes once more and write the result as a new run."""
    out = Path(options.out)
    if out.resolve() == Path(options.run).resolve():
        raise InputError(f"--out is the run itself: {out}; choose another folder, the first run stays as it is")
    check_momentum(options.momentum)
    check_unique(options.unique)
    check_guard(options.guard, options.guard_budget)
    guarded = options.guard != "off"
    run, device = open_with(options)
    fresh_folder(out, options.overwrite)
    dataset, catalog = split_of(run, options)
    val = open_split(DataConfig(**data_of(run, options)), "val", run.class_names, run.transform)[0] if guarded else None
    report: PushReport = run.model.push_prototypes(
        loader_of(dataset, options, device),
        device,
        use_local=options.use_local,
        momentum=options.momentum,
        max_patches_per_class=options.max_patches_per_class,
        unique=options.unique,
        interpolation=options.interpolation,
        guard=options.guard,
        guard_budget=options.guard_budget,
        val_loader=None if val is None else loader_of(val, options, device),
        allow=allow_of(load_decisions(run.folder), dataset),
    )
    pushed = replace(run, model=run.model.cpu(), folder=out, root=catalog.root.resolve(), data=data_of(run, options))
    clear_folder(out)
    for name in ("config.yaml", FILE):
        if (run.folder / name).is_file():
            shutil.copyfile(run.folder / name, out / name)
    save_run(pushed)
    append_metrics(out, push_row(report, 0, None, None))
    return report


def forbid_run(options: Namespace) -> Decision:
    """Forbid a patch, an image or a region, or undo that, and replace the anchors there in the run itself."""
    wish = Wish(
        options.prototype, options.image, options.mask_column, options.min_share, options.reason, options.who or ""
    )
    if options.undo is None:
        wish.kind()  # a wish that says nothing is refused before the run is opened
    elif wish.prototype is not None or wish.image is not None or wish.masks:
        raise InputError("--undo takes back one decision; expected no --prototype, --image or --mask-column beside it")
    with alone(Path(options.run), lambda: logger.info("Somebody else is deciding about %s; waiting", options.run)):
        run, device = open_with(options)
        data, workers = data_of(run, options), options.data.num_workers
        if options.undo is not None:
            return undo(run, options.undo, data, device, wish.reason, wish.who, workers)
        return forbid(run, wish, data, device, workers)
