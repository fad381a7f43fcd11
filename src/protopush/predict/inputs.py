"""Inputs of a prediction, in an order that is always the same, and what a run's model makes of them, batch by batch."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from protopush.data.images import read_image, why_unreadable
from protopush.data.manifest import DataConfig, manifest_rows
from protopush.data.shards import is_file, is_shard, open_shard, shards_below
from protopush.data.transforms import EvalTransform
from protopush.data.walk import LeftOut, walk_images
from protopush.distributed import rank_and_size
from protopush.errors import InputError, first_line
from protopush.models.model import ProtoModel
from protopush.models.model_folder import Run
from protopush.nn.head import HeadOutput
from protopush.preserve_state import iterate_outputs

logger = logging.getLogger("protopush.predict")

TABLES = {".csv", ".tsv", ".tab"}
SIGNAL_SECONDS = 0.5  # until the end of a process that has died is known to the one that started it
DIGITS = 6  # of numbers in the table; what is compared is what is written

Floats = NDArray[np.float64]
T = TypeVar("T")


class Strings:
    """Many strings in one block of memory: a million file names take their bytes and eight each.

    Processes that read images share the block, which a list of Python's strings would not let them: counting its
    references copies it.

    Example:
        >>> names = Strings(["a.jpg"])
        >>> names[0], len(names)
        ('a.jpg', 1)
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._bytes = bytearray()
        self._ends = array("q")
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Add one at the end; what the file system has beyond UTF-8 (surrogateescape) is kept as it is."""
        self._bytes += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        place = range(len(self._ends))[index]
        start = self._ends[place - 1] if place else 0
        return self._bytes[start : self._ends[place]].decode("utf-8", "surrogateescape")

    def sha256(self) -> str:
        """Changes when any of them does, or their order."""
        digest = hashlib.sha256(self._ends.tobytes())
        digest.update(self._bytes)
        return digest.hexdigest()


class Inputs:
    """The images, in order.

    Attributes:
        names: a path for each image, that opens from the current folder.
        labels: what a manifest calls each image, "" for others; None where no manifest has labels.
    """

    def __init__(self) -> None:
        self.names = Strings()
        self.labels: Strings | None = None

    def add(self, name: str, label: str | None = None) -> None:
        """One more image; from the first label on there are labels."""
        if label is not None and self.labels is None:
            self.labels = Strings("" for _ in range(len(self.names)))
        self.names.append(name)
        if self.labels is not None:
            self.labels.append(label or "")


def list_inputs(paths: Sequence[str]) -> Inputs:
    """The images of folders (with all folders in them, sorted), manifests (in their order) and files, path by path.

    Hidden files and folders are left out. Links to folders inside a folder are not followed, so that a loop of links
    does no harm; the log names them, and counts files that are no images by their ending.

    Args:
        paths: folders, manifests (.csv, .tsv or .tab, with a column ``image``, relative to the manifest, and
            perhaps ``label``), shards (.tar, .parquet), and image files; of the latter any name will do.

    Raises:
        InputError: a path that isn't there, a folder without images, or no manifest.
    """
    found = Inputs()
    for path in paths:
        before = len(found.names)
        for name, label in _images_of(path):
            found.add(name, label)
        if len(found.names) == before:
            raise InputError(f"no images in {path}; expected files that Pillow reads, such as .jpg, .png or .tif")
    return found


def _images_of(path: str) -> Iterator[tuple[str, str | None]]:
    """Names and labels of the images of one path."""
    folder = Path(path).is_dir()
    if shards := shards_below(Path(path)) if folder else [Path(path)] if is_shard(path) else []:
        for shard in shards:
            for name in open_shard(shard).images():
                yield os.path.join(shard, name), None  # noqa: PTH118 - a million of them
    elif folder:
        left_out = LeftOut()
        for name in walk_images(path, left_out):
            yield name, None
        for words in left_out.in_words():
            logger.warning("%s: %s", path, words)
    elif not (os.path.lexists(path) or is_file(path)):
        raise InputError(f"no such file: {path}; expected a folder, a manifest (CSV) or an image")
    elif Path(path).suffix.lower() in TABLES:
        for row in manifest_rows(Path(path), "a manifest (CSV with a column image)", label_needed=False):
            yield row["image"], row.get("label")
    else:
        yield path, None


class Pictures(Dataset[tuple[Tensor, str]]):
    """Items are (image (3, H, W), why it could not be read); the image is all zeros where there is a reason."""

    def __init__(self, names: Strings, transform: EvalTransform, max_megapixels: float = inf) -> None:
        self.names = names
        self.transform = transform
        self.max_megapixels = max_megapixels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        name = self.names[index]
        try:
            return self.transform(read_image(name, self.max_megapixels)), ""
        except InputError as error:
            return self._empty(), why_unreadable(name, error.__cause__ or error)
        except Exception as error:  # whatever one damaged file does to a decoder, the others are still to be predicted
            return self._empty(), why_unreadable(name, error)

    def _empty(self) -> Tensor:
        return torch.zeros(3, *self.transform.preprocessing.size)


class Outputs(NamedTuple):
    """B images, C classes; similarities are rounded to ``DIGITS``.

    Attributes:
        probabilities: (B, C), softmax of the logits in float64.
        predicted: (B,), the most probable class; of equals the first.
        slots: (B, N), prototypes of that class by what they contribute to its logit, -1 where it has fewer than N.
        similarities: (B, N), of these prototypes.
        best: (B,), the largest similarity of any prototype in use, of whatever class.
        finite: (B,), whether the logits are numbers at all.
    """

    probabilities: Floats
    predicted: NDArray[np.intp]
    slots: NDArray[np.intp]
    similarities: Floats
    best: Floats
    finite: NDArray[np.bool_]


def run_model(model: ProtoModel, images: Tensor, top: int) -> Outputs:
    """Run a model, in eval mode and without gradients, over images (B, 3, H, W) on its device, for ``top`` slots."""
    output: HeadOutput = model(images)
    return read_output(output, model.head.proto_manager.mask(), top)


def read_output(output: HeadOutput, mask: Tensor, top: int) -> Outputs:
    """What a head said of B images, for ``top`` slots; ``mask`` (C, K) says which are in use."""
    logits = output.logits.double().cpu() if output.logits.device.type != "mps" else output.logits.cpu().double()
    used = mask.cpu().numpy()
    similarities = np.round(_array(output.similarities), DIGITS)
    predicted = logits.argmax(dim=1).numpy()
    rows = np.arange(len(predicted))
    contributions = np.where(used, _array(output.contributions), -np.inf)[rows, predicted]
    slots = np.argsort(-contributions, axis=1, kind="stable")[:, :top]  # the lower slot first among equals
    found = np.take_along_axis(similarities[rows, predicted], slots, axis=1)
    known = np.take_along_axis(used[predicted], slots, axis=1)
    return Outputs(
        probabilities=logits.softmax(dim=1).numpy(),
        predicted=predicted,
        slots=np.where(known, slots, -1),
        similarities=found,
        best=np.where(used, similarities, -np.inf).max(axis=(1, 2)),
        finite=logits.isfinite().all(dim=1).numpy(),
    )


def _array(values: Tensor) -> NDArray[Any]:
    return values.float().cpu().numpy().astype(np.float64)


def own_share(batches: Sequence[T]) -> Sequence[T]:
    """The consecutive share of this process, of those that work together."""
    rank, ranks = rank_and_size()
    return batches[len(batches) * rank // ranks : len(batches) * (rank + 1) // ranks]


def run_over(
    run: Run, names: Strings, batches: Sequence[range], top: int, device: torch.device | str, num_workers: int,
    take: Callable[[range, Sequence[str], Outputs], object],
) -> None:  # fmt: skip
    """Run a run's model over images in batches; ``take`` gets of each, in order, (indices, B problems, outputs).

    Raises:
        InputError: a process that reads images has died, mostly for want of memory.
    """
    pictures = Pictures(names, run.transform, DataConfig(**run.data).max_megapixels)
    loader: DataLoader[Any] = DataLoader(pictures, batch_sampler=batches, num_workers=num_workers)  # type: ignore[arg-type]
    try:
        with iterate_outputs(run.model, loader, device, call=lambda images: run_model(run.model, images, top)) as found:
            for indices, (outputs, problems) in zip(batches, found, strict=True):
                take(indices, problems, outputs)
    except (RuntimeError, ConnectionError, EOFError) as error:  # from anywhere above: torch interrupts what is done
        if isinstance(error, RuntimeError):
            if "DataLoader worker" not in str(error):
                raise
        else:  # its last batch was being fetched; PyTorch's own error follows with the signal of its end
            with suppress(RuntimeError):
                time.sleep(SIGNAL_SECONDS)
        raise InputError(
            f"a process that reads images died ({first_line(error)}); expected memory for {num_workers} of them; start "
            "the same again with fewer --data.num_workers: it goes on where it stopped"
        ) from error
