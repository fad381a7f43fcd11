"""Which prototype stands for which candidate, so that no two of a class share a patch, an image or a group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from protopush.errors import InputError
from protopush.push.candidates import TIE, Ranked

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
