"""Whether a push can leave most images aside: how far similarities move between the pushes of a fine-tuning run.

At each push every image's best similarities are kept. The images that a push would have to read are then counted: the
nearest of before (16 for each prototype), a sample by which the drift is measured, and all whose similarity of before,
raised by that drift, reaches the best that was found. ``missed`` is the share of prototypes whose true nearest patch is
in none of them.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from measuring import save
from rich.console import Console
from rich.table import Table
from showing import Parser, count, surroundings

from protopush._compat import ensure_torchvision

ensure_torchvision()
import protopush.training.final_push as final_push  # noqa: E402
import protopush.training.trainer as trainer  # noqa: E402
from protopush.cli import main as protopush_main  # noqa: E402
from protopush.preserve_state import preserve_state  # noqa: E402
from protopush.push.embedding import own_similarity  # noqa: E402
from protopush.push.protocol import Slots, unwrap  # noqa: E402
from protopush.push.reader import read_through  # noqa: E402

NEAREST = 16
DRIFTS = (("largest", 1.0, 150), ("95th percentile", 0.95, 50))  # of a sample of so many images
TRAINING = (
    "--data.source manifest --overwrite --model.backbone tf_efficientnet_lite0 --model.image_size 112 "
    "--model.windows null --model.num_prototypes 5 --train.freeze_backbone false --train.head_epochs 2 "
    "--train.epochs 8 --train.patience 20 --push.start_epoch 3 --push.interval 1 --push.final_decay 0 "
    "--push.candidates 0 --data.num_workers 0 --trainer.device cpu"
)


def pushes(manifest: Path, images: int, anchoring: str, folder: Path) -> list[tuple[Any, ...]]:
    """labels (N,), best similarities (N, K) before and after each push, and the images it chose."""
    rows = list(csv.DictReader(manifest.open(newline="", encoding="utf-8")))
    of = {split: [row for row in rows if row["split"] == split] for split in ("train", "val")}
    random.Random(0).shuffle(of["train"])
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        kept = [*of["train"][:images], *of["val"][: max(20, images // 7)]]
        writer = csv.writer(file)
        writer.writerow(("image", "label", "split"))
        writer.writerows((str(manifest.parent.resolve() / row["image"]), row["label"], row["split"]) for row in kept)
    seen: list[tuple[Any, ...]] = []
    real = final_push.push_now

    def watched(job: Any, model: Any, loader: Any, *args: Any, **more: Any) -> Any:
        net = unwrap(model)

        def similarities() -> Any:
            net.head.sync_prototypes()
            slots = Slots.of(net.head.proto_manager)
            with preserve_state(model):
                return own_similarity(net, read_through(loader), slots.unit, slots.used, True)

        before, report, after = similarities(), real(job, model, loader, *args, **more), similarities()
        chosen = [(one.class_index, one.prototype, one.anchor.file) for one in report.prototypes]
        seen.append((before.labels.numpy(), before.best.numpy(), after.best.numpy(), chosen))
        return report

    words = ["train", "--data.path", folder / "manifest.csv", "--out", folder / "run", *TRAINING.split()]
    words += ["--push.anchoring", anchoring]
    with patch.object(final_push, "push_now", watched), patch.object(trainer, "push_now", watched):
        protopush_main([str(word) for word in words])
    return seen


def drifts(seen: Sequence[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """For each push but the first, what the one before knew of it."""
    draw = np.random.default_rng(0)
    for (labels, _, old, chosen), (_, new, _, now) in pairwise(seen):
        slots = [
            (c, k) for c in np.unique(labels) for k in range(old.shape[1]) if np.isfinite(new[labels == c, k]).all()
        ]
        row: dict[str, Any] = {"same anchors": len(set(chosen) & set(now)) / len(now)}
        for name, quantile, size in DRIFTS:
            read, missed = np.zeros(len(labels), bool), 0
            sample = draw.choice(len(labels), min(size, len(labels)), replace=False)
            read[sample] = True
            for c, k in slots:
                own = np.flatnonzero(labels == c)
                before, after = old[own, k], new[own, k]
                measured = np.isin(own, sample)
                drift = np.quantile((after - before)[measured], quantile) if measured.any() else 2.0
                nearest = np.argsort(-before)[:NEAREST]
                some = before + drift >= after[nearest].max()
                some[nearest] = True
                missed += not some[after.argmax()]
                read[own[some]] = True
            row[name] = {"cost": float(read.mean()), "missed": missed / len(slots)}
        yield row


def main(argv: Sequence[str] | None = None) -> int:
    """Train, count, print and save."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, help="of HAM10000, say: image, label, split")
    parser.add_argument("--images", type=count, default=1000, help="of training")
    parser.add_argument("--anchoring", nargs="+", choices=["off", "live"], default=["off", "live"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "shortlist.json")
    args = parser.parse_args(argv)
    found: dict[str, Any] = {**surroundings(), "images": args.images, "training": TRAINING}
    shown = Table("anchoring", "push", "same anchors", *(f"{name}: cost, missed" for name, _, _ in DRIFTS))
    for anchoring in args.anchoring:
        with tempfile.TemporaryDirectory(prefix="protopush-bench-") as folder:
            found[anchoring] = list(drifts(pushes(args.manifest, args.images, anchoring, Path(folder))))
        for number, row in enumerate(found[anchoring], start=2):
            words = [f"{row[name]['cost']:.2f}, {row[name]['missed']:.3f}" for name, _, _ in DRIFTS]
            shown.add_row(anchoring, str(number), f"{row['same anchors']:.2f}", *words)
    Console(width=120).print(shown)
    save(found, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
