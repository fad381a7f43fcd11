"""Quality of prototypes: real, distinct, in use, and few at a time.

Shapes, with C classes of K slots and N samples: prototypes (C, K, D), unit norm; mask bool (C, K), the slots in use;
similarities and contributions (N, C, K), as in :class:`protopush.nn.head.HeadOutput`; labels and predicted int64
(N,). Lists over slots have C * K entries, class by class, which is how prototypes are numbered here. What is undefined
is None; a mean over classes is over those for which the number is defined. Every function raises
:class:`protopush.errors.InputError` for NaN or infinite numbers in slots in use, and for shapes that don't match.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from protopush.errors import InputError
from protopush.metrics.classification import mean_of_defined

T = TypeVar("T")


def prototype_metrics(
    prototypes: Tensor,
    mask: Tensor,
    patches: Sequence[Hashable | None],
    anchor_similarities: Sequence[float | None],
    similarities: Tensor,
    contributions: Tensor,
    labels: Tensor,
    predicted: Tensor,
    threshold: float = 0.7,
) -> dict[str, Any]:
    """Every number of this module, as plain values for JSON.

    Args:
        prototypes, mask, similarities, contributions, labels, predicted: see the module.
        patches: C * K keys, such as (file, cell), of the patches that prototypes stand for; None where there is none.
        anchor_similarities: C * K cosines of prototypes and their patches; None where there is none.
        threshold: cosine from which on a sample counts as covered.

    Returns:
        count (the prototypes in use), then a key for each function: anchor_similarity, duplicates, diversity,
        usage_entropy, never_used, coverage and sparsity.

    Example:
        >>> prototypes, mask = torch.eye(4).view(2, 2, 4), torch.ones(2, 2, dtype=torch.bool)
        >>> similarities = torch.tensor([[[0.9, 0.1], [0.2, 0.0]], [[0.3, 0.1], [0.2, 0.8]]])
        >>> found = prototype_metrics(
        ...     prototypes, mask, ["a", "b", "a", None], [1.0, 0.5, 0.75, None], similarities, 5 * similarities,
        ...     torch.tensor([0, 1]), torch.tensor([0, 1]))
        >>> found["count"], found["anchor_similarity"], found["duplicates"], found["never_used"]
        (4, {'mean': 0.75, 'min': 0.5}, {'same_patch': 1, 'alike': 0}, 0.5)
    """
    return {
        "count": int(mask.sum()),
        "anchor_similarity": anchor_similarity(_in_use(anchor_similarities, mask)),
        "duplicates": duplicates(patches, prototypes, mask),
        "diversity": diversity(prototypes, mask),
        "usage_entropy": usage_entropy(contributions, labels, mask),
        "never_used": never_used(contributions, labels, mask),
        "coverage": coverage(similarities, labels, mask, threshold),
        "sparsity": sparsity(similarities, contributions, predicted, mask),
    }


def anchor_similarity(similarities: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and min of the cosine of prototypes and their patches, over the prototypes that stand for a patch.

    1 says that what is shown is what the model compares with. The nearer the patches, the less it changes the logits
    when they take the prototypes' place (Chen et al., ProtoPNet, 2019, theorem 2.1).

    Example:
        >>> anchor_similarity([1.0, None, 0.5])
        {'mean': 0.75, 'min': 0.5}
    """
    cosines = [float(similarity) for similarity in similarities if similarity is not None]
    if not all(map(math.isfinite, cosines)):
        raise InputError("a prototype's similarity to its patch is NaN or infinite; expected a cosine: push again")
    return {"mean": mean_of_defined(cosines), "min": min(cosines, default=None)}


def duplicates(
    patches: Sequence[Hashable | None], prototypes: Tensor, mask: Tensor, threshold: float = 0.99
) -> dict[str, int]:
    """Counts of prototypes that repeat one with a lower number; 0 is best.

    ``same_patch`` counts prototypes, of any class, that stand for the patch of another. ``alike`` counts prototypes
    whose cosine to another of their class is above ``threshold``: the partial prototype collapse of Govindarajan et
    al. (2024).

    Example:
        >>> prototypes = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
        >>> duplicates([("a.png", 3), ("b.png", 3), ("a.png", 3)], prototypes, torch.ones(1, 3, dtype=torch.bool))
        {'same_patch': 1, 'alike': 1}
    """
    unit, pairs = _units_and_pairs(prototypes, mask)
    shown = [key for key in _in_use(patches, mask) if key is not None]
    alike = (unit @ unit.transpose(1, 2) > threshold) & pairs
    return {"same_patch": len(shown) - len(set(shown)), "alike": int(alike.any(dim=2).sum())}


def diversity(prototypes: Tensor, mask: Tensor) -> dict[str, Any]:
    """How far apart the prototypes of a class are: mean over its pairs of the distance ``sqrt(2 - 2 cos)``.

    The mean dissimilarity of all pairs, which is what Smyth and McClave (2001) call the diversity of a set of cases.
    0 where all are the same, 2 for two that are opposite, sqrt(2) for orthogonal ones.

    Returns:
        mean over the classes, and per_class (C); None for a class of fewer than two.

    Example:
        >>> prototypes = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
        >>> diversity(prototypes, torch.tensor([[True, True], [True, False]]))
        {'mean': 2.0, 'per_class': [2.0, None]}
    """
    unit, pairs = _units_and_pairs(prototypes, mask)
    # of unit vectors this is sqrt(2 - 2 cos), without the loss of digits where cos is near 1
    distances = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
    per_class = [_mean(own[chosen]) for own, chosen in zip(distances, pairs, strict=True)]
    return {"mean": mean_of_defined(per_class), "per_class": per_class}


def usage_entropy(contributions: Tensor, labels: Tensor, mask: Tensor) -> float | None:
    """How evenly a class's samples are spread over its prototypes: 1 for evenly, 0 where one prototype takes all.

    With ``q_k`` the share of a class's samples in which its prototype k contributes most, ``H = -sum_k q_k ln q_k`` and
    n prototypes, the class has ``H / ln n``: Pielou's evenness (1966) of the assignment to the strongest prototype,
    whose ``exp(H)`` is the perplexity, vector quantisation's measure of how much of a codebook is used. (The entropy
    of the contributions themselves is near 1 for any model whose cosines are alike.) Equally strong prototypes share
    a sample; a sample without a positive contribution of its class counts for none. The result is the mean over classes
    of at least two prototypes.

    Example:
        >>> contributions = torch.tensor([[[2.0, 1.0]], [[0.0, 1.0]]])
        >>> usage_entropy(contributions, torch.tensor([0, 0]), torch.ones(1, 2, dtype=torch.bool))
        1.0
    """
    own = _of_class(contributions, labels, mask, unused=0.0).clamp(min=0)
    strongest = ((own == own.amax(dim=1, keepdim=True)) & (own > 0)).double()
    strongest /= strongest.sum(dim=1, keepdim=True).clamp(min=1)
    counts = strongest.new_zeros(mask.shape).index_add_(0, labels, strongest)
    evenness = [
        min(1.0, float(torch.special.entr(row / row.sum()).sum()) / math.log(n)) if n > 1 and row.any() else None
        for row, n in zip(counts, mask.sum(dim=1).tolist(), strict=True)
    ]
    return mean_of_defined(evenness)


def never_used(contributions: Tensor, labels: Tensor, mask: Tensor, top: int = 1) -> float | None:
    """The share of prototypes that are among the ``top`` strongest of their class in no sample of it; 0 is best.

    The dead codes of vector quantisation (Dhariwal et al., 2020), of the classes that occur. Equally strong prototypes
    are all among the strongest; one that contributes nothing positive is not.

    Example:
        >>> contributions = torch.tensor([[[2.0, 1.0, 0.0]], [[3.0, 1.0, 2.0]]])
        >>> never_used(contributions, torch.tensor([0, 0]), torch.tensor([[True, True, False]]))
        0.5
    """
    if top < 1:
        raise InputError(f"top is {top}; expected at least 1, the strongest prototype")
    own = _of_class(contributions, labels, mask, unused=0.0)
    last = own.topk(min(top, own.shape[1]), dim=1).values[:, -1:]
    strong = ((own >= last) & (own > 0)).double()
    ever = strong.new_zeros(mask.shape).index_add_(0, labels, strong) > 0
    used = int(mask[labels.unique()].sum())  # type: ignore[no-untyped-call]
    return 1 - int(ever.sum()) / used if used else None


def coverage(similarities: Tensor, labels: Tensor, mask: Tensor, threshold: float) -> dict[str, Any]:
    """The share of samples that are similar to a prototype of their own class, and how similar they are.

    ``share`` is that of samples with ``max_k s_k >= threshold`` over the prototypes of their class: those in the balls
    of Bien and Tibshirani (2011), who choose prototypes so that each sample lies in one of its class.
    ``mean_similarity`` is the mean of ``max_k s_k``.

    Returns:
        share and mean_similarity, means over the classes, and per_class (C) with the same two; None for a class
        without samples or prototypes.

    Example:
        >>> similarities = torch.tensor([[[0.9, 0.2]], [[0.1, 0.5]]])
        >>> coverage(similarities, torch.tensor([0, 0]), torch.ones(1, 2, dtype=torch.bool), 0.7)["share"]
        0.5
    """
    best = _of_class(similarities, labels, mask, unused=-math.inf).amax(dim=1)
    per_class: list[dict[str, float | None] | None] = []
    for c, used in enumerate(mask):
        own = best[labels == c]
        row = {"share": _mean(own >= threshold), "mean_similarity": _mean(own)}
        per_class.append(row if len(own) and bool(used.any()) else None)
    known = [row for row in per_class if row is not None]
    means = {key: mean_of_defined([row[key] for row in known]) for key in ("share", "mean_similarity")}
    return {**means, "per_class": per_class}


def sparsity(
    similarities: Tensor,
    contributions: Tensor,
    predicted: Tensor,
    mask: Tensor,
    share: float = 0.9,
    relevant: float = 1e-3,
) -> dict[str, Any]:
    """How many prototypes there are to know, and how many make a decision; small is best.

    After PIP-Net (Nauta et al., 2023), which counts what exceeds 0.001:

    - ``global_size``: prototypes whose weight does. A weight is what a similarity of 1 contributes, here the
      slope of contributions over similarities, ``|sum_n c s| / sum_n s^2``; it is exact for a linear head;
    - ``relevant_predicted``: prototypes whose contribution to the predicted class does, mean over samples;
    - ``relevant_overall``: the same over all classes.

    As weights of a softplus and cosines of a patch are never 0, these are close to all there are. So:

    - ``local_size``: the smallest number of prototypes that make up ``share`` (to a millionth) of the predicted class's
      positive contributions, mean over samples; 0 for a sample that has none;
    - ``local_size_median``, ``local_size_p95``: the number that suffices in half and in 95 % of the samples.

    Example:
        >>> contributions = torch.tensor([[[8.0, 1.5, 0.5], [-1.0, 0.0, 0.0]]])
        >>> mask = torch.tensor([[True, True, True], [True, True, False]])
        >>> sparsity(contributions / 10, contributions, torch.tensor([0]), mask)
        {'global_size': 4, 'local_size': 2.0, 'local_size_median': 2, 'local_size_p95': 2, 'relevant_predicted': 3.0,
         'relevant_overall': 3.0}
    """
    _check(similarities, predicted, mask)
    own = _of_class(contributions, predicted, mask, unused=0.0).clamp(min=0)
    every, cosines = (values.double().masked_fill(~mask, 0) for values in (contributions, similarities))
    weights = (every * cosines).sum(dim=0).abs() / cosines.square().sum(dim=0)
    made_up = own.sort(dim=1, descending=True).values.cumsum(dim=1)
    total = made_up[:, -1:]
    needed = ((made_up < (share - 1e-6) * total).sum(dim=1) + 1) * (total[:, 0] > 0)
    return {
        "global_size": int((weights > relevant).sum()) if len(predicted) else None,  # 0 / 0 isn't above anything
        "local_size": _mean(needed),
        "local_size_median": _suffices(needed, 50),
        "local_size_p95": _suffices(needed, 95),
        "relevant_predicted": _mean((own > relevant).sum(dim=1)),
        "relevant_overall": _mean((every > relevant).sum(dim=(1, 2))),
    }


def _in_use(listed: Sequence[T], mask: Tensor) -> list[T]:
    """What a list over slots has for those in use."""
    if len(listed) != mask.numel():
        raise InputError(f"a list of {len(listed)} for {mask.numel()} slots; expected an entry, or None, for each")
    return [entry for entry, used in zip(listed, mask.flatten().tolist(), strict=True) if used]


def _of_class(values: Tensor, classes: Tensor, mask: Tensor, unused: float) -> Tensor:
    """The values of each sample's class, float64 (N, K), with ``unused`` in slots out of use."""
    _check(values, classes, mask)
    rows = torch.arange(len(classes), device=classes.device)
    return values[rows, classes].double().masked_fill(~mask[classes], unused)


def _check(values: Tensor, classes: Tensor, mask: Tensor) -> None:
    expected = (len(classes), *mask.shape)
    if values.shape != expected:
        raise InputError(f"similarities or contributions are {tuple(values.shape)}; expected {expected}")
    if not bool(((classes >= 0) & (classes < len(mask))).all()):
        raise InputError(f"classes are {int(classes.min())} to {int(classes.max())}; expected 0 to {len(mask) - 1}")
    if broken := int((~values.isfinite() & mask).flatten(1).any(dim=1).sum()):
        raise InputError(
            f"{broken} of {len(classes)} samples have similarities or contributions that are NaN or infinite; "
            "expected numbers: search for NaN in the images and the weights"
        )


def _units_and_pairs(prototypes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The prototypes in float64, and bool (C, K, K), True at (c, i, j) for prototypes in use i > j of class c."""
    if prototypes.shape[:2] != mask.shape:
        raise InputError(f"prototypes are {tuple(prototypes.shape)}; expected {tuple(mask.shape)}, then their size")
    if not bool(prototypes[mask].isfinite().all()):
        raise InputError(
            "a prototype has NaN or infinite numbers; expected unit vectors: search for NaN in the weights"
        )
    return prototypes.double(), (mask.unsqueeze(2) & mask.unsqueeze(1)).tril(diagonal=-1)


def _suffices(sizes: Tensor, percent: int) -> int | None:
    """The smallest of whole numbers (N,) that so many per cent of them do not exceed."""
    return int(sizes.sort().values[-(-percent * len(sizes) // 100) - 1]) if len(sizes) else None


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if values.numel() else None
