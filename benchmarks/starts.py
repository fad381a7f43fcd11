"""Where prototypes start: at random, at k-means of their class's patches, or at their class's mean, over seeds.

    python benchmarks/starts.py manifest.csv --seeds 0 1 2

Frozen backbone on windows, live anchors (recipes/ham10000-windows.yaml without its lines on masks). The numbers are
those of the validation split, since a start would be chosen by them. The class mean with a bias that raises rare
classes is the start of Geometric Prototype Alignment (Lai et al., ICCV 2025): ``w = mean / |mean|``, ``b = -log(N /
N_ref)``, here with the mean count as ``N_ref``. It has one weight vector a class: here prototypes lie around it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import save, spread
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torch.nn import functional as F

from protopush.data.features import CachedFeatures
from protopush.data.manifest import DataConfig
from protopush.errors import InputError
from protopush.push import PushSchedule
from protopush.training.config import ModelConfig, PushConfig, RunConfig, TrainConfig
from protopush.training.final_push import embed_anchors, fit_to_prototypes
from protopush.training.phases import Frozen, on_validation
from protopush.training.setup import Job, prepare
from protopush.training.trainer import Trainer

MOST = 5000  # patches of a class that a start is made of
SPREAD = 0.3  # length of what is added to a unit class mean, so that prototypes of a class are not the same
ARMS = {  # the start, how many epochs come before it, and the first epoch with a push
    "random": ("random", 0, 5),
    "k-means": ("k-means", 0, 5),
    "class mean": ("class mean", 0, 5),
    "class mean, frequency bias": ("class mean, frequency bias", 0, 5),
    "random, pushed at once": ("random", 0, 0),
    "k-means, pushed at once": ("k-means", 0, 0),
    "k-means at the first push": ("k-means", 5, 5),
    "class mean at the first push": ("class mean", 5, 5),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the arms that the JSON file doesn't hold yet; it grows run by run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", help="CSV image,label,split[,group]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--rare", nargs="+", default=["df", "vasc", "akiec"], help="classes of which more is reported")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of the head")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/starts.json"))
    options = parser.parse_args(words)
    logging.basicConfig(level=logging.WARNING)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    setup = {"manifest": Path(options.manifest).name, "rate": options.rate, "epochs": options.epochs}
    try:
        for seed in options.seeds:
            for arm in options.arms:
                if (arm, seed) not in done:
                    rows.append(run(arm, seed, options))
                    print(rows[-1], flush=True)
                    save({"setup": setup, "rows": rows}, options.out)
    except InputError as error:
        print(f"starts: error: {error}", file=sys.stderr)
        return 2
    print(markdown(rows))
    return 0


def run(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train from a start; the numbers of the validation split, and how near two classes were at the start."""
    start, before, first = ARMS[arm]
    config = RunConfig(
        data=DataConfig(path=options.manifest, source="manifest", num_workers=0),
        model=ModelConfig(backbone=options.backbone),
        push=PushConfig(anchoring="live", start_epoch=first, interval=5, unique="image"),
        train=TrainConfig(seed=seed, lr=options.rate, epochs=options.epochs),
    )
    job = prepare(config)
    stage, schedule = Frozen(job), PushSchedule(first, 5)
    features = stage.plain_train_loader.dataset
    assert isinstance(features, CachedFeatures)
    job.fabric.seed_everything(seed, verbose=False)
    trainer = Trainer(job, stage, 0, options.epochs)
    for epoch in range(options.epochs + 1):  # as a run does, but for the start
        if epoch == before:
            begin(job, features, start, seed)
            nearest = torch.pdist(F.normalize(job.head.proto_manager.unit().detach().mean(dim=1), dim=1)).min()
        if epoch == first == 0 or (epoch and schedule.due(epoch - 1, lr=trainer.rate_after(epoch - 1), peak_lr=1.0)):
            trainer.push(epoch, None)
        if epoch < options.epochs:
            trainer.epoch(epoch)
            trainer.validate(f"epoch {epoch + 1}")
    trainer.best.restore()
    embed_anchors(job)
    fit_to_prototypes(job, stage)
    metrics = on_validation(job, stage)
    assert metrics is not None
    rare = {name: {key: metrics["per_class"][name][key] for key in ("sensitivity", "auroc")} for name in options.rare}
    row = {"arm": arm, "seed": seed, "nearest_classes": float(nearest), "best": trainer.best.where}
    return row | {name: metrics[name] for name in ("balanced_accuracy", "auroc", "ece")} | {"rare": rare}


@torch.no_grad()
def begin(job: Job, features: CachedFeatures, start: str, seed: int) -> None:
    """Put the prototypes, and with a frequency bias the biases, where a run is to start; the same for a seed."""
    manager, labels = job.head.proto_manager, np.array(features.labels)
    random = np.random.default_rng(seed)
    job.head.eval()  # without dropout; an epoch begins with train()
    for c, (first, end) in enumerate(manager.get_prototype_indices()) if start != "random" else ():
        patches = some_patches(features, labels == c, MOST, random)
        embedded = job.head.embed(patches.to(job.fabric.device)).cpu().double().numpy()
        chosen = class_means if start.startswith("class mean") else k_means
        found = torch.from_numpy(chosen(embedded, end - first, random)).to(manager.prototypes)
        manager.prototypes[first : first + len(found)] = found  # a class without patches keeps its random ones
    if start.endswith("frequency bias"):
        job.head.bias.copy_(
            frequency_bias(torch.bincount(torch.tensor(features.labels), minlength=manager.num_classes))
        )


def some_patches(
    features: Sequence[Any] | CachedFeatures, chosen: NDArray[np.bool_], most: int, random: np.random.Generator
) -> Tensor:
    """So many patches (n, C) of the chosen items, (patches (L, C), ...) each, once; all where there are no more."""
    images, (cells, channels) = np.flatnonzero(chosen), features[0][0].shape
    count = len(images) * cells
    drawn = np.sort(random.choice(count, min(most, count), replace=False))
    found = [features[int(images[one // cells])][0][one % cells] for one in drawn]
    return torch.stack(found).float() if found else torch.empty(0, channels)


def k_means(patches: NDArray[np.float64], count: int, random: np.random.Generator) -> NDArray[np.float64]:
    """The unit centres of ``count`` clusters of unit patches (n, D); the patches themselves where there are no more."""
    if len(patches) <= count:
        return patches
    with warnings.catch_warnings():  # of an empty cluster, which keeps the centre it had
        warnings.simplefilter("ignore", UserWarning)
        centres, _ = kmeans2(patches, count, iter=20, minit="++", seed=random)
    return np.asarray(centres / np.linalg.norm(centres, axis=1, keepdims=True))


def class_means(patches: NDArray[np.float64], count: int, random: np.random.Generator) -> NDArray[np.float64]:
    """``count`` unit vectors at the distance SPREAD, in random directions, around the unit mean of patches (n, D)."""
    if not len(patches):
        return patches
    mean = patches.mean(axis=0)
    away = random.normal(size=(count, len(mean)))
    around = mean / np.linalg.norm(mean) + SPREAD * away / np.linalg.norm(away, axis=1, keepdims=True)
    return np.asarray(around / np.linalg.norm(around, axis=1, keepdims=True))


def frequency_bias(counts: Tensor) -> Tensor:
    """``-log(N_c / mean N)``: rare classes are raised; a class without images counts as one of one image."""
    return -(counts / counts.double().mean()).clamp(min=1 / float(counts.double().mean())).log().float()


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table: mean (deviation) over seeds."""
    rare = list(rows[0]["rare"])
    titles = ["bal. accuracy", "AUROC", "ECE", *(f"recall {name}" for name in rare), "nearest classes", "seeds"]
    lines = ["| start | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    for arm in ARMS:
        own = [row for row in rows if row["arm"] == arm]
        if own:
            columns = [[row[name] for row in own] for name in ("balanced_accuracy", "auroc", "ece")]
            columns += [[row["rare"][name]["sensitivity"] for row in own] for name in rare]
            columns.append([row["nearest_classes"] for row in own])
            cells = ["{:.3f} ({:.3f})".format(*spread(values)) for values in columns]
            lines.append(f"| {arm} | " + " | ".join([*cells, str(len(own))]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
