"""Give prototypes the next best anchors, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.data import DataLoader, SubsetRandomSampler

from protopush.data.dataset import ImageDataset
from protopush.data.features import inference_batch_size
from protopush.errors import InputError, listing
from protopush.prototypes import Anchor, PrototypeManager
from protopush.push import push_prototypes
from protopush.review.allowed import Allowed, Barred
from protopush.review.decisions import Replacement
from protopush.review.places import Place
from protopush.training.run import Run

LEVELS = ("group", "image", "patch")  # of what no two prototypes of a class share one, most to least


@dataclass(frozen=True)
class Bench:
    """What a replacement works with.

    Attributes:
        run: its model is changed, the folder isn't.
        train: the images to choose from.
        allowed: which of their patches may be chosen.
        device: of the model.
        num_workers: processes that read images.
    """

    run: Run
    train: ImageDataset
    allowed: Allowed
    device: torch.device
    num_workers: int = 0

    def push(self, rows: Sequence[int], use_local: bool, level: str) -> list[int]:
        """One hard push of some prototypes, away from what the others stand for; returns those that found nothing."""
        manager = self.run.head.proto_manager
        places = _places(manager, rows)
        classes = {c for c, _ in places}
        images = [i for i, label in enumerate(self.train.labels) if label in classes]
        if not images:
            return list(rows)
        loader: DataLoader[Any] = DataLoader(
            self.train,
            batch_size=inference_batch_size(self.device),
            sampler=SubsetRandomSampler(images),  # the push reads them in order
            num_workers=self.num_workers,
        )
        report = push_prototypes(
            self.run.model,
            loader,
            self.device,
            use_local=use_local,
            momentum=0.0,
            unique=level,
            prototypes=places,
            allow=self.allowed.rule(self.train.samples, _taken(manager, rows, classes, level)),
        )
        found = {(record.class_index, record.prototype) for record in report.prototypes}
        return [row for row, place in zip(rows, places, strict=True) if place not in found]


def replace_anchors(bench: Bench, rows: Sequence[int]) -> list[Replacement]:
    """Push prototypes onto the nearest patches that are allowed and that no other prototype of their class stands for.

    Where the run was trained with another image or group for each prototype of a class, that holds on while there are
    enough. A prototype that stood for a pooled feature stands for one again. Connections stay as they are.

    Args:
        bench: model, images and rules.
        rows: the prototypes, as rows of the manager; each has an anchor.

    Raises:
        InputError: no patch is left for some of them.
    """
    run, manager = bench.run, bench.run.head.proto_manager
    run.head.sync_prototypes()
    old = {row: Place.of(manager, row) for row in rows}
    for use_local in (True, False):
        missing = [row for row in rows if (old[row].anchor.grid != (1, 1)) == use_local]
        for level in LEVELS[LEVELS.index(level_of(run.folder)) :]:
            missing = bench.push(missing, use_local, level) if missing else []
        if missing:
            names = [f"{run.class_names[c]}:{k}" for c, k in _places(manager, missing)]
            raise InputError(
                f"no allowed patch is left for {listing(names)}; add training images or forbid less; "
                "nothing was changed"
            )
    return [old[row].replacement(run.class_names[row // manager.max_prototypes], manager, row) for row in rows]


def _taken(manager: PrototypeManager, rows: Sequence[int], classes: set[int], level: str) -> Barred:
    """What the other prototypes of these classes stand for."""
    others = enumerate(manager.anchors)
    return taken([a for row, a in others if row not in rows and row // manager.max_prototypes in classes], level)


def taken(anchors: Sequence[Anchor | None], level: str) -> Barred:
    """Where nobody else of the class may stand beside these anchors; ``level`` is one of :data:`LEVELS`."""
    barred = Barred()
    for anchor in anchors:
        if anchor is None:
            continue
        barred.add_patch(anchor.grid, anchor.cell, anchor.file, anchor.sha256)
        if level != "patch":
            barred.add_image(anchor.file, anchor.sha256)
        if level == "group" and anchor.group is not None:
            barred.groups.add(anchor.group)
    return barred


def level_of(folder: Path) -> str:
    """Of what no two prototypes of a class share one, as the run was trained; at least ``patch``."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        level = config["push"]["unique"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return "patch"
    return level if level in LEVELS else "patch"


def _places(manager: PrototypeManager, rows: Sequence[int]) -> list[tuple[int, int]]:
    return [divmod(row, manager.max_prototypes) for row in rows]
