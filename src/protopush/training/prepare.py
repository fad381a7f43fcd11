"""Everything that can be checked before the long work starts, and the data and model that come of it."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from protopush._compat import ensure_torchvision
from protopush.backbones import Backbone, create_backbone
from protopush.data.dataset import ImageDataset
from protopush.data.features import inference_batch_size
from protopush.data.images import check_images
from protopush.data.manifest import Catalog, Sample, require_training_images
from protopush.data.sources import load_catalog
from protopush.data.transforms import EvalTransform, TrainTransform
from protopush.errors import InputError, first_line
from protopush.head_optimal import HeadOptimal
from protopush.losses import PrototypeLoss, balanced_class_weights
from protopush.model import ProtoModel
from protopush.push import check_momentum
from protopush.push.guard import check_guard
from protopush.training.config import DataConfig, RunConfig
from protopush.training.progress import bar

if TYPE_CHECKING:
    from lightning_fabric import Fabric

logger = logging.getLogger("protopush.training")


@dataclass
class Job:
    """A run that is ready to begin."""

    config: RunConfig
    catalog: Catalog
    model: ProtoModel
    transform: EvalTransform
    train: ImageDataset
    val: ImageDataset | None
    hashes: dict[str, str]  # image name -> SHA-256
    fabric: Fabric

    @property
    def head(self) -> HeadOptimal:
        """The prototype head."""
        return self.model.head  # type: ignore[return-value]

    def loader(self, dataset: Dataset[Any], shuffle: bool = False) -> DataLoader[Any]:
        """A loader with a seeded order of its own, so that nothing else's randomness moves it.

        Batches have the run's size where they train (``shuffle``) or hold stored features, else what suits the device.
        """
        generator = torch.Generator().manual_seed(self.config.train.seed)
        reads_files = isinstance(dataset, ImageDataset)
        only_forward = reads_files and not shuffle
        return DataLoader(
            dataset,
            batch_size=inference_batch_size(self.fabric.device) if only_forward else self.config.train.batch_size,
            shuffle=shuffle,
            num_workers=self.config.data.num_workers if reads_files else 0,
            generator=generator,
        )

    def class_weights(self) -> Tensor | None:
        """Class weights of the cross-entropy, or None where classes count as they come."""
        power = self.config.loss.class_balance
        balanced = balanced_class_weights(torch.tensor(self.train.labels), len(self.catalog.classes))
        return balanced.pow(power).to(self.fabric.device) if power else None

    def loss(self) -> PrototypeLoss:
        """The run's loss, on its device."""
        c = self.config.loss
        return PrototypeLoss(
            self.class_weights(), c.grounding, c.cluster, c.separation, c.orthogonality, c.consistency,
            c.separation_margin, c.label_smoothing,
        )  # fmt: skip


def prepare(config: RunConfig) -> Job:
    """Read the data's table, check every image, build the model.

    Raises:
        InputError: anything that would make the run fail or mean nothing.
    """
    _check_numbers(config)
    data = config.data
    catalog = load_catalog(data.path, data.source, seed=data.split_seed)
    require_training_images(catalog)
    hashes = _check_samples(catalog.samples)
    fabric = make_fabric(config.train.device, config.train.precision)
    fabric.seed_everything(config.train.seed, verbose=False)
    backbone = create_backbone(config.model.backbone, pretrained=config.model.pretrained)
    head = HeadOptimal(
        backbone.channels,
        len(catalog.classes),
        num_prototypes=config.model.num_prototypes,
        embed_dim=config.model.embed_dim,
        max_prototypes=config.model.max_prototypes,
        dropout=config.model.dropout,
        match=config.model.match,
        anchoring=config.push.anchoring,
    )
    model = ProtoModel(backbone, head)
    model.class_names = list(catalog.classes)
    if config.train.freeze_backbone:
        backbone.freeze()
    transform = EvalTransform(backbone.preprocessing, data.crop_pct)
    train, val = _datasets(catalog, transform, _train_transform(config, backbone))
    return Job(config, catalog, model.to(fabric.device), transform, train, val, hashes, fabric)


def _datasets(
    catalog: Catalog, transform: EvalTransform, augment: TrainTransform | None
) -> tuple[ImageDataset, ImageDataset | None]:
    train = ImageDataset(catalog.split("train"), transform, augment)
    has_val = any(sample.split == "val" for sample in catalog.samples)
    if not has_val:
        logger.warning("no validation images: the last epoch is taken as the best one")
    return train, ImageDataset(catalog.split("val"), transform) if has_val else None


def _train_transform(config: RunConfig, backbone: Backbone) -> TrainTransform | None:
    if config.train.freeze_backbone or not config.data.augment:
        return None
    return TrainTransform(backbone.preprocessing, config.data.flip_vertical)


def _check_numbers(config: RunConfig) -> None:
    train, push = config.train, config.push
    at_least_one = {
        "train.epochs": train.epochs,
        "train.batch_size": train.batch_size,
        "model.num_prototypes": config.model.num_prototypes,
        "model.embed_dim": config.model.embed_dim,
        "model.max_prototypes": config.model.max_prototypes or 1,
        "push.interval": push.interval,
        "push.anchor_refresh": push.anchor_refresh,
    }
    for name, value in at_least_one.items():
        if value < 1:
            raise InputError(f"{name} is {value}; expected at least 1")
    between: dict[str, tuple[float, float, float]] = {
        "push.start_epoch": (push.start_epoch, 0, math.inf),
        "push.grow_quantile": (push.grow_quantile, 0, 1),
        "push.grow_below": (push.grow_below, -1, 1),
        "push.prune_cosine": (push.prune_cosine, -1, 1),
    }
    for name, (number, least, most) in between.items():
        if not least <= number <= most:
            raise InputError(f"{name} is {number}; expected {least} or more" + (f", up to {most}" if most < 9 else ""))
    check_momentum(push.momentum, "push.momentum")
    check_guard(push.guard, push.guard_budget, push.anchoring == "live")


def make_fabric(device: str, precision: str = "32-true") -> Fabric:
    """One device under Lightning Fabric.

    Raises:
        InputError: the device isn't there.
    """
    ensure_torchvision()
    with quiet():
        from lightning_fabric import Fabric

        try:
            return Fabric(accelerator=device, devices=1, precision=precision)  # type: ignore[arg-type]
        except Exception as error:
            raise InputError(
                f"cannot run on device {device!r} with {precision} ({first_line(error)}); try --train.device cpu"
            ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that Fabric and its imports give about other people's settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_split(
    data: DataConfig, split: str, class_names: list[str], transform: EvalTransform
) -> tuple[ImageDataset, Catalog]:
    """One split of a source for a trained model, each of its images checked.

    Raises:
        InputError: unknown labels, unreadable images, an empty split.
    """
    catalog = load_catalog(data.path, data.source, classes=class_names, seed=data.split_seed)
    samples = catalog.split(split)
    _check_samples(samples)
    return ImageDataset(samples, transform), catalog


def _check_samples(samples: Sequence[Sample]) -> dict[str, str]:
    """Decode every image once; its SHA-256 by its name."""
    with bar("Checking images", len(samples)) as advance:
        digests = check_images([sample.image for sample in samples], lambda: advance(1))
    return {sample.name: digest for sample, digest in zip(samples, digests, strict=True)}
