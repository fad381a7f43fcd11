"""Samples as a PyTorch dataset that knows where each of its items comes from, and the masks of samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from protopush.data.images import check_images, image_size, read_image, read_mask_file, sha256_of
from protopush.data.manifest import Sample
from protopush.data.regions import Region
from protopush.data.transforms import EvalTransform, View
from protopush.errors import InputError, listing


@dataclass(frozen=True)
class Provenance:
    """Where one item of a dataset comes from.

    Attributes:
        sample_id: what the dataset calls the item.
        file: path of the image file, relative to the data's root.
        sha256: of the file's bytes.
        group: lesion, patient, module, ...
        view: where its cells lie in the file (None: unknown, then an anchor has no box); also any object that has
            ``original``, (width, height), and ``original_box(region)``.
    """

    sample_id: int | str
    file: str | None = None
    sha256: str | None = None
    group: str | None = None
    view: View | None = None


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
        view = self.eval_transform.view(image_size(sample.image))
        return Provenance(sample.name, sample.name, sha256_of(sample.image), sample.group, view)


def check_masks(samples: Sequence[Sample], max_megapixels: float = inf) -> int:
    """Read every mask (of what an image is about: a lesion, a bird) once; returns how many samples have none.

    Raises:
        InputError: there is no mask at all, or some can't be read or have another size than their image; all are named.
    """
    masks = [sample.mask for sample in samples if sample.mask is not None]
    if not masks:
        raise InputError(
            f"none of the {len(samples)} images has a mask; expected a manifest with a column 'mask'; give "
            "--data.path MANIFEST.csv"
        )
    check_images(masks, max_megapixels=max_megapixels)
    if wrong := [text for text in map(_other_size, samples) if text]:
        raise InputError(f"{len(wrong)} masks do not fit: {listing(wrong)}; expected the image's own size")
    return len(samples) - len(masks)


def read_mask(sample: Sample) -> NDArray[np.bool_]:
    """A sample's mask, bool (height, width) of the upright picture.

    It is where the file is not 0; of a JPEG, whose zeros are not exact, where it is above 127. Where a file has an
    alpha channel and one colour alone, the mask is what is not transparent.

    Raises:
        InputError: the sample has none, it can't be read, or has another size than its image.
    """
    if sample.mask is None or _other_size(sample):
        raise InputError(f"the mask does not fit: {_other_size(sample) or sample.name}; expected the image's own size")
    return read_mask_file(sample.mask)


def mask_shares(sample: Sample, transform: EvalTransform, regions: Sequence[Region]) -> Tensor:
    """The share of each region of the model's input that lies on the sample's mask, float64 (L,); 1 without a mask."""
    if sample.mask is None:
        return torch.ones(len(regions), dtype=torch.float64)
    mask = read_mask(sample)
    height, width = mask.shape
    boxes = map(transform.view((width, height)).original_box, regions)
    shares = [mask[min(y0, height - 1) : y1, min(x0, width - 1) : x1].mean() for x0, y0, x1, y1 in boxes]
    return torch.tensor(shares, dtype=torch.float64)


def seen_mask(sample: Sample, transform: EvalTransform) -> Tensor:
    """What :func:`read_mask` gives, as the model sees its image: resized and cropped alike, bool (H, W)."""
    picture = Image.fromarray(read_mask(sample).astype(np.uint8) * 255).convert("RGB")
    return torch.from_numpy(np.asarray(transform.visible(picture))[..., 0] > 127)


def _other_size(sample: Sample) -> str:
    """How the sizes of mask and image differ; empty where they don't."""
    if sample.mask is None:
        return ""
    mask, image = image_size(sample.mask), image_size(sample.image)
    return "" if mask == image else f"{sample.mask} ({mask[0]}x{mask[1]}, its image {image[0]}x{image[1]})"
