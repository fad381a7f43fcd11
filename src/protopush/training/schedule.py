"""When to push, and how fast to learn."""

from __future__ import annotations

import math


def push_due(epoch: int, start_epoch: int = 10, interval: int = 5, rate: float = 1.0, final_decay: float = 0.0) -> bool:
    """Whether a push follows an epoch, counted from 0.

    Args:
        epoch: the one that has ended.
        start_epoch: the first epoch, counted from 1, with a push.
        interval: epochs between two pushes.
        rate: the learning rate's share of its peak as the epoch ends.
        final_decay: below this share there is no push any more.

    Example:
        >>> [epoch + 1 for epoch in range(30) if push_due(epoch)]
        [10, 15, 20, 25, 30]
    """
    return (epoch + 1) >= start_epoch and (epoch + 1) % interval == 0 and rate >= final_decay


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Linear rise over ``warmup`` steps, then a cosine from 1 to 0 (Loshchilov and Hutter, 2017).

    Example:
        >>> [round(learning_rate_factor(step, total=6, warmup=2), 2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
