"""Masks of what an image is about (a lesion, a bird): files of the image's own size, not 0 inside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from protopush.data.images import check_images, image_size, read_image
from protopush.data.manifest import Sample
from protopush.data.transforms import EvalTransform
from protopush.errors import InputError, listing


def check_masks(samples: Sequence[Sample]) -> int:
    """Read every mask once; returns how many samples have none.

    Raises:
        InputError: there is no mask at all, or some can't be read or have another size than their image; all are named.
    """
    masked = [sample for sample in samples if sample.mask is not None]
    if not masked:
        raise InputError(
            f"none of the {len(samples)} images has a mask; expected a manifest with a column 'mask'; give "
            "--data.path MANIFEST.csv"
        )
    check_images([sample.mask for sample in masked if sample.mask is not None])
    wrong = [text for text in map(_other_size, masked) if text]
    if wrong:
        raise InputError(f"{len(wrong)} masks do not fit: {listing(wrong)}; expected the image's own size")
    return len(samples) - len(masked)


def read_mask(sample: Sample) -> NDArray[np.bool_]:
    """A sample's mask, bool (height, width) of the upright picture.

    Raises:
        InputError: the sample has none, it can't be read, or has another size than its image.
    """
    if sample.mask is None or _other_size(sample):
        raise InputError(f"the mask does not fit: {_other_size(sample) or sample.name}; expected the image's own size")
    mask: NDArray[np.bool_] = np.asarray(read_image(sample.mask)).max(axis=2) > 0
    return mask


def seen_mask(sample: Sample, transform: EvalTransform) -> Tensor:
    """A sample's mask as the model sees its image: resized and cropped alike, bool (H, W).

    Raises:
        InputError: as :func:`read_mask`.
    """
    picture = Image.fromarray(read_mask(sample).astype(np.uint8) * 255).convert("RGB")
    return torch.from_numpy(np.asarray(transform.visible(picture))[..., 0] > 127)


def _other_size(sample: Sample) -> str:
    """How the sizes of mask and image differ; empty where they don't."""
    if sample.mask is None:
        return ""
    mask, image = image_size(sample.mask), image_size(sample.image)
    return "" if mask == image else f"{sample.mask} ({mask[0]}x{mask[1]}, its image {image[0]}x{image[1]})"
