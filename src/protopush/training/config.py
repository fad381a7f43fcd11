"""Options of a run, with their ranges.

They live together, and without torch, because the command line reads all of them before anything heavy is imported; the
rooms below take plain arguments and never see them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from protopush.data.manifest import DataConfig
from protopush.errors import (
    Cosine,
    Count,
    CountOrZero,
    InputError,
    OpenShare,
    Positive,
    PositiveOrZero,
    Range,
    Share,
    check_fields,
)
from protopush.push.options import PushSettings


@dataclass
class WindowsConfig:
    """Windows that the backbone sees one by one, alone: nothing outside a window can change what is said of it.

    Args:
        size: pixels of a side, or several sizes; full is the whole image as one window.
        stride: pixels from one window to the next, one for each size; none: half the size.
    """

    size: int | Literal["full"] | list[int | Literal["full"]] = 64
    stride: int | list[int] | None = None


@dataclass
class ModelConfig:
    """The network.

    Args:
        backbone: any timm model name, fusion:one+other (two maps, fused per cell), or hf:name (Hugging Face).
        pretrained: true (the model's own weights), false (random) or a file of weights.
        image_size: pixels of a side, or [height, width]; none: what the backbone was trained on.
        stage: an earlier level of a timm model to stop at: its number (from 0; -2: from the end) or a layer (blocks.3).
        windows: windows that the backbone sees alone, so that prototypes are local; null: the image as a whole.
        window_input: pixels of a side that windows are enlarged to before the backbone; none: they are not.
        num_prototypes: prototypes per class.
        max_prototypes: slots per class, room to grow; none: as many as prototypes.
        embed_dim: size of the embedding space.
        dropout: after the projection.
        match: local (prototypes against every patch) or global (against the pooled feature).
        top_patches: a similarity is the mean over so many most similar patches; 1: the most similar one alone.
    """

    backbone: str = "tf_efficientnet_lite0"
    pretrained: bool | str = True
    image_size: Annotated[int, Range(8)] | list[int] | None = None
    stage: int | str | None = None
    windows: WindowsConfig | None = field(default_factory=WindowsConfig)
    window_input: Annotated[int, Range(8)] | None = None
    num_prototypes: Count = 10
    max_prototypes: Count | None = None
    embed_dim: Count = 128
    dropout: Share = 0.1
    match: Literal["local", "global"] = "local"
    top_patches: Count = 1


@dataclass
class LossConfig:
    """Weights of the loss terms; 0 leaves a term out.

    Args:
        grounding: each prototype near a patch of its class, so that a hard push costs little.
        cluster: each image near a prototype of its class.
        separation: other classes' prototypes beyond a margin.
        orthogonality: prototypes of a class unlike each other.
        consistency: images of a class use its prototypes alike.
        off_mask: similarity to patches that lie off the masks of the manifest; for a frozen backbone.
        separation_margin: cosine up to which other classes' prototypes may be similar.
        label_smoothing: of the cross-entropy.
        class_weights: of the cross-entropy: inverse (to the class's size), effective (to its effective number of
            samples, Cui et al. 2019) or none.
        class_balance: exponent of these weights: 0 counts images alike, 1 counts as class_weights says.
        effective_beta: of the effective number: 0 is none, towards 1 it becomes inverse.
        logit_adjustment: in training, logits are raised by this often the log of the class's share (Menon et al.
            2021; 1 is its theory): instead of class weights, not on top of them.
    """

    grounding: float = 1.0
    cluster: float = 0.0
    separation: float = 0.0
    orthogonality: float = 0.05
    consistency: float = 0.0
    off_mask: PositiveOrZero = 0.0
    separation_margin: float = 0.3
    label_smoothing: Share = 0.0
    class_weights: Literal["inverse", "effective", "none"] = "inverse"
    class_balance: float = 1.0
    effective_beta: OpenShare = 0.999
    logit_adjustment: PositiveOrZero = 0.0


@dataclass(frozen=True)
class PushConfig(PushSettings):
    """When and how prototypes are pushed. (How, for the most part, stands in PushSettings.)

    Args:
        start_epoch: first epoch (counted from 1) with a push; 0: also before the first.
        interval: epochs between pushes.
        use_local: patches (true) or pooled features; by default what the head matches.
        anchoring: off, or live: from its first push on a prototype is its anchor's embedding at every step.
        min_mask_share: share of an anchor that must lie on its image's mask, where the manifest has masks; 0: any.
        anchor_refresh: steps between two embeddings of the live anchors' images, where the backbone is trained.
        guard: what is done where a push costs accuracy on validation images: off (nothing is measured), report,
            rollback, or budget (the momentum is raised until the cost is within the budget).
        rows: after the first push that follows an epoch, only so many prototypes stay of the commonest classes, which
            make up three quarters of the training images, and twice as many of any other: those that the loss would
            miss most, so that an explanation has few rows; none: all stay.
        grow: after each push, badly covered classes with a free slot get another prototype.
        grow_quantile: of the best similarity of a class's samples, which says how well it is covered.
        grow_below: the similarity below which it is badly covered.
        prune: after each push, prototypes that are duplicates or never matter are removed.
        prune_cosine: two prototypes of a class more alike than this are duplicates.
        final_decay: no push follows an epoch that ends with the learning rate below this share of its peak: what a push
            moves could not be learned any more, and the final push is near; 0: push there as well.
        shortlist: a push of live prototypes, once each has an anchor, embeds the anchors' images alone: no other patch
            can be nearer than a prototype's own. For others there is no such bound: each push reads every image.
        candidates: images kept for each prototype, from which a decision about it is worked out at once; 0: none.
        final: the push of the best model: hard (real patches), momentum, or none (only name the nearest patches); live
            prototypes are real patches already: they stay.
    """

    start_epoch: CountOrZero = 10
    interval: Count = 5
    use_local: bool | None = None
    anchoring: Literal["off", "live"] = "off"
    min_mask_share: Share = 0.0
    anchor_refresh: Count = 100
    guard: Literal["off", "report", "rollback", "budget"] = "off"
    rows: Count | None = None
    grow: bool = False
    grow_quantile: Share = 0.1
    grow_below: Cosine = 0.7
    prune: bool = False
    prune_cosine: Cosine = 0.99
    final_decay: Share = 0.1
    shortlist: bool = False
    candidates: CountOrZero = 64
    final: Literal["hard", "momentum", "none"] = "hard"


@dataclass
class TrainConfig:
    """The optimisation.

    Args:
        epochs: passes over the training images.
        freeze_backbone: train the head alone, on features computed once.
        head_epochs: where the backbone is trained: so many of the epochs first train the head alone, on features
            computed once (LP-FT, Kumar et al. 2022), so that a random head doesn't spoil the backbone.
        trainable_stages: of a trained backbone only the last so many stages learn, or all behind a layer (blocks.4);
            none: all of it. With data.cached_views what the first ones make of an image is computed once.
        freeze_norms: batch norms of a trained backbone keep their pretrained statistics. Those of a batch may be so
            different that everything learned before is lost at the first step, above all what the head has learned.
        batch_size: images a step, on each device.
        accumulate: batches whose gradients make one step together.
        sampling: shuffle (each image once an epoch) or balanced (each class as often as any other).
        lr: peak learning rate of the head.
        backbone_lr: of the backbone, where it is trained.
        prototype_lr: of the prototypes; none: as lr.
        connection_lr: of connections, temperature and biases; none: as lr.
        layer_decay: each earlier layer of the backbone learns by this factor more slowly (Clark et al. 2020; 0.65 to
            0.8 for ViTs); 1: all alike.
        weight_decay: of AdamW, on weight matrices alone.
        warmup_epochs: linear rise of the learning rate; a cosine falls after it. Both start again after head_epochs.
        clip_norm: the largest norm of a step's gradients; none: as they are.
        ema: what is validated and saved is a moving average of the weights with this decay (0.999); none: the weights.
        patience: stop after so many epochs without a better validation score; none: never.
        refit: what is fitted to the prototypes after the final push: biases, connections (with temperature and biases),
            or none.
        refit_steps: full-batch steps.
        refit_lr: their learning rate.
        refit_decay: pulls what is fitted to what it was before the final push.
        prior: after all that, biases and a temperature are fitted on validation images for these shares of the classes:
            balanced, data (those of the training images) or {class: share}; none: they stay as they are.
        select: the validation metric that chooses the best epoch; mean is that of balanced accuracy and AUROC.
        seed: of weights, order and augmentation.
    """

    epochs: Count = 15
    freeze_backbone: bool = True
    head_epochs: CountOrZero = 0
    trainable_stages: int | str | None = None
    freeze_norms: bool = True
    batch_size: Count = 64
    accumulate: Count = 1
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    lr: Positive = 1e-3
    backbone_lr: Positive = 1e-4
    prototype_lr: PositiveOrZero | None = None
    connection_lr: PositiveOrZero | None = None
    layer_decay: Annotated[float, Range(0.01, 1)] = 1.0
    weight_decay: PositiveOrZero = 0.01
    warmup_epochs: PositiveOrZero = 1.0
    clip_norm: Positive | None = None
    ema: OpenShare | None = None
    patience: Count | None = None
    refit: Literal["biases", "connections", "none"] = "biases"
    refit_steps: int = 100
    refit_lr: float = 0.02
    refit_decay: float = 0.1
    prior: dict[str, float] | str | None = None
    select: Literal["mean", "balanced_accuracy", "auroc", "macro_f1", "accuracy"] = "mean"
    seed: int = 0


@dataclass
class TrainerConfig:
    """Devices, precision and trackers.

    Args:
        device: auto, cpu, cuda or mps.
        devices: processes on this computer, one for each GPU (on a CPU: gloo); under torchrun it decides.
        num_nodes: computers; each runs the same command (torchrun or SLURM numbers them).
        precision: of Lightning Fabric (32-true, bf16-mixed, 16-mixed).
        channels_last: weights of the backbone in the order that convolutions like best.
        compile: torch.compile for the backbone.
        cache_dir: where computed features are kept; by default the user's cache folder.
        cache_precision: of what is kept: float16, float32 (exact, twice the room) or float8 (half of it, errors up to a
            sixteenth); off: nothing is kept, and the frozen backbone runs in each epoch.
        track: where metrics.jsonl is mirrored: tensorboard, wandb, or both.
    """

    device: str = "auto"
    devices: Count = 1
    num_nodes: Count = 1
    precision: str = "32-true"
    channels_last: bool = True
    compile: bool = False
    cache_dir: str = ""
    cache_precision: Literal["float16", "float32", "float8", "off"] = "float16"
    track: list[str] = field(default_factory=list)


@dataclass
class RunConfig:
    """Everything that decides a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    push: PushConfig = field(default_factory=PushConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def check(self) -> None:
        """Refuse, in an InputError, what lies outside its range, and options that contradict each other."""
        if isinstance(size := self.model.image_size, list) and len(size) != 2:
            raise InputError(f"model.image_size is {size}; expected pixels of a side, or [height, width]")
        for group in fields(self):
            check_fields(getattr(self, group.name), f"{group.name}.")
        from protopush.push import check_settings  # here: it needs torch

        check_settings(self.push, self.push.anchoring == "live", "push.")
        if self.push.shortlist and self.push.anchoring != "live":
            raise InputError(
                "push.shortlist reads the anchors of live prototypes alone, but push.anchoring is 'off': their patches "
                "may have moved anywhere (docs/push.md); leave it out, or give --push.anchoring live"
            )
        train, views = self.train, self.data.cached_views
        if train.trainable_stages is not None and train.freeze_backbone:
            raise InputError(
                "train.trainable_stages is for a backbone that is trained, but train.freeze_backbone is true; leave it "
                "out, or give --train.freeze_backbone false"
            )
        if views and not train.freeze_backbone and train.trainable_stages is None:
            raise InputError(
                f"data.cached_views is {views}, but all of the backbone is trained; expected first layers that are "
                "frozen; give --train.trainable_stages 1, or leave it out"
            )
        if views and self.trainer.cache_precision == "off":
            raise InputError(
                f"data.cached_views is {views}, but trainer.cache_precision is off: nothing is stored; leave one of "
                "them out"
            )
        if views > 2 and not self.data.flip_vertical:
            raise InputError(
                f"data.cached_views is {views}, which has images upside down, but data.flip_vertical is false; give "
                "--data.cached_views 2"
            )
        if views > 1 and self.loss.off_mask:
            raise InputError(
                "loss.off_mask compares patches with masks, which are upright, but data.cached_views has images in "
                f"{views} orientations; leave one of them out"
            )
        if self.loss.off_mask and not (train.freeze_backbone or train.head_epochs or views == 1):
            raise InputError(
                "loss.off_mask compares patches with masks, which augmented images have none of; expected a frozen "
                "backbone; leave it out, or give --train.freeze_backbone true (or data.cached_views 1)"
            )
        if train.head_epochs and train.freeze_backbone:
            raise InputError(
                "train.head_epochs is for a backbone that is trained afterwards, but train.freeze_backbone is true; "
                "leave train.head_epochs out, or give --train.freeze_backbone false"
            )
        if self.push.rows is not None and (self.push.prune or self.push.grow):
            raise InputError(
                f"push.rows {self.push.rows} chooses the prototypes that stay, but push.prune is {self.push.prune} and "
                f"push.grow is {self.push.grow}; expected one way to remove them and none to add any; leave these two "
                "out, or push.rows"
            )
        if train.head_epochs >= train.epochs:
            raise InputError(
                f"train.head_epochs is {train.head_epochs} of {train.epochs} epochs; expected fewer, so that some are "
                "left for the backbone; lower it, or raise train.epochs"
            )
