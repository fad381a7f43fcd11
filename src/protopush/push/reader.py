"""Readers of a loader: every sample once, with an id that comes from the dataset, never from counting batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from protopush.data.dataset import Provenance
from protopush.distributed import all_gather_objects, rank_and_size
from protopush.errors import InputError
from protopush.push.protocol import Items, unpack

WHOLE = (SequentialSampler, RandomSampler, DistributedSampler)  # samplers that draw from all of a dataset


class Batch(NamedTuple):
    """images (B, ...) as the loader gives them; labels and ids int64 (B,) on the CPU."""

    images: Tensor
    labels: Tensor
    ids: Tensor


@dataclass(kw_only=True)
class Reader:
    """Batches of :class:`Batch`, and where each id comes from: any iterable, read as it comes, by each rank its own.

    Ids are the third element of what is read, or a number for it where it is a name. What is to be read is settled when
    a reader is made; reading leaves a trace in a stream alone: the names, and that samples had to be counted.

    Attributes:
        loader: what is read.
        verified: whether ids and view can be trusted to name the very patch that was seen.
        note: why not, or what else the log should say.
        labels: int64, the label of each id, where it is known without reading.
        groups: int64, a number for the group of each id, where the dataset has groups; a sample without has its own.
        divided: whether each rank reads a part of its own.
        names: of the ids that stand for one.
    """

    loader: Any
    verified: bool = True
    note: str = ""
    labels: Tensor | None = None
    groups: Tensor | None = None
    divided: bool = True
    names: dict[int, int | str] = field(default_factory=dict)

    def batches(self) -> Iterator[Batch]:
        """This rank's batches."""
        seen = 0
        for item in self.loader:
            images, labels, ids = unpack(item)
            if ids is None:
                if rank_and_size()[1] > 1:
                    raise InputError(
                        "the loader is no DataLoader over an indexed dataset and yields no ids; expected (images, "
                        "labels, ids) from each of several processes, or their samples would be mistaken for one "
                        "another"
                    )
                self.verified = False
                self.note = (
                    "the loader is no DataLoader over an indexed dataset and yields no ids: anchors are numbered in "
                    "the order of reading and marked unverified; yield (images, labels, ids)"
                )
                ids = torch.arange(seen, seen + len(labels))
            elif isinstance(ids, Tensor):
                ids = ids.detach().cpu().long()
            else:
                numbers = [name if isinstance(name, int) else _order_free_number(name) for name in ids]
                self.names.update(zip(numbers, ids, strict=True))
                ids = torch.tensor(numbers, dtype=torch.int64)
            seen += len(labels)
            yield Batch(images, _as_labels(labels), ids)

    def subset(self, ids: Sequence[int]) -> Reader:
        """A reader of these samples alone, in this order; a stream can only be read as a whole."""
        return self

    def of_classes(self, classes: Collection[int]) -> Reader:
        """A reader of the samples of some classes alone, where labels are known without reading."""
        return self

    def describe(self, sample_id: int) -> Provenance:
        """Where a sample that this rank has read comes from."""
        return Provenance(self.names.get(sample_id, sample_id))


def read_through(loader: Iterable[Any], order_seed: int | None = None) -> Reader:
    """The reader of a loader.

    A loader over a dataset with ``len`` and ``[]`` is read again through its dataset (through its deterministic view
    where it has one), in order, or in a seeded random order: those of its samples that the loader's sampler draws.
    Anything else is iterated as it is.

    Args:
        loader: a DataLoader, shuffled or not, or any iterable of ``(images, labels[, ids])`` or of dicts with keys of
            :data:`protopush.push.protocol.KEYS`.
        order_seed: a seed for a random order; None reads in order.

    Raises:
        InputError: on every rank, if the ranks have different datasets: ids are indices, and must mean the same items.
    """
    plain = getattr(loader, "_dataloader", loader)  # behind Fabric's wrapper
    dataset = getattr(plain, "dataset", None)
    indexed = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    indexed = indexed and not isinstance(dataset, IterableDataset)
    if not isinstance(plain, DataLoader) or not indexed or plain.batch_sampler is None:
        return Reader(loader=loader)
    items = Items(dataset)
    if len(set(all_gather_objects(items.layout()))) > 1:
        raise InputError(
            "the ranks' loaders have different datasets; expected the same dataset on every rank, divided by its "
            "sampler alone (DistributedSampler); the push divides the work itself"
        )
    note = "" if items.deterministic else (
        "the dataset augments and has no eval_view(): patches come from augmented images, anchors are "
        "marked unverified; give the dataset an eval_view() that returns it without augmentation"
    )  # fmt: skip
    return DatasetReader(
        loader=plain,
        items=items,
        ids=_reading_order(plain, order_seed),
        verified=items.deterministic,
        note=note,
        labels=items.labels(),
        groups=items.groups(),
    )


def read_by_index(loader: Iterable[Any]) -> DatasetReader:
    """The reader of a loader whose samples can be read again by their index; an :class:`InputError` for a stream."""
    reader = read_through(loader)
    if not isinstance(reader, DatasetReader):
        raise InputError(
            "live anchors are read again by their index, but the loader is a stream; expected a DataLoader over a "
            "dataset with len() and []; nothing was changed"
        )
    return reader


def describe_all(reader: Reader, ids: Iterable[int]) -> dict[int, Provenance]:
    """Where the samples of all ranks come from; each rank gives the ``ids`` of those that it has read."""
    here = {i: reader.describe(i) for i in sorted(set(ids))}
    return {i: origin for part in reversed(all_gather_objects(here)) for i, origin in part.items()}


@dataclass(kw_only=True)
class DatasetReader(Reader):
    """A dataset read by index: the id is the index. Ranks take the batches of one process in turn, none padded.

    Attributes:
        items: the dataset behind the loader, whose workers and collate_fn read it.
        ids: the indices to read, in order.
    """

    items: Items
    ids: Sequence[int]

    def batches(self) -> Iterator[Batch]:
        loader: DataLoader[Any] = self.loader
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32
        rank, ranks = rank_and_size() if self.divided else (0, 1)
        again: DataLoader[Any] = DataLoader(
            self.items,
            batch_sampler=_Batches(self.ids, size, range(0, len(self.ids), size)[rank::ranks]),
            num_workers=loader.num_workers,
            collate_fn=_CollateWithIds(loader.collate_fn),
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor if loader.num_workers else None,
            generator=torch.Generator().manual_seed(0),
        )
        for (images, plain_labels, *_), ids in again:
            if len(plain_labels) != len(ids):
                raise InputError(
                    f"the loader's collate_fn made {len(plain_labels)} labels of {len(ids)} samples; "
                    "expected as many, or a sample could not be traced to its image"
                )
            labels = _as_labels(plain_labels)
            if self.labels is not None and not torch.equal(self.labels[ids], labels):
                wrong = int((self.labels[ids] != labels).int().argmax())
                raise InputError(
                    f"the dataset's labels say {int(self.labels[ids[wrong]])} for item {int(ids[wrong])}, the item "
                    f"itself says {int(labels[wrong])}; expected the same; nothing was changed"
                )
            yield Batch(images, labels, ids)

    def subset(self, ids: Sequence[int]) -> DatasetReader:
        return replace(self, ids=ids)

    def of_classes(self, classes: Collection[int]) -> DatasetReader:
        if self.labels is None:
            return self
        labels = self.labels.tolist()
        return self.subset([i for i in self.ids if labels[i] in classes])

    def describe(self, sample_id: int) -> Provenance:
        return self.items.describe(sample_id)


def _order_free_number(name: str) -> int:
    """A 63-bit number that depends on the name alone, so that ties never depend on the order of reading."""
    return int.from_bytes(hashlib.blake2b(str(name).encode(), digest_size=8).digest(), "big") >> 1


def _reading_order(loader: DataLoader[Any], seed: int | None) -> Sequence[int]:
    """The indices that the loaders of all ranks may draw, each once: ascending, or in a seeded random order."""
    own = hasattr(loader.batch_sampler, "sampler")
    sampler: Any = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    if hasattr(sampler, "indices"):  # SubsetRandomSampler: the others may be validation images
        indices: Sequence[int] = sorted({int(i) for i in sampler.indices})
    elif hasattr(sampler, "weights"):  # WeightedRandomSampler never draws a weight of 0
        indices = [i for i, weight in enumerate(sampler.weights.tolist()) if weight > 0]
    elif isinstance(sampler, WHOLE):
        indices = range(len(loader.dataset))  # type: ignore[arg-type]
    else:  # one of somebody's own, perhaps of batches: only what it draws may be chosen
        drawn = sampler if own else chain.from_iterable(sampler)
        indices = sorted({int(i) for i in drawn})
    same = indices if isinstance(indices, range) else hash(tuple(indices))
    if len(set(all_gather_objects(same))) > 1:
        indices = sorted(set().union(*all_gather_objects(indices)))
    if seed is None:
        return indices
    shuffled = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))
    return [indices[i] for i in shuffled.tolist()]


class _Batches:
    """Batches of ids, made as they are read: ten million ids in lists would take more memory than all else."""

    def __init__(self, ids: Sequence[int], size: int, starts: range) -> None:
        self.ids, self.size, self.starts = ids, size, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(self.ids[start : start + self.size]) for start in self.starts)


class _CollateWithIds:
    """The loader's own collate_fn on the items, the indices beside them; picklable for spawned workers."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, batch: list[tuple[Any, int]]) -> tuple[tuple[Any, ...], Tensor]:
        return unpack(self.collate([item for item, _ in batch])), torch.tensor([index for _, index in batch])


def _as_labels(labels: Any) -> Tensor:
    tensor = torch.as_tensor(labels).detach().cpu()
    tensor = tensor.squeeze(1) if tensor.ndim == 2 and tensor.shape[1] == 1 else tensor
    if tensor.ndim != 1 or tensor.is_floating_point():
        raise InputError(
            f"labels of shape {tuple(tensor.shape)} and type {tensor.dtype}; expected class numbers of shape (B,)"
        )
    return tensor.long()


def check_labels(labels: Tensor, ids: Tensor, num_classes: int) -> None:
    """Raise an :class:`InputError`, which names label and sample, for labels (B,) that are no class."""
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        raise InputError(
            f"label {int(labels[wrong][0])} of sample {int(ids[wrong][0])}; expected 0 to {num_classes - 1}; "
            "nothing was changed"
        )
