"""The training loop, on Lightning Fabric: epochs with pushes, the best of them kept, then the final push."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from protopush.data.files import write_atomic
from protopush.errors import InputError, listing
from protopush.head_optimal import HeadOutput
from protopush.losses import PrototypeLoss
from protopush.prototypes import Anchor, PrototypeManager
from protopush.push.tally import NonFinite
from protopush.training.config import RunConfig
from protopush.training.evaluate import in_short, score_of
from protopush.training.finish import final_push, push_between
from protopush.training.prepare import Job, prepare
from protopush.training.progress import bar
from protopush.training.run import Run, append_metrics, clear_folder, fresh_folder, save_checkpoint, save_run
from protopush.training.schedule import learning_rate_factor, push_due
from protopush.training.stages import Frozen, Joint, Stage, on_validation

logger = logging.getLogger("protopush.training")


def train(config: RunConfig, out: str | Path, overwrite: bool = False) -> Run:
    """Train, push and save a model; nothing is written before every input was checked.

    Args:
        config: everything that decides the run.
        out: the run folder.
        overwrite: replace a run that is there.

    Raises:
        InputError: bad input, in one line.
    """
    out = Path(out)
    fresh_folder(out, overwrite)
    job = prepare(config)
    stage = Frozen(job) if config.train.freeze_backbone else Joint(job)
    fit(job, stage, out)
    final_push(job, stage, out)
    path = os.path.abspath(config.data.path) if config.data.path else ""  # the run may be used from another folder
    data = {"path": path, "source": config.data.source, "split_seed": config.data.split_seed}
    model = job.model.cpu().eval()
    run = Run(model, list(job.catalog.classes), job.transform, job.catalog.root.resolve(), data, out)
    save_run(run)
    logger.info("Saved %s", out)
    return run


def fit(job: Job, stage: Stage, out: Path) -> None:
    """The epochs; leaves the model at its best epoch on the validation images."""
    config = job.config
    # Again: whether features came from the cache or not must not decide the random numbers that follow.
    job.fabric.seed_everything(config.train.seed, verbose=False)
    optimizer = _optimizer(job, stage.model)
    total = config.train.epochs * len(stage.train_loader)
    warmup = round(config.train.warmup_epochs * len(stage.train_loader))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, total, warmup))
    model, wrapped = job.fabric.setup(stage.model, optimizer)
    loss = job.loss().to(job.fabric.device)
    best = Best(stage.model, job.head.proto_manager, config.train.select)
    first = push_between(job, stage, 0, None, optimizer) if config.push.start_epoch == 0 else None
    for epoch in range(config.train.epochs):
        terms = train_epoch(job, stage, model, wrapped, schedule, loss, epoch)
        if epoch == 0:  # not before: an input that fails in the first epoch leaves nothing behind
            _begin_folder(out, config)
            if first is not None:
                append_metrics(out, first)
        row: dict[str, Any] = {"epoch": epoch + 1, **terms}
        row["val"] = on_validation(job, stage)
        append_metrics(out, row)
        best.see(row["val"], f"epoch {epoch + 1}")
        _say_epoch(row, config.train.epochs)
        if push_due(epoch, config.push.start_epoch, config.push.interval):
            pushed = push_between(job, stage, epoch + 1, row["val"], optimizer)
            append_metrics(out, pushed)
            best.see(pushed["val_after"], f"epoch {epoch + 1} after its push")
        save_checkpoint(out, stage.model, optimizer, epoch + 1, config.train.seed)
    best.restore()
    logger.info("Best on validation: %s", best.where)


def _begin_folder(out: Path, config: RunConfig) -> None:
    clear_folder(out)
    text = yaml.safe_dump(asdict(config), sort_keys=False)
    write_atomic(out / "config.yaml", lambda file: file.write_text(text, encoding="utf-8"))


def train_epoch(
    job: Job,
    stage: Stage,
    model: Any,
    optimizer: Any,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    loss: PrototypeLoss,
    epoch: int,
) -> dict[str, float]:
    """One pass over the training images; the mean of each loss term.

    Raises:
        InputError: embeddings became NaN or infinite; the samples are named.
    """
    sums: dict[str, Tensor] = {}
    strange = NonFinite(job.fabric.device, first_batch_only=True)
    count = 0
    model.train()
    with bar(f"Epoch {epoch + 1}", len(stage.train_loader)) as advance:
        for step, (images, labels, ids) in enumerate(stage.train_loader, start=1):
            images, labels = images.to(job.fabric.device), labels.to(job.fabric.device)
            out: HeadOutput = model(images)
            strange.update(out.embeddings, ids.to(job.fabric.device))
            total, terms = loss(out, labels, job.head.proto_manager)
            optimizer.zero_grad()
            job.fabric.backward(total)
            optimizer.step()
            schedule.step()
            for name, value in {"loss": total.detach(), **terms}.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value * len(labels)
            count += len(labels)
            if step % job.config.push.anchor_refresh == 0 or step == len(stage.train_loader):
                stage.refresh()
            advance(1)
    bad, smallest = strange.found()
    if bad:
        names = [job.train.samples[i].name for i in smallest]
        raise InputError(
            f"NaN or infinite features in {bad} samples of one batch: {listing(names, 10)}; expected finite ones; "
            "look at these images and at the weights, or lower the learning rate"
        )
    return {name: float(value) / count for name, value in sums.items()}


class Best:
    """Remembers the best state on the validation images; without any, the last one."""

    def __init__(self, model: nn.Module, manager: PrototypeManager, metric: str) -> None:
        self.model = model
        self.manager = manager
        self.metric = metric
        self.score = float("-inf")
        self.where = "the first weights"
        self.state: dict[str, Tensor] = {}
        self.anchors: list[Anchor | None] = []

    def see(self, metrics: dict[str, Any] | None, where: str) -> None:
        """Compare the model as it is now; live prototypes must have been pushed once."""
        if self.manager.anchor_ids is not None and not any(self.manager.anchors):
            return
        score = self.score if metrics is None else score_of(metrics, self.metric)
        if score >= self.score:
            self.score, self.where = score, where
            self.state = {key: value.detach().cpu().clone() for key, value in self.model.state_dict().items()}
            self.anchors = list(self.manager.anchors)

    def restore(self) -> None:
        """Put the best state back."""
        if not self.state:
            return
        self.model.load_state_dict(self.state)
        self.manager.anchors = list(self.anchors)


def _optimizer(job: Job, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors and prototypes don't; the backbone has its own rate."""
    config = job.config.train
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = config.backbone_lr if name.startswith("backbone.") else config.lr
        keep = parameter.ndim < 2 or name.endswith(("prototypes", "connections"))
        groups.setdefault((rate, 0.0 if keep else config.weight_decay), []).append(parameter)
    return torch.optim.AdamW([{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()])


def _say_epoch(row: dict[str, Any], epochs: int) -> None:
    text = f"Epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}"
    logger.info("%s%s", text, f"  validation: {in_short(row['val'])}" if row["val"] else "")
