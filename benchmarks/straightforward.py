"""The push as research code writes it: collect patches in lists, compare them all, update prototype by prototype.

It is what :func:`protopush.push_prototypes` is measured against; it gives the same result only where no class has more
patches than the cap, and all vectors have unit norm.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def push(
    model: nn.Module,
    loader: Iterable[Any],
    device: str = "cpu",
    momentum: float = 0.9,
    max_patches_per_class: int = 5000,
) -> None:
    """Move each prototype towards the nearest of its class's collected patches."""
    model.eval()
    manager = model.head.proto_manager
    patches = collect(model, loader, device, len(manager.get_prototype_indices()), max_patches_per_class)
    for class_index, (start, end) in enumerate(manager.get_prototype_indices()):
        if not patches[class_index]:
            continue
        features = torch.cat(patches[class_index])[:max_patches_per_class].to(device)
        distances = torch.cdist(manager.prototypes[start:end], features)
        for k in range(end - start):
            nearest = features[distances[k].argmin()]
            manager.prototypes[start + k] = momentum * manager.prototypes[start + k] + (1 - momentum) * nearest


def collect(
    model: nn.Module, loader: Iterable[Any], device: str, num_classes: int, max_patches: int
) -> list[list[Tensor]]:
    """The projected patches of each class, on the CPU, until it has its fill."""
    patches: list[list[Tensor]] = [[] for _ in range(num_classes)]
    counts = [0] * num_classes
    for images, labels in loader:
        _, x_fu1 = model.extract_features(images.to(device))
        projected = model.head.proj(x_fu1).cpu()
        for feature, label in zip(projected, labels.tolist(), strict=True):
            if counts[label] < max_patches:
                patches[label].append(feature)
                counts[label] += len(feature)
    return patches
