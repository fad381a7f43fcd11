"""A moving average of a model's weights, which often does better than the last step's (Polyak and Juditsky, 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """The average of a model's parameters and of its norms' statistics.

    Its decay rises from 0.1 to the one asked for, so that it soon forgets the first, random weights.

    Args:
        model: is followed from step to step.
        decay: what is left of the average after a step; 0.999 looks back about a thousand steps.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> ema = Ema(model, decay=0.5)
        >>> _ = nn.init.zeros_(model.weight)
        >>> ema.update()
        >>> with ema.applied():
        ...     print(round(model.weight.item(), 3))
        0.1
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.now = dict([*model.named_parameters(), *model.named_buffers()])
        self.average = {name: value.detach().clone() for name, value in self.now.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of a step; what can't be averaged (counts, masks) is taken as it is."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        averaged = [name for name, value in self.now.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.average[name] for name in averaged], [self.now[name].detach() for name in averaged], 1.0 - decay
        )
        for name in self.now.keys() - set(averaged):
            self.average[name].copy_(self.now[name])

    @torch.no_grad()
    def take(self, module: nn.Module) -> None:
        """Take a part of the model as it is now, because it was moved at once and not by a step: the prototypes."""
        for value in (*module.parameters(), *module.buffers()):
            name = next(name for name, own in self.now.items() if own is value)
            self.average[name].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the average."""
        with torch.no_grad():
            stepped = {name: value.detach().clone() for name, value in self.now.items()}
            self._write(self.average)
        try:
            yield
        finally:
            self._write(stepped)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.now.items():
            value.copy_(values[name])

    def state_dict(self) -> dict[str, object]:
        """Plain tensors and numbers."""
        return {"steps": self.steps, "average": dict(self.average)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """The inverse."""
        self.steps = int(state["steps"])  # type: ignore[call-overload]
        for name, value in state["average"].items():  # type: ignore[attr-defined]
            self.average[name].copy_(value)
