"""Options and schedule of a push: how prototypes move, and after which epochs. (No torch: recipes are made of this.)"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, Protocol, TypedDict, TypeVar

from protopush.errors import InputError

logger = logging.getLogger("protopush.push.schedule")

T = TypeVar("T")

GUARDS = ("off", "report", "rollback", "budget")

Allow = Callable[[Any, Any], Any]
"""ids (B,) and the regions of L patches to bool (B, L), on the CPU: the patches that may become anchors."""


class OptimizerLike(Protocol):
    """What is used of an optimizer: any of torch's, also as Fabric or Lightning wrap them."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    @property
    def state(self) -> Any: ...


@dataclass(frozen=True)
class PushSettings:
    """How prototypes move in a push, as a recipe and the command line can say it.

    Args:
        momentum: in [0, 1]: 0 puts a prototype onto its patch (a hard push), 0.9 moves it a tenth of the way, 1 only
            names the patch.
        max_patches_per_class: none for every patch; a number bounds the work: images are then visited in a seeded
            random order, until every class has as many.
        unique: of what no two prototypes of a class share one, so that the sum of their similarities is the largest:
            none (each takes its nearest patch), patch, image or group (lesion, patient; the dataset's groups). Where a
            class has too few, the next lower word holds for it, and the report says so.
        interpolation: linear, or slerp (the momentum is a share of the angle).
        guard: what is done where a push costs accuracy on validation images: off (nothing is measured), report,
            rollback (beyond the budget it is taken back), or budget (the momentum is raised until the cost is within
            the budget); none: report where there are validation images.
        guard_budget: the fall of balanced accuracy or AUROC that is allowed.
    """

    momentum: float = 0.9
    max_patches_per_class: int | None = None
    unique: str | Callable[..., Any] = "none"
    interpolation: str | Callable[..., Any] = "linear"
    guard: str | None = None
    guard_budget: float = 0.01

    def settings(self) -> dict[str, Any]:
        """These fields alone, as keyword arguments of a push."""
        return {one.name: getattr(self, one.name) for one in fields(PushSettings)}


@dataclass(frozen=True)
class PushOptions(PushSettings):
    """All options of a push, as :func:`protopush.push_prototypes` takes them by name, with those of a recipe.

    ``unique`` and ``interpolation`` may be a function as well: see ``RULES`` of ``push/selection.py`` and
    ``INTERPOLATIONS`` of ``push/update.py``.

    Args:
        use_local: patches ``x_fu1`` (True) or the pooled feature ``x_fu``.
        seed: of the order in which images are visited under ``max_patches_per_class``.
        optimizer: its moments of the pushed prototypes are set to 0.
        prototypes: (class, prototype) of those to push; None for all.
        allow: which patches may become anchors, see :data:`Allow`.
        val_loader: validation images for the guard, as the training images.
        bounds: of what prototypes can find in samples (:class:`protopush.push.shortlist.Bounds`): only those that can
            win are read, by their index.
    """

    use_local: bool = True
    seed: int = 0
    optimizer: OptimizerLike | None = None
    prototypes: Iterable[tuple[int, int]] | None = None
    allow: Allow | None = None
    val_loader: Iterable[Any] | None = None
    bounds: Any = None


class PushKeywords(TypedDict, total=False):
    """The fields of :class:`PushOptions` but for the first arguments of a push, for type checkers and editors."""

    seed: int
    optimizer: OptimizerLike | None
    unique: str | Callable[..., Any]
    interpolation: str | Callable[..., Any]
    prototypes: Iterable[tuple[int, int]] | None
    allow: Allow | None
    guard: str | None
    guard_budget: float
    val_loader: Iterable[Any] | None
    bounds: Any


def resolve(registry: Mapping[str, T], value: str | T, name: str) -> T:
    """What a registry has under a name (an :class:`InputError` if nothing); anything but a name is the thing itself."""
    if not isinstance(value, str):
        return value
    if value not in registry:
        raise InputError(f"{name} is {value!r}; expected one of: {', '.join(registry)}")
    return registry[value]


@dataclass(eq=False)
class PushSchedule:
    """The epochs after which to push: ``(epoch + 1) >= start and (epoch + 1) % interval == 0``.

    Epochs are handed over as a loop counts them, from 0; ``start``, ``end`` and ``total_epochs`` are counted from 1.

    Args:
        start: the first epoch that a push may follow.
        interval: epochs between two pushes.
        end: the last epoch that a push may follow; None: no end.
        total_epochs: how many epochs there will be, where that is known: a schedule that would never push is refused,
            and :meth:`planned` needs no argument.
        final_decay: no push follows an epoch that ends with the learning rate below this share of its peak: what a push
            moves could not be learned any more. 0: the learning rate doesn't matter. It is known only where
            :meth:`due` is given it. (A rate that has yet to rise as far, in a warm-up, is below the share as well.)

    Attributes:
        peaks: the highest learning rate that each parameter group was seen with. A new optimizer with lower rates, as
            when a backbone is unfrozen, needs a new schedule.

    Raises:
        InputError: an interval of 0, a negative start, an end before the start, ...

    Example:
        >>> schedule = PushSchedule(start=10, interval=5)
        >>> [epoch + 1 for epoch in range(30) if schedule.due(epoch)]
        [10, 15, 20, 25, 30]
        >>> PushSchedule(start=2, interval=3, end=9).planned(20)
        [3, 6, 9]
    """

    start: int = 10
    interval: int = 5
    end: int | None = None
    total_epochs: int | None = None
    final_decay: float = 0.1
    peaks: list[float] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("start", 0), ("interval", 1), ("end", 1), ("total_epochs", 1)):
            if name in ("start", "interval") or getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), least)
        if not 0 <= self.final_decay <= 1:
            raise InputError(f"final_decay is {self.final_decay}; expected a share of the peak learning rate, 0 to 1")
        if self.end is not None and self.end < self.start:
            raise InputError(
                f"end is {self.end} but start is {self.start}; expected an end that isn't before the start"
            )
        if self.total_epochs is not None and not self.planned():
            last = "" if self.end is None else f" and end {self.end}"
            raise InputError(
                f"no push would follow any of {self.total_epochs} epochs with start {self.start}, interval "
                f"{self.interval}{last}; expected at least one; lower start or interval"
            )

    def due(
        self,
        epoch: int,
        optimizer: OptimizerLike | Iterable[OptimizerLike] | None = None,
        *,
        lr: float | None = None,
        peak_lr: float | None = None,
    ) -> bool:
        """Whether a push follows the epoch that has just ended.

        Call it after every epoch, so that the optimizer's peak learning rate is seen.

        Args:
            epoch: the one that has ended, counted from 0.
            optimizer: read for the learning rate, which is in its final decay where that of every parameter group is;
                several optimizers count as one.
            lr: the learning rate itself, instead.
            peak_lr: its peak; without, the highest ``lr`` so far.

        Raises:
            InputError: a negative epoch, a learning rate that is none, both an optimizer and a rate.

        Example:
            >>> schedule = PushSchedule(start=1, interval=1, final_decay=0.1)
            >>> [schedule.due(epoch, lr=lr) for epoch, lr in enumerate([1e-3, 2e-4, 5e-5])]
            [True, True, False]
        """
        _check_whole("epoch", epoch, 0)
        if optimizer is not None and (lr is not None or peak_lr is not None):
            raise InputError("due() was given an optimizer and a learning rate; expected one of them")
        if lr is None and peak_lr is not None:
            raise InputError("due() was given peak_lr without lr; expected both, or an optimizer")
        share = 1.0
        if optimizer is not None:
            several = [optimizer] if hasattr(optimizer, "param_groups") else optimizer
            if not isinstance(several, Iterable):
                raise InputError(f"{type(optimizer).__name__} has no param_groups; expected an optimizer, or several")
            share = self._share([group for one in several for group in one.param_groups])
        elif lr is not None:
            share = self._share([{"lr": lr}]) if peak_lr is None else _share([_rate(lr)], [_rate(peak_lr)])
        if not self._falls_on(epoch):
            return False
        if share < self.final_decay:
            why = f"the learning rate is at {share:.2g} of its peak, below final_decay {self.final_decay:g}"
            logger.info("No push after epoch %d: %s", epoch + 1, why)
        return share >= self.final_decay

    def planned(self, total_epochs: int | None = None) -> list[int]:
        """The epochs, counted from 1, that a push follows whatever the learning rate does."""
        total = self.total_epochs if total_epochs is None else total_epochs
        if total is None:
            raise InputError("planned() needs the number of epochs; give it, or PushSchedule(total_epochs=...)")
        return [epoch + 1 for epoch in range(total) if self._falls_on(epoch)]

    def state_dict(self) -> dict[str, Any]:
        """The peak learning rates, for another process."""
        return {"peaks": list(self.peaks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self.peaks = [float(peak) for peak in state["peaks"]]

    def _falls_on(self, epoch: int) -> bool:
        number = epoch + 1
        return number >= self.start and number % self.interval == 0 and (self.end is None or number <= self.end)

    def _share(self, groups: list[dict[str, Any]]) -> float:
        """The learning rate's share of its peak; the peaks are remembered."""
        # initial_lr is a scheduler's word for where it begins, max_lr OneCycleLR's for its peak
        names = ("lr", "initial_lr", "max_lr")
        highest = [max(_rate(group[name]) for name in names if name in group) for group in groups]
        known = self.peaks[: len(highest)] + [0.0] * (len(highest) - len(self.peaks))  # groups may be added later
        self.peaks = [max(pair) for pair in zip(highest, known, strict=True)]
        return _share([_rate(group["lr"]) for group in groups], self.peaks)


def _share(rates: list[float], peaks: list[float]) -> float:
    """Of the group whose share is the largest; 1 where nothing learns."""
    return max((rate / peak for rate, peak in zip(rates, peaks, strict=True) if peak > 0), default=1.0)


def _rate(value: Any) -> float:
    rate = float(value)
    if not (math.isfinite(rate) and rate >= 0):
        raise InputError(f"the learning rate is {rate}; expected a finite number, at least 0")
    return rate


def _check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise InputError(f"{name} is {value!r}; expected a whole number, at least {least}")
