"""Prototypes against the black box: one backbone, one loop, one budget, frozen and fine-tuned, over seeds.

    python benchmarks/accuracy.py manifest.csv --seeds 0 1 2
    python benchmarks/accuracy.py manifest.csv --seeds 0 --arms "fine-tuned, black box" "fine-tuned, live"

Frozen: a linear probe and prototypes, on the same features. Fine-tuned: both get the same epochs of the head alone,
then of the whole model. The best epoch is chosen on the validation split, the numbers are those of the test split.
Results grow training by training in the JSON file; what is there isn't run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from black_box import without_prototypes
from measuring import save, spread

from protopush.data.dataset import ImageDataset
from protopush.data.manifest import DataConfig
from protopush.errors import InputError
from protopush.evaluation.evaluate import evaluate, score_of
from protopush.training.config import ModelConfig, PushConfig, RunConfig, TrainConfig
from protopush.training.final_push import final_push
from protopush.training.phases import Frozen, Joint, Stage
from protopush.training.run_writer import RunWriter
from protopush.training.setup import Job, prepare
from protopush.training.trainer import Trainer, fit

NEVER = PushConfig(start_epoch=10**6)
HARD = replace(NEVER, unique="image")
LIVE = PushConfig(start_epoch=5, interval=5, unique="image", anchoring="live")
PROBE_RATES = (1e-3, 3e-3, 1e-2)  # a linear layer likes larger steps: it may choose, on the validation split


@dataclass(frozen=True)
class Training:
    """One way to train.

    Args:
        tuned: whether the backbone is trained, too.
        push: the pushes of prototypes; None for a black box.
        arms: what is tested: a name, and how the run is ended before (None: as it was trained).
        rates: learning rates of the head to choose from.
    """

    tuned: bool
    push: PushConfig | None
    arms: dict[str, PushConfig | None]
    rates: tuple[float, ...] = (1e-3,)


TRAININGS = (
    Training(False, None, {"frozen, linear probe": None}, PROBE_RATES),
    Training(False, NEVER, {"frozen, never pushed": None, "frozen, hard": HARD}),
    Training(False, LIVE, {"frozen, live": LIVE}),
    Training(True, None, {"fine-tuned, black box": None}),
    Training(True, NEVER, {"fine-tuned, never pushed": None, "fine-tuned, hard": HARD}),
    Training(True, LIVE, {"fine-tuned, live": LIVE}),
)
ARMS = [arm for training in TRAININGS for arm in training.arms]
METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece", "sensitivity")


def main(words: Sequence[str] | None = None) -> int:
    """Run the arms that are asked for and that the JSON file doesn't hold yet."""
    options = _options(words)
    logging.basicConfig(level=logging.WARNING)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(options.out.read_text()) if options.out.is_file() else {"rows": []}
    found["setup"] = _setup(options)
    done = {(row["arm"], row["seed"]) for row in found["rows"]}
    try:
        for seed, training in product(options.seeds, TRAININGS):
            again = {(arm, seed) for arm in training.arms}
            if any(arm in options.arms and (arm, seed) not in done for arm in training.arms):
                found["rows"] = [row for row in found["rows"] if (row["arm"], row["seed"]) not in again]
                found["rows"] += run_training(training, seed, options)
                print(markdown(summary(found["rows"])), flush=True)
                save(found | {"summary": summary(found["rows"])}, options.out)
        if options.throughput:
            found["throughput"] = throughput(options)
            save(found | {"summary": summary(found["rows"])}, options.out)
    except InputError as error:
        print(f"accuracy: error: {error}", file=sys.stderr)
        return 2
    print(markdown(summary(found["rows"]), options.positive))
    return 0


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", help="CSV image,label,split[,group]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    parser.add_argument("--positive", default="mel", help="the class whose sensitivity is told")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--epochs", type=int, default=15, help="of the head alone, where the backbone is frozen")
    parser.add_argument("--head-epochs", type=int, default=10, help="of the head alone, before fine-tuning")
    parser.add_argument("--tuned-epochs", type=int, default=5, help="of the whole model")
    parser.add_argument("--image-size", type=int, default=224, help="where the backbone is fine-tuned")
    parser.add_argument("--batch-size", type=int, default=32, help="likewise")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--throughput", type=int, default=0, metavar="N", help="compare the speed, N times in turn")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="GROUP.NAME=VALUE", help="options of the runs that are to be different"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"), help="where runs are written")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accuracy.json"))
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    return options


def _setup(options: argparse.Namespace) -> dict[str, Any]:
    names = ("backbone", "epochs", "head_epochs", "tuned_epochs", "image_size", "batch_size", "set")
    return {"manifest": Path(options.manifest).name, **{name: getattr(options, name) for name in names}}


def config_of(training: Training, seed: int, rate: float, options: argparse.Namespace) -> RunConfig:
    """The run of a training: recipes/ham10000.yaml on the last map; a trained backbone has the benchmark's epochs."""
    train = TrainConfig(seed=seed, lr=rate, epochs=options.epochs)
    model = ModelConfig(backbone=options.backbone, windows=None)  # the last map
    if training.tuned:
        train = replace(
            train,
            freeze_backbone=False,
            head_epochs=options.head_epochs,
            epochs=options.head_epochs + options.tuned_epochs,
            batch_size=options.batch_size,
        )
        model = replace(model, image_size=options.image_size)
    config = RunConfig(
        data=DataConfig(path=options.manifest, source="manifest", num_workers=options.workers),
        model=model,
        push=replace(training.push or NEVER),
        train=train,
    )
    for key, value in (words.split("=") for words in options.set):
        group, name = key.split(".")
        setattr(getattr(config, group), name, yaml.safe_load(value))
    return config


def run_training(training: Training, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train, and test each arm; where there are several rates, that which is best on the validation split."""
    tried = [_run(training, seed, rate, options) for rate in training.rates]
    return max(tried, key=lambda rows: rows[0]["val_score"])


def _run(training: Training, seed: int, rate: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    job = prepare(config_of(training, seed, rate, options))
    job = job if training.push else without_prototypes(job)
    name = list(training.arms)[-1].replace(", ", "-").replace(" ", "-")
    folder, rows = options.runs / name / f"{seed}-{rate:g}", []
    with RunWriter(folder, job.config) as writer:
        stage = fit(job, writer)
        for arm, end in training.arms.items():
            if end is not None:
                job.config.push = end
                final_push(job, stage, writer)
            told = {"arm": arm, "seed": seed, "rate": rate, **_history(folder)}
            rows.append(told | {"test": _test(job, stage, options)})
    return rows


def _history(folder: Path) -> dict[str, Any]:
    """The best validation score, the epochs it was reached among, and the speed of the last epoch."""
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [row for row in epochs if "epoch" in row]
    best = max(epochs, key=lambda row: score_of(row["val"], "mean"))
    return {
        "val_score": score_of(best["val"], "mean"),
        "best_epoch": best["epoch"],
        "epochs": len(epochs),
        "images_per_second": epochs[-1]["images_per_second"],
    }


def _test(job: Job, stage: Stage, options: argparse.Namespace) -> dict[str, float]:
    images = ImageDataset(job.catalog.split("test"), job.transform)
    loader = job.loader(stage.features(job, images, "test") if isinstance(stage, Frozen) else images)
    metrics = evaluate(stage.model, loader, job.fabric.device, list(job.catalog.classes))
    metrics["sensitivity"] = metrics["per_class"][options.positive]["sensitivity"]
    return {name: metrics[name] for name in METRICS}


def throughput(options: argparse.Namespace) -> dict[str, Any]:
    """Training images a second of prototypes (live) and of the black box: epochs over the same 2,048 images, in turn.

    So many that embedding the live anchors anew, once an epoch, weighs as much as in a run over 4,189 images.
    """
    tuned = {arm: training for training in TRAININGS for arm in training.arms if training.tuned}
    trainers = {name: _trainer(tuned[name], options) for name in ("fine-tuned, black box", "fine-tuned, live")}
    for trainer in trainers.values():  # warm
        trainer.epoch(0)
    speeds: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(options.throughput):
        for name, trainer in sorted(trainers.items(), reverse=turn % 2 == 1):
            speeds[name].append(trainer.epoch(turn + 1)["images_per_second"])
    black, live = speeds.values()
    ratios = [b / a for a, b in zip(black, live, strict=True)]
    return {"images_per_second": speeds, "ratios": ratios, "median": median(ratios), "goal": ">= 0.95"}


def _trainer(training: Training, options: argparse.Namespace) -> Trainer:
    job = prepare(config_of(training, 0, 1e-3, options))
    job.train.samples = job.train.samples[:2048]
    job = job if training.push else without_prototypes(job)
    trainer = Trainer(job, Joint(job), 0, options.throughput + 1)
    if job.head.anchoring == "live":
        trainer.push(0, None)
    return trainer


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, an entry for each arm."""
    entries = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        entry: dict[str, Any] = {"arm": arm, "seeds": len(own)}
        for name in METRICS:
            entry[name] = spread([row["test"][name] for row in own])
        entry["images_per_second"] = spread([row["images_per_second"] for row in own])
        entries.append(entry)
    return entries


def markdown(entries: list[dict[str, Any]], positive: str = "mel") -> str:
    """The table: mean (deviation) over seeds; a single seed has no deviation."""
    titles = ["accuracy", "bal. accuracy", "macro F1", "AUROC", "ECE", f"sensitivity {positive}", "images/s", "seeds"]
    lines = ["| arm | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    for entry in entries:
        cells = [
            f"{mean:.3f}" + (f" ({spread:.3f})" if entry["seeds"] > 1 else "")
            for mean, spread in map(entry.get, METRICS)
        ]
        cells += [f"{entry['images_per_second'][0]:.0f}", str(entry["seeds"])]
        lines.append(f"| {entry['arm']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
