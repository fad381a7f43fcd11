"""How diverse prototypes of a class are: local against global ones, before and after pushes, over seeds.

    python benchmarks/diversity.py manifest.csv --seeds 0 1 2

Frozen backbone, on cells of the last map and on windows, pushes with momentum 0.9 after epochs 10 and 15 of 15: the
schedule of the push's guide. "global push" changes the push alone (``use_local=False``): prototypes are still compared
with patches, but go towards pooled features. The numbers describe prototypes; no image is classified for them.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measuring import save, spread
from torch import Tensor

from protopush.data.manifest import DataConfig
from protopush.errors import InputError
from protopush.metrics.prototype_quality import diversity, duplicates
from protopush.nn.prototypes import PrototypeManager
from protopush.push import PushSchedule
from protopush.training.config import ModelConfig, PushConfig, RunConfig, TrainConfig, WindowsConfig
from protopush.training.final_push import push_now
from protopush.training.phases import Frozen
from protopush.training.setup import prepare
from protopush.training.trainer import Trainer

PATCHES = {"last map": None, "windows": WindowsConfig(64, 32)}
# name -> what prototypes are compared with, and what they are pushed to
ARMS = {"local": ("local", True), "global push": ("local", False), "global": ("global", False)}
WHEN = ("before the first push", "after it", "at the end", "hard push at the end")


def main(words: Sequence[str] | None = None) -> int:
    """Run the arms that the JSON file doesn't hold yet; it grows run by run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", help="CSV image,label,split[,group]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--start", type=int, default=10, help="the first epoch with a push")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/diversity.json"))
    options = parser.parse_args(words)
    logging.basicConfig(level=logging.WARNING)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.is_file() else []
    done = {(row["patches"], row["arm"], row["seed"]) for row in rows}
    setup = {"manifest": Path(options.manifest).name, "epochs": options.epochs, "start": options.start}
    try:
        for seed, patches, arm in product(options.seeds, PATCHES, ARMS):
            if (patches, arm, seed) not in done:
                rows.append({"patches": patches, "arm": arm, "seed": seed, **run(patches, arm, seed, options)})
                print(rows[-1], flush=True)
                save({"setup": setup, "rows": rows}, options.out)
    except InputError as error:
        print(f"diversity: error: {error}", file=sys.stderr)
        return 2
    print(markdown(rows))
    return 0


def run(patches: str, arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train, and measure the prototypes at each of WHEN; the last epoch's model, not the best one."""
    match, use_local = ARMS[arm]
    config = RunConfig(
        data=DataConfig(path=options.manifest, source="manifest", num_workers=0),
        model=ModelConfig(backbone=options.backbone, match=match, windows=PATCHES[patches]),  # type: ignore[arg-type]
        push=PushConfig(momentum=0.9, start_epoch=options.start, interval=5, use_local=use_local, final_decay=0.0),
        train=TrainConfig(seed=seed, epochs=options.epochs),
    )
    job = prepare(config)
    stage, manager, found = Frozen(job), job.head.proto_manager, dict[str, Any]()
    job.fabric.seed_everything(seed, verbose=False)
    trainer, schedule = Trainer(job, stage, 0, options.epochs), PushSchedule(options.start, 5, final_decay=0.0)
    for epoch in range(options.epochs):
        trainer.epoch(epoch)
        if schedule.due(epoch):
            found.setdefault(WHEN[0], measured(manager))
            push_now(job, stage.model, stage.train_loader, 0.9, trainer.optimizer)
            found.setdefault(WHEN[1], measured(manager))
    found[WHEN[2]] = measured(manager)
    push_now(job, stage.model, stage.train_loader, 0.0)
    found[WHEN[3]] = measured(manager)
    return found


def measured(manager: PrototypeManager) -> dict[str, float | None]:
    """The diversity of the prototypes of a class, and of the images that they name; means over the classes."""
    unit, mask = manager.unit().detach().cpu(), manager.mask().cpu()
    classes = [[manager.anchor(c, k) for k in manager.used_of(c)] for c in range(manager.num_classes)]
    named = [[anchor for anchor in own if anchor is not None] for own in classes]
    images = [len({anchor.sample_id for anchor in own}) for own in named if own]
    return {
        "distance": diversity(unit, mask)["mean"],
        "rank": sum(effective_rank(own[used]) for own, used in zip(unit, mask, strict=True)) / len(unit),
        "alike": duplicates([None] * mask.numel(), unit, mask)["alike"],
        "images": sum(images) / len(images) if images else None,
    }


def effective_rank(vectors: Tensor) -> float:
    """``exp`` of the entropy of the singular values' shares, of vectors (n, D): 1 if equal, n if orthogonal.

    Source: Roy and Vetterli, 2007, "The effective rank".
    """
    values = torch.linalg.svdvals(vectors.double())
    return float(torch.special.entr(values / values.sum()).sum().exp())


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table: mean distance (deviation over seeds) / effective rank at each moment."""
    titles = ["patches", "prototypes", *WHEN, "of them all but equal", "images named by a class", "seeds"]
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for patches, arm in product(PATCHES, ARMS):
        own = [row for row in rows if (row["patches"], row["arm"]) == (patches, arm)]
        if own:
            found = {
                (when, name): spread([row[when][name] for row in own]) for when in WHEN for name in ("distance", "rank")
            }
            cells = [
                "{:.3f} ({:.3f}) / {:.1f}".format(*found[when, "distance"], found[when, "rank"][0]) for when in WHEN
            ]
            cells += [
                "{:.1f} ({:.1f})".format(*spread([row[WHEN[-1]][name] for row in own])) for name in ("alike", "images")
            ]
            lines.append(f"| {patches} | {arm} | " + " | ".join([*cells, str(len(own))]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
