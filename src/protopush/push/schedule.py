"""When to push: one rule, for our own training loop and for anybody else's."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, Protocol

from protopush.errors import InputError

logger = logging.getLogger("protopush.push.schedule")


class HasRates(Protocol):
    """What is read of an optimizer: any of torch's, also as Fabric or Lightning wrap them."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


class PushSchedule:
    """Says after which epochs to push: ``(epoch + 1) >= start and (epoch + 1) % interval == 0``.

    Epochs are handed over as a loop counts them, from 0; ``start``, ``end`` and ``total_epochs`` are counted from 1.

    Args:
        start: the first epoch that a push may follow.
        interval: epochs between two pushes.
        end: the last epoch that a push may follow; None: no end.
        total_epochs: how many epochs there will be, where that is known: a schedule that would never push is refused,
            and :meth:`planned` needs no argument.
        final_decay: no push follows an epoch that ends with the learning rate below this share of its peak: what a push
            moves could not be learned any more. 0: the learning rate doesn't matter. It is known only where
            :meth:`due` is told of it. (A rate that has yet to rise as far, in a warm-up, is below the share as well.)

    Attributes:
        peaks: the highest learning rate that each parameter group was seen with. An optimizer that is made anew with
            lower rates, as when a backbone is unfrozen, wants a new schedule.

    Raises:
        InputError: an interval of 0, a negative start, an end before the start, ...

    Example:
        >>> schedule = PushSchedule(start=10, interval=5)
        >>> [epoch + 1 for epoch in range(30) if schedule.due(epoch)]
        [10, 15, 20, 25, 30]
        >>> PushSchedule(start=2, interval=3, end=9).planned(20)
        [3, 6, 9]
    """

    def __init__(
        self,
        start: int = 10,
        interval: int = 5,
        end: int | None = None,
        total_epochs: int | None = None,
        final_decay: float = 0.1,
    ) -> None:
        _check_whole("start", start, 0)
        _check_whole("interval", interval, 1)
        for name, value in (("end", end), ("total_epochs", total_epochs)):
            if value is not None:
                _check_whole(name, value, 1)
        if not 0 <= final_decay <= 1:
            raise InputError(f"final_decay is {final_decay}; expected a share of the peak learning rate, 0 to 1")
        if end is not None and end < start:
            raise InputError(f"end is {end} but start is {start}; expected an end that isn't before the start")
        self.start, self.interval, self.end = start, interval, end
        self.total_epochs, self.final_decay = total_epochs, final_decay
        self.peaks: list[float] = []
        if total_epochs is not None and not self.planned(total_epochs):
            last = "" if end is None else f" and end {end}"
            raise InputError(
                f"no push would follow any of {total_epochs} epochs with start {start}, interval {interval}{last}; "
                "expected at least one; lower start or interval"
            )

    def due(
        self,
        epoch: int,
        optimizer: HasRates | Iterable[HasRates] | None = None,
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
            raise InputError("due() was told an optimizer and a learning rate; expected one of them")
        if lr is None and peak_lr is not None:
            raise InputError("due() was told peak_lr without lr; expected both, or an optimizer")
        share = 1.0
        if optimizer is not None:
            share = self._share(_groups(optimizer))
        elif lr is not None:
            share = self._share([{"lr": lr}]) if peak_lr is None else _share([_rate(lr)], [_rate(peak_lr)])
        if self._falls_on(epoch) and share < self.final_decay:
            logger.info(
                "No push after epoch %d: the learning rate is at %.2g of its peak, below final_decay %g",
                epoch + 1, share, self.final_decay,
            )  # fmt: skip
            return False
        return self._falls_on(epoch)

    def planned(self, total_epochs: int | None = None) -> list[int]:
        """The epochs, counted from 1, that a push follows whatever the learning rate does."""
        total = self.total_epochs if total_epochs is None else total_epochs
        if total is None:
            raise InputError("planned() needs the number of epochs; give it, or PushSchedule(total_epochs=...)")
        return [epoch + 1 for epoch in range(total) if self._falls_on(epoch)]

    def state_dict(self) -> dict[str, Any]:
        """The peak learning rates, to go on with in another process."""
        return {"peaks": list(self.peaks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self.peaks = [float(peak) for peak in state["peaks"]]

    def __repr__(self) -> str:
        names = ("start", "interval", "end", "total_epochs", "final_decay")
        return f"PushSchedule({', '.join(f'{name}={getattr(self, name)}' for name in names)})"

    def _falls_on(self, epoch: int) -> bool:
        number = epoch + 1
        return number >= self.start and number % self.interval == 0 and (self.end is None or number <= self.end)

    def _share(self, groups: list[dict[str, Any]]) -> float:
        """The learning rate's share of its peak; the peaks are remembered."""
        # initial_lr is a scheduler's word for where it begins, max_lr OneCycleLR's for its peak
        names = ("lr", "initial_lr", "max_lr")
        told = [max(_rate(group[name]) for name in names if name in group) for group in groups]
        known = self.peaks[: len(told)] + [0.0] * (len(told) - len(self.peaks))  # groups may be added later
        self.peaks = [max(pair) for pair in zip(told, known, strict=True)]
        return _share([_rate(group["lr"]) for group in groups], self.peaks)


def _share(rates: list[float], peaks: list[float]) -> float:
    """Of the group whose share is the largest; 1 where nothing learns."""
    return max((rate / peak for rate, peak in zip(rates, peaks, strict=True) if peak > 0), default=1.0)


def _groups(optimizer: HasRates | Iterable[HasRates]) -> list[dict[str, Any]]:
    several = [optimizer] if hasattr(optimizer, "param_groups") else optimizer
    if not isinstance(several, Iterable):
        raise InputError(f"{type(optimizer).__name__} has no param_groups; expected an optimizer, or several")
    return [group for one in several for group in one.param_groups]


def _rate(value: Any) -> float:
    rate = float(value)
    if not (math.isfinite(rate) and rate >= 0):
        raise InputError(f"the learning rate is {rate}; expected a finite number, at least 0")
    return rate


def _check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise InputError(f"{name} is {value!r}; expected a whole number, at least {least}")
