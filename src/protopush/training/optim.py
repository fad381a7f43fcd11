"""How fast to learn; when to push is told by :class:`protopush.PushSchedule`.

What learns how fast.

A moving average of a model's weights, which often does better than the last step's (Polyak and Juditsky, 1992).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from protopush._compat import ensure_torchvision
from protopush.training.config import TrainConfig


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Linear rise over ``warmup`` steps, then a cosine from 1 to 0 (Loshchilov and Hutter, 2017).

    Example:
        >>> [round(learning_rate_factor(step, total=6, warmup=2), 2) for step in range(6)]
        [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


PROTOTYPES = "prototypes"
CONNECTIONS = ("connections", "log_temperature", "bias")  # of the head itself, not of its projection


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors, prototypes and connections don't; each part has its own learning rate.

    Args:
        model: with ``head`` and, where it is trained, ``backbone``.
        config: the rates.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for group in _backbone_groups(model, config):
        groups[config.backbone_lr * group["lr_scale"], group["weight_decay"]] += group["params"]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("backbone."):
            rate = _head_rate(name.removeprefix("head."), config)
            plain = parameter.ndim < 2 or name.endswith((PROTOTYPES, "connections"))
            groups[rate, 0.0 if plain else config.weight_decay].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ]
    )


def _backbone_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """The backbone's parameters by layer, each with its share of the learning rate (timm, as in BEiT)."""
    backbone: Any = getattr(model, "backbone", nn.Identity())
    backbone = getattr(backbone, "model", backbone)
    ensure_torchvision()
    from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

    groups, grouped = [], set[nn.Parameter]()
    for part in _layered(backbone):
        exempt = part.no_weight_decay() if hasattr(part, "no_weight_decay") else ()
        groups += param_groups_layer_decay(part, config.weight_decay, exempt, layer_decay=config.layer_decay)
        grouped.update(part.parameters())
    for parameter in backbone.parameters():  # what joins the parts of a fusion
        if parameter.requires_grad and parameter not in grouped:
            decay = 0.0 if parameter.ndim < 2 else config.weight_decay
            groups.append({"params": [parameter], "lr_scale": 1.0, "weight_decay": decay})
    return groups


def _layered(backbone: nn.Module) -> list[Any]:
    """The models whose layers have an order: the parts of a fusion, else the backbone itself."""
    found: dict[str, nn.Module] = {}
    for name, module in backbone.named_modules():
        inside = any(name.startswith(f"{outer}.") or not outer for outer in found)
        if hasattr(module, "group_matcher") and not inside:
            found[name] = module
    layered = list(found.values()) or [backbone]
    return [part for part in layered if any(parameter.requires_grad for parameter in part.parameters())]


def _head_rate(name: str, config: TrainConfig) -> float:
    special = dict.fromkeys(CONNECTIONS, config.connection_lr).get(name)
    if name.endswith(PROTOTYPES):
        special = config.prototype_lr
    return config.lr if special is None else special


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group learns at this share of its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


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
