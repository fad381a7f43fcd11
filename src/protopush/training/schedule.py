"""How fast to learn; when to push is told by :class:`protopush.schedule.PushSchedule`."""

from __future__ import annotations

import math


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Linear rise over ``warmup`` steps, then a cosine from 1 to 0 (Loshchilov and Hutter, 2017).

    Example:
        >>> [round(learning_rate_factor(step, total=6, warmup=2), 2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
