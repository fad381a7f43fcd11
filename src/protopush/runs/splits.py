"""Splits of a data set, each image checked."""

from __future__ import annotations

from collections.abc import Sequence

from protopush.data.dataset import ImageDataset
from protopush.data.images import check_images
from protopush.data.manifest import Catalog, DataConfig, Sample
from protopush.data.sources import load_catalog
from protopush.data.transforms import EvalTransform
from protopush.runs.progress import bar


def open_split(
    data: DataConfig, split: str, class_names: list[str], transform: EvalTransform
) -> tuple[ImageDataset, Catalog]:
    """One split of a source for a trained model, each of its images checked.

    Raises:
        InputError: unknown labels, unreadable images, an empty split.
    """
    catalog = load_catalog(data.path, data.source, classes=class_names, seed=data.split_seed)
    samples = catalog.split(split)
    check_samples(samples)
    return ImageDataset(samples, transform), catalog


def check_samples(samples: Sequence[Sample]) -> dict[str, str]:
    """Decode every image once; its SHA-256 by its name."""
    with bar("Checking images", len(samples)) as advance:
        digests = check_images([sample.image for sample in samples], lambda: advance(1))
    return {sample.name: digest for sample, digest in zip(samples, digests, strict=True)}
