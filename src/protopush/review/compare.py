"""Several heads on the same features: what a change of the prototypes alone has cost, for one pass over the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from protopush.head_optimal import HeadOptimal
from protopush.metrics.classification import classification_metrics
from protopush.model import ProtoModel
from protopush.training.progress import bar
from protopush.untouched import untouched


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
    with untouched(model), bar("Evaluating", len(loader)) as advance:
        for images, target, *_ in loader:
            features = model.backbone(images.to(device))
            for head, found in zip(heads, probabilities, strict=True):
                found.append(head(features).logits.float().softmax(dim=1).cpu())
            labels.append(target)
            advance(1)
    return [classification_metrics(torch.cat(found), torch.cat(labels), class_names) for found in probabilities]
