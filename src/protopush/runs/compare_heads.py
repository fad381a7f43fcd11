"""Heads compared on the same features: the cost of a change of prototypes, in one pass over the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from protopush.data.dataset import ImageDataset
from protopush.data.features import inference_batch_size
from protopush.data.manifest import Catalog, DataConfig
from protopush.metrics.classification import classification_metrics
from protopush.models.model import ProtoModel
from protopush.models.model_folder import Run
from protopush.nn.head import HeadOptimal
from protopush.nn.outputs import iterate_outputs
from protopush.runs.progress import bar
from protopush.runs.splits import open_split


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
