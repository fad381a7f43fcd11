"""Trackers that mirror the rows of ``metrics.jsonl``: TensorBoard and Weights & Biases.

``metrics.jsonl`` is the record; whatever stops a tracker never stops the training.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml

from protopush.data.images import read_image
from protopush.errors import InputError, did_you_mean, first_line

logger = logging.getLogger("protopush.training")


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of ``metrics.jsonl`` under flat names, but for the epoch; anything else in it is left out.

    An epoch's own numbers begin with ``train/``, a push's with ``push/``, the last row's with ``final/``.

    Example:
        >>> scalars({"epoch": 3, "loss": 0.5, "val": {"auroc": 0.9, "per_class": {"mel": {"f1": 1, "auroc": None}}}})
        {'train/loss': 0.5, 'val/auroc': 0.9, 'val/per_class/mel/f1': 1.0}
        >>> scalars({"push": 3, "min_dist": 0.1, "use_local": True, "notes": [], "val_after": {"auroc": 0.8}})
        {'push/min_dist': 0.1, 'push/val_after/auroc': 0.8}
    """
    kind = next((name for name in ("final", "push") if name in row), "train")
    own = {key: value for key, value in row.items() if key not in ("epoch", "push", "final", "val")}
    return _flat(kind, own) | _flat("val", row.get("val"))


def _flat(name: str, value: object) -> dict[str, float]:
    if isinstance(value, Mapping):
        return {path: number for key in value for path, number in _flat(f"{name}/{key}", value[key]).items()}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {name: float(value)}
    return {}


class Tracker:
    """Takes numbers and pictures of an epoch, with the arguments of :class:`Trackers`, which handles its errors."""

    package: ClassVar[str]  # must be importable

    def __init__(self, folder: Path, config: Mapping[str, Any], resumed_at: int | None) -> None: ...
    @classmethod
    def check(cls) -> None:
        """Raise what would keep it from starting, as far as that can be known before."""

    def log(self, values: Mapping[str, float], epoch: int) -> None: ...
    def picture(self, name: str, path: Path, epoch: int) -> None: ...
    def close(self, failed: bool) -> None: ...


class TensorBoard(Tracker):
    """Event files in ``tensorboard/`` of the run folder: ``tensorboard --logdir RUN/tensorboard``.

    A resumed run hides what the interrupted one logged after the epoch that it goes on from.
    """

    package = "tensorboard"

    def __init__(self, folder: Path, config: Mapping[str, Any], resumed_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resumed_at is None else resumed_at + 1
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        self.writer.add_text("config", f"```yaml\n{yaml.safe_dump(dict(config), sort_keys=False)}```", resumed_at or 0)
        self.writer.flush()

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()  # a row comes once an epoch: let it be seen now

    def picture(self, name: str, path: Path, epoch: int) -> None:
        self.writer.add_image(name, np.asarray(read_image(path)), epoch, dataformats="HWC")
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandB(Tracker):
    """A run of Weights & Biases; its id is in ``wandb_id`` of the run folder, its files are in ``wandb/``.

    The environment decides as usual: ``WANDB_PROJECT`` (else "protopush"), ``WANDB_ENTITY``, ``WANDB_NAME`` (else the
    folder's), and ``WANDB_MODE=offline`` for no network (``wandb sync`` uploads later, the parts of a resumed run in
    their order).

    W&B's own step only ever increases, so it is left to count rows, and charts are drawn over ``epoch``. After a resume
    the rows of an interrupted epoch may be there twice, as two points; the summary has the later one.
    """

    package = "wandb"
    FINISH_SECONDS = 300  # a network that is gone must not hold the end of a run; `wandb sync` uploads what is left

    def __init__(self, folder: Path, config: Mapping[str, Any], resumed_at: int | None) -> None:
        import wandb

        known = folder / "wandb_id"
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # it would advise to trace language models
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "protopush"),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            dir=folder,
            config=dict(config),
            id=known.read_text(encoding="utf-8").strip() if resumed_at is not None and known.is_file() else None,
            resume="allow",
            allow_val_change=True,  # of the config: a resumed run may train for more epochs
            reinit="create_new",  # a caller's own run stays as it is
            settings=wandb.Settings(  # a console would stand between progress bars and the terminal
                console="off", silent=True, finish_timeout=self.FINISH_SECONDS, finish_timeout_raises=True
            ),
        )
        known.write_text(self.run.id + "\n", encoding="utf-8")
        self.run.define_metric("*", step_metric="epoch")
        logger.info("W&B: %s", f"offline, in {folder / 'wandb'}" if self.run.offline else self.run.url or "disabled")

    @classmethod
    def check(cls) -> None:
        import wandb

        if wandb.setup().settings.mode != "online":
            return
        try:
            wandb.login(verify=True)  # asks for the key on a terminal: better now than after the first epoch
        except Exception as error:
            reason = first_line(error).rstrip(".")
            raise InputError(f"no login at W&B ({reason}); run `wandb login`, or set WANDB_MODE=offline") from error

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self.run.log({"epoch": epoch, **values})

    def picture(self, name: str, path: Path, epoch: int) -> None:
        import wandb

        self.run.log({"epoch": epoch, name: wandb.Image(str(path))})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}


class Trackers:
    """The trackers of a run as one: one that fails is named in a warning and switched off, and never stops the run.

    Args:
        names: of :data:`TRACKERS`; may be empty.
        folder: the run folder; must exist.
        config: everything that decides the run; shown beside the numbers.
        resumed_at: the epochs that an interrupted run had done; the same curves go on from there. None: a fresh run.
    """

    def __init__(
        self,
        names: Sequence[str] = (),
        folder: Path = Path(),
        config: Mapping[str, Any] | None = None,
        resumed_at: int | None = None,
    ) -> None:
        self._epoch = resumed_at or 0
        self._live: dict[str, Tracker] = {}
        for name, kind in {name: _kind(name) for name in names}.items():
            with self._off_if_failing(name):
                self._live[name] = kind(folder, config or {}, resumed_at)

    def log(self, row: Mapping[str, Any]) -> None:
        """Mirror a row of ``metrics.jsonl``; one that names no epoch (the last, with live anchors) is of the latest."""
        self._epoch = row.get("epoch", row.get("push", self._epoch))
        values = scalars(row)
        self._each(lambda tracker: tracker.log(values, self._epoch))

    def picture(self, name: str, path: Path) -> None:
        """Mirror a picture file."""
        self._each(lambda tracker: tracker.picture(name, path, self._epoch))

    def close(self, failed: bool = False) -> None:
        """Finish all of them, once; ``failed`` says that the run did."""
        self._each(lambda tracker: tracker.close(failed))
        self._live.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._live.items()):
            with self._off_if_failing(name):
                act(tracker)

    @contextmanager
    def _off_if_failing(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a network, a disk, a service: there is no list of what may fail
            reason = first_line(error)
            logger.warning("Tracking with %s is off from here on (%s); metrics.jsonl has every row", name, reason)
            if (tracker := self._live.pop(name, None)) is not None:
                with suppress(Exception):
                    tracker.close(failed=True)


def check_trackers(names: Sequence[str]) -> None:
    """Refuse, before the long work, trackers that can't be started; W&B may ask for its key here.

    Example:
        >>> check_trackers(["tensorbord"])
        Traceback (most recent call last):
        protopush.errors.InputError: unknown tracker 'tensorbord'; did you mean 'tensorboard'?
    """
    for kind in [_kind(name) for name in names]:
        kind.check()


def _kind(name: str) -> type[Tracker]:
    if name not in TRACKERS:
        hint = did_you_mean(name.lower(), TRACKERS, f"expected {' or '.join(TRACKERS)}")
        raise InputError(f"unknown tracker {name!r}; {hint}")
    try:
        importlib.import_module(TRACKERS[name].package)
    except ImportError as error:
        reason = first_line(error)
        raise InputError(
            f"tracking with {name} needs a package that is not there ({reason}); pip install 'protopush[track]'"
        ) from error
    return TRACKERS[name]
