"""What a push does to the prototypes once their patches are known."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def momentum_update(prototypes: Tensor, nearest: Tensor, momentum: float) -> Tensor:
    """``normalise(momentum * p + (1 - momentum) * f)``, in the precision of the inputs.

    Args:
        prototypes: (..., D), unit norm.
        nearest: (..., D), unit norm: the patch of each prototype.
        momentum: 0 puts the prototype onto the patch (hard push), 1 leaves it where it is.

    Where prototype and patch cancel out (opposite, momentum 0.5), the patch is taken.

    Example:
        >>> momentum_update(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5)
        tensor([0.7071, 0.7071])
    """
    mixed = momentum * prototypes + (1.0 - momentum) * nearest
    norm = torch.linalg.vector_norm(mixed, dim=-1, keepdim=True)
    return torch.where(norm > 1e-6, F.normalize(mixed, dim=-1), nearest)


def reset_moments(optimizer: torch.optim.Optimizer, prototypes: Tensor, rows: Tensor) -> None:
    """Zero the optimiser's running moments of the pushed rows: they speak of where the prototypes were.

    Args:
        optimizer: any optimiser that keeps state tensors of the parameter's shape (SGD, Adam, AdamW, ...).
        prototypes: the parameter (S, D).
        rows: int64, the rows that a push moved.
    """
    for value in optimizer.state.get(prototypes, {}).values():
        if isinstance(value, Tensor) and value.shape == prototypes.shape:
            value[rows.to(value.device)] = 0
