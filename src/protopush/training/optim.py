"""Optimizer, parameter groups, learning rate, and the moving average of the weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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

    The model has a ``head`` and, where it is trained, a ``backbone``.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for group in _backbone_groups(model, config):
        groups[config.backbone_lr * group["lr_scale"], group["weight_decay"]] += group["params"]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("backbone."):
            rate = config.connection_lr if name.removeprefix("head.") in CONNECTIONS else None
            if name.endswith(PROTOTYPES):
                rate = config.prototype_lr
            rate = config.lr if rate is None else rate
            plain = parameter.ndim < 2 or name.endswith((PROTOTYPES, "connections"))
            groups[rate, 0.0 if plain else config.weight_decay].append(parameter)
    options = [
        {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
    return torch.optim.AdamW(options)


def _backbone_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """The backbone's parameters by layer, each with its share of the learning rate (timm, as in BEiT)."""
    backbone: Any = getattr(model, "backbone", nn.Identity())
    backbone = getattr(backbone, "model", backbone)
    ensure_torchvision()
    from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

    layered: dict[
        str, Any
    ] = {}  # the models whose layers have an order: the parts of a fusion, else the backbone itself
    for name, module in backbone.named_modules():
        inside = any(name.startswith(f"{outer}.") or not outer for outer in layered)
        if hasattr(module, "group_matcher") and not inside:
            layered[name] = module
    groups, grouped = [], set[nn.Parameter]()
    for part in layered.values() or [backbone]:
        if not any(parameter.requires_grad for parameter in part.parameters()):
            continue
        exempt = part.no_weight_decay() if hasattr(part, "no_weight_decay") else ()
        groups += param_groups_layer_decay(part, config.weight_decay, exempt, layer_decay=config.layer_decay)
        grouped.update(part.parameters())
    for parameter in backbone.parameters():  # what joins the parts of a fusion
        if parameter.requires_grad and parameter not in grouped:
            decay = 0.0 if parameter.ndim < 2 else config.weight_decay
            groups.append({"params": [parameter], "lr_scale": 1.0, "weight_decay": decay})
    return groups


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group learns at this share of its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


class Ema:
    """The moving average of a model's parameters and buffers, which often does better than the last step's weights.

    (Polyak and Juditsky, 1992.) Its decay rises from 0.1 to the one asked for, so that it soon forgets the first,
    random weights. What can't be averaged (counts, masks) is taken as it is. ``decay`` is what is left of the average
    after a step; 0.999 goes back about a thousand steps.

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
        self.model = model
        self.decay = decay
        self.averaged = AveragedModel(model, multi_avg_fn=self._average, use_buffers=True)  # has the state to be saved
        self.update()  # the first only copies

    def update(self) -> None:
        """Take in the weights of a step."""
        self.averaged.update_parameters(self.model)

    def _average(self, averages: Any, values: Any, _: Tensor | int) -> None:
        """Tensors of one type; ``n_averaged`` is read where it is, on the CPU, which doesn't wait for a GPU."""
        steps = int(self.averaged.n_averaged)
        if averages[0].is_floating_point():
            average = get_ema_multi_avg_fn(min(self.decay, steps / (9 + steps)))  # type: ignore[no-untyped-call]
            average(averages, values, steps)
        else:
            _copy(averages, values)

    def take(self, *parts: nn.Module | nn.Parameter) -> None:
        """Take parts of the model as they are now, because a push moved them at once and not by a step."""
        moved = {id(value) for part in parts for value in ([part] if isinstance(part, Tensor) else _values(part))}
        pairs = zip(_values(self.averaged.module), _values(self.model), strict=True)
        for average, value in pairs:
            if id(value) in moved:
                _copy([average], [value])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the average."""
        now = _values(self.model)
        stepped = [value.detach().clone() for value in now]
        _copy(now, _values(self.averaged.module))
        try:
            yield
        finally:
            _copy(now, stepped)


def _values(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.detach().copy_(source.detach())
