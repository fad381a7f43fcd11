"""Biases and a temperature fitted on validation images for a stated prior, held back where there are few images.

The strength of that pull is chosen by cross-fitting: each image is judged by a fit that has not seen its group, and the
strongest pull within one standard error of the best is taken (Breiman et al., 1984), so that a gain which may be luck
moves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FOLDS = 5
# How far a bias, or the log of the temperature, may be expected to move: 0 leaves them as they were.
SPREADS = (0.0, 0.1, 0.2, 0.4, 0.8)


class PriorFit(NamedTuple):
    """What was fitted, and how it does on images that a fit has not seen.

    Attributes:
        scale: of the contributions; 1 / temperature.
        biases: (C,).
        spread: of :data:`SPREADS`; 0: the biases were moved to the prior, and nothing was fitted.
        log_loss: for the prior, of each of :data:`SPREADS`, cross-fitted.
        probabilities: (N, C), cross-fitted with ``spread``.
    """

    scale: float
    biases: Tensor
    spread: float
    log_loss: list[float]
    probabilities: Tensor


def fit_prior(
    evidence: Tensor, biases: Tensor, labels: Tensor, groups: Sequence[str | None], assumed: Sequence[float],
    prior: Sequence[float], seed: int = 0,
) -> PriorFit:  # fmt: skip
    """Move biases from the prior that they assume to another one, and fit them and a temperature around that place.

    The fit is the least weighted log loss, in which a class counts by its share of the prior, however many images it
    has. A bias is pulled to where it was moved to, with the weight of one over its number of images, so that a class of
    six moves less than one of six hundred. A class without an image stays where it is, and the others are fitted
    among themselves.

    Args:
        evidence: (N, C), the sums of the contributions of N validation images.
        biases: (C,), as trained.
        labels: (N,).
        groups: N names of what images show; images of a group are fitted or judged together.
        assumed: the prior of ``evidence + biases``.
        prior: the stated one.
        seed: of the folds.

    Source: Platt, 1999, for fits of trained scores, here with a bias for each class; Saerens et al., 2002, for the
    prior.

    Example:
        >>> evidence, labels = torch.zeros(40, 2), torch.tensor([0, 1] * 20)  # it says nothing: biases are to be equal
        >>> found = fit_prior(evidence, torch.tensor([1.0, 0.0]), labels, [None] * 40, [0.5, 0.5], [0.5, 0.5])
        >>> bool(0 < found.biases[0] - found.biases[1] < 0.5), found.spread
        (True, 0.8)
    """
    wanted = torch.tensor(prior, dtype=torch.float64).log()
    start = biases.detach().cpu().double() - torch.tensor(assumed, dtype=torch.float64).log()
    scores, labels = evidence.detach().cpu().double() + start, labels.cpu()
    folds = stratified_folds(labels, groups, FOLDS, seed)
    weights, known = _weights(labels, wanted.exp()), torch.bincount(labels, minlength=len(wanted)) > 0
    surprises, logits = [], []
    for spread in SPREADS:
        held_out = torch.empty_like(scores)
        for fold in range(FOLDS):
            here = folds == fold
            scale, offsets = _fit(scores[~here], labels[~here], wanted, spread)
            held_out[here] = scale * scores[here] + wanted + offsets
        logits.append(held_out)
        surprises.append(_surprise(held_out, labels, known))
    losses = [float(weights @ surprise) for surprise in surprises]
    least = surprises[losses.index(min(losses))]
    gaps = [(float(weights @ (one - least)), _standard_error(one - least, labels, weights)) for one in surprises]
    chosen = next(place for place, (gap, error) in enumerate(gaps) if gap <= error)  # of these the strongest pull
    scale, offsets = _fit(scores, labels, wanted, SPREADS[chosen])
    fitted = (scale * start + wanted + offsets).to(biases)
    return PriorFit(scale, fitted, SPREADS[chosen], losses, logits[chosen].softmax(dim=1).float())


def _fit(scores: Tensor, labels: Tensor, wanted: Tensor, spread: float) -> tuple[float, Tensor]:
    """The scale of the scores (N, C) and the offsets (C,) of least penalised loss."""
    counts, offsets = torch.bincount(labels, minlength=len(wanted)), torch.zeros_like(wanted)
    known = counts > 0
    if not spread or not len(labels):
        return 1.0, offsets
    shares = wanted.exp()[known] / wanted.exp()[known].sum()
    weights = _weights(labels, wanted.exp())
    pull = torch.cat([(shares**2 / counts[known]).sum().view(1), shares / counts[known]]) / spread**2
    free = torch.zeros(1 + len(shares), dtype=torch.float64, requires_grad=True)  # log scale, offsets
    places = (known.cumsum(0) - 1)[labels]
    optimizer = torch.optim.LBFGS(
        [free], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = free[0].exp() * scores[:, known] + wanted[known] + free[1:]
        value = weights @ F.cross_entropy(logits, places, reduction="none") + (pull * free.square()).sum() / 2
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    offsets[known] = free.detach()[1:]
    return float(free[0].detach().exp()), offsets


def _weights(labels: Tensor, shares: Tensor) -> Tensor:
    """What each image counts (N,), summing to 1: its class's share of the prior, divided among the class's images."""
    counts = torch.bincount(labels, minlength=len(shares))
    weights = (shares / counts.clamp(min=1))[labels]
    return weights / weights.sum()


def _surprise(logits: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """The log loss of each image (N,), among the classes that have images."""
    return F.cross_entropy(logits[:, known], (known.cumsum(0) - 1)[labels], reduction="none")


def _standard_error(values: Tensor, labels: Tensor, weights: Tensor) -> float:
    """Of a weighted mean over images of each class; the only image of a class counts as it is."""
    counts = torch.bincount(labels).double()
    means = torch.zeros_like(counts).index_add_(0, labels, values) / counts.clamp(min=1)
    deviations = torch.where(counts > 1, means, 0.0)[labels] - values
    factors = torch.where(counts > 1, counts / (counts - 1).clamp(min=1), 1.0)[labels]
    return float((weights.square() @ (deviations.square() * factors)).sqrt())


def stratified_folds(labels: Tensor, groups: Sequence[str | None], folds: int, seed: int) -> Tensor:
    """A fold for each image, (N,): a group is never divided, and each class is spread as evenly as its groups allow.

    A group counts for the class of its first image; None is a group of its own.

    Example:
        >>> stratified_folds(torch.tensor([0, 0, 0, 1]), ["a", "a", None, None], 2, seed=0).tolist()
        [0, 0, 1, 0]
    """
    units: dict[object, list[int]] = {}
    for place, group in enumerate(groups):
        units.setdefault((place,) if group is None else group, []).append(place)
    members = list(units.values())
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    order.sort(key=lambda unit: int(labels[members[unit][0]]))  # stable: random within a class
    found = torch.empty(len(labels), dtype=torch.long)
    for number, unit in enumerate(order):  # dealt on from class to class, so that no fold gets all the rare ones
        found[members[unit]] = number % folds
    return found
