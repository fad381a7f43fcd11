"""What real-patch prototypes cost: never pushed, momentum, hard, live, local and global, over seeds.

    python benchmarks/anchoring.py manifest.csv --seeds 0 1 2

Trained as recipes/ham10000.yaml says, but on the last map (frozen backbone, features from the cache) and tested on the
test split, before and after the biases are refitted. The arms that are to be exact are saved as runs and verified:
every prototype must equal its anchor's embedding to 1e-5.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from measuring import save, spread

from protopush.data.dataset import ImageDataset
from protopush.data.manifest import DataConfig
from protopush.errors import InputError
from protopush.evaluation.evaluate import evaluate
from protopush.models.model_folder import Run, save_run
from protopush.push.certificate import verify_anchors
from protopush.training.config import ModelConfig, PushConfig, RunConfig, TrainConfig
from protopush.training.final_push import embed_anchors, fit_to_prototypes, push_now
from protopush.training.phases import Frozen
from protopush.training.run_writer import RunWriter
from protopush.training.setup import Job, prepare
from protopush.training.trainer import fit

NEVER = 10**6  # an epoch that doesn't come

# name -> how it is trained, and what prototypes are compared with
TRAININGS: dict[str, tuple[PushConfig, str]] = {
    "never": (PushConfig(start_epoch=NEVER), "local"),
    "local": (PushConfig(final_decay=0.0), "local"),
    "live": (PushConfig(anchoring="live", start_epoch=5, interval=5, unique="image", final_decay=0.0), "local"),
    "global": (PushConfig(final_decay=0.0), "global"),
}


@dataclass(frozen=True)
class Arm:
    """How a training ends: the momentum of its last push (None: no such push), what is unique, and whether exactly.

    Exact anchors come from the images themselves, not from cached float16 features; they are saved and verified.
    """

    training: str
    momentum: float | None = None
    unique: str = "none"
    exact: bool = False


ARMS: dict[str, Arm] = {
    "never pushed": Arm("never"),
    "local, momentum 0.9": Arm("local", 0.9),
    "local, hard at the end": Arm("local", 0.0),
    "local, hard, an image each": Arm("local", 0.0, "image", exact=True),
    "local, live, an image each": Arm("live", exact=True),
    "global, momentum 0.9": Arm("global", 0.9),
    "global, hard at the end": Arm("global", 0.0),
}
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
        for seed, training in product(options.seeds, TRAININGS):
            arms = [arm for arm in options.arms if ARMS[arm].training == training and (arm, seed) not in done]
            for row in run_training(training, arms, seed, options) if arms else ():
                rows.append(row)
                print(row, flush=True)
                save({"manifest": Path(options.manifest).name, "rows": rows, "summary": summary(rows)}, options.out)
    except InputError as error:
        print(f"anchoring: error: {error}", file=sys.stderr)
        return 2
    print(markdown(summary(rows)))
    return 0


def run_training(name: str, arms: list[str], seed: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train once; for each way to end, the test metrics before and after the refit, and how exact prototypes are."""
    push, match = TRAININGS[name]
    config = RunConfig(
        data=DataConfig(path=options.manifest, source="manifest"),
        model=ModelConfig(backbone=options.backbone, match=match, windows=None),  # type: ignore[arg-type]
        push=replace(push),
        train=TrainConfig(seed=seed),
    )
    job = prepare(config)
    folder = options.runs / f"{name}-{seed}"
    with RunWriter(folder, config) as writer:
        stage = fit(job, writer)
    assert isinstance(stage, Frozen)
    test = job.loader(stage.features(job, ImageDataset(job.catalog.split("test"), job.transform), "test"))
    trained = copy.deepcopy(job.head.state_dict()), list(job.head.proto_manager.anchors)
    for arm in arms:
        job.head.load_state_dict(trained[0])
        job.head.proto_manager.anchors = list(trained[1])
        found: dict[str, Any] = {"arm": arm, "seed": seed}
        _end(job, stage, ARMS[arm])
        found["plain"] = _test(job, stage, test)
        if ARMS[arm].exact:
            found["error"] = _largest_error(job, folder)
        fit_to_prototypes(job, stage)
        found["refitted"] = _test(job, stage, test)
        yield found


def _end(job: Job, stage: Frozen, arm: Arm) -> None:
    """The last push, if there is one."""
    job.config.push = replace(job.config.push, unique=arm.unique)
    if arm.training == "live":
        embed_anchors(job)
    elif arm.momentum is not None and arm.exact:
        push_now(job, job.model, job.loader(job.train), arm.momentum)
    elif arm.momentum is not None:
        push_now(job, stage.model, stage.plain_train_loader, arm.momentum)


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
                entry[f"{when} {name}"] = spread(values)
        errors = [row["error"] for row in own if "error" in row]
        entry["largest error"] = max(errors) if errors else None
        entries.append(entry)
    return entries


def markdown(entries: list[dict[str, Any]]) -> str:
    """Balanced accuracy, AUROC and calibration error before and after the refit: mean (deviation) over seeds."""
    columns = [f"{when} {name}" for when in ("plain", "refitted") for name in METRICS]
    titles = ["bal. accuracy", "AUROC", "ECE", "refitted: bal. accuracy", "AUROC", "ECE", "largest error"]
    lines = ["| arm | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    for entry in entries:
        cells = [f"{mean:.3f} ({spread:.3f})" for mean, spread in (entry[column] for column in columns)]
        error = entry["largest error"]
        lines.append(f"| {entry['arm']} | " + " | ".join([*cells, "-" if error is None else f"{error:.0e}"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
