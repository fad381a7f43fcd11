"""Numbers that make no sense, told before anything begins."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from protopush.errors import InputError
from protopush.push import check_settings
from protopush.training.config import RunConfig


@dataclass(frozen=True)
class Range:
    """From ``least`` to ``most``; with ``open``, the ends don't belong to it."""

    least: float
    most: float = inf
    open: bool = False

    def holds(self, number: float) -> bool:
        """Whether the number lies in it; NaN lies nowhere."""
        return self.least < number < self.most if self.open else self.least <= number <= self.most

    def __str__(self) -> str:
        if self.most == inf:
            return f"more than {self.least:g}" if self.open else f"at least {self.least:g}"
        return f"{self.least:g} to {self.most:g}" + (", both excluded" if self.open else "")


COUNT, SHARE, POSITIVE, NOT_NEGATIVE = Range(1), Range(0, 1), Range(0, open=True), Range(0)
LIMITS = {
    "data.crop_pct": Range(0.01, 1),
    "data.random_erasing": SHARE,
    "data.num_workers": NOT_NEGATIVE,
    "model.image_size": Range(8),
    "model.num_prototypes": COUNT,
    "model.max_prototypes": COUNT,
    "model.embed_dim": COUNT,
    "model.dropout": SHARE,
    "loss.label_smoothing": SHARE,
    "loss.effective_beta": Range(0, 1, open=True),
    "loss.logit_adjustment": NOT_NEGATIVE,
    "push.start_epoch": NOT_NEGATIVE,
    "push.interval": COUNT,
    "push.anchor_refresh": COUNT,
    "push.grow_quantile": SHARE,
    "push.grow_below": Range(-1, 1),
    "push.prune_cosine": Range(-1, 1),
    "push.final_decay": SHARE,
    "train.epochs": COUNT,
    "train.head_epochs": NOT_NEGATIVE,
    "train.batch_size": COUNT,
    "train.accumulate": COUNT,
    "train.lr": POSITIVE,
    "train.backbone_lr": POSITIVE,
    "train.prototype_lr": NOT_NEGATIVE,
    "train.connection_lr": NOT_NEGATIVE,
    "train.layer_decay": Range(0.01, 1),
    "train.weight_decay": NOT_NEGATIVE,
    "train.warmup_epochs": NOT_NEGATIVE,
    "train.clip_norm": POSITIVE,
    "train.ema": Range(0, 1, open=True),
    "train.patience": COUNT,
    "trainer.devices": COUNT,
    "trainer.num_nodes": COUNT,
}


def check_numbers(config: RunConfig) -> None:
    """Refuse what lies outside its limits, and options that contradict each other.

    Raises:
        InputError: the key, its value and what was expected.
    """
    for key, limit in LIMITS.items():
        group, name = key.split(".")
        value = getattr(getattr(config, group), name)
        if value is not None and not limit.holds(value):
            raise InputError(f"{key} is {value}; expected {limit}")
    check_settings(config.push, config.push.anchoring == "live", "push.")
    train = config.train
    if train.head_epochs and train.freeze_backbone:
        raise InputError(
            "train.head_epochs is for a backbone that is trained afterwards, but train.freeze_backbone is true; "
            "leave train.head_epochs out, or give --train.freeze_backbone false"
        )
    if train.head_epochs >= train.epochs:
        raise InputError(
            f"train.head_epochs is {train.head_epochs} of {train.epochs} epochs; expected fewer, so that some are left "
            "for the backbone; lower it, or raise train.epochs"
        )
