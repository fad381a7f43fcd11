"""Next best anchors for some prototypes, without training, and the exact places to put them back to."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader, SubsetRandomSampler

from protopush.data.dataset import ImageDataset
from protopush.data.features import inference_batch_size
from protopush.errors import InputError, listing
from protopush.models.model_folder import Run
from protopush.nn.prototypes import Anchor, PrototypeManager
from protopush.push import push_prototypes
from protopush.push.update import POOLED
from protopush.runs.allowed import Allowed, Barred
from protopush.runs.decisions import Replacement


@dataclass(frozen=True)
class Place:
    """One prototype's anchor and numbers.

    Attributes:
        anchor: what it stands for.
        vector: base64 of D float32, little-endian.
        features: of a live anchor, base64 of C float32; None where anchors aren't live, or weren't kept.
        index: of a live anchor, its place in the training data.
    """

    anchor: Anchor
    vector: str
    features: str | None = None
    index: int | None = None

    @classmethod
    def of(cls, manager: PrototypeManager, row: int) -> Place:
        """Where a prototype, that has an anchor, stands now; live ones must be in sync."""
        anchor = manager.anchors[row]
        if anchor is None:
            raise ValueError(f"prototype {row} has no anchor")
        vector = _text_of(manager.prototypes[row])
        if manager.anchor_features is None or manager.anchor_ids is None or int(manager.anchor_ids[row]) < 0:
            return cls(anchor, vector)
        return cls(anchor, vector, _text_of(manager.anchor_features[row]), int(manager.anchor_ids[row]))

    @classmethod
    def before(cls, move: Replacement) -> Place:
        """Where a prototype stood before it was replaced."""
        return cls(move.old, move.old_vector, move.old_features, move.old_index)

    @classmethod
    def made_of(cls, anchor: Anchor, vector: Tensor, features: Tensor, index: int) -> Place:
        """A live anchor's place, from what was computed of its image."""
        return cls(anchor, _text_of(vector), _text_of(features), index)

    @torch.no_grad()
    def take(self, manager: PrototypeManager, row: int) -> None:
        """Put a prototype here."""
        manager.anchors[row] = self.anchor
        manager.prototypes[row] = _vector_of(self.vector).to(manager.prototypes)
        if manager.anchor_features is None or manager.anchor_ids is None or manager.anchor_cells is None:
            return
        if self.features is not None:
            manager.anchor_features[row] = _vector_of(self.features).to(manager.anchor_features)
        manager.anchor_ids[row] = -1 if self.features is None or self.index is None else self.index
        manager.anchor_cells[row] = self.anchor.cell if self.anchor.grid != (1, 1) else POOLED

    def replacement(self, class_name: str, manager: PrototypeManager, row: int) -> Replacement:
        """The record of a prototype that stood here and has another anchor now."""
        c, k = manager.slot(row)
        new = Place.of(manager, row).anchor
        return Replacement(c, class_name, k, self.anchor, new, self.vector, self.features, self.index)


def _text_of(vector: Tensor) -> str:
    values = vector.detach().float().cpu().numpy().astype("<f4")
    return base64.b64encode(values.tobytes()).decode()


def _vector_of(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32))


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
    return [old[row].replacement(run.class_names[manager.slot(row)[0]], manager, row) for row in rows]


def _taken(manager: PrototypeManager, rows: Sequence[int], classes: set[int], level: str) -> Barred:
    """What the other prototypes of these classes stand for."""
    others = enumerate(manager.anchors)
    return taken([a for row, a in others if row not in rows and manager.slot(row)[0] in classes], level)


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
    return [manager.slot(row) for row in rows]
