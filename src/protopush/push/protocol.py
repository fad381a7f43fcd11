"""The contract: what a push needs of a model, and what it reads of a dataset before an image is opened."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from protopush.data.dataset import Provenance
from protopush.errors import InputError, listing


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
        """x_fu (B, 1, C), the pooled features, and x_fu1 (B, L, C), the patches."""


def unwrap(model: nn.Module) -> Pushable:
    """The module behind DDP and Fabric wrappers.

    Raises:
        InputError: it lacks a part of the contract.
    """
    net: Any = model
    while missing := _missing(net):
        if not isinstance(getattr(net, "module", None), nn.Module):
            raise InputError(
                f"{type(net).__name__} has no {', no '.join(missing)}; "
                "the push needs extract_features(images) -> (x_fu, x_fu1), head.proj and head.proto_manager"
            )
        net = net.module
    return cast(Pushable, net)


def _missing(net: Any) -> list[str]:
    head = getattr(net, "head", None)
    parts = [] if hasattr(net, "extract_features") else ["extract_features"]
    return parts + [f"head.{name}" for name in ("proj", "proto_manager") if not hasattr(head, name)]


def live_features_of(net: Pushable) -> Tensor | None:
    """The features (S, C) of live anchors, which the prototypes are computed from; None where they are parameters."""
    found: Tensor | None = getattr(net.head.proto_manager, "anchor_features", None)
    return found


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
        used = (rows >= 0) & valid[rows.clamp(min=0)]
        if only is not None:
            chosen = torch.zeros_like(used)
            for c, k in only:
                if not (0 <= c < used.shape[0] and 0 <= k < used.shape[1] and bool(used[c, k])):
                    raise InputError(
                        f"there is no prototype {c}:{k} in use; expected class:prototype, classes 0 to "
                        f"{used.shape[0] - 1}, prototypes 0 to {used.shape[1] - 1}"
                    )
                chosen[c, k] = True
            used = chosen
        rows, used = rows.to(parameter.device), used.to(parameter.device)
        vectors = parameter[rows.clamp(min=0)].to(exact_dtype(parameter.device))
        if not bool(vectors[used].isfinite().all()):
            raise InputError("the prototypes hold NaN or infinite values; expected finite ones; nothing was changed")
        return cls(rows, used, F.normalize(vectors, dim=-1))


def resizable(model: nn.Module, device: str | int | torch.device, purpose: str) -> tuple[Pushable, Slots]:
    """The module behind its wrappers, and its prototypes as they are now.

    Raises:
        InputError: the model is on another device, or its prototypes can neither come nor go.
    """
    net = unwrap(model)
    resolve_device(net, device)
    manager = net.head.proto_manager
    if not isinstance(getattr(manager, "valid_mask", None), Tensor):
        raise InputError(
            f"{type(manager).__name__} has no valid_mask, so that its prototypes cannot {purpose}; expected a bool "
            "tensor of the slots in use, as protopush.PrototypeManager has"
        )
    if live_features_of(net) is not None:
        net.head.sync_prototypes()  # type: ignore[attr-defined]
    return net, Slots.of(manager)


def connections_of(net: Pushable, slots: Slots) -> Tensor | None:
    """The head's weight of each prototype, (C, K), where it has such a parameter beside ``weights()``."""
    found = getattr(net.head, "connections", None)
    is_one = isinstance(found, Tensor) and found.shape == slots.rows.shape and hasattr(type(net.head), "weights")
    return found if is_one else None


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that have no float64 (Apple's)."""
    return torch.float32 if device.type == "mps" else torch.float64


# Of a batch that is a dict: the images, the labels, the ids.
KEYS = (
    ("image", "images", "img", "pixel_values"),
    ("label", "labels", "target", "targets"),
    ("id", "ids", "index", "indices"),
)


def unpack(batch: Any) -> tuple[Any, Any, Any]:
    """Images, labels and ids (None: there are none) of a batch, or of an item: a tuple, or a dict with :data:`KEYS`.

    Raises:
        InputError: it is neither; its keys are named.
    """
    if isinstance(batch, Mapping):
        image, label, number = (next((key for key in keys if key in batch), None) for keys in KEYS)
        if image is None or label is None:
            expected = " and one of ".join(", ".join(keys) for keys in KEYS[:2])
            raise InputError(
                f"the loader yields a dict with {listing(list(batch))}; expected one of {expected}, or (images, labels)"
            )
        return batch[image], batch[label], None if number is None else batch[number]
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise InputError(
            f"the loader yields {type(batch).__name__}; expected (images, labels), (images, labels, ids) or a dict"
        )
    images, labels, *ids = batch
    return images, labels, ids[0] if ids else None


class Items(Dataset[tuple[Any, int]]):
    """A dataset whose items carry their index, read without augmentation, behind Subset and ConcatDataset.

    Args:
        dataset: with ``len`` and ``[]``. Used where it has them: ``eval_view()``, the dataset without augmentation;
            ``describe(index)``, a :class:`protopush.data.dataset.Provenance`; ``labels`` and ``groups``, one an item.

    Attributes:
        parts: the datasets that items are read from.
        where: int64 (N, 3), the part of each item, its index there, and its name: an index as well.
        deterministic: whether each part gives the same item twice.
    """

    def __init__(self, dataset: Any) -> None:
        self.parts, self.where, self.deterministic = _behind(dataset, False)
        self.where[:, 2] = torch.where(self.where[:, 2] < 0, torch.arange(len(self.where)), self.where[:, 2])

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        part, place, _ = self.where[index].tolist()
        return self.parts[part][place], index

    def layout(self) -> Any:
        """Equal where the items are: what ranks compare."""
        kinds = tuple((type(part).__name__, len(part)) for part in self.parts)
        return kinds, hashlib.sha256(self.where.numpy().tobytes()).hexdigest()

    def labels(self) -> Tensor | None:
        """The label of every item, int64 (N,), where it is known without reading an image."""
        of_parts = [_labels_of(part) for part in self.parts]
        labels = torch.zeros(len(self.where), dtype=torch.int64)
        for number, found in enumerate(of_parts):
            if found is None:
                return None
            here = self.where[:, 0] == number
            labels[here] = found.cpu()[self.where[here, 1]]
        return labels

    def groups(self) -> Tensor | None:
        """A number, int64 (N,), for the group (lesion, patient) of every item, another for each item without one.

        None where not all parts have ``groups``, or no item has one.
        """
        of_parts = [getattr(part, "groups", None) for part in self.parts]
        if any(found is None for found in of_parts):
            return None
        groups = [of_parts[part][place] for part, place, _ in self.where.tolist()]
        names = sorted({str(group) for group in groups if group is not None})
        if not names:
            return None
        number = {name: place for place, name in enumerate(names)}
        return torch.tensor([len(names) + i if one is None else number[str(one)] for i, one in enumerate(groups)])

    def describe(self, index: int) -> Provenance:
        """Where an item comes from: as its dataset says, else its third element or its index as the name."""
        number, place, name = self.where[index].tolist()
        part = self.parts[number]
        if hasattr(part, "describe"):
            found: Provenance = part.describe(place)
            return found
        if isinstance(part, TensorDataset) and len(part.tensors) < 3:
            return Provenance(name)  # no third element that could be a name
        files = getattr(part, "imgs", None)  # torchvision's ImageFolder
        item = part[place]
        third = unpack(item)[2] if isinstance(item, Mapping) else item[2] if len(item) > 2 else name
        known = third if isinstance(third, str) else int(third) if isinstance(third, (int, Tensor)) else name
        return Provenance(known, file=None if files is None else str(files[place][0]))


def _behind(dataset: Any, sure: bool) -> tuple[list[Any], Tensor, bool]:
    """``parts``, ``where`` and ``deterministic`` of :class:`Items`; a name of -1 is the index in the whole.

    It is ``sure`` that parts of an ``eval_view()`` give the same item twice.
    """
    if not sure and hasattr(dataset, "eval_view"):
        return _behind(dataset.eval_view(), True)
    if isinstance(dataset, Subset):
        parts, where, same = _behind(dataset.dataset, sure)
        where[:, 2] = torch.where(where[:, 2] < 0, torch.arange(len(where)), where[:, 2])
        return parts, where[torch.as_tensor(list(dataset.indices), dtype=torch.int64)], same
    if isinstance(dataset, ConcatDataset):
        found, wheres, sames = list[Any](), list[Tensor](), list[bool]()
        for one in dataset.datasets:
            parts, where, same = _behind(one, sure)
            wheres.append(where + torch.tensor([len(found), 0, 0]))
            found += parts
            sames.append(same)
        return found, torch.cat(wheres), all(sames)
    count = len(dataset)
    where = torch.stack([torch.zeros(count, dtype=torch.int64), torch.arange(count), torch.full((count,), -1)], dim=1)
    return [dataset], where, sure or isinstance(dataset, TensorDataset) or _gives_the_same_twice(dataset)


def _gives_the_same_twice(dataset: Any, tries: int = 8) -> bool:
    """Read a few items twice with different random states; augmentation shows as a difference."""
    for index in range(min(tries, len(dataset))):
        torch.manual_seed(index)
        first = _image_of(dataset[index])
        torch.manual_seed(index + tries)
        if not torch.equal(torch.as_tensor(first), torch.as_tensor(_image_of(dataset[index]))):
            return False
    return True


def _image_of(item: Any) -> Any:
    return unpack(item)[0] if isinstance(item, Mapping) else item[0]


def _labels_of(dataset: Any) -> Tensor | None:
    if isinstance(dataset, TensorDataset):
        labels = dataset.tensors[1] if len(dataset.tensors) > 1 else torch.empty(0, 0)
        return labels.long() if labels.ndim == 1 and not labels.is_floating_point() else None
    # Our protocol; others' attributes of this name may mean more.
    has = hasattr(dataset, "describe") and hasattr(dataset, "labels")
    return torch.as_tensor(dataset.labels, dtype=torch.int64) if has else None
