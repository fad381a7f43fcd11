"""What a run can be told. (No torch here: the command line reads this before anything heavy is imported.)

These dataclasses live together because the parser needs all of them before torch is there; the rooms below take plain
arguments and never see them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class DataConfig:
    """Which images, and how they are seen.

    Args:
        path: a folder of class folders or a manifest (CSV image,label[,split][,group][,mask]).
        source: auto, folder, manifest or elpv.
        crop_pct: share of the resized short side that the centre crop keeps.
        augment: random crops, flips and colour, where the backbone is trained.
        flip_vertical: whether upside down is as good.
        num_workers: processes that read images.
        split_seed: decides held-out images where the source has no splits.
    """

    path: str = ""
    source: str = "auto"
    crop_pct: float = 1.0
    augment: bool = True
    flip_vertical: bool = True
    num_workers: int = 2
    split_seed: int = 0


@dataclass
class ModelConfig:
    """The network.

    Args:
        backbone: any timm model name.
        pretrained: true (the model's own weights), false (random) or a file of weights.
        num_prototypes: prototypes per class.
        max_prototypes: slots per class, room to grow; none: as many as prototypes.
        embed_dim: size of the embedding space.
        dropout: after the projection.
        match: local (prototypes against every patch) or global (against the pooled feature).
    """

    backbone: str = "tf_efficientnet_lite0"
    pretrained: bool | str = True
    num_prototypes: int = 10
    max_prototypes: int | None = None
    embed_dim: int = 128
    dropout: float = 0.1
    match: Literal["local", "global"] = "local"


@dataclass
class LossConfig:
    """Weights of the loss terms; 0 leaves a term out.

    Args:
        grounding: each prototype near a patch of its class, so that a hard push costs little.
        cluster: each image near a prototype of its class.
        separation: other classes' prototypes beyond a margin.
        orthogonality: prototypes of a class unlike each other.
        consistency: images of a class use its prototypes alike.
        separation_margin: cosine up to which other classes' prototypes may be similar.
        label_smoothing: of the cross-entropy.
        class_balance: exponent of the class weights: 0 counts images alike, 1 counts classes alike.
    """

    grounding: float = 1.0
    cluster: float = 0.0
    separation: float = 0.0
    orthogonality: float = 0.05
    consistency: float = 0.0
    separation_margin: float = 0.3
    label_smoothing: float = 0.0
    class_balance: float = 1.0


@dataclass
class PushConfig:
    """When and how prototypes are pushed.

    Args:
        start_epoch: first epoch (counted from 1) with a push; 0: also before the first.
        interval: epochs between pushes.
        momentum: 0 puts a prototype onto its patch, 0.9 moves it a tenth of the way.
        use_local: patches (true) or pooled features; by default what the head matches.
        max_patches_per_class: none for every patch.
        interpolation: linear, or slerp (the momentum is a share of the angle).
        unique: of what no two prototypes of a class share one: none, patch, image or group (lesion, patient).
        anchoring: off, or live: from its first push on a prototype is its anchor's embedding at every step.
        anchor_refresh: steps between two embeddings of the live anchors' images, where the backbone is trained.
        guard: what is done where a push costs accuracy on validation images: off (nothing is measured), report,
            rollback, or budget (the momentum is raised until the cost is within the budget).
        guard_budget: the fall of balanced accuracy or AUROC that is allowed.
        grow: after each push, badly covered classes with a free slot get another prototype.
        grow_quantile: of the best similarity of a class's samples, that tells how well it is covered.
        grow_below: the similarity below which it is badly covered.
        prune: after each push, prototypes that are duplicates or never matter are removed.
        prune_cosine: two prototypes of a class more alike than this are duplicates.
        final: the push of the best model: hard (real patches), momentum, or none (only name the nearest patches); live
            prototypes are real patches already: they stay.
    """

    start_epoch: int = 10
    interval: int = 5
    momentum: float = 0.9
    use_local: bool | None = None
    max_patches_per_class: int | None = None
    interpolation: Literal["linear", "slerp"] = "linear"
    unique: Literal["none", "patch", "image", "group"] = "none"
    anchoring: Literal["off", "live"] = "off"
    anchor_refresh: int = 100
    guard: Literal["off", "report", "rollback", "budget"] = "off"
    guard_budget: float = 0.01
    grow: bool = False
    grow_quantile: float = 0.1
    grow_below: float = 0.7
    prune: bool = False
    prune_cosine: float = 0.99
    final: Literal["hard", "momentum", "none"] = "hard"


@dataclass
class TrainConfig:
    """The optimisation.

    Args:
        epochs: passes over the training images.
        batch_size: images a step.
        lr: peak learning rate of the head.
        backbone_lr: peak learning rate of the backbone, where it is trained.
        weight_decay: of AdamW, on weight matrices alone.
        warmup_epochs: linear rise of the learning rate; a cosine falls after it.
        freeze_backbone: train the head alone, on features computed once.
        refit: what is fitted to the prototypes after the final push: biases, connections (with temperature and biases),
            or none.
        refit_steps: full-batch steps.
        refit_lr: their learning rate.
        refit_decay: pulls what is fitted to what it was before the final push.
        select: the validation metric that chooses the best epoch; mean is that of balanced accuracy and AUROC.
        seed: of weights, order and augmentation.
        device: auto, cpu, cuda or mps.
        precision: of Lightning Fabric (32-true, bf16-mixed, 16-mixed).
        cache_dir: where computed features are kept; by default the user's cache folder.
    """

    epochs: int = 15
    batch_size: int = 64
    lr: float = 1e-3
    backbone_lr: float = 1e-4
    weight_decay: float = 0.01
    warmup_epochs: float = 1.0
    freeze_backbone: bool = True
    refit: Literal["biases", "connections", "none"] = "biases"
    refit_steps: int = 100
    refit_lr: float = 0.02
    refit_decay: float = 0.1
    select: Literal["mean", "balanced_accuracy", "auroc", "macro_f1", "accuracy"] = "mean"
    seed: int = 0
    device: str = "auto"
    precision: str = "32-true"
    cache_dir: str = ""


@dataclass
class RunConfig:
    """Everything that decides a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    push: PushConfig = field(default_factory=PushConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
