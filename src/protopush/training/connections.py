"""Training of the class connections, the last step of a run: similarities are fixed, what they count for is fitted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from protopush.head_optimal import HeadOptimal


def fit_connections(
    head: HeadOptimal,
    similarities: Tensor,
    labels: Tensor,
    class_weights: Tensor | None,
    score: Callable[[], float],
    steps: int = 200,
    lr: float = 0.02,
    decay: float = 0.01,
    every: int = 10,
) -> int:
    """Fit connections, temperature and biases to fixed similarities, full batch; keep the best step on validation.

    A hard push keeps the ranking of a class's images but shifts its similarities, so that biases are off; refitting few
    numbers, held near where they were, mends that without learning the training images by heart.

    Args:
        head: is changed in place.
        similarities: (N, num_classes, K) of the training images, from the pushed model in eval mode.
        labels: (N,).
        class_weights: (num_classes,) of the cross-entropy, or None.
        score: the validation score of the head as it is, larger is better.
        steps, lr: of Adam.
        decay: weight of the squared distance of connections to where they start.
        every: steps between two looks at the score.

    Returns:
        The step that was kept; 0 where fitting didn't help.
    """
    fitted = [head.connections, head.log_temperature, head.bias]
    start = [parameter.detach().clone() for parameter in fitted]
    best, best_step, best_state = score(), 0, start
    with torch.enable_grad():
        optimizer = torch.optim.Adam(fitted, lr=lr)
        for step in range(1, steps + 1):
            logits = (similarities * head.weights()).sum(-1) + head.bias
            stay = (head.connections - start[0]).square().sum()
            loss = F.cross_entropy(logits, labels, class_weights) + decay * stay
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step % every == 0 or step == steps:
                found = score()
                if found > best:
                    best, best_step, best_state = found, step, [p.detach().clone() for p in fitted]
    with torch.no_grad():
        for parameter, value in zip(fitted, best_state, strict=True):
            parameter.copy_(value)
            parameter.grad = None
    return best_step
