"""Splits of a data set, each image checked, and heads compared on one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from protopush.data.dataset import ImageDataset
from protopush.data.features import inference_batch_size
from protopush.data.images import check_images
from protopush.data.manifest import Catalog, DataConfig, Sample
from protopush.data.sources import load_catalog
from protopush.data.transforms import EvalTransform
from protopush.metrics.classification import classification_metrics
from protopush.models.model import ProtoModel
from protopush.models.model_folder import Run
from protopush.nn.head import HeadOptimal
from protopush.nn.outputs import iterate_outputs
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


def compare_heads(
    model: ProtoModel,
    heads: Sequence[HeadOptimal],
    loader: DataLoader[Any],
    device: torch.device,
    class_names: list[str],
) -> list[dict[str, Any]]:
    """The metrics of :func:`classification_metrics` for each head, as if the model had it.

    Args:
        model: its backbone makes the features, once.
        heads: on ``device``, in eval mode.
        loader: yields (images, labels, ids).
        device: of the model.
        class_names: in label order.
    """
    probabilities: list[list[Tensor]] = [[] for _ in heads]
    labels = []
    count = len(loader.dataset)  # type: ignore[arg-type]
    with (
        bar("Evaluating", count) as advance,
        iterate_outputs(model, loader, device, advance, call=model.backbone) as batches,
    ):
        for features, target, *_ in batches:
            for head, found in zip(heads, probabilities, strict=True):
                found.append(head(features).logits.float().softmax(dim=1).cpu())
            labels.append(target)
    return [classification_metrics(torch.cat(found), torch.cat(labels), class_names) for found in probabilities]


def validation_of(run: Run, config: DataConfig, catalog: Catalog) -> ImageDataset | None:
    """The validation images, each checked; None where there are none."""
    if not any(sample.split == "val" for sample in catalog.samples):
        return None
    return open_split(config, "val", run.class_names, run.transform)[0]


def scores(
    run: Run, val: ImageDataset | None, heads: Sequence[HeadOptimal], device: torch.device, num_workers: int
) -> list[dict[str, Any] | None]:
    """What a decision keeps of the metrics of each head; None without validation images."""
    if val is None:
        return [None for _ in heads]
    size = inference_batch_size(device)
    loader: DataLoader[Any] = DataLoader(val, batch_size=size, num_workers=num_workers)
    found = compare_heads(run.model, heads, loader, device, run.class_names)
    return [{name: metrics[name] for name in ("n", "balanced_accuracy", "auroc")} for metrics in found]
