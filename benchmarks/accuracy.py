"""Real patches against the black box: the same backbone, images, windows, loop and budget, frozen and fine-tuned.

    python benchmarks/accuracy.py manifest.csv --seeds 0 1 2
    python benchmarks/accuracy.py manifest.csv --seeds 0 --arms "fine-tuned, black box on windows"

A black box is a linear layer on the pooled feature: of the image, or of its windows (the mean of their features). Each
arm takes its learning rate of the head from the same list, by the validation split; the numbers are those of the test
split. Results grow arm by arm in the JSON file; what is there isn't run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
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
from torch import Tensor

from protopush.data.dataset import ImageDataset
from protopush.data.manifest import DataConfig
from protopush.errors import InputError
from protopush.evaluation.evaluate import predict, score_of
from protopush.metrics.classification import classification_metrics
from protopush.training.config import ModelConfig, PushConfig, RunConfig, TrainConfig, WindowsConfig
from protopush.training.final_push import final_push
from protopush.training.phases import Joint, Stage, Stored, on_validation
from protopush.training.run_writer import RunWriter
from protopush.training.setup import Job, prepare
from protopush.training.trainer import Trainer, fit

NEVER = PushConfig(start_epoch=10**6)
LIVE = PushConfig(start_epoch=5, interval=5, unique="image", anchoring="live")


@dataclass(frozen=True)
class Kind:
    """What is trained on a frozen or on a trained backbone.

    Args:
        windows: whether the backbone sees windows instead of the image.
        push: the pushes of prototypes; None for a black box.
        as_long: as many epochs as real patches have seconds.
    """

    windows: bool
    push: PushConfig | None
    as_long: bool = False


KINDS = {
    "black box on images": Kind(False, None),
    "black box on windows": Kind(True, None),
    "floating prototypes": Kind(True, NEVER),
    "real patches": Kind(True, LIVE),
}
AS_LONG = {f"{name}, as many seconds": replace(kind, as_long=True) for name, kind in KINDS.items() if not kind.push}
ARMS = [f"{backbone}, {kind}" for backbone in ("frozen", "fine-tuned") for kind in KINDS]
MORE = [f"{backbone}, {kind}" for backbone in ("frozen", "fine-tuned") for kind in AS_LONG]
METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece", "sensitivity_at_90")


def main(words: Sequence[str] | None = None) -> int:
    """Run the arms that are asked for and that the JSON file doesn't hold yet."""
    options = _options(words)
    logging.basicConfig(level=logging.WARNING)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(options.out.read_text()) if options.out.is_file() else {"rows": []}
    found["setup"] = _setup(options)
    try:
        for seed, arm in product(options.seeds, options.arms):
            if all((row["arm"], row["seed"]) != (arm, seed) for row in found["rows"]):
                found["rows"].append(run_arm(arm, seed, found["rows"], options))
                print(markdown(summary(found["rows"]), options.positive), flush=True)
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
    parser.add_argument("--arms", nargs="*", choices=ARMS + MORE, default=ARMS)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="of the head, to choose from"
    )
    parser.add_argument("--positive", default="mel", help="the class whose sensitivity is reported")
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
    names = ("backbone", "epochs", "head_epochs", "tuned_epochs", "image_size", "batch_size", "rates", "threads", "set")
    return {"manifest": Path(options.manifest).name, **{name: getattr(options, name) for name in names}}


def kind_of(arm: str) -> tuple[bool, Kind]:
    """Whether an arm trains the backbone, and what is on it."""
    backbone, kind = arm.split(", ", 1)
    return backbone == "fine-tuned", (KINDS | AS_LONG)[kind]


def config_of(arm: str, seed: int, rate: float, options: argparse.Namespace) -> RunConfig:
    """The run of an arm: recipes/ham10000-windows.yaml without masks, or the image as a whole."""
    tuned, kind = kind_of(arm)
    train = TrainConfig(seed=seed, lr=rate, epochs=options.epochs)
    model = ModelConfig(backbone=options.backbone, windows=WindowsConfig(64, 32) if kind.windows else None)
    if tuned:
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
        push=replace(kind.push or NEVER),
        train=train,
    )
    for key, value in (words.split("=", 1) for words in options.set):
        group, name = key.split(".")
        given = yaml.safe_load(value)
        if name == "windows":
            given = WindowsConfig(**given) if kind.windows else None
        setattr(config, group, replace(getattr(config, group), **{name: given}))
    return config


def run_arm(arm: str, seed: int, rows: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Train with each rate; the row of that which is best on the validation split, tested."""
    more = _more_epochs(arm, seed, rows) if kind_of(arm)[1].as_long else 1.0
    tried = [_run(arm, seed, rate, more, options) for rate in options.rates]
    job, stage, row = max(tried, key=lambda one: one[2]["val_score"])
    scores = {f"{row['rate']:g}": row["val_score"] for *_, row in tried}
    row |= {"val_scores": scores, "seconds_of_all": sum(row["seconds"] for *_, row in tried)}
    return row | {"test": _test(job, stage, options.positive)}


def _more_epochs(arm: str, seed: int, rows: list[dict[str, Any]]) -> float:
    """How many times the epochs of a black box fit in the seconds of real patches with the same seed."""
    backbone, kind, _ = arm.split(", ")
    seconds = {row["arm"]: row["seconds"] for row in rows if row["seed"] == seed}
    try:
        return max(1.0, seconds[f"{backbone}, real patches"] / seconds[f"{backbone}, {kind}"])
    except KeyError as missing:
        raise InputError(f"{arm} needs the seconds of {missing} with seed {seed}; run that arm first") from None


def _run(
    arm: str, seed: int, rate: float, more: float, options: argparse.Namespace
) -> tuple[Job, Stage, dict[str, Any]]:
    config = config_of(arm, seed, rate, options)
    head = config.train.head_epochs
    tuned = math.ceil((config.train.epochs - head) * more)
    config.train.head_epochs = math.ceil(head * more)
    config.train.epochs = config.train.head_epochs + tuned
    job = prepare(config)
    _, kind = kind_of(arm)
    job = job if kind.push else without_prototypes(job)
    folder = options.runs / arm.replace(", ", "-").replace(" ", "-") / f"{seed}-{rate:g}"
    with RunWriter(folder, job.config) as writer:
        stage = fit(job, writer)
        if kind.push == LIVE:
            final_push(job, stage, writer)
    metrics = on_validation(job, stage)
    if metrics is None:
        raise InputError("no validation images, by which learning rates are chosen; give some the split val")
    row = {"arm": arm, "seed": seed, "rate": rate, "val_score": score_of(metrics, "mean"), "weights": stage.weights}
    return job, stage, row | _history(folder, len(job.train))


def _history(folder: Path, images: int) -> dict[str, Any]:
    """How many epochs there were, the seconds of all epochs and pushes, and the speed of the middle epoch."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["images_per_second"] for row in rows if "epoch" in row]
    seconds = sum(images / speed for speed in speeds) + sum(row.get("seconds", 0.0) for row in rows)
    return {"epochs": len(speeds), "seconds": seconds, "images_per_second": median(speeds)}


def _test(job: Job, stage: Stage, positive: str) -> dict[str, float]:
    images, classes = ImageDataset(job.catalog.split("test"), job.transform), list(job.catalog.classes)
    loader = job.loader(stage.features(job, images, "test") if isinstance(stage, Stored) else images)
    found = predict(stage.model, loader, job.fabric.device)
    metrics = classification_metrics(found.probabilities, found.labels, classes)
    scores, is_positive = found.probabilities[:, classes.index(positive)], found.labels == classes.index(positive)
    metrics["sensitivity_at_90"] = sensitivity_at(0.9, scores, is_positive)
    return {name: metrics[name] for name in METRICS}


def sensitivity_at(specificity: float, scores: Tensor, positive: Tensor) -> float:
    """The largest share of positives that a threshold finds while it leaves so many of the others alone.

    Example:
        >>> scores = torch.tensor([0.9, 0.6, 0.3, 0.7, 0.5, 0.4, 0.2])
        >>> sensitivity_at(0.75, scores, torch.tensor([True, True, True, False, False, False, False]))
        0.6666666865348816
    """
    others = scores[~positive].sort(descending=True).values
    allowed = math.floor((1 - specificity) * len(others) + 1e-9)  # of the others may be called positive
    return float((scores[positive] > others[allowed]).float().mean()) if allowed < len(others) else 1.0


def throughput(options: argparse.Namespace) -> dict[str, Any]:
    """Training images a second of real patches and of the black box: epochs over the same 2,048 images, in turn.

    So many that embedding the live anchors anew, once an epoch, weighs as much as in a run over 4,189 images.
    """
    trainers = {arm: _trainer(arm, options) for arm in ("fine-tuned, black box on windows", "fine-tuned, real patches")}
    for trainer in trainers.values():  # warm
        trainer.epoch(0)
    speeds: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(options.throughput):
        for name, trainer in sorted(trainers.items(), reverse=turn % 2 == 1):
            speeds[name].append(trainer.epoch(turn + 1)["images_per_second"])
    black, live = speeds.values()
    ratios = [b / a for a, b in zip(black, live, strict=True)]
    return {"images_per_second": speeds, "ratios": ratios, "median": median(ratios), "goal": ">= 0.95"}


def _trainer(arm: str, options: argparse.Namespace) -> Trainer:
    job = prepare(config_of(arm, 0, options.rates[0], options))
    job.train.samples = job.train.samples[:2048]
    job = job if kind_of(arm)[1].push else without_prototypes(job)
    trainer = Trainer(job, Joint(job), 0, options.throughput + 1)
    if job.head.anchoring == "live":
        trainer.push(0, None)
    return trainer


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, an entry for each arm."""
    entries = []
    for arm in sorted({row["arm"] for row in rows}, key=(ARMS + MORE).index):
        own = [row for row in rows if row["arm"] == arm]
        entry: dict[str, Any] = {"arm": arm, "seeds": len(own), "rates": [row["rate"] for row in own]}
        entry |= {name: spread([row["test"][name] for row in own]) for name in METRICS}
        names = ("seconds", "seconds_of_all", "images_per_second", "epochs")
        entries.append(entry | {name: spread([row[name] for row in own]) for name in names})
    return entries


def markdown(entries: list[dict[str, Any]], positive: str = "mel") -> str:
    """The table: mean (deviation) over seeds; a single seed has no deviation."""
    titles = ["accuracy", "bal. accuracy", "macro F1", "AUROC", "ECE", f"{positive}: sensitivity at 90 % specificity",
              "epochs", "seconds (all rates)", "images/s", "rates", "seeds"]  # fmt: skip
    lines = ["| arm | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    for entry in entries:
        cells = [
            f"{mean:.3f}" + (f" ({spread:.3f})" if entry["seeds"] > 1 else "")
            for mean, spread in map(entry.get, METRICS)
        ]
        cells += [f"{entry['epochs'][0]:.0f}", f"{entry['seconds'][0]:.0f} ({entry['seconds_of_all'][0]:.0f})"]
        cells += [f"{entry['images_per_second'][0]:.0f}", ", ".join(f"{rate:g}" for rate in entry["rates"])]
        lines.append(f"| {entry['arm']} | " + " | ".join([*cells, str(entry["seeds"])]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
