"""What a push needs of a model: the contract, and the prototypes laid out class by class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protopush.errors import InputError


class PrototypeOwner(Protocol):
    """``head.proto_manager``; ``valid_mask`` (S,) and ``anchors`` are used where it has them."""

    prototypes: nn.Parameter

    def get_prototype_indices(self) -> list[tuple[int, int]]:
        """(start, end) of the rows of each class."""


class PushableHead(Protocol):
    """``head``: ``proj`` maps (..., C) to (..., D)."""

    proto_manager: PrototypeOwner

    def proj(self, features: Tensor) -> Tensor:
        """Features (B, L, C) in the embedding space (B, L, D), not normalised."""


class Pushable(Protocol):
    """The module itself."""

    head: PushableHead

    def extract_features(self, images: Any) -> tuple[Tensor, Tensor]:
        """x_fu (B, 1, C) and x_fu1 (B, L, C)."""


def unwrap(model: nn.Module) -> Pushable:
    """The module behind DDP and Fabric wrappers.

    Raises:
        InputError: it lacks a part of the contract.
    """
    net: Any = model
    while _missing(net) and isinstance(getattr(net, "module", None), nn.Module):
        net = net.module
    missing = _missing(net)
    if missing:
        raise InputError(
            f"{type(net).__name__} has no {', no '.join(missing)}; "
            "the push needs extract_features(images) -> (x_fu, x_fu1), head.proj and head.proto_manager"
        )
    return cast(Pushable, net)


def _missing(net: Any) -> list[str]:
    head = getattr(net, "head", None)
    there = {
        "extract_features": hasattr(net, "extract_features"),
        "head.proj": hasattr(head, "proj"),
        "head.proto_manager": hasattr(head, "proto_manager"),
    }
    return [part for part, has in there.items() if not has]


def class_names_of(net: Pushable, count: int) -> list[str]:
    """The model's own names of its classes, where it has as many."""
    names = [str(name) for name in getattr(net, "class_names", None) or []]
    return names if len(names) == count else []


def resolve_device(net: Pushable, device: str | int | torch.device) -> torch.device:
    """The device of the prototypes, which must be the one asked for."""
    asked, there = torch.device(device), net.head.proto_manager.prototypes.device
    if there.type != asked.type or (asked.index is not None and there.index not in (None, asked.index)):
        raise InputError(f"the model is on {there} but the push is asked for on {asked}; move the model there first")
    return there


class Slots(NamedTuple):
    """The prototypes class by class; K is the widest class.

    Attributes:
        rows: int64 (C, K), the rows of the parameter; -1 where a class has fewer.
        used: bool (C, K).
        unit: (C, K, D), unit norm, in :func:`exact_dtype`.
    """

    rows: Tensor
    used: Tensor
    unit: Tensor

    @classmethod
    def of(cls, manager: PrototypeOwner, only: Iterable[tuple[int, int]] | None = None) -> Slots:
        """Lay out a manager's prototypes; with ``only`` (class, prototype) in use, as if there were no others.

        Raises:
            InputError: a prototype in use isn't finite, or one of ``only`` isn't there.
        """
        parameter = manager.prototypes.detach()
        ranges = manager.get_prototype_indices()
        mask = getattr(manager, "valid_mask", None)
        valid = torch.ones(len(parameter), dtype=torch.bool) if mask is None else mask.detach().flatten().bool().cpu()
        rows = torch.full((len(ranges), max(end - start for start, end in ranges)), -1)
        for number, (start, end) in enumerate(ranges):
            rows[number, : end - start] = torch.arange(start, end)
        used = ((rows >= 0) & valid[rows.clamp(min=0)]).to(parameter.device)
        rows = rows.to(parameter.device)
        if only is not None:
            used = _only(used, only)
        vectors = parameter[rows.clamp(min=0)].to(exact_dtype(parameter.device))
        if not bool(vectors[used].isfinite().all()):
            raise InputError("the prototypes hold NaN or infinite values; expected finite ones; nothing was changed")
        return cls(rows, used, F.normalize(vectors, dim=-1))


def _only(used: Tensor, only: Iterable[tuple[int, int]]) -> Tensor:
    chosen = torch.zeros_like(used)
    for c, k in only:
        if not (0 <= c < used.shape[0] and 0 <= k < used.shape[1] and bool(used[c, k])):
            raise InputError(
                f"there is no prototype {c}:{k} in use; expected class:prototype, classes 0 to {used.shape[0] - 1}, "
                f"prototypes 0 to {used.shape[1] - 1}"
            )
        chosen[c, k] = True
    return chosen


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have no float64 (Apple's)."""
    return torch.float32 if device.type == "mps" else torch.float64
