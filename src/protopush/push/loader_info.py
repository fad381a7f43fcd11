"""What a dataset can say of itself before it is read: order, labels, groups, names, and how to read it unaugmented."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from protopush.data.dataset import Provenance
from protopush.distributed import all_gather_objects
from protopush.errors import InputError


def deterministic_view(dataset: Any) -> tuple[Any, bool]:
    """The dataset without augmentation, and whether it gives the same item twice."""
    if hasattr(dataset, "eval_view"):
        return dataset.eval_view(), True
    if isinstance(dataset, Subset):
        inner, deterministic = deterministic_view(dataset.dataset)
        return Subset(inner, dataset.indices), deterministic
    if isinstance(dataset, ConcatDataset):
        views = [deterministic_view(part) for part in dataset.datasets]
        return ConcatDataset([view for view, _ in views]), all(deterministic for _, deterministic in views)
    if isinstance(dataset, TensorDataset):
        return dataset, True
    return dataset, _gives_the_same_twice(dataset)


def _gives_the_same_twice(dataset: Any, tries: int = 8) -> bool:
    """Read a few items twice with different random states; augmentation shows as a difference."""
    for index in range(min(tries, len(dataset))):
        torch.manual_seed(index)
        first = dataset[index][0]
        torch.manual_seed(index + tries)
        second = dataset[index][0]
        if not torch.equal(torch.as_tensor(first), torch.as_tensor(second)):
            return False
    return True


def labels_of(dataset: Any) -> Tensor | None:
    """The label of every item, int64 (N,), where it is known without reading an image."""
    if isinstance(dataset, Subset):
        inner = labels_of(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(list(dataset.indices), dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [labels_of(part) for part in dataset.datasets]
        return torch.cat([p for p in parts if p is not None]) if all(p is not None for p in parts) else None
    if isinstance(dataset, TensorDataset):
        labels = dataset.tensors[1] if len(dataset.tensors) > 1 else None
        known = labels is not None and labels.ndim == 1 and not labels.is_floating_point()
        return labels.cpu().long() if known and labels is not None else None
    if hasattr(dataset, "describe") and hasattr(dataset, "labels"):  # our protocol; others' attributes may mean more
        return torch.as_tensor(dataset.labels, dtype=torch.int64)
    return None


def groups_of(dataset: Any) -> list[str | None] | None:
    """The group (lesion, patient) of every item, where the dataset tells its ``groups``."""
    if isinstance(dataset, Subset):
        inner = groups_of(dataset.dataset)
        return None if inner is None else [inner[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [groups_of(part) for part in dataset.datasets]
        if any(part is None for part in parts):
            return None
        return [group for part in parts if part is not None for group in part]
    groups = getattr(dataset, "groups", None)
    return None if groups is None else [None if group is None else str(group) for group in groups]


def describe(dataset: Any, index: int, name: int | None = None) -> Provenance:
    """Where an item comes from; without a better name it is called by its index in the outermost ConcatDataset."""
    name = index if name is None else name
    if hasattr(dataset, "describe"):
        found: Provenance = dataset.describe(index)
        return found
    if isinstance(dataset, Subset):
        return describe(dataset.dataset, int(dataset.indices[index]))
    if isinstance(dataset, ConcatDataset):
        part = next(k for k, end in enumerate(dataset.cumulative_sizes) if index < end)
        start = dataset.cumulative_sizes[part - 1] if part else 0
        return describe(dataset.datasets[part], index - start, name)
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) < 3:
        return Provenance(name)  # no third element that could be a name
    files = getattr(dataset, "imgs", None)  # torchvision's ImageFolder
    return Provenance(_name_in(dataset[index], name), file=str(files[index][0]) if files is not None else None)


def _name_in(item: Any, default: int) -> int | str:
    """The third element of an item, where it is a name or a number."""
    name = item[2] if len(item) > 2 else default
    if isinstance(name, str):
        return name
    return int(name) if isinstance(name, (int, Tensor)) else default


def reading_order(loader: DataLoader[Any], seed: int | None) -> list[int]:
    """The indices that the loaders of all ranks may draw, each once: ascending, or in a seeded random order."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if hasattr(sampler, "indices"):  # SubsetRandomSampler: the others may be validation images
        indices = sorted({int(i) for i in sampler.indices})
    elif hasattr(sampler, "weights"):  # WeightedRandomSampler never draws a weight of 0
        indices = [i for i, weight in enumerate(sampler.weights.tolist()) if weight > 0]
    else:
        indices = list(range(len(loader.dataset)))  # type: ignore[arg-type]
    if len(set(all_gather_objects(hash(tuple(indices))))) > 1:
        indices = sorted(set().union(*all_gather_objects(indices)))
    if seed is None:
        return indices
    shuffled = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))
    return [indices[i] for i in shuffled.tolist()]


def refuse_different_datasets(dataset: Any) -> None:
    """Ids are indices of the dataset: all ranks must mean the same items by them.

    Raises:
        InputError: on every rank, if they don't.
    """
    if len(set(all_gather_objects(_layout(dataset)))) > 1:
        raise InputError(
            "the ranks' loaders have different datasets; expected the same dataset on every rank, divided by its "
            "sampler alone (DistributedSampler); the push divides the work itself"
        )


def _layout(dataset: Any) -> tuple[Any, ...]:
    if isinstance(dataset, Subset):
        return ("subset", hash(tuple(int(i) for i in dataset.indices)), *_layout(dataset.dataset))
    if isinstance(dataset, ConcatDataset):
        return tuple(_layout(part) for part in dataset.datasets)
    return (type(dataset).__name__, len(dataset))
