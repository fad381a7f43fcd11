"""Callback that pushes in a run of Lightning's Trainer: :class:`PushCallback`.

Importing this needs Lightning: ``pip install "protopush[lightning]"``. The package ``pytorch_lightning`` does as well.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from protopush._compat import ensure_torchvision
from protopush.errors import InputError, first_line, listing
from protopush.nn.prototypes import anchors_from, plain_anchors
from protopush.push import PushOptions, PushReport, PushSchedule, check_settings, push_prototypes
from protopush.push.protocol import unwrap

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
FINAL = ("hard", "none")
DISTANCES = ("min_dist", "mean_dist", "mean_dist_after")
OWN = ("model", "dataloader", "device", "optimizer")  # arguments of a push that the callback gives itself


def _lightning() -> Any:
    """The package that the program uses already, else the first one that is there."""
    ensure_torchvision()
    first, second = sorted(PACKAGES, key=lambda name: name not in sys.modules)
    with suppress(ImportError):
        return importlib.import_module(first)
    try:
        return importlib.import_module(second)
    except ImportError as cause:
        needed = f"PushCallback needs Lightning, which is not there ({first_line(cause)})"
        raise ImportError(f"{needed}; run: pip install protopush[lightning]") from cause


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = _lightning().Callback


class PushCallback(Callback):
    """Pushes the prototypes of a LightningModule after the epochs that a schedule names.

    The push reads the trainer's own training data (unaugmented, where the dataset has an ``eval_view()``; each sample
    once, whatever sampler Lightning has put there), on the module's device and in the trainer's precision. Under DDP
    every rank takes part, and all end with the same prototypes (strategies that shard parameters, FSDP or DeepSpeed's
    stage 3, are not supported). ``push/min_dist``, ``push/mean_dist`` (before) and
    ``push/mean_dist_after`` are logged with ``LightningModule.log``.

    A push comes after the epoch's validation, so that a ``ModelCheckpoint`` that monitors a validation metric has saved
    the model as it was before; ``ModelCheckpoint(save_on_train_epoch_end=True)`` saves it as it is after.

    Args:
        schedule: when to push; by default ``PushSchedule()``. It gets the trainer's optimizers.
        find: where the model with ``extract_features``, ``head.proj`` and ``head.proto_manager`` is: an attribute of
            the LightningModule (``"net"``, ``"net.classifier"``) or a function of it; None: the LightningModule itself.
        loader: a DataLoader to push with, instead of the trainer's.
        final: ``hard`` puts each prototype onto its nearest patch when training ends, before Lightning lets go of
            device and processes (``on_train_end``); ``none``.
        options: of :func:`protopush.push_prototypes`: ``momentum``, ``use_local``, ``unique``, ``guard``, ...

    Attributes:
        reports: the :class:`protopush.PushReport` of each push in this process; the last one is ``reports[-1]``.
        history: for each push of the run, also of those before it was resumed: epoch, distances, whether it was final.

    Raises:
        InputError: options that make no sense, now; a model or loader that cannot be pushed, as training starts.

    Example:
        >>> from protopush import PushSchedule
        >>> PushCallback(PushSchedule(start=10, interval=5), find="net", momentum=0.9, final="hard").reports
        []
    """

    def __init__(
        self,
        schedule: PushSchedule | None = None,
        *,
        find: str | Callable[[LightningModule], nn.Module] | None = None,
        loader: DataLoader[Any] | None = None,
        final: str = "none",
        **options: Any,
    ) -> None:
        super().__init__()
        if final not in FINAL:
            raise InputError(f"final is {final!r}; expected one of: {', '.join(FINAL)}")
        # Now, not at the first push, after hours perhaps.
        known = [name for name in inspect.signature(push_prototypes).parameters if name not in OWN]
        if unknown := [name for name in options if name not in known]:
            raise InputError(
                f"PushCallback takes no {listing(unknown)}; expected options of a push: {', '.join(known)}"
            )
        check_settings(PushOptions(**options))
        if options.get("prototypes") is not None:
            options["prototypes"] = list(options["prototypes"])  # an iterator would be at its end after one push
        self.schedule = PushSchedule() if schedule is None else schedule
        self.find, self.loader, self.final, self.options = find, loader, final, options
        self.reports: list[PushReport] = []
        self.history: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first epoch, not at the first push: whether there is something to push, and with what."""
        unwrap(self._model(pl_module))
        self._loader(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.schedule.due(trainer.current_epoch, trainer.optimizers):
            row = self._push(trainer, pl_module, self.options, final=False)
            for name, value in _distances(row).items():
                pl_module.log(name, value, on_step=False, on_epoch=True, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.final == "hard":
            row = self._push(trainer, pl_module, self.options | {"momentum": 0.0}, final=True)
            for logger in trainer.loggers:  # Lightning takes no log() from here on
                logger.log_metrics(_distances(row), step=trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"schedule": self.schedule.state_dict(), "history": [dict(row) for row in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state_dict["schedule"])
        self.history = [dict(row) for row in state_dict["history"]]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What the prototypes stand for is no tensor: the module's own state doesn't hold it."""
        anchors = getattr(unwrap(self._model(pl_module)).head.proto_manager, "anchors", None)
        if anchors is not None:
            checkpoint["protopush_anchors"] = plain_anchors(anchors)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        manager: Any = unwrap(self._model(pl_module)).head.proto_manager
        if "protopush_anchors" in checkpoint and hasattr(manager, "anchors"):
            manager.anchors = anchors_from(checkpoint["protopush_anchors"])

    def _push(
        self, trainer: Trainer, pl_module: LightningModule, options: dict[str, Any], final: bool
    ) -> dict[str, Any]:
        """Pushes and keeps the report; the push's line of the history."""
        model = self._model(pl_module)
        prototypes = unwrap(model).head.proto_manager.prototypes
        default = torch.get_default_dtype()
        with trainer.precision_plugin.forward_context():
            # A push compares in its own precision; the context puts back what it found.
            torch.set_default_dtype(default)
            report = push_prototypes(
                _Converted(model, trainer.precision_plugin.convert_input),
                self._loader(trainer),
                pl_module.device,
                optimizer=next((one for one in trainer.optimizers if _holds(one, prototypes)), None),
                **options,
            )
        self.reports.append(report)
        epoch = trainer.current_epoch + (not final)  # at the end it is counted already
        row = {"epoch": epoch, **{name: getattr(report, name) for name in DISTANCES}, "final": final}
        self.history.append(row)
        return row

    def _model(self, pl_module: LightningModule) -> nn.Module:
        found: Any = pl_module
        if isinstance(self.find, str):
            for name in self.find.split("."):
                found = getattr(found, name, None)
        elif self.find is not None:
            found = self.find(pl_module)
        if not isinstance(found, nn.Module):
            raise InputError(
                f"{type(pl_module).__name__} has no module at find={self.find!r}; expected the one with "
                "extract_features, head.proj and head.proto_manager"
            )
        return found

    def _loader(self, trainer: Trainer) -> Any:
        loader = trainer.train_dataloader if self.loader is None else self.loader
        if not isinstance(loader, DataLoader):
            raise InputError(
                f"the trainer's training data is a {type(loader).__name__}; expected one DataLoader of (images, "
                "labels) or (images, labels, ids); give PushCallback(loader=...) such a one"
            )
        return loader


class _Converted(nn.Module):
    """The model, with images in the precision that Lightning would hand them over in (bf16-true, 64-true, ...)."""

    def __init__(self, model: nn.Module, convert: Callable[[Any], Any]) -> None:
        super().__init__()
        self.model, self.convert = model, convert
        net: Any = unwrap(model)
        self.head, self.class_names, self.features_of = net.head, getattr(net, "class_names", []), net.extract_features

    def forward(self, images: Tensor) -> Any:
        return self.model(self.convert(images))

    def extract_features(self, images: Tensor) -> Any:
        return self.features_of(self.convert(images))


def _holds(optimizer: Any, parameter: nn.Parameter) -> bool:
    return any(parameter is one for group in optimizer.param_groups for one in group["params"])


def _distances(row: dict[str, Any]) -> dict[str, float]:
    """What is logged; nothing where nothing was pushed, whose distances are NaN."""
    return {f"push/{name}": row[name] for name in DISTANCES if row[name] == row[name]}
