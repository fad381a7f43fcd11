"""Patches that may become anchors by the decisions in force, and the next best of them for some prototypes."""

from __future__ import annotations

import base64
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader, SubsetRandomSampler

from protopush.data.dataset import ImageDataset, check_masks, mask_shares
from protopush.data.features import inference_batch_size
from protopush.data.images import sha256_of
from protopush.data.manifest import Sample
from protopush.data.regions import Region
from protopush.data.transforms import EvalTransform
from protopush.errors import InputError, listing
from protopush.models.model_folder import Run
from protopush.nn.prototypes import Anchor, PrototypeManager
from protopush.push import push_prototypes
from protopush.push.options import Allow
from protopush.push.update import POOLED
from protopush.runs.candidates import Slot, candidates_for
from protopush.runs.decisions import Decision, Replacement, in_force

logger = logging.getLogger("protopush.training")

LEVELS = ("group", "image", "patch")  # of what no two prototypes of a class share one, most to least


class Barred:
    """Images, groups and patches that may not become anchors.

    An image is known by its name and by its SHA-256: under another name, or below another root, it is still the same.
    """

    def __init__(self) -> None:
        self.images: set[str] = set()
        self.groups: set[str] = set()
        self.patches: dict[str, set[Region | None]] = defaultdict(set)

    def add(self, what: Anchor | Decision, level: str) -> None:
        """Bar the patch, the image or the group of an anchor or a decision; ``level`` is one of :data:`LEVELS`."""
        for key in (what.file, what.sha256):
            if key is not None:
                self.patches[key].add(what.region)
                if level != "patch":
                    self.images.add(key)
        if level == "group" and isinstance(what, Anchor) and what.group is not None:
            self.groups.add(what.group)

    def cells(self, keys: Sequence[str | None], group: str | None, boxes: Sequence[Region]) -> Tensor:
        """Bool (L,), True where a patch of the image (its name and SHA-256 are ``keys``) may be chosen."""
        if not self.images.isdisjoint(keys) or group in self.groups:
            return torch.zeros(len(boxes), dtype=torch.bool)
        barred = {box for key in keys for box in self.patches.get(key or "", ())}
        return torch.tensor([box not in barred for box in boxes])


class Allowed:
    """What those of some decisions that were not undone let a push choose among images.

    The transform is that of the model's images: it says where in the picture a patch lies.
    """

    def __init__(self, decisions: Sequence[Decision], transform: EvalTransform) -> None:
        self.transform = transform
        self.barred = Barred()
        holding = in_force(decisions)
        for made in holding:
            if made.kind != "mask":
                self.barred.add(made, "image" if made.kind == "image" else "patch")
        self.min_share = max((made.min_share or 0.0 for made in holding if made.kind == "mask"), default=0.0)
        self._digest = lru_cache(maxsize=None)(lambda sample: sha256_of(sample.image))

    def rule(self, samples: Sequence[Sample], more: Barred | None = None, min_share: float = 0.0) -> Allow:
        """The ``allow`` of a push over these samples, whose places are the ids; ``more`` is barred as well.

        At least ``min_share`` of a patch lies on its image's mask, whatever was decided.
        """
        least = max(self.min_share, min_share)

        def cells(sample: Sample, boxes: Sequence[Region]) -> Tensor:
            names = sample.name, self._digest(sample)
            free = self._inside(self.barred.cells(names, sample.group, boxes), sample, boxes, least)
            return free if more is None else free & more.cells(names, sample.group, boxes)

        return lambda ids, regions: torch.stack([cells(samples[i], regions.boxes) for i in ids.tolist()])

    def forbids(self, anchor: Anchor, sample: Sample | None) -> bool:
        """Whether an anchor may not stay; ``sample`` is its image, where the data still has it."""
        free = self.barred.cells((anchor.file, anchor.sha256), anchor.group, [anchor.region])
        return not bool(self._inside(free, sample, [anchor.region], self.min_share))

    def _inside(self, free: Tensor, sample: Sample | None, regions: Sequence[Region], least: float) -> Tensor:
        """Those patches alone of whose box so much lies where the sample's mask, if any, is not 0."""
        if sample is None or sample.mask is None or not least or not bool(free.any()):
            return free
        return free & (mask_shares(sample, self.transform, regions) >= least)


def allow_of(decisions: Sequence[Decision], dataset: ImageDataset) -> Allow | None:
    """The ``allow`` of a push over a dataset, None where nothing is forbidden; masks that it needs are checked."""
    holding = in_force(decisions)
    if not holding:
        return None
    if any(made.kind == "mask" for made in holding):
        logger.info("Decisions keep anchors inside masks; %d images have none", check_masks(dataset.samples))
    return Allowed(holding, dataset.eval_transform).rule(dataset.samples)


def replace_anchors(
    run: Run, train: ImageDataset, allowed: Allowed, slots: Sequence[Slot], device: torch.device, num_workers: int,
    tried: Sequence[Anchor] = (),
) -> list[Replacement]:  # fmt: skip
    """Push prototypes onto the nearest patches that are allowed and that no other prototype of their class stands for.

    Of the images those are read that can hold them, by the run's candidates; those of anchors that were ``tried`` are
    left out.

    Where the run was trained with another image or group for each prototype of a class, that holds on while there are
    enough; where it was trained with anchors on masks, these are too. A prototype that stood for a pooled feature
    stands for one again. Connections stay as they are. The run's model is changed, its folder isn't. Where no patch is
    left for some, an InputError names them.
    """
    manager = run.head.proto_manager
    run.head.sync_prototypes()
    candidates = candidates_for(run, train, slots, device, num_workers)
    level, on_mask = _trained(run.folder)

    def push(slots: Sequence[Slot], use_local: bool, level: str) -> list[Slot]:
        """One hard push, away from what the others of these classes stand for; returns those that found nothing."""
        classes = {c for c, _ in slots}
        images = [i for i, label in enumerate(train.labels) if label in classes]
        if not images:
            return list(slots)
        others = [slot for slot in manager.used_slots() if slot[0] in classes and slot not in slots]
        size, sampler = inference_batch_size(device), SubsetRandomSampler(images)  # the push reads them in order
        loader: DataLoader[Any] = DataLoader(train, size, sampler=sampler, num_workers=num_workers)
        barred = taken([manager.anchor(*slot) for slot in others], level)
        for anchor in tried:
            barred.add(anchor, "image")
        rule = allowed.rule(train.samples, barred, on_mask if use_local else 0.0)
        bounds = candidates.bounds(slots, rule) if use_local == (run.head.match == "local") else None
        report = push_prototypes(
            run.model, loader, device, use_local=use_local, momentum=0.0, unique=level, prototypes=list(slots),
            allow=rule, bounds=bounds,
        )  # fmt: skip
        found = {(record.class_index, record.prototype) for record in report.prototypes}
        return [slot for slot in slots if slot not in found]

    old = [standing(run, slot) for slot in slots]
    for use_local in (True, False):
        missing = [one.slot for one in old if one.old.pooled != use_local]
        for lower in LEVELS[LEVELS.index(level) :]:
            missing = push(missing, use_local, lower) if missing else []
        if missing:
            names = listing([f"{run.class_names[c]}:{k}" for c, k in missing])
            raise InputError(
                f"no allowed patch is left for {names}; add training images or forbid less; nothing was changed"
            )
    return [replace(one, new=standing(run, one.slot).old) for one in old]


def taken(anchors: Sequence[Anchor | None], level: str) -> Barred:
    """Where nobody else of the class may stand beside these anchors; ``level`` is one of :data:`LEVELS`."""
    barred = Barred()
    for anchor in anchors:
        if anchor is not None:
            barred.add(anchor, level)
    return barred


def level_of(folder: Path) -> str:
    """Of what no two prototypes of a class share one, as the run was trained; at least ``patch``."""
    return _trained(folder)[0]


def _trained(folder: Path) -> tuple[str, float]:
    """``push.unique``, at least ``patch``, and ``push.min_mask_share``, as the run was trained."""
    try:
        push = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["push"]
        level, share = push.get("unique"), float(push.get("min_mask_share", 0.0))
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return "patch", 0.0
    return level if level in LEVELS else "patch", share


def standing(run: Run, slot: Slot) -> Replacement:
    """Where a prototype, that has an anchor, stands now, as a move away from there; live ones must be in sync."""
    manager = run.head.proto_manager
    row, anchor = manager.index(*slot), manager.anchor(*slot)
    if anchor is None:
        raise ValueError(f"prototype {slot} has no anchor")
    here = Replacement(slot[0], run.class_names[slot[0]], slot[1], anchor, anchor, text_of(manager.prototypes[row]))
    if manager.anchor_features is None or manager.anchor_ids is None or int(manager.anchor_ids[row]) < 0:
        return here
    features, index = text_of(manager.anchor_features[row]), int(manager.anchor_ids[row])
    return replace(here, old_features=features, old_index=index)


@torch.no_grad()
def put_back(manager: PrototypeManager, move: Replacement) -> None:
    """Give a prototype the anchor and the numbers that it had before a move."""
    row = manager.index(*move.slot)
    manager.anchors[row] = move.old
    manager.prototypes[row] = _vector_of(move.old_vector).to(manager.prototypes)
    if manager.anchor_features is None or manager.anchor_ids is None or manager.anchor_cells is None:
        return
    if move.old_features is not None:
        manager.anchor_features[row] = _vector_of(move.old_features).to(manager.anchor_features)
    manager.anchor_ids[row] = -1 if move.old_features is None or move.old_index is None else move.old_index
    manager.anchor_cells[row] = move.old.cell if not move.old.pooled else POOLED


def text_of(vector: Tensor) -> str:
    """Base64 of the numbers as float32, little-endian."""
    return base64.b64encode(vector.detach().float().cpu().numpy().astype("<f4").tobytes()).decode()


def _vector_of(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32))
