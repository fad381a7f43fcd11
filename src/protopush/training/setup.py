"""Setup of a run: its data, samplers, model and loss, with all that can be checked before the long work starts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from protopush.backbones.create import Backbone, create_backbone
from protopush.backbones.division import Division, divide
from protopush.backbones.windows import FULL
from protopush.data.dataset import ImageDataset, check_masks, mask_shares
from protopush.data.features import CachedFeatures, collate_stored, inference_batch_size
from protopush.data.manifest import (
    Catalog,
    check_names,
    refuse_duplicates,
    require_training_images,
    without_images,
)
from protopush.data.regions import Regions
from protopush.data.shards import index_shards
from protopush.data.sources import load_catalog
from protopush.data.transforms import EvalTransform, TrainTransform
from protopush.distributed import broadcast_from_rank_zero, raise_on_all_ranks, rank_and_size
from protopush.errors import InputError, listing
from protopush.models.model import ProtoModel
from protopush.nn.head import HeadOptimal
from protopush.nn.losses import PrototypeLoss, balanced_class_weights, effective_class_weights, logit_shift
from protopush.nn.priors import read_prior, seen_more, shares_of, trained_prior
from protopush.runs.progress import bar
from protopush.runs.run import check_samples, make_fabric
from protopush.runs.split_record import catalog_to_go_on, refuse_changed
from protopush.training.config import RunConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

logger = logging.getLogger("protopush.training")


def seed_of(*numbers: int) -> int:
    """One seed from several numbers (seed, epoch, rank), far from those of their neighbours.

    Example:
        >>> seed_of(0, 1) != seed_of(1, 0)
        True
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class EpochSampler(Sampler[int]):
    """The indices that this process reads in an epoch: the same for an epoch however often it is asked.

    Batches of all processes together are those of one process whose batches are as many times larger. Where the number
    of samples can't be divided among the processes, some at the beginning are read twice.

    Args:
        labels: of the samples.
        seed: decides the order, together with the epoch.
        balanced: each draw takes each class with the same chance; in an epoch there are as many draws as samples.

    Example:
        >>> sampler = EpochSampler([0, 0, 0, 1], seed=0)
        >>> sorted(sampler)
        [0, 1, 2, 3]
    """

    def __init__(self, labels: Sequence[int], seed: int, balanced: bool = False) -> None:
        self.labels, self.indices = torch.tensor(labels), range(len(labels))  # a push may choose of all
        self.seed, self.balanced, self.epoch = seed, balanced, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next pass is."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        count = len(self.labels)
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        if self.balanced:
            sizes = torch.bincount(self.labels)
            order = torch.multinomial(1.0 / sizes[self.labels], count, replacement=True, generator=generator)
        else:
            order = torch.randperm(count, generator=generator)
        rank, size = rank_and_size()
        places = torch.arange(rank, count + -count % size, size) % count
        yield from order[places].tolist()

    def __len__(self) -> int:
        return -(-len(self.labels) // rank_and_size()[1])


@dataclass
class Job:
    """A run that is ready to start."""

    config: RunConfig
    catalog: Catalog
    model: ProtoModel
    transform: EvalTransform
    train: ImageDataset
    val: ImageDataset | None
    hashes: dict[str, str]  # image name -> SHA-256
    fabric: Fabric
    mask_shares: Tensor | None = None  # (N, L) of the training images' patches, where the run uses masks
    division: Division | None = None  # of the backbone, where only its last layers learn

    @property
    def head(self) -> HeadOptimal:
        """The prototype head."""
        return self.model.head

    def loader(self, dataset: Any, train: bool = False) -> DataLoader[Any]:
        """Batches of this process's share of a data set.

        To train, in a seeded order that ``loader.sampler.set_epoch`` moves on, in batches of the run's size; else each
        sample once over all processes, in order, in batches of the run's size (stored features) or of what suits the
        device (images).
        """
        reads_files = not isinstance(dataset, CachedFeatures)
        config = self.config.train
        if train:
            sampler: Any = EpochSampler(dataset.labels, config.seed, config.sampling == "balanced")
        else:
            rank, size = rank_and_size()
            sampler = range(rank, len(dataset), size)  # none is read twice
        return DataLoader(
            dataset,
            batch_size=config.batch_size if train or not reads_files else inference_batch_size(self.fabric.device),
            sampler=sampler,
            num_workers=self.config.data.num_workers if reads_files else 0,
            collate_fn=None if reads_files else collate_stored,
            generator=torch.Generator().manual_seed(config.seed),  # so that nothing else's randomness moves it
        )

    def class_weights(self) -> Tensor | None:
        """Class weights of the cross-entropy, or None where classes count as they come."""
        config, labels, classes = self.config.loss, torch.tensor(self.train.labels), len(self.catalog.classes)
        if config.class_weights == "none" or not config.class_balance:
            return None
        if config.class_weights == "effective":
            weights = effective_class_weights(labels, classes, config.effective_beta)
        else:
            weights = balanced_class_weights(labels, classes)
        return weights.pow(config.class_balance).to(self.fabric.device)

    def train_shares(self) -> list[float]:
        """The classes' shares of the training images."""
        return _shares(self.train.labels, self.catalog).tolist()

    def seen_more(self) -> Tensor:
        """How much more than by its share each class counts, but for :meth:`class_weights`; 1 with the defaults."""
        balanced, shares = self.config.train.sampling == "balanced", _shares(self.train.labels, self.catalog)
        return seen_more(shares, balanced, self.config.loss.logit_adjustment)

    def trained_prior(self) -> list[float]:
        """The prior that the probabilities assume before anything is fitted to another one."""
        return trained_prior(_shares(self.train.labels, self.catalog), self.seen_more(), self.class_weights())

    def prior(self) -> list[float]:
        """The prior that the probabilities assume at the end."""
        wish = self.config.train.prior
        if wish is None:
            return self.trained_prior()
        return read_prior(wish, self.catalog.classes, self.train_shares(), "train.prior")

    def loss(self) -> PrototypeLoss:
        """The run's loss, on its device."""
        c = self.config.loss
        labels, classes = torch.tensor(self.train.labels), len(self.catalog.classes)
        shift = logit_shift(labels, classes, c.logit_adjustment) if c.logit_adjustment else None
        return PrototypeLoss(
            self.class_weights(), c.grounding, c.cluster, c.separation, c.orthogonality, c.consistency,
            c.off_mask, c.separation_margin, c.label_smoothing, shift,
        ).to(self.fabric.device)  # fmt: skip


def prepare(config: RunConfig, fabric: Fabric | None = None, folder: Path | None = None) -> Job:
    """Read the data's table, check every image, build the model.

    Args:
        config: of the run.
        fabric: launched already; else one device's.
        folder: of a run that goes on, whose images keep their splits.

    Raises:
        InputError: anything that would make the run fail or mean nothing.
    """
    config.check()
    fabric = fabric or make_fabric(config.trainer.device, config.trainer.precision)
    catalog = broadcast_from_rank_zero(lambda: _catalog(config, folder))
    raise_on_all_ranks(lambda: index_shards(sample.image for sample in catalog.samples))
    hashes = broadcast_from_rank_zero(lambda: check_samples(catalog.samples, config.data.max_megapixels))
    if folder is not None:
        raise_on_all_ranks(lambda: refuse_changed(folder, hashes))
    if not config.data.allow_duplicates:
        refuse_duplicates(catalog.samples, hashes)
    fabric.seed_everything(config.train.seed, verbose=False)
    model, division = raise_on_all_ranks(lambda: _model(config, catalog))
    preprocessing, data, augment = model.backbone.preprocessing, config.data, None
    if data.cached_views == 8 and preprocessing.size[0] != preprocessing.size[1]:
        height, width = preprocessing.size
        raise InputError(
            f"data.cached_views is 8, which has quarter turns, but images have {height}x{width} pixels; expected "
            "square ones; give --data.cached_views 4"
        )
    transform = EvalTransform(preprocessing, data.crop_pct)
    if data.augment and not config.train.freeze_backbone:
        augment = TrainTransform(preprocessing, data.flip_vertical, data.auto_augment, data.random_erasing)
    train = ImageDataset(catalog.split("train"), transform, augment)
    held = [sample for sample in catalog.samples if sample.split == "val"]
    if not held:
        logger.warning("no validation images: the last epoch is taken as the best one")
    elif absent := without_images(held, catalog.classes):
        logger.warning("no validation images of %s: the best epoch is chosen by the other classes", listing(absent))
    val = ImageDataset(held, transform) if held else None
    shares = _mask_shares(config, train, model.backbone.regions)
    return Job(config, catalog, model.to(fabric.device), transform, train, val, hashes, fabric, shares, division)


def _catalog(config: RunConfig, folder: Path | None) -> Catalog:
    data, prior = config.data, config.train.prior
    if folder is None:
        catalog = load_catalog(data.path, data.source, seed=data.split_seed)
    else:
        catalog = catalog_to_go_on(data, folder)
    require_training_images(catalog)
    check_names(catalog)
    if config.train.select == "auroc":
        _require_two_classes(catalog)
    if prior is not None:  # before the images are read
        read_prior(prior, catalog.classes, [], "train.prior")
    return catalog


def _require_two_classes(catalog: Catalog) -> None:
    labels = [sample.label for sample in catalog.samples if sample.split == "val"]
    if len(set(labels)) == 1:
        raise InputError(
            f"train.select is auroc, but all {len(labels)} validation images are of one class; expected two or more; "
            "give --train.select accuracy, or add images"
        )


def _shares(labels: Sequence[int], catalog: Catalog) -> Tensor:
    return shares_of(torch.tensor(labels), len(catalog.classes))


def _mask_shares(config: RunConfig, train: ImageDataset, regions: Regions) -> Tensor | None:
    """How much of each patch of each training image lies on its mask (N, L); None where the run doesn't use masks."""
    if not config.push.min_mask_share and not config.loss.off_mask:
        return None
    without = check_masks(train.samples, config.data.max_megapixels)
    logger.info("Masks are used in training; %d of %d images have none", without, len(train))
    with bar("Reading masks", len(train)) as advance:
        shares = []
        for sample in train.samples:
            shares.append(mask_shares(sample, train.eval_transform, regions.boxes))
            advance(1)
    return torch.stack(shares)


def _crop_size(config: RunConfig, backbone: Backbone) -> int | None:
    """The side of the pixels that live anchors of a trained backbone are embedded from; None where they are not."""
    if config.train.freeze_backbone or config.push.anchoring != "live" or not backbone.is_local:
        return None
    if not config.train.freeze_norms and any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules()
    ):
        raise InputError(
            "windows with batch norms that learn from a batch's statistics would see each other in training; expected "
            "norms that keep theirs; leave train.freeze_norms true, or choose a backbone without batch norms"
        )
    return int(max(max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in backbone.regions.boxes))


def _model(config: RunConfig, catalog: Catalog) -> tuple[ProtoModel, Division | None]:
    c = config.model
    sides = [c.image_size] * 2 if isinstance(c.image_size, int) else c.image_size
    given: dict[str, Any] = {
        "size": sides and tuple(sides), "stage": c.stage,
        "windows": c.windows and asdict(c.windows), "window_input": c.window_input,
    }  # fmt: skip
    backbone = create_backbone(
        c.backbone, pretrained=c.pretrained, **{key: value for key, value in given.items() if value is not None}
    )
    if c.windows and len(backbone.regions) == 1 and c.windows.size != FULL:
        height, width = backbone.preprocessing.size
        raise InputError(
            f"model.windows.size is {c.windows.size}, and images have {height}x{width} pixels: one window is all of "
            "an image; expected smaller ones; give --model.windows.size, --model.image_size, or --model.windows null"
        )
    if c.stage is not None:
        backbone.measure()
    head = HeadOptimal(
        backbone.channels, len(catalog.classes), num_prototypes=c.num_prototypes, embed_dim=c.embed_dim,
        max_prototypes=c.max_prototypes, dropout=c.dropout, match=c.match, top_patches=c.top_patches,
        anchoring=config.push.anchoring, crop_size=_crop_size(config, backbone),
    )  # fmt: skip
    model = ProtoModel(backbone, head)
    model.class_names = list(catalog.classes)
    trainable, division = config.train.trainable_stages, None
    if config.train.freeze_backbone:
        backbone.freeze()
    elif trainable is not None:
        division = divide(backbone, trainable)
    if config.trainer.channels_last:
        backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.trainer.compile:
        backbone.compile()
    return model, division
