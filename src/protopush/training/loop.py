"""The training loop, on Lightning Fabric: epochs with pushes, then the final push and the class connections."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from protopush.backbones import Features
from protopush.data.features import CachedFeatures, cache_features
from protopush.data.files import write_atomic
from protopush.errors import InputError, listing
from protopush.head_optimal import HeadOutput
from protopush.losses import PrototypeLoss
from protopush.metrics.classification import classification_metrics
from protopush.model import ProtoModel
from protopush.push import PushReport
from protopush.push.search import NonFinite
from protopush.training.config import RunConfig
from protopush.training.connections import fit_connections
from protopush.training.evaluate import evaluate, predict
from protopush.training.prepare import Job, prepare
from protopush.training.progress import bar
from protopush.training.run import Run, append_metrics, fresh_folder, save_checkpoint, save_run
from protopush.training.schedule import learning_rate_factor, push_due

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
    data = {"path": config.data.path, "source": config.data.source, "split_seed": config.data.split_seed}
    model = job.model.cpu().eval()
    run = Run(model, list(job.catalog.classes), job.transform, job.catalog.root.resolve(), data, out)
    save_run(run)
    logger.info("Saved %s", out)
    return run


class Joint:
    """What is trained when the backbone learns too: the model itself, on images."""

    def __init__(self, job: Job) -> None:
        self.model: nn.Module = job.model
        self.train_loader = job.loader(job.train, shuffle=True)
        self.val_loader = job.loader(job.val) if job.val else None
        self.plain_train_loader = job.loader(job.train.eval_view())


class Frozen:
    """What is trained when the backbone is frozen: the head, on features that were computed once."""

    def __init__(self, job: Job) -> None:
        train = self._features(job, job.train, "training")
        val = self._features(job, job.val, "validation") if job.val else None
        self.model: nn.Module = ProtoModel(FeatureReader(train.grid), job.head).to(job.fabric.device)
        self.train_loader = job.loader(train, shuffle=True)
        self.val_loader = job.loader(val) if val else None
        self.plain_train_loader = job.loader(train)

    def _features(self, job: Job, images: Any, what: str) -> CachedFeatures:
        config = job.config
        with bar(f"Features of the {what} images", len(images)) as advance:
            return cache_features(
                job.model.backbone,
                images,
                [job.hashes[sample.name] for sample in images.samples],
                Path(config.train.cache_dir) if config.train.cache_dir else None,
                job.fabric.device,
                num_workers=config.data.num_workers,
                advance=advance,
            )


class FeatureReader(nn.Module):
    """Stands in for the frozen backbone: stored patches (B, L, C) to :class:`Features`."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, patches: Tensor) -> Features:
        patches = patches.float()
        return Features(patches.mean(dim=1, keepdim=True), patches, self.grid)


def fit(job: Job, stage: Frozen | Joint, out: Path) -> None:
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
    best = Best(stage.model, config.train.select)
    for epoch in range(config.train.epochs):
        terms = train_epoch(job, model, wrapped, schedule, stage.train_loader, loss, epoch)
        if epoch == 0:  # not before: an input that fails in the first epoch leaves nothing behind
            _begin_folder(out, config)
        row: dict[str, Any] = {"epoch": epoch + 1, **terms}
        row["val"] = on_validation(job, stage)
        append_metrics(out, row)
        best.see(row["val"], f"epoch {epoch + 1}")
        _say_epoch(row, config.train.epochs)
        if push_due(epoch, config.push.start_epoch, config.push.interval):
            with job.fabric.autocast():
                report = _push(job, stage.model, stage.train_loader, config.push.momentum, optimizer)
            after = on_validation(job, stage)
            append_metrics(out, push_row(report, epoch + 1, row["val"], after))
            best.see(after, f"epoch {epoch + 1} after its push")
        save_checkpoint(out, stage.model, optimizer, epoch + 1, config.train.seed)
    best.restore()
    logger.info("Best on validation: %s", best.where)


def on_validation(job: Job, stage: Frozen | Joint) -> dict[str, Any] | None:
    """The metrics on the validation images, in the precision of the run; None where there are no such images."""
    if stage.val_loader is None:
        return None
    with job.fabric.autocast():
        return evaluate(stage.model, stage.val_loader, job.fabric.device, list(job.catalog.classes))


def _begin_folder(out: Path, config: RunConfig) -> None:
    if out.is_dir():
        shutil.rmtree(out)  # empty, or a run to be overwritten: fresh_folder saw to it
    text = yaml.safe_dump(asdict(config), sort_keys=False)
    write_atomic(out / "config.yaml", lambda file: file.write_text(text, encoding="utf-8"))


def train_epoch(
    job: Job,
    model: Any,
    optimizer: Any,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    loader: Iterable[Any],
    loss: PrototypeLoss,
    epoch: int,
) -> dict[str, float]:
    """One pass over the training images; the mean of each loss term.

    Raises:
        InputError: embeddings became NaN or infinite; the samples are named.
    """
    sums: dict[str, Tensor] = {}
    strange = NonFinite(job.fabric.device)
    count = 0
    model.train()
    with bar(f"Epoch {epoch + 1}", len(loader)) as advance:  # type: ignore[arg-type]
        for images, labels, ids in loader:
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
            advance(1)
    bad, smallest = strange.found()
    if bad:
        names = [job.train.samples[i].name for i in smallest]
        raise InputError(
            f"NaN or infinite features in {bad} samples: {listing(names, 10)}; expected finite ones; "
            "look at these images, or lower the learning rate"
        )
    return {name: float(value) / count for name, value in sums.items()}


def final_push(job: Job, stage: Frozen | Joint, out: Path) -> None:
    """The last push, over the real images in full precision, and the class connections fitted to it."""
    config = job.config
    momentum = {"hard": 0.0, "momentum": config.push.momentum, "none": 1.0}[config.push.final]
    before = on_validation(job, stage)
    report = _push(job, job.model, job.loader(job.train), momentum)
    after = on_validation(job, stage)
    row = push_row(report, config.train.epochs, before, after) | {"final": config.push.final}
    if config.train.connection_steps and momentum < 1:
        row["connection_step"] = _connections(job, stage)
        row["val_connections"] = on_validation(job, stage)
    append_metrics(out, row)
    for name in ("val_before", "val_after", "val_connections"):
        if row.get(name):
            logger.info("%-16s %s", name, _short(row[name]))


def _connections(job: Job, stage: Frozen | Joint) -> int:
    config, head, device = job.config.train, job.head, job.fabric.device
    train = predict(stage.model, stage.plain_train_loader, device, "Similarities")
    held = predict(stage.model, stage.val_loader, device) if stage.val_loader else train
    held_similarities, names = held.similarities.to(device), list(job.catalog.classes)

    def score() -> float:
        with torch.no_grad():
            logits = (held_similarities * head.weights()).sum(-1) + head.bias
        return score_of(classification_metrics(logits.softmax(dim=1).cpu(), held.labels, names), config.select)

    return fit_connections(
        head,
        train.similarities.to(device),
        train.labels.to(device),
        job.class_weights(),
        score,
        config.connection_steps,
        config.connection_lr,
        config.connection_decay,
    )


def score_of(metrics: dict[str, Any], name: str) -> float:
    """The number that chooses between models, larger is better; ``mean`` is that of balanced accuracy and AUROC."""
    parts = ("balanced_accuracy", "auroc") if name == "mean" else (name,)
    return sum(metrics[part] or 0.0 for part in parts) / len(parts)


class Best:
    """Remembers the best state on the validation images; without any, the last one."""

    def __init__(self, model: nn.Module, metric: str) -> None:
        self.model = model
        self.metric = metric
        self.score = float("-inf")
        self.where = "the first weights"
        self.state: dict[str, Tensor] = {}

    def see(self, metrics: dict[str, Any] | None, where: str) -> None:
        """Compare the model as it is now."""
        score = self.score if metrics is None else score_of(metrics, self.metric)
        if score >= self.score:
            self.score, self.where = score, where
            self.state = {key: value.detach().cpu().clone() for key, value in self.model.state_dict().items()}

    def restore(self) -> None:
        """Put the best state back."""
        self.model.load_state_dict(self.state)


def _push(
    job: Job, model: nn.Module, loader: Iterable[Any], momentum: float, optimizer: torch.optim.Optimizer | None = None
) -> PushReport:
    config = job.config.push
    use_local = job.head.match == "local" if config.use_local is None else config.use_local
    return model.push_prototypes(  # type: ignore[operator, no-any-return]
        loader,
        job.fabric.device,
        use_local=use_local,
        momentum=momentum,
        max_patches_per_class=config.max_patches_per_class,
        seed=job.config.train.seed,
        optimizer=optimizer,
    )


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


def push_row(
    report: PushReport, epoch: int, before: dict[str, Any] | None, after: dict[str, Any] | None
) -> dict[str, Any]:
    """A push as one line of ``metrics.jsonl``."""
    return {
        "push": epoch,
        "use_local": report.use_local,
        "momentum": report.momentum,
        "min_dist": report.min_dist,
        "mean_dist": report.mean_dist,
        "mean_dist_after": report.mean_dist_after,
        "seconds": report.seconds,
        "val_before": before,
        "val_after": after,
    }


def _say_epoch(row: dict[str, Any], epochs: int) -> None:
    text = f"Epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}"
    logger.info("%s%s", text, f"  validation: {_short(row['val'])}" if row["val"] else "")


def _short(metrics: dict[str, Any]) -> str:
    auroc = metrics["auroc"]
    return f"balanced accuracy {metrics['balanced_accuracy']:.3f}" + (
        f", AUROC {auroc:.3f}" if auroc is not None else ""
    )
