"""Fine-tuning of the last layers on stored outputs of the first ones, against the ordinary way: seconds and memory.

    python benchmarks/last_layers.py manifest.csv
    python benchmarks/last_layers.py manifest.csv --windows null --layers 2

The same images, live prototypes, batches of 32; an epoch of each side in turn, in processes of their own (for the peak
of their memory). "all" trains the whole backbone, "last, images" its last layers alone, "last, stored" the same on
outputs of the first layers, which were computed before: "before" has the seconds of that.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import yaml
from measuring import save, synchronize
from peak_memory import peak_megabytes

from protopush.data.manifest import DataConfig
from protopush.training.config import ModelConfig, PushConfig, RunConfig, TrainConfig, WindowsConfig
from protopush.training.phases import Joint, LastLayers
from protopush.training.setup import prepare
from protopush.training.trainer import Trainer

SIDES = {"all": (False, 0), "last, images": (True, 0), "last, stored": (True, 1)}  # the last layers alone; cached views


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", help="CSV image,label,split[,group]")
    parser.add_argument("--images", type=int, default=256, help="training images of an epoch (default: 256)")
    parser.add_argument("--windows", default="64", help="pixels of a side; null: images as a whole (default: 64)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", default="1", help="train.trainable_stages (default: 1)")
    parser.add_argument("--set", nargs="+", default=[], metavar="GROUP.NAME=VALUE", help="other options of all sides")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/last_layers.json"))
    options = parser.parse_args(words)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for _ in range(options.repetitions):
        for name in SIDES:
            found[name].append(_in_fresh_process(name, options))
    middle = {name: {key: median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()}
    for name, row in middle.items():
        ratio = median(a["seconds"] / b["seconds"] for a, b in zip(found["all"], found[name], strict=True))
        row["times_faster"] = ratio
        took = f"{row['seconds']:7.1f} s an epoch ({ratio:.1f} times faster)"
        print(f"{name:13} {took}, before {row['before']:6.1f} s, {row['megabytes']:6.0f} MB", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    names = ("images", "windows", "threads", "layers", "set")
    setup = {name: getattr(options, name) for name in names}
    save({"setup": setup, "median": middle, "values": found}, options.out)
    return 0


def _in_fresh_process(name: str, options: argparse.Namespace) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return json.loads(pool.apply(_epochs, (name, options)))


def _epochs(name: str, options: argparse.Namespace) -> str:
    """The second epoch's seconds, those of what was computed before the first, and the process's peak of memory."""
    torch.set_num_threads(options.threads)
    job = replace(prepare(_config(*SIDES[name], options)), val=None)
    job.train.samples = job.train.samples[: options.images]
    start = time.perf_counter()
    stage = (LastLayers if job.config.data.cached_views else Joint)(job)
    synchronize()
    before = time.perf_counter() - start
    trainer = Trainer(job, stage, 0, 2)
    trainer.push(0, None)
    trainer.epoch(0)
    synchronize()
    start = time.perf_counter()
    trainer.epoch(1)
    synchronize()
    row = {"seconds": time.perf_counter() - start, "before": before, "megabytes": peak_megabytes()}
    return json.dumps(row)


def _config(last: bool, views: int, options: argparse.Namespace) -> RunConfig:
    side, layers = yaml.safe_load(options.windows), yaml.safe_load(options.layers)
    config = RunConfig(
        data=DataConfig(path=options.manifest, source="manifest", num_workers=0, augment=False, cached_views=views),
        model=ModelConfig(windows=side and WindowsConfig(size=side)),
        push=PushConfig(anchoring="live", unique="image", start_epoch=10**6),
        train=TrainConfig(freeze_backbone=False, trainable_stages=layers if last else None, batch_size=32, epochs=2),
    )
    for key, value in (words.split("=", 1) for words in options.set):
        group, name = key.split(".")
        setattr(config, group, replace(getattr(config, group), **{name: yaml.safe_load(value)}))
    return config


if __name__ == "__main__":
    sys.exit(main())
