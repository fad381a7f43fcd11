"""What real-patch prototypes cost: never pushed, momentum, hard, live, local and global, over seeds.

    python benchmarks/anchoring.py manifest.csv --seeds 0 1 2

Each arm is trained as recipes/ham10000.yaml says (frozen backbone, features from the cache) and tested on the test
split, before and after its connections are refitted. The arms whose prototypes are real patches are saved as runs and
verified: every prototype must equal its anchor's embedding to 1e-5.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from measuring import save
from rich.console import Console
from rich.table import Table

from protopush.data.dataset import ImageDataset
from protopush.errors import InputError
from protopush.push.certificate import verify_anchors
from protopush.training.config import DataConfig, ModelConfig, PushConfig, RunConfig, TrainConfig
from protopush.training.evaluate import evaluate
from protopush.training.finish import embed_anchors, fit_to_prototypes, push_now
from protopush.training.loop import fit
from protopush.training.prepare import Job, prepare
from protopush.training.run import Run, save_run
from protopush.training.stages import Frozen

NEVER = 10**6  # an epoch that doesn't come

LIVE = PushConfig(anchoring="live", start_epoch=5, interval=5, unique="image")  # recipes/ham10000-live.yaml

# name -> how it is trained, the momentum of its last push (None: no such push), what prototypes are compared with
ARMS: dict[str, tuple[PushConfig, float | None, str]] = {
    "never pushed": (PushConfig(start_epoch=NEVER), None, "local"),
    "local, momentum 0.9": (PushConfig(), 0.9, "local"),
    "local, hard at the end": (PushConfig(), 0.0, "local"),
    "local, hard, an image each": (PushConfig(unique="image"), 0.0, "local"),
    "local, live, an image each": (LIVE, None, "local"),
    "global, momentum 0.9": (PushConfig(), 0.9, "global"),
    "global, hard, an image each": (PushConfig(unique="image"), 0.0, "global"),
}
# Saved and verified; the others are searched in cached features.
EXACT = ("local, hard at the end", "local, hard, an image each", "local, live, an image each")
METRICS = ("balanced_accuracy", "auroc", "ece")


def main() -> int:
    """Run the arms that are asked for and that the JSON file doesn't hold yet; it grows arm by arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", help="CSV image,label,split[,group]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--runs", type=Path, default=Path("runs/anchoring"), help="where runs are written")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/anchoring.json"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    try:
        for seed in options.seeds:
            for arm in (arm for arm in options.arms if (arm, seed) not in done):
                rows.append({"arm": arm, "seed": seed, **run_arm(arm, seed, options)})
                print(rows[-1], flush=True)
                save({"manifest": Path(options.manifest).name, "rows": rows, "summary": summary(rows)}, options.out)
    except InputError as error:
        print(f"anchoring: error: {error}", file=sys.stderr)
        return 2
    print_table(summary(rows))
    return 0


def run_arm(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm; its test metrics before and after the refit, and how exact its prototypes are."""
    push, momentum, match = ARMS[arm]
    config = RunConfig(
        data=DataConfig(path=options.manifest, source="manifest"),
        model=ModelConfig(backbone=options.backbone, match=match),  # type: ignore[arg-type]
        push=push,
        train=TrainConfig(seed=seed),
    )
    job = prepare(config)
    stage = Frozen(job)
    test = job.loader(stage.features(job, ImageDataset(job.catalog.split("test"), job.transform), "test"))
    folder = options.runs / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
    fit(job, stage, folder)
    if momentum is not None and arm in EXACT:  # from the images themselves, not from cached float16 features
        push_now(job, job.model, job.loader(job.train), momentum)
    elif momentum is not None:
        push_now(job, stage.model, stage.plain_train_loader, momentum)
    elif arm in EXACT:
        embed_anchors(job)
    found: dict[str, Any] = {"plain": _test(job, stage, test)}
    if arm in EXACT:
        found["error"] = _largest_error(job, folder)
    fit_to_prototypes(job, stage)
    found["refitted"] = _test(job, stage, test)
    return found


def _test(job: Job, stage: Frozen, loader: Any) -> dict[str, float]:
    metrics = evaluate(stage.model, loader, job.fabric.device, list(job.catalog.classes))
    return {name: metrics[name] for name in METRICS}


def _largest_error(job: Job, folder: Path) -> float:
    """Save the run; the largest distance of a saved prototype and its anchor's embedding."""
    data = {"path": job.config.data.path, "source": job.config.data.source, "split_seed": 0}
    run = Run(job.model.eval(), list(job.catalog.classes), job.transform, job.catalog.root.resolve(), data, folder)
    save_run(run)
    checks = verify_anchors(job.model, job.head.proto_manager, job.transform, run.root, run.class_names)
    assert all(check.holds for check in checks), [check for check in checks if not check.holds]
    return max(math.sqrt(max(0.0, 2.0 - 2.0 * check.measured)) for check in checks if check.measured is not None)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, an entry for each arm."""
    entries = []
    for arm in (arm for arm in ARMS if any(row["arm"] == arm for row in rows)):
        own = [row for row in rows if row["arm"] == arm]
        entry: dict[str, Any] = {"arm": arm, "seeds": len(own)}
        for when in ("plain", "refitted"):
            for name in METRICS:
                values = [row[when][name] for row in own]
                entry[f"{when} {name}"] = [fmean(values), stdev(values) if len(values) > 1 else 0.0]
        errors = [row["error"] for row in own if "error" in row]
        entry["largest error"] = max(errors) if errors else None
        entries.append(entry)
    return entries


def print_table(entries: list[dict[str, Any]]) -> None:
    """Balanced accuracy, AUROC and calibration error, before and after the refit."""
    table = Table("arm", *(f"{when}\n{name}" for when in ("plain", "refitted") for name in METRICS), "largest error")
    for entry in entries:
        numbers = [entry[f"{when} {name}"] for when in ("plain", "refitted") for name in METRICS]
        cells = [f"{mean:.3f} ({spread:.3f})" for mean, spread in numbers]
        error = entry["largest error"]
        table.add_row(entry["arm"], *cells, "-" if error is None else f"{error:.1e}")
    Console(width=140).print(table)


if __name__ == "__main__":
    sys.exit(main())
