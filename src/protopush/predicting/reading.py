"""Pictures for prediction: one that can't be read is told, and its place in the batch stays empty."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from protopush.data.images import read_image, why_unreadable
from protopush.data.transforms import EvalTransform
from protopush.errors import InputError, first_line
from protopush.predicting.inputs import Strings

# Pixels that a picture may have when it is resized to cover the model's input: a line of 1 x 100,000 has billions.
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)


class Pictures(Dataset[tuple[Tensor, str]]):
    """Items are (image (3, H, W), why it could not be read); the image is all zeros where there is a reason."""

    def __init__(self, names: Strings, transform: EvalTransform) -> None:
        self.names = names
        self.transform = transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        name = self.names[index]
        try:
            picture = read_image(name)
            width, height = self.transform.view(picture.size).resized
            if width * height > MOST_PIXELS:
                return self._empty(), f"too long and narrow: {picture.width} x {picture.height} pixels"
            return self.transform(picture), ""
        except InputError as error:
            return self._empty(), why_unreadable(name, error.__cause__ or error)
        except Exception as error:  # whatever one damaged file does to a decoder, the others are still to be predicted
            return self._empty(), why_unreadable(name, error)

    def _empty(self) -> Tensor:
        return torch.zeros(3, *self.transform.preprocessing.size)


@dataclass(frozen=True)
class Batches:
    """The images of batches ``first`` to ``last`` (not included), of ``size`` images each but the very last.

    Which images make a batch depends on nothing else: the same batch gives the same bits, whoever computes it and
    when. That is why a table that was cut off ends as if it had not been.

    Example:
        >>> list(Batches(1, 3, size=2, images=5))
        [range(2, 4), range(4, 5)]
    """

    first: int
    last: int
    size: int
    images: int

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[range]:
        for batch in range(self.first, self.last):
            yield range(batch * self.size, min((batch + 1) * self.size, self.images))


def read(pictures: Pictures, batches: Batches, num_workers: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Batches of (images (B, 3, H, W), B reasons), in order; to be used within :func:`readers`."""
    loader: DataLoader[Any] = DataLoader(pictures, batch_sampler=batches, num_workers=num_workers)  # type: ignore[arg-type]
    yield from loader


@contextmanager
def readers(num_workers: int) -> Iterator[None]:
    """Around all that is done while other processes read: torch tells of one's death wherever we are just then.

    Raises:
        InputError: a process that reads images has died, mostly for want of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"a process that reads images died ({first_line(error)}); expected memory for {num_workers} of them; start "
            "the same again with fewer --data.num_workers: it goes on where it stopped"
        ) from error
