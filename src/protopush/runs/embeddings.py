"""Embeddings of images, kept in the cache: what other prototypes would make of the images is then known at once."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from protopush.data.dataset import ImageDataset
from protopush.data.features import CachedFeatures, cache_features, weights_fingerprint
from protopush.data.images import check_images, sha256_of
from protopush.data.manifest import DataConfig
from protopush.data.regions import Regions
from protopush.errors import InputError
from protopush.metrics.classification import classification_metrics
from protopush.models.model import ProtoModel
from protopush.models.model_folder import Run
from protopush.nn.head import HeadOptimal, HeadOutput

logger = logging.getLogger("protopush.runs")

AT_ONCE = 256  # images whose embeddings are read together


class Embedded(NamedTuple):
    """Unit embeddings (B, L, D), and where what they are of lies."""

    patches: Tensor
    regions: Regions


class Embedder(nn.Module):
    """Images to the unit embeddings that prototypes are compared with."""

    def __init__(self, model: ProtoModel) -> None:
        super().__init__()
        self.backbone, self.proj = model.backbone, model.head.proj
        self.compared, self.match = model.head.compared, model.head.match
        self.name, self.layout = f"embeddings of {model.backbone.name}", model.backbone.layout
        self.recipe = {**(model.backbone.recipe or {}), "match": self.match}

    def key(self) -> str:
        """Changes with every weight, and with what prototypes are compared with."""
        return f"{weights_fingerprint(self.state_dict())} {self.match}"

    def forward(self, images: Tensor) -> Embedded:
        features = self.backbone(images)
        what = features.patches if self.match == "local" else features.pooled
        return Embedded(F.normalize(self.proj(what), dim=-1), self.compared(features.regions))


def embeddings_of(
    run: Run, images: ImageDataset, device: torch.device, num_workers: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> CachedFeatures:  # fmt: skip
    """The embeddings of images, as float32: computed once for these weights and files, then read from the cache.

    The run's model is on ``device``.

    Raises:
        InputError: images can't be read.
    """
    files = [sample.image for sample in images.samples]
    try:
        hashes: Sequence[str] = [sha256_of(file) for file in files]
    except OSError:  # this names them all
        hashes = check_images(files, max_megapixels=DataConfig(**run.data).max_megapixels)

    def kept(folder: Path | None) -> CachedFeatures:
        return cache_features(
            Embedder(run.model), images, hashes, folder, device, num_workers=num_workers, advance=advance,
            precision="float32",
        )  # fmt: skip

    try:
        return kept(None)
    except InputError as error:  # no place there: they are computed for this once
        logger.warning("Outputs are not kept: %s", error)
        with tempfile.TemporaryDirectory(prefix="protopush-") as folder:
            return kept(Path(folder))


def outputs_of(embeddings: CachedFeatures, head: HeadOptimal, device: torch.device) -> Iterator[HeadOutput]:
    """What a head, in eval mode and on ``device``, says of images, batch by batch and in their order."""
    for patches, *_ in DataLoader(embeddings, AT_ONCE):
        with torch.no_grad():
            output = head.classify(patches.to(device))
        yield output


def logits_of(embeddings: CachedFeatures, head: HeadOptimal, device: torch.device) -> Tensor:
    """The logits (N, num_classes), on the CPU, that a head gives to images."""
    return torch.cat([output.logits.float().cpu() for output in outputs_of(embeddings, head, device)])


def scores_of(logits: Tensor, images: ImageDataset, class_names: Sequence[str]) -> dict[str, Any]:
    """``n``, ``balanced_accuracy`` and ``auroc`` of logits (N, num_classes)."""
    metrics = classification_metrics(logits.softmax(dim=1), torch.tensor(images.labels), list(class_names))
    return {name: metrics[name] for name in ("n", "balanced_accuracy", "auroc")}
