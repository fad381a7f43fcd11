"""Which prototype stands for which candidate, so that no two of a class share a patch, an image or a group.

From candidates to anchors: search and assignment, also where a class has fewer images than prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from protopush.data.dataset import Provenance
from protopush.errors import InputError, listing
from protopush.push.nearest_patches import Found, Query, search
from protopush.push.protocol import Pushable, Slots
from protopush.push.reader import DatasetSource, Source
from protopush.push.top_candidates import TIE, Ranked

UNIQUE = ("none", "patch", "image", "group")
LOWER = {"group": "image", "image": "patch", "patch": "none"}

_FOREIGN = 1e6  # more than any sum of distances: a key that isn't among a prototype's candidates


def check_unique(unique: str, name: str = "unique") -> None:
    """Refuse an unknown word, under the name that the user knows it by.

    Raises:
        InputError: it isn't one of :data:`UNIQUE`.
    """
    if unique not in UNIQUE:
        raise InputError(f"{name} is {unique!r}; expected one of: {', '.join(UNIQUE)}")


@dataclass(frozen=True)
class Assignment:
    """Which candidate each prototype takes.

    Attributes:
        choice: int64 (C, K): 0 is the nearest; 0 as well where nothing was found.
        short: classes with fewer keys than prototypes, to be settled at a lower level.
    """

    choice: Tensor
    short: list[int]


def assign(ranked: Ranked, used: Tensor, unique: str) -> Assignment:
    """The candidates that maximise the sum of the similarities of each class, no key taken twice.

    Args:
        ranked: (C, M, K), M at least the number of prototypes in use of any class, unless ``unique`` is ``none``.
        used: bool (C, K).
        unique: of what no two prototypes of a class may share one.

    M candidates of different keys are enough for the best of all assignments: among M keys, one is always left for the
    last of M prototypes. Equal sums are settled for smaller keys.
    """
    similarity, keys = ranked.similarity.cpu().double().numpy(), ranked.keys.cpu().numpy()
    choice, short = np.zeros(used.shape, dtype=np.int64), []
    if unique != "none":
        for c, slots in enumerate(used.cpu().numpy()):
            (rows,) = np.nonzero(slots)
            found = np.isfinite(similarity[c][:, rows])
            if len(rows) == 0 or not found.any():
                continue
            if len(np.unique(keys[c][:, rows][found])) < len(rows):
                short.append(c)
            else:
                choice[c, rows] = _assign_class(similarity[c][:, rows].T, keys[c][:, rows].T)
    return Assignment(torch.from_numpy(choice).to(ranked.keys.device), short)


def _assign_class(similarity: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The place in its list that each prototype takes; both inputs are (prototypes, M), best first."""
    there = np.isfinite(similarity)
    columns, place = np.unique(keys[there], return_inverse=True)
    cost = np.full((len(keys), len(columns)), _FOREIGN)
    rows, ranks = np.nonzero(there)
    # Noise must not choose between equals, but the smaller key: equal costs, then a nudge that is smaller than any TIE.
    cost[rows, place] = 1.0 - _levelled(similarity)[rows, ranks] + place * (TIE / 2 / len(columns) / len(keys))
    taken = np.full(len(keys), -1)
    chosen_rows, chosen = linear_sum_assignment(cost)
    taken[chosen_rows] = chosen
    rank_of = np.zeros(cost.shape, dtype=np.int64)
    rank_of[rows, place] = ranks
    ranks_taken: np.ndarray = rank_of[np.arange(len(keys)), taken]
    return ranks_taken


def _levelled(similarity: np.ndarray) -> np.ndarray:
    """Similarities (prototypes, M) in falling order, up to TIE, with near-equal ones made equal."""
    levelled = similarity.copy()
    for m in range(1, similarity.shape[1]):
        with np.errstate(invalid="ignore"):  # -inf beside -inf: never equal, never taken
            same = similarity[:, m - 1] - similarity[:, m] <= TIE
        levelled[same, m] = levelled[same, m - 1]
    return levelled


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
