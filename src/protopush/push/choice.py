"""Choice of the prototypes that stay, so that an explanation is short: those that the loss would miss most."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TIE = 1e-9  # of the loss: what differs by rounding alone is missed alike


class Choice(NamedTuple):
    """What stays.

    Attributes:
        kept: bool (C, K).
        bias: (C,), with which the mean logit of each class is what it was.
        loss_before, loss_after: cross-entropy of the images.
    """

    kept: Tensor
    bias: Tensor
    loss_before: float
    loss_after: float


def most_per_class(labels: Tensor, num_classes: int, rows: int) -> Tensor:
    """The most prototypes of each class (C,), so that half of the explanations have few rows and none more than twice.

    ``rows`` for the commonest classes, until they make up three quarters of the images: half would not do, as a model
    that is trained for a balanced prior answers common classes less often than they occur.

    Args:
        labels: (N,).
        num_classes: C.
        rows: of an explanation, one for each prototype of the class.

    Example:
        >>> most_per_class(torch.tensor([1, 1, 1, 1, 2, 2, 0]), num_classes=4, rows=2)
        tensor([4, 2, 2, 4])
    """
    counts = torch.bincount(labels, minlength=num_classes)
    ordered = counts.sort(descending=True).values
    sooner = ordered.cumsum(0) - ordered  # images of the classes before it
    least = ordered[4 * sooner < 3 * len(labels)].min()  # classes of as many images are alike
    return torch.where(counts >= least, rows, 2 * rows)


def choose_prototypes(
    contributions: Tensor, bias: Tensor, labels: Tensor, used: Tensor, most: Tensor, class_weights: Tensor | None = None
) -> Choice:
    """Remove prototypes of the classes that have too many, one at a time, that whose removal leaves the least loss.

    A class's evidence is the mean over its prototypes: without one of them the others count for more, and the bias
    takes up the difference, so that the class's mean logit stays. In each round each class that has too many loses one;
    of equals the last slot goes. That is greedy, and nothing is fitted: training goes on with those that stay.

    It costs N * C * K multiplications a round, in float64, and N * C * K * 8 bytes.

    Args:
        contributions: (N, C, K), as :class:`protopush.nn.head.HeadOutput` has them.
        bias: (C,).
        labels: (N,).
        used: bool (C, K), the slots in use.
        most: (C,), at least 1.
        class_weights: (C,) of the cross-entropy, or None.

    Source: backward elimination (Marill and Green, 1963), on the parts of a sum.

    Example:
        >>> contributions = torch.zeros(2, 2, 3)
        >>> contributions[0, 0, 1] = contributions[1, 1, 2] = 1.0  # each class has one that knows its image
        >>> bias, used = torch.zeros(2), torch.ones(2, 3, dtype=torch.bool)
        >>> choose_prototypes(contributions, bias, torch.tensor([0, 1]), used, torch.tensor([1, 1])).kept.int().tolist()
        [[0, 1, 0], [0, 0, 1]]
    """
    kept, count, rows = used.clone(), used.sum(dim=1), torch.arange(len(labels))
    share = torch.ones(len(labels)) if class_weights is None else class_weights[labels]
    share = share.double() / share.sum(dtype=torch.float64)
    alone = contributions.double() * count.unsqueeze(1)  # of a prototype, were it the only one of its class
    start = logits = contributions.double().masked_fill(~used, 0).sum(dim=2) + bias.double()

    def loss_of(column: Tensor, c: int) -> Tensor:
        """With other logits (N, M) of a class; (M,)."""
        others = logits.index_fill(1, torch.tensor([c]), -torch.inf).logsumexp(dim=1, keepdim=True)
        own = torch.where((labels == c).unsqueeze(1), column, logits[rows, labels].unsqueeze(1))
        return share @ (torch.logaddexp(others, column) - own)

    before = float(loss_of(logits[:, :1], 0))
    while bool((over := kept.sum(dim=1) > most).any()):
        for c in over.nonzero().flatten().tolist():
            slots = kept[c].nonzero().flatten()
            of_class = alone[:, c, slots]
            without = (of_class.sum(dim=1, keepdim=True) - of_class) / (len(slots) - 1)
            without += share @ (start[:, c : c + 1] - without)
            losses = loss_of(without, c)
            gone = int((losses <= losses.min() + TIE).nonzero()[-1])
            kept[c, slots[gone]] = False
            logits = logits.index_copy(1, torch.tensor([c]), without[:, gone : gone + 1])
    mean = alone.masked_fill(~kept, 0).sum(dim=2) / kept.sum(dim=1).clamp(min=1)
    return Choice(kept, share @ (logits - mean), before, float(loss_of(logits[:, :1], 0)))
