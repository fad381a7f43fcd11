"""Feature maps that are there already, and a model that does nothing to them: what is left is the push alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from protopush.nn.prototypes import PrototypeManager

BATCH = 32


class ReadyMaps(nn.Module):
    """A model whose images are feature maps (B, L, D) already: backbone and projection do nothing."""

    def __init__(self, classes: int, prototypes: int, dim: int) -> None:
        super().__init__()
        self.head = nn.Module()
        self.head.proj = nn.Identity()
        self.head.proto_manager = PrototypeManager(classes, prototypes, dim)

    def extract_features(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled feature (B, 1, D) and the patches (B, L, D)."""
        return maps[:, :1], maps  # a push of patches reads no pooled feature: none is charged to it


class GeneratedMaps(Dataset[tuple[Tensor, int]]):
    """Maps (cells, dim) that are made when they are asked for, each from its own seed: none is kept."""

    def __init__(self, count: int, classes: int, cells: int, dim: int) -> None:
        self.count, self.classes, self.shape = count, classes, (cells, dim)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(index)), index % self.classes


def labelled(images: Tensor, classes: int) -> TensorDataset:
    """Images with labels: as many of each class as of any other, in a random but fixed order."""
    count = len(images)
    labels = torch.randperm(count, generator=torch.Generator().manual_seed(0)) % classes
    return TensorDataset(images, labels)


def training_loader(dataset: Dataset[tuple[Tensor, int]]) -> DataLoader[tuple[Tensor, int]]:
    """The loader that a push gets in a training."""
    return DataLoader(dataset, BATCH, shuffle=True)


def plain_loader(dataset: Dataset[tuple[Tensor, int]]) -> DataLoader[tuple[Tensor, int]]:
    """The same in order."""
    return DataLoader(dataset, BATCH)


def read_all(loader: Iterable[tuple[Tensor, Tensor]], device: str = "cpu") -> None:
    """Iterate, bring the maps where they are needed, and do nothing else."""
    for maps, _ in loader:
        maps.to(device)
