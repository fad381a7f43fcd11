"""Reading a loader for a push: every sample once, with an id that comes from the dataset, never from counting."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from protopush.data.provenance import Provenance
from protopush.errors import InputError


class Batch(NamedTuple):
    """images (B, ...) as the loader gives them; labels and ids int64 (B,) on the CPU."""

    images: Tensor
    labels: Tensor
    ids: Tensor


class Source:
    """An iterable of :class:`Batch` that can say where each id comes from.

    Attributes:
        verified: whether ids and view can be trusted to name the very patch that was seen.
        note: why not, or what else the log should say.
    """

    verified: bool = True
    note: str = ""

    def batches(self, skip: Callable[[int], bool]) -> Iterator[Batch]:
        """The batches; samples of labels for which ``skip`` holds may be left out to save the work."""
        raise NotImplementedError

    def describe(self, sample_id: int) -> Provenance:
        """Where the sample of an id comes from."""
        return Provenance(sample_id)


def read_through(loader: Iterable[Any], order_seed: int | None = None) -> Source:
    """The source behind a loader.

    A loader over a dataset with ``len`` and ``[]`` is read again through its dataset (through its deterministic view
    where it has one), in order, or in a seeded random order. Anything else is iterated as it is.

    Args:
        loader: a DataLoader, shuffled or not, or any iterable of ``(images, labels[, ids])``.
        order_seed: a seed for a random order; None reads in order.
    """
    plain = getattr(loader, "_dataloader", loader)  # behind Fabric's wrapper
    dataset = getattr(plain, "dataset", None)
    indexed = (
        hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)
    )
    if isinstance(plain, DataLoader) and indexed and plain.batch_sampler is not None:
        return DatasetSource(plain, order_seed)
    return StreamSource(loader)


class DatasetSource(Source):
    """A dataset read by index: the id is the index."""

    def __init__(self, loader: DataLoader[Any], order_seed: int | None) -> None:
        self.loader = loader
        self.dataset, deterministic = deterministic_view(loader.dataset)
        self.order = _order(loader, order_seed)
        if not deterministic:
            self.verified = False
            self.note = (
                "the dataset augments and has no eval_view(): patches come from augmented images, anchors are "
                "marked unverified; give the dataset an eval_view() that returns it without augmentation"
            )

    def batches(self, skip: Callable[[int], bool]) -> Iterator[Batch]:
        # A dataset that follows our protocol tells its labels: full classes can then be passed over unread.
        known = getattr(self.dataset, "labels", None) if hasattr(self.dataset, "describe") else None
        order = (i for i in self.order if known is None or not skip(known[i]))
        loader = self.loader
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32
        again: DataLoader[Any] = DataLoader(
            _Indexed(self.dataset),
            batch_size=size,
            sampler=order,
            num_workers=loader.num_workers,
            collate_fn=_CollateWithIds(loader.collate_fn),
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor if loader.num_workers else None,
            generator=torch.Generator().manual_seed(0),
        )
        for (images, labels, *_), ids in again:
            if len(labels) != len(ids):
                raise InputError(
                    f"the loader's collate_fn made {len(labels)} labels of {len(ids)} samples; "
                    "expected as many, or a sample could not be traced to its image"
                )
            yield Batch(images, _as_labels(labels), ids)

    def describe(self, sample_id: int) -> Provenance:
        return _describe(self.dataset, sample_id)


class StreamSource(Source):
    """Any other iterable, read as it comes; ids are the third element of each batch."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.names: dict[int, int | str] = {}

    def batches(self, skip: Callable[[int], bool]) -> Iterator[Batch]:
        seen = 0
        for item in self.loader:
            images, labels, ids = _unpack(item)
            if ids is None:
                self.verified = False
                self.note = (
                    "the loader is no DataLoader over an indexed dataset and yields no ids: anchors are numbered in "
                    "the order of reading and marked unverified; yield (images, labels, ids)"
                )
                numbers = torch.arange(seen, seen + len(labels))
            else:
                numbers = self._number(ids)
            seen += len(labels)
            yield Batch(images, _as_labels(labels), numbers)

    def _number(self, ids: Tensor | Sequence[int | str]) -> Tensor:
        if isinstance(ids, Tensor):
            return ids.detach().cpu().long()
        numbers = [_order_free_number(name) for name in ids]
        self.names.update(zip(numbers, ids, strict=True))
        return torch.tensor(numbers, dtype=torch.int64)

    def describe(self, sample_id: int) -> Provenance:
        return Provenance(self.names.get(sample_id, sample_id))


def _order_free_number(name: int | str) -> int:
    """A 63-bit number that depends on the name alone, so that ties never depend on the order of reading."""
    if isinstance(name, int):
        return name
    return int.from_bytes(hashlib.blake2b(str(name).encode(), digest_size=8).digest(), "big") >> 1


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


def _describe(dataset: Any, index: int, name: int | None = None) -> Provenance:
    """Where an item comes from; without a better name it is called by its index in the outermost ConcatDataset."""
    name = index if name is None else name
    if hasattr(dataset, "describe"):
        found: Provenance = dataset.describe(index)
        return found
    if isinstance(dataset, Subset):
        return _describe(dataset.dataset, int(dataset.indices[index]))
    if isinstance(dataset, ConcatDataset):
        part = next(k for k, end in enumerate(dataset.cumulative_sizes) if index < end)
        start = dataset.cumulative_sizes[part - 1] if part else 0
        return _describe(dataset.datasets[part], index - start, name)
    files = getattr(dataset, "imgs", None)  # torchvision's ImageFolder
    return Provenance(_name_in(dataset[index], name), file=str(files[index][0]) if files is not None else None)


def _name_in(item: Any, default: int) -> int | str:
    """The third element of an item, where it is a name or a number."""
    name = item[2] if len(item) > 2 else default
    if isinstance(name, str):
        return name
    return int(name) if isinstance(name, (int, Tensor)) else default


def _order(loader: DataLoader[Any], seed: int | None) -> list[int]:
    """The indices that the loader may draw, each once: ascending, or in a seeded random order."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if hasattr(sampler, "indices"):  # SubsetRandomSampler: the others may be validation images
        indices = sorted({int(i) for i in sampler.indices})
    elif hasattr(sampler, "weights"):  # WeightedRandomSampler never draws a weight of 0
        indices = [i for i, weight in enumerate(sampler.weights.tolist()) if weight > 0]
    else:
        indices = list(range(len(loader.dataset)))  # type: ignore[arg-type]
    if seed is None:
        return indices
    shuffled = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))
    return [indices[i] for i in shuffled.tolist()]


class _Indexed(Dataset[tuple[Any, int]]):
    """A dataset whose items carry their index."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index], index


class _CollateWithIds:
    """The loader's own collate_fn on the items, the indices beside them; picklable for spawned workers."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, batch: list[tuple[Any, int]]) -> tuple[tuple[Any, ...], Tensor]:
        return _unpack(self.collate([item for item, _ in batch])), torch.tensor([index for _, index in batch])


def _unpack(batch: Any) -> tuple[Any, Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise InputError(
            f"the loader yields {type(batch).__name__}; expected (images, labels) or (images, labels, ids)"
        )
    images, labels, *ids = batch
    return images, labels, ids[0] if ids else None


def _as_labels(labels: Any) -> Tensor:
    tensor = torch.as_tensor(labels).detach().cpu()
    if tensor.ndim != 1 or tensor.is_floating_point():
        raise InputError(
            f"labels of shape {tuple(tensor.shape)} and type {tensor.dtype}; expected class numbers of shape (B,)"
        )
    return tensor.long()
