"""What learns how fast."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from protopush._compat import ensure_torchvision
from protopush.training.config import TrainConfig

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
