"""Phases of a run: the whole model on images, its head or last layers on stored outputs; and the best state of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from protopush.backbones.create import Backbone, FeatureReader, Features
from protopush.backbones.division import Tail, Trunk
from protopush.data.dataset import ImageDataset
from protopush.data.features import CachedFeatures, cache_features
from protopush.distributed import raise_on_all_ranks
from protopush.evaluation.evaluate import evaluate, score_of
from protopush.models.model import ProtoModel
from protopush.nn.prototypes import Anchor, PrototypeManager, anchors_from, plain_anchors
from protopush.push import refresh_anchors
from protopush.runs.progress import bar
from protopush.training.config import RunConfig
from protopush.training.setup import Job


class Stage:
    """A model in training, and its loaders: training images in random order, in order, and validation images."""

    weights = ""  # which epoch's they are at the end, in words

    def __init__(self, job: Job, model: nn.Module, train: ImageDataset, val: ImageDataset | None) -> None:
        self.job, self.model = job, model
        self.train_loader = job.loader(train, train=True)
        self.plain_train_loader = job.loader(train.eval_view())
        self.val_loader = job.loader(val) if val else None

    def train(self) -> None:
        """Dropout and the like on; batch norms of the backbone keep their statistics unless they are to learn."""
        self.model.train()
        if self.job.config.train.freeze_norms:
            for module in self.job.model.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def refresh(self) -> None:
        """Embed live anchors again, from their images, where the backbone has moved."""
        if self.job.head.anchoring == "live":
            refresh_anchors(self.job.model, self.job.loader(self.job.train.eval_view()), self.job.fabric.device)


class Joint(Stage):
    """What is trained when the backbone learns too: the model itself, on images."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, job.model, job.train, job.val)
        if job.head.proto_manager.anchor_crops is not None:
            self.refresh()  # anchors of epochs of the head alone


class Stored(Stage):
    """What is trained on outputs of frozen layers that were computed once.

    Args:
        job: the run.
        extract: these layers, images to an object with ``patches`` and ``regions``.
        rest: what learns behind them: stored patches to :class:`protopush.backbones.Features`.
        views: orientations of each training image.
    """

    def __init__(self, job: Job, extract: nn.Module, rest: nn.Module, views: int) -> None:
        self.extract = extract
        train = self.features(job, job.train, "training", views)
        val = self.features(job, job.val, "validation") if job.val else None
        super().__init__(job, ProtoModel(rest, job.head).to(job.fabric.device), train, val)

    def features(self, job: Job, images: ImageDataset, what: str, views: int = 1) -> ImageDataset:
        """The outputs for a data set, from the cache where they are there; else the processes compute them together.

        Where nothing is to be stored, the images themselves.
        """
        config = job.config
        if config.trainer.cache_precision == "off":
            return images.eval_view()

        def cached() -> CachedFeatures:
            hashes = [job.hashes[sample.name] for sample in images.samples]
            place, workers = config.trainer.cache_dir, config.data.num_workers
            with bar(f"Features of the {what} images", len(images)) as advance:
                return cache_features(
                    self.extract, images, hashes, Path(place) if place else None, job.fabric.device,
                    num_workers=workers, advance=advance, views=views, precision=config.trainer.cache_precision,
                )  # fmt: skip

        return raise_on_all_ranks(cached)


class Unstored(nn.Module):
    """Stands in for the frozen backbone where its outputs are not stored: what it makes of images, without learning."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.hidden = (backbone.eval(),)  # no part of what is trained, averaged and saved
        self.regions, self.regions_of = backbone.regions, backbone.regions_of

    def forward(self, images: Tensor) -> Features:
        """Images (B, 3, H, W) to features."""
        with torch.no_grad():
            found: Features = self.hidden[0](images)
        return found


class Frozen(Stored):
    """What is trained when the backbone is frozen: the head, on features, stored or computed in each epoch."""

    def __init__(self, job: Job) -> None:
        views = job.config.data.cached_views if job.config.train.freeze_backbone else 1
        backbone, off = job.model.backbone, job.config.trainer.cache_precision == "off"
        super().__init__(job, backbone, Unstored(backbone) if off else FeatureReader(backbone.regions), max(1, views))

    def refresh(self) -> None:
        """Nothing: features of a frozen backbone don't grow old."""


class LastLayers(Stored):
    """What is trained when the last layers of the backbone learn, on what the first ones made of the images."""

    def __init__(self, job: Job) -> None:
        assert job.division is not None  # the configuration was checked
        backbone = job.model.backbone
        trunk, tail = Trunk(backbone, job.division), Tail(backbone, job.division)
        super().__init__(job, trunk, tail, job.config.data.cached_views)
        if job.head.proto_manager.anchor_crops is not None:
            self.refresh()


class Phase(NamedTuple):
    """Epochs (from ``start``, before ``end``) of one kind of stage."""

    stage: type[Joint | Frozen | LastLayers]
    start: int
    end: int


def phases(config: RunConfig) -> list[Phase]:
    """The head alone, then the whole model or its last layers, as the run asks for them."""
    train = config.train
    frozen = train.epochs if train.freeze_backbone else train.head_epochs
    both = [Phase(Frozen, 0, frozen), Phase(LastLayers if config.data.cached_views else Joint, frozen, train.epochs)]
    return [phase for phase in both if phase.start < phase.end]


def on_validation(job: Job, stage: Stage) -> dict[str, Any] | None:
    """The metrics on the validation images, in the precision of the run; None where there are no such images."""
    if stage.val_loader is None:
        return None
    with job.fabric.autocast():
        return evaluate(stage.model, stage.val_loader, job.fabric.device, list(job.catalog.classes))


class Best:
    """The best state on the validation images; without any, the last one."""

    PLAIN = ("score", "metrics", "where", "stale", "state")

    def __init__(self, model: nn.Module, manager: PrototypeManager, metric: str) -> None:
        self.model = model
        self.manager = manager
        self.metric = metric
        self.score = float("-inf")
        self.metrics: dict[str, Any] | None = None  # with which it scored; None without validation images
        self.where = "the first weights"  # the epoch, in words
        self.stale = 0  # epochs since
        self.state: dict[str, Tensor] = {}
        self.anchors: list[Anchor | None] = []

    def see(self, metrics: dict[str, Any] | None, where: str) -> None:
        """Compare the model as it is now; live prototypes must have been pushed once."""
        if self.manager.anchor_ids is not None and not any(self.manager.anchors):
            self.stale = 0
            return
        score = self.score if metrics is None else score_of(metrics, self.metric)
        if score > self.score or metrics is None:
            self.stale = 0
        if score >= self.score:  # of equals the last: it has learned longer
            self.score, self.metrics, self.where = score, metrics, where
            self.state = {key: value.detach().cpu().clone() for key, value in self.model.state_dict().items()}
            self.anchors = list(self.manager.anchors)

    def restore(self) -> None:
        """Put the best state back."""
        if self.state:
            self.model.load_state_dict(self.state)
            self.manager.anchors = list(self.anchors)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {name: getattr(self, name) for name in self.PLAIN} | {"anchors": plain_anchors(self.anchors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        for name in self.PLAIN:
            setattr(self, name, state[name])
        self.anchors = anchors_from(state["anchors"])
