"""The keyword arguments that the push methods of a model hand on, for type checkers and editors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypedDict

import torch

from protopush.push.search import Allow


class PushOptions(TypedDict, total=False):
    """See :func:`protopush.push_prototypes`."""

    seed: int
    optimizer: torch.optim.Optimizer | None
    unique: str
    interpolation: str
    prototypes: Iterable[tuple[int, int]] | None
    allow: Allow | None
    guard: str | None
    guard_budget: float
    val_loader: Iterable[Any] | None
