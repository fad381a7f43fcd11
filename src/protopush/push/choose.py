"""From candidates to anchors: search and assignment, also where a class has fewer images than prototypes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from protopush.data.provenance import Provenance
from protopush.errors import listing
from protopush.push.assign import LOWER, assign
from protopush.push.contract import Pushable, Slots
from protopush.push.search import Found, Query, search
from protopush.push.source import DatasetSource, Source


@dataclass(frozen=True)
class Chosen:
    """One patch for each prototype. Tensors are (C, K), on the CPU but for ``vectors``.

    Attributes:
        hit: bool, where a patch was found.
        ids, cells: int64.
        vectors: (C, K, W), the embeddings or features of the patches.
        rank: int64, 1 where the nearest was taken, 2 where another prototype has that one, ...
        nearest: float32, the similarity of the nearest patch.
        runner_up: float32, that of the best candidate but the chosen; -inf where there is none.
        levels: of what no two prototypes share one, a word for each class.
        notes: where a class had too few.
        origins: where each id comes from.
        grid: of the patches.
        patches, images: (C,), how many were looked at.
    """

    hit: Tensor
    ids: Tensor
    cells: Tensor
    vectors: Tensor
    rank: Tensor
    nearest: Tensor
    runner_up: Tensor
    levels: list[str]
    notes: list[str]
    origins: dict[int, Provenance]
    grid: tuple[int, int]
    patches: Tensor
    images: Tensor


def choose(net: Pushable, source: Source, slots: Slots, query: Query, unique: str, class_names: list[str]) -> Chosen:
    """The anchors of all prototypes, by one pass; by one more over the classes that have too few images or groups."""
    notes: list[str] = []
    if unique == "group" and source.groups is None:
        notes.append("the dataset tells no groups: anchors are unique by image instead")
        unique = "image"
    result, short = _choose(net, source, slots, query, unique)
    level = unique
    while short:
        lower = LOWER[level]
        names = listing([class_names[c] if class_names else f"class {c}" for c in short])
        notes.append(
            f"{names}: fewer {_plural(level)} than prototypes, "
            + (f"anchors are unique by {lower} instead" if lower != "none" else "anchors are shared")
        )
        again = slots._replace(used=slots.used & _members(short, slots.used).to(slots.used.device).unsqueeze(1))
        if isinstance(source, DatasetSource):
            source.narrow(short.__contains__)
        second, still_short = _choose(net, source, again, query, lower)
        result = _replaced(result, second, short)
        short, level = still_short, lower
    return replace(result, notes=notes)


def _choose(net: Pushable, source: Source, slots: Slots, query: Query, unique: str) -> tuple[Chosen, list[int]]:
    """Search and assignment at one level; and the classes for which it isn't to be had."""
    most = int(slots.used.sum(dim=1).max()) if unique != "none" else 1
    found = search(net, source, slots, query, max(2, most), "image" if unique == "none" else unique)
    assignment = assign(found.ranked, slots.used, unique)
    return _chosen(found, assignment.choice, source, slots, unique), assignment.short


def _chosen(found: Found, choice: Tensor, source: Source, slots: Slots, unique: str) -> Chosen:
    at = choice.unsqueeze(1)
    similarity, ids, cells, *_ = found.ranked
    others = similarity.scatter(1, at, -torch.inf)
    return Chosen(
        hit=similarity.gather(1, at).squeeze(1).isfinite().cpu(),
        ids=ids.gather(1, at).squeeze(1).cpu(),
        cells=cells.gather(1, at).squeeze(1).cpu(),
        vectors=found.vectors(choice),
        rank=(choice + 1).cpu(),
        nearest=similarity[:, 0].cpu(),
        runner_up=others.amax(dim=1).cpu(),
        levels=[unique] * len(slots.rows),
        notes=[],
        origins=found.origins(choice, source),
        grid=found.grid,
        patches=found.patches,
        images=found.images,
    )


def _replaced(first: Chosen, second: Chosen, classes: list[int]) -> Chosen:
    """The first, but for some classes that are as in the second."""
    mask = _members(classes, first.hit)

    def either(name: str) -> Tensor:
        old, new = getattr(first, name), getattr(second, name)
        return torch.where(mask.to(old.device).view(-1, *[1] * (old.ndim - 1)), new, old)

    names = ("hit", "ids", "cells", "vectors", "rank", "nearest", "runner_up")
    tensors: dict[str, Any] = {name: either(name) for name in names}
    levels = [second.levels[c] if c in classes else level for c, level in enumerate(first.levels)]
    return replace(first, levels=levels, origins=first.origins | second.origins, **tensors)


def _members(classes: list[int], like: Tensor) -> Tensor:
    mask = torch.zeros(len(like), dtype=torch.bool)
    mask[classes] = True
    return mask


def _plural(level: str) -> str:
    return {"group": "groups", "image": "images", "patch": "patches"}[level]
