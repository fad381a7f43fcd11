"""Reading a loader for a push: every sample once, with an id that comes from the dataset, never from counting."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from protopush.data.dataset import Provenance
from protopush.distributed import rank_and_size
from protopush.errors import InputError
from protopush.push.loader_info import (
    describe,
    deterministic_view,
    groups_of,
    labels_of,
    reading_order,
    refuse_different_datasets,
)


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
        labels: int64, the label of each id, where it is known without reading.
        groups: int64, a number for the group of each id, where the dataset tells groups; a sample without has its own.
        divided: whether each rank reads a part of its own.
    """

    verified: bool = True
    note: str = ""
    labels: Tensor | None = None
    groups: Tensor | None = None
    divided: bool = True

    def batches(self) -> Iterator[Batch]:
        """This rank's batches."""
        raise NotImplementedError

    def describe(self, sample_id: int) -> Provenance:
        """Where a sample that this rank has read comes from."""
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
    """A dataset read by index: the id is the index. Ranks take the batches of one process in turn, none padded.

    Attributes:
        order: the indices to read.
    """

    def __init__(self, loader: DataLoader[Any], order_seed: int | None = None) -> None:
        refuse_different_datasets(loader.dataset)
        self.loader = loader
        self.dataset, deterministic = deterministic_view(loader.dataset)
        self.order = reading_order(loader, order_seed)
        self.labels = labels_of(self.dataset)
        self.groups = _numbered(groups_of(self.dataset))
        if not deterministic:
            self.verified = False
            self.note = (
                "the dataset augments and has no eval_view(): patches come from augmented images, anchors are "
                "marked unverified; give the dataset an eval_view() that returns it without augmentation"
            )

    def batches(self) -> Iterator[Batch]:
        yield from self.pick(self.order)

    def _read(self, batches: list[list[int]]) -> Iterator[Batch]:
        """Batches of these indices, read as the loader reads: its workers, its collate_fn."""
        loader = self.loader
        again: DataLoader[Any] = DataLoader(
            _Indexed(self.dataset),
            batch_sampler=batches,
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
            yield Batch(images, self._checked(_as_labels(labels), ids), ids)

    def pick(self, ids: Sequence[int]) -> Iterator[Batch]:
        """This rank's batches of just these samples."""
        rank, size = rank_and_size() if self.divided else (0, 1)
        yield from self._read(_cut(ids, self._batch_size())[rank::size])

    def first(self) -> Batch:
        """A batch of the first sample alone, on each rank."""
        return next(self._read([self.order[:1]]))

    def narrow(self, keep: Callable[[int], bool]) -> None:
        """Read only samples of labels that are to be kept, where labels are known."""
        if self.labels is not None:
            wanted = [keep(label) for label in self.labels.tolist()]
            self.order = [i for i in self.order if wanted[i]]

    def describe(self, sample_id: int) -> Provenance:
        return describe(self.dataset, sample_id)

    def _batch_size(self) -> int:
        return self.loader.batch_size or getattr(self.loader.batch_sampler, "batch_size", None) or 32

    def _checked(self, labels: Tensor, ids: Tensor) -> Tensor:
        if self.labels is not None and not torch.equal(self.labels[ids], labels):
            wrong = int((self.labels[ids] != labels).int().argmax())
            raise InputError(
                f"the dataset's labels say {int(self.labels[ids[wrong]])} for item {int(ids[wrong])}, the item itself "
                f"says {int(labels[wrong])}; expected the same; nothing was changed"
            )
        return labels


class StreamSource(Source):
    """Any other iterable, read as it comes; ids are the third element of each batch. Each rank reads its own."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.names: dict[int, int | str] = {}

    def batches(self) -> Iterator[Batch]:
        seen = 0
        for item in self.loader:
            images, labels, ids = _unpack(item)
            if ids is None:
                self._refuse_to_count()
                numbers = torch.arange(seen, seen + len(labels))
            else:
                numbers = self._number(ids)
            seen += len(labels)
            yield Batch(images, _as_labels(labels), numbers)

    def _refuse_to_count(self) -> None:
        if rank_and_size()[1] > 1:
            raise InputError(
                "the loader is no DataLoader over an indexed dataset and yields no ids; expected (images, labels, ids) "
                "from each of several processes, or their samples would be mistaken for one another"
            )
        self.verified = False
        self.note = (
            "the loader is no DataLoader over an indexed dataset and yields no ids: anchors are numbered in "
            "the order of reading and marked unverified; yield (images, labels, ids)"
        )

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


def _numbered(groups: Sequence[str | None] | None) -> Tensor | None:
    """A number for each group, another for each sample without one; None where nothing has a group."""
    if groups is None or all(group is None for group in groups):
        return None
    number = {name: place for place, name in enumerate(sorted({group for group in groups if group is not None}))}
    return torch.tensor([len(number) + i if group is None else number[group] for i, group in enumerate(groups)])


def _cut(indices: Sequence[int], size: int) -> list[list[int]]:
    return [list(indices[start : start + size]) for start in range(0, len(indices), size)]


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


def check_labels(labels: Tensor, ids: Tensor, num_classes: int) -> None:
    """Refuse labels (B,) that are no class.

    Raises:
        InputError: it names the label and the sample.
    """
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        raise InputError(
            f"label {int(labels[wrong][0])} of sample {int(ids[wrong][0])}; expected 0 to {num_classes - 1}; "
            "nothing was changed"
        )
