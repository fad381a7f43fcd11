"""Selection of anchors: which of its nearest patches each prototype takes, by the rule that a class is to keep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from protopush.errors import listing
from protopush.push.nearest_patches import Candidates, Rule, nearest_patches
from protopush.push.options import PushOptions, resolve
from protopush.push.protocol import Pushable, Slots
from protopush.push.reader import Reader
from protopush.push.shortlist import nearest_on_shortlist
from protopush.push.top_candidates import TIE, Ranked

_SPREAD = -7046029254386353131  # 2**64 / golden ratio: multiples of it lie far apart, so that cells fit between ids
_FOREIGN = 1e6  # more than any sum of distances: a key that isn't among a prototype's candidates


def shared(reader: Reader, ids: Tensor, cells: Tensor) -> Tensor:
    """``none``: each prototype takes its nearest patch; the keys only keep its runner-up in another image."""
    return ids


def by_patch(reader: Reader, ids: Tensor, cells: Tensor) -> Tensor:
    """``patch``: each prototype of a class has another patch."""
    return ids * _SPREAD + cells


def by_image(reader: Reader, ids: Tensor, cells: Tensor) -> Tensor:
    """``image``: each prototype of a class has another image."""
    return ids


def by_group(reader: Reader, ids: Tensor, cells: Tensor) -> Tensor:
    """``group``: each prototype of a class has another group (lesion, patient, ...) of the dataset's ``groups``."""
    return ids if reader.groups is None else reader.groups[ids]


def choose(net: Pushable, reader: Reader, slots: Slots, options: PushOptions, class_names: list[str]) -> Candidates:
    """The patch that each prototype takes, by one pass; by one more over the classes that have too few for the rule.

    Where a class has fewer images than prototypes, prototypes of it have different patches instead; where it has fewer
    patches as well, they share them. For any other rule than ``patch``, ``image`` takes the place of it.
    """
    rule, notes = resolve(RULES, options.unique, "unique"), list[str]()
    if rule is by_group and reader.groups is None:
        notes.append("the dataset has no groups: anchors are unique by image instead")
        rule = by_image
    chosen, classes = None, list(range(len(slots.rows)))
    search = nearest_patches if options.bounds is None else nearest_on_shortlist
    while True:
        asked = slots._replace(used=torch.zeros_like(slots.used))
        asked.used[classes] = slots.used[classes]
        depth = 2 if rule is shared else max(2, int(asked.used.sum(dim=1).max()))
        found = search(net, reader, asked, options, rule, depth)
        taken, short = (found.taken, []) if rule is shared else assign(found.ranked, asked.used)
        found = replace(found, taken=taken, unique=(_word(rule),) * len(slots.rows))
        chosen = found if chosen is None else chosen.with_classes(classes, found)
        if not short:
            return replace(chosen, notes=tuple(notes))
        lower = by_patch if rule is by_image else shared if rule is by_patch else by_image
        few = listing([class_names[c] if class_names else f"class {c}" for c in short])
        instead = "anchors are shared" if lower is shared else f"anchors are unique by {_word(lower)} instead"
        plural = _word(rule) + ("es" if _word(rule).endswith("ch") else "s")
        notes.append(f"{few}: fewer {plural} than prototypes, {instead}")
        rule, classes, reader = lower, short, reader.of_classes(short)


def _word(rule: Rule) -> str:
    return next((name for name, known in RULES.items() if known is rule), getattr(rule, "__name__", "key"))


def assign(ranked: Ranked, used: Tensor) -> tuple[Tensor, list[int]]:
    """The candidates that maximise the sum of the similarities of each class, no key taken twice.

    M candidates (C, M, K) of different keys are enough for M prototypes ``used`` (C, K) of a class: among M keys, one
    is always left for the last. Equal sums are settled for smaller keys.

    Returns:
        int64 (C, K), the candidate that each prototype takes, 0 for the nearest and where nothing was found; and the
        classes with fewer keys than prototypes, which have to be settled by another rule.
    """
    similarity, keys = ranked.similarity.cpu().double().numpy(), ranked.keys.cpu().numpy()
    taken, short = np.zeros(used.shape, dtype=np.int64), []
    for c, slots in enumerate(used.cpu().numpy()):
        (rows,) = np.nonzero(slots)
        found = np.isfinite(similarity[c][:, rows])
        if not found.any():
            continue
        if len(np.unique(keys[c][:, rows][found])) < len(rows):
            short.append(c)
        else:
            taken[c, rows] = _assign_class(similarity[c][:, rows].T, keys[c][:, rows].T)
    return torch.from_numpy(taken).to(ranked.keys.device), short


def _assign_class(similarity: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The place in its list that each prototype takes; both inputs are (prototypes, M), best first."""
    there = np.isfinite(similarity)
    columns, place = np.unique(keys[there], return_inverse=True)
    cost = np.full((len(keys), len(columns)), _FOREIGN)
    rows, ranks = np.nonzero(there)
    # Noise must not choose between equals, but the smaller key: equal costs, then a nudge that is smaller than any TIE.
    cost[rows, place] = 1.0 - _levelled(similarity)[rows, ranks] + place * (TIE / 2 / len(columns) / len(keys))
    rank_of = np.zeros(cost.shape, dtype=np.int64)
    rank_of[rows, place] = ranks
    from scipy.optimize import linear_sum_assignment  # here: opening a run needs none of it, and it takes long

    taken: np.ndarray = rank_of[linear_sum_assignment(cost)]  # its rows are all prototypes, in order
    return taken


def _levelled(similarity: np.ndarray) -> np.ndarray:
    """Similarities (prototypes, M) in falling order, up to TIE, with near-equal ones made equal."""
    levelled = similarity.copy()
    for m in range(1, similarity.shape[1]):
        with np.errstate(invalid="ignore"):  # -inf beside -inf: never equal, never taken
            same = similarity[:, m - 1] - similarity[:, m] <= TIE
        levelled[same, m] = levelled[same, m - 1]
    return levelled


RULES: dict[str, Rule] = {
    "none": shared,
    "patch": by_patch,
    "image": by_image,
    "group": by_group,
}
