"""Shards of stored features: files of a few hundred images each, written one by one, and by one process each."""

from __future__ import annotations

import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor

from protopush.data.files import write_json
from protopush.errors import InputError

SHARD = 512  # images: of 7 x 7 cells with 1280 channels 64 MB in float16
FLOAT8_MAX = 448.0  # of torch.float8_e4m3fn


class Format:
    """Outputs of one shape as records of a file, one for each view of an image.

    Args:
        precision: float32, float16, or float8: ``torch.float8_e4m3fn`` (a relative error of 1/16 at most) of the values
            divided by a scale of the record's own, which lies before them.
        shape: of the outputs for a view.

    Example:
        >>> values = torch.tensor([[1.0, -3.0, 0.01], [0.0, 0.0, 0.0]])
        >>> data, finite = Format("float8", [3]).pack(values)
        >>> len(data), finite.tolist()
        (14, [True, True])
    """

    def __init__(self, precision: str, shape: Sequence[int]) -> None:
        self.precision, self.shape, self.values = precision, tuple(shape), math.prod(shape)
        plain: Any = np.dtype(precision if precision != "float8" else "u1").newbyteorder("<")
        self.dtype = np.dtype([("scale", "<f4"), ("values", "u1", self.shape)]) if precision == "float8" else plain
        self.size = self.values * plain.itemsize + (4 if precision == "float8" else 0)

    def pack(self, outputs: Tensor) -> tuple[bytes, Tensor]:
        """Outputs (N, ...) as N records, and whether each is finite, also as it is stored: bool (N,)."""
        if self.precision != "float8":
            stored = outputs.to(getattr(torch, self.precision)).cpu()
            return stored.numpy().tobytes(), stored.isfinite().flatten(1).all(dim=1)
        outputs = outputs.float()
        largest = outputs.abs().flatten(1).amax(dim=1).cpu()
        scale = torch.where(largest > 0, largest / FLOAT8_MAX, 1.0)
        places = scale.to(outputs.device).view(-1, *[1] * (outputs.ndim - 1))
        records = np.empty(len(outputs), dtype=self.dtype)
        records["scale"] = scale.numpy()
        records["values"] = (outputs / places).to(torch.float8_e4m3fn).view(torch.uint8).cpu().numpy()
        return records.tobytes(), largest.isfinite()

    def write_header(self, file: BinaryIO, records: int) -> None:
        """The head of an ``.npy`` file."""
        shape = (records,) if self.dtype.names else (records, *self.shape)
        head = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, head)

    def read(self, file: Path, record: int, records: int) -> Tensor:
        """One record of a file of so many; of float8 in float32.

        No file is kept open or mapped: a process may hold about a thousand, and the system's cache serves all.
        """
        start = os.path.getsize(file) - (records - record) * self.size  # noqa: PTH202 - once an item
        count = 1 if self.dtype.names else self.values
        found: NDArray[Any] = np.fromfile(file, self.dtype, count, offset=start)
        if not self.dtype.names:
            return torch.from_numpy(found.reshape(self.shape))
        values = torch.from_numpy(found["values"][0]).view(torch.float8_e4m3fn)
        return values.float() * float(found["scale"][0])


def file_of(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"{number:06d}.npy"


def ids_of(number: int, images: int) -> range:
    """The images of a shard, of so many."""
    return range(number * SHARD, min((number + 1) * SHARD, images))


def missing(folder: Path, images: int) -> list[int]:
    """The numbers of the shards that are not there, of so many images."""
    there = {entry.name for entry in os.scandir(folder)} if folder.is_dir() else set()
    return [number for number in range(-(-images // SHARD)) if file_of(folder, number).name not in there]


class Claims:
    """A batch sampler over shards of images that no other process computes: each is this one's until it is released.

    A process that is killed lets go of its shards. Where a file system has no locks, shards may be computed twice, and
    the last one written stays: nothing is wrong then.

    Args:
        folder: of the shards.
        numbers: of the shards that are missing, in the order in which they are tried.
        images: in all.
        batch: images in a batch; none holds images of two shards.

    Raises:
        InputError: the folder can't be made.
    """

    def __init__(self, folder: Path, numbers: Sequence[int], images: int, batch: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make {folder} ({error.strerror}); choose another --trainer.cache_dir") from error
        self.folder, self.numbers, self.images, self.batch = folder, numbers, images, batch
        self.locks: dict[int, FileLock] = {}
        self.left: dict[str, list[Path]] = defaultdict(list)  # unfinished, of killed processes
        for file in folder.glob(".*.tmp"):
            self.left[file.name.split(".")[1]].append(file)

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self.locks):
            self.release(number)

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.numbers:
            if self.claim(number):
                ids = ids_of(number, self.images)
                yield from (list(ids[start : start + self.batch]) for start in range(0, len(ids), self.batch))

    def claim(self, number: int, wait: bool = False) -> bool:
        """Take a shard; False: another process has it, or has finished it."""
        lock = FileLock(self.folder / f".{number:06d}.lock")
        try:
            lock.acquire(blocking=wait, poll_interval=0.2)
        except Timeout:
            return False
        self.locks[number] = lock
        if file_of(self.folder, number).is_file():
            self.release(number)
            return False
        for file in self.left.pop(f"{number:06d}", ()):
            file.unlink(missing_ok=True)
        return True

    def write_once(self, name: str, values: dict[str, Any]) -> None:
        """Write a JSON file, which is the same from each process, where no other has."""
        if not (self.folder / name).is_file():
            with FileLock(self.folder / f".{name}.lock") as lock:  # processes of two computers may have one number
                write_json(self.folder / name, values)
                _remove(lock)

    def release(self, number: int) -> None:
        """Let go of a shard, which is whole or not there."""
        lock = self.locks.pop(number)
        _remove(lock)
        lock.release()


def _remove(lock: FileLock) -> None:
    with suppress(OSError):  # Windows keeps open files
        Path(lock.lock_file).unlink()


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Refuse, in an InputError, to begin what would fill the disk."""
    if needed > (free := shutil.disk_usage(folder).free):
        raise InputError(
            f"the features need {needed / 2**30:.1f} GiB but {folder} has {free / 2**30:.1f} GiB free; make room, "
            "choose --trainer.cache_dir, or take less: --trainer.cache_precision float8, or off"
        )
