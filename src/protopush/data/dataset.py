"""What a dataset can say about one of its items.

Samples as a PyTorch dataset that knows where each of its items comes from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from protopush.data.images import image_size, read_image, sha256_of
from protopush.data.manifest import Sample
from protopush.data.transforms import EvalTransform


class CellBoxes(Protocol):
    """Where cells lie in the original picture of size (width, height), as :class:`protopush.data.transforms.View`."""

    @property
    def original(self) -> tuple[int, int]: ...

    def cell_box(self, cell: int, grid: tuple[int, int]) -> tuple[int, int, int, int]: ...


@dataclass(frozen=True)
class Provenance:
    """Where one item of a dataset comes from.

    Attributes:
        sample_id: what the dataset calls the item.
        file: path of the image file, relative to the data's root.
        sha256: of the file's bytes.
        group: lesion, patient, module, ...
        view: where its cells lie in the file (None: unknown, then an anchor has no box).
    """

    sample_id: int | str
    file: str | None = None
    sha256: str | None = None
    group: str | None = None
    view: CellBoxes | None = None


class ImageDataset(Dataset[tuple[Tensor, int, int]]):
    """Items are (image (3, H, W), label, index); the index is the sample's place in ``samples``.

    A dataset of your own that the push can read as well offers the same two methods: ``eval_view()``
    (the dataset without augmentation) and ``describe(index)`` (a :class:`protopush.data.dataset.Provenance`); with
    ``labels`` and ``groups`` (one for each item) the push need not read images to know them.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        eval_transform: EvalTransform,
        transform: Callable[[Image.Image], Tensor] | None = None,
    ) -> None:
        self.samples = list(samples)
        self.eval_transform = eval_transform
        self.transform = transform or eval_transform

    @property
    def labels(self) -> list[int]:
        """The label of each sample, known without reading an image."""
        return [sample.label for sample in self.samples]

    @property
    def groups(self) -> list[str | None]:
        """The group (lesion, patient) of each sample."""
        return [sample.group for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        sample = self.samples[index]
        return self.transform(read_image(sample.image)), sample.label, index

    def eval_view(self) -> ImageDataset:
        """The same samples through the deterministic transform."""
        view = copy.copy(self)
        view.transform = self.eval_transform
        return view

    def describe(self, index: int) -> Provenance:
        """File, hash, group and geometry of a sample, as the deterministic view shows it."""
        sample = self.samples[index]
        return Provenance(
            sample_id=sample.name,
            file=sample.name,
            sha256=sha256_of(sample.image),
            group=sample.group,
            view=self.eval_transform.view(image_size(sample.image)),
        )
