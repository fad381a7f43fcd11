"""The last step of a run: similarities are fixed, and what they count for is fitted to them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from protopush.head_optimal import HeadOptimal

FITTED = {"biases": ("bias",), "connections": ("bias", "log_temperature", "connections")}


def refit(
    head: HeadOptimal,
    similarities: Tensor,
    labels: Tensor,
    class_weights: Tensor | None,
    what: str = "biases",
    steps: int = 100,
    lr: float = 0.02,
    decay: float = 0.1,
) -> None:
    """Fit biases, or all of the head but its prototypes, to fixed similarities, full batch.

    A hard push keeps the ranking of a class's images but shifts its similarities, so that the biases are off. On
    HAM10000 a fit of the biases alone, held near where they were, mended that; connections and temperature, fitted as
    well, made the model more sure than it should be.

    Args:
        head: is changed in place.
        similarities: (N, num_classes, K) of the training images, from the pushed model in eval mode.
        labels: (N,).
        class_weights: (num_classes,) of the cross-entropy, or None.
        what: a key of :data:`FITTED`.
        steps, lr: of Adam.
        decay: weight of the squared distance of what is fitted to where it starts.

    Example:
        >>> head = HeadOptimal(4, num_classes=2, num_prototypes=1)
        >>> similarities = torch.tensor([[[0.9], [0.8]], [[0.5], [0.4]]])  # class 0 is nearer, whatever the label
        >>> refit(head, similarities, torch.tensor([1, 1]), None)
        >>> bool(head.bias[1] > head.bias[0])
        True
    """
    fitted = [getattr(head, name) for name in FITTED[what]]
    start = [parameter.detach().clone() for parameter in fitted]
    with torch.enable_grad():
        optimizer = torch.optim.Adam(fitted, lr=lr)
        for _ in range(steps):
            logits = (similarities * head.weights()).sum(-1) + head.bias
            moved = torch.stack([(now - before).square().sum() for now, before in zip(fitted, start, strict=True)])
            loss = F.cross_entropy(logits, labels, class_weights) + decay * moved.sum()
            head.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    head.zero_grad()
