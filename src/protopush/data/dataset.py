"""Samples as a PyTorch dataset that knows where each of its items comes from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from protopush.data.images import image_size, read_image, sha256_of
from protopush.data.manifest import Sample
from protopush.data.provenance import Provenance
from protopush.data.transforms import EvalTransform


class ImageDataset(Dataset[tuple[Tensor, int, int]]):
    """Items are (image (3, H, W), label, index); the index is the sample's place in ``samples``.

    A dataset of your own that the push can read as well offers the same two methods: ``eval_view()``
    (the dataset without augmentation) and ``describe(index)`` (a :class:`protopush.data.provenance.Provenance`); with
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
