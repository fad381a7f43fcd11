"""Training on Lightning Fabric: setup, phases, epochs with pushes, the best of them kept, then the final push."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protopush.distributed import all_gather_rows, broadcast_from_rank_zero, raise_on_all_ranks, rank_and_size
from protopush.errors import InputError, listing
from protopush.evaluation.evaluate import in_short
from protopush.models.model_folder import Run, save_run
from protopush.nn.head import HeadOutput
from protopush.nn.losses import off_mask_loss
from protopush.nn.prototypes import anchors_from, plain_anchors
from protopush.push import PushSchedule
from protopush.push.embedding import NonFinite
from protopush.runs.candidates import keep_candidates
from protopush.runs.progress import bar
from protopush.runs.run import make_fabric, open_run, quiet
from protopush.training.config import RunConfig
from protopush.training.final_push import choose, final_push, push_now, push_row, push_shortlisted, resize
from protopush.training.optim import Ema, learning_rate_factor, make_optimizer, set_rate
from protopush.training.phases import Best, Phase, Stage, Stored, on_validation, phases
from protopush.training.run_writer import RunWriter, fresh_folder, load_checkpoint, refuse_other_options
from protopush.training.setup import Job, prepare, seed_of
from protopush.training.tracking import check_trackers

logger = logging.getLogger("protopush.training")


def train(config: RunConfig, out: str | Path, overwrite: bool = False, resume: bool = False) -> Run:
    """Train, push and save a model; nothing is written before every input was checked.

    Args:
        config: everything that decides the run.
        out: the run folder.
        overwrite: replace a run that is there.
        resume: go on where a run in ``out`` was cut off; start one where there is none, and leave a whole one as it is.

    Raises:
        InputError: bad input, in one line.
    """
    out, trainer = Path(out), config.trainer
    config.check()
    fabric = make_fabric(trainer.device, trainer.precision, trainer.devices, trainer.num_nodes)
    with quiet():
        fabric.launch()
    whole, saved = broadcast_from_rank_zero(lambda: _found(out, config, overwrite, resume))
    if whole:
        logger.info("%s is whole: nothing is left to do", out)
        return open_run(out)
    job = prepare(config, fabric, out if saved else None)
    with RunWriter(out, config, job.catalog, job.hashes) as writer:
        stage = fit(job, writer, saved)
        final_push(job, stage, writer)
        run = _save(job, out)
    logger.info("Saved %s", out)
    return run


def _found(out: Path, config: RunConfig, overwrite: bool, resume: bool) -> tuple[bool, dict[str, Any] | None]:
    """Whether a run is there that is whole, else the checkpoint to go on with; what is in the way is refused."""
    if resume and (out / "config.json").is_file():
        refuse_other_options(out, config)
        return True, None
    check_trackers(config.trainer.track)
    saved = load_checkpoint(out, config) if resume else None
    if saved is None:
        fresh_folder(out, overwrite or resume)
    return False, saved


def _save(job: Job, out: Path) -> Run:
    data = job.config.data
    recorded = {name: getattr(data, name) for name in ("path", "source", "split_seed", "max_megapixels")}
    recorded["path"] = os.path.abspath(data.path) if data.path else ""  # the run may be used from another folder
    model = job.model.eval()
    model.prior, model.train_shares = job.prior(), job.train_shares()
    run = Run(model, list(job.catalog.classes), job.transform, job.catalog.root.resolve(), recorded, out)

    how = job.fabric.device, data.num_workers, job.config.push.candidates
    broadcast_from_rank_zero(lambda: keep_candidates(run, job.train, job.val, *how))
    model.cpu()
    broadcast_from_rank_zero(lambda: save_run(run))
    return run


def fit(job: Job, writer: RunWriter, saved: dict[str, Any] | None = None) -> Stage:
    """The epochs of all phases, from a saved checkpoint's on; leaves the model at its best on the validation images."""
    best, done = None, saved["epoch"] if saved else 0
    for phase in phases(job.config):
        if done > phase.end:
            continue
        # Before the seed: whether features came from the cache or not must not decide the random numbers that follow.
        stage = phase.stage(job)
        job.fabric.seed_everything(job.config.train.seed, verbose=False)
        trainer = Trainer(job, stage, phase.start, phase.end)
        if saved and phase.start < done:
            writer.resume(saved, trainer.load_state_dict)
        elif best is not None:  # what the head alone reached is to be beaten
            trainer.best.see(best, "the head alone")
        fit_phase(trainer, phase, writer, max(done, phase.start))
        trainer.best.restore()
        stage.weights = trainer.best.where
        logger.info("Best on validation: %s", stage.weights)
        best = trainer.best.metrics
    return stage


def fit_phase(trainer: Trainer, phase: Phase, writer: RunWriter, start: int) -> None:
    """The epochs of one phase, from ``start`` on."""
    config, best = trainer.job.config, trainer.best
    last = phase.end == config.train.epochs
    schedule = PushSchedule(config.push.start_epoch, config.push.interval, final_decay=config.push.final_decay)
    first = trainer.push(0, None) if start == 0 and config.push.start_epoch == 0 else None
    for epoch in range(start, phase.end):
        if last and config.train.patience and best.stale >= config.train.patience:
            logger.info("Stopped: no better validation score for %d epochs", best.stale)
            break
        row: dict[str, Any] = {"epoch": epoch + 1, **trainer.epoch(epoch)}
        if epoch == 0:  # not before: an input that fails in the first epoch leaves nothing behind
            writer.start()
            if first is not None:
                writer.write(first)
        best.stale += 1
        row["val"] = trainer.validate(f"epoch {epoch + 1}")
        writer.write(row)
        validation = f"  validation: {in_short(row['val'])}" if row["val"] else ""
        logger.info("Epoch %d/%d  loss %.4f%s", epoch + 1, config.train.epochs, row["loss"], validation)
        rate = trainer.rate_after(epoch) if last else 1.0  # only the last phase's decay is final
        if schedule.due(epoch, lr=rate, peak_lr=1.0):
            writer.write(trainer.push(epoch + 1, row["val"]))
        writer.checkpoint(epoch + 1, trainer.state_dict())


class Trainer:
    """A stage in training, from an epoch to another: optimizer, average, best state, and the steps of an epoch."""

    def __init__(self, job: Job, stage: Stage, start: int, end: int) -> None:
        self.job, self.fabric, self.config = job, job.fabric, job.config.train
        config = self.config
        self.stage, self.start = stage, start
        self.batches = len(stage.train_loader)
        self.steps = -(-self.batches // config.accumulate)  # of the optimizer, in an epoch
        self.total, self.warmup = (end - start) * self.steps, round(config.warmup_epochs * self.steps)
        self.optimizer = make_optimizer(stage.model, config)
        self.model, self.wrapped = job.fabric.setup(stage.model, self.optimizer)
        self.ema = Ema(stage.model, config.ema) if config.ema is not None else None
        self.best = Best(stage.model, job.head.proto_manager, config.select)
        self.loss = job.loss()

    def rate_after(self, epoch: int, steps: int = 0) -> float:
        """The learning rate's share of its peak after an epoch, counted from 0 over the run, and so many steps."""
        return learning_rate_factor((epoch + 1 - self.start) * self.steps + steps, self.total, self.warmup)

    def epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training images, counted from 0 over the run; the mean of each loss term.

        Where embeddings become NaN or infinite, an InputError names the samples.
        """
        # An epoch's randomness depends on nothing that came before it, so that a run can go on from any epoch.
        seed = seed_of(self.config.seed, epoch, rank_and_size()[0])
        self.stage.train_loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        self.stage.train_loader.generator.manual_seed(seed)
        self.fabric.seed_everything(seed, verbose=False)
        start, count, sums, every = time.perf_counter(), 0, dict[str, Tensor](), self.config.accumulate
        non_finite = NonFinite(self.fabric.device, first_batch_only=True)
        self.stage.train()
        with bar(f"Epoch {epoch + 1}", self.batches) as advance:
            for number, (images, labels, ids) in enumerate(self.stage.train_loader):
                step, place = divmod(number, every)
                parts = min(every, self.batches - step * every)
                terms, rows = self._batch(images, labels, ids, non_finite, parts, place + 1 == parts)
                if place + 1 == parts:
                    self._step(self.rate_after(epoch - 1, step))
                for name, value in terms.items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value * rows
                count += rows
                if (number + 1) % self.job.config.push.anchor_refresh == 0 or number + 1 == self.batches:
                    self.stage.refresh()
                advance(1)
        raise_on_all_ranks(lambda: self._refuse(non_finite))
        means = {name: float(value) / count for name, value in sums.items()}
        return means | {"images_per_second": count / (time.perf_counter() - start)}

    def _batch(
        self, images: Tensor, labels: Tensor, ids: Tensor, non_finite: NonFinite, parts: int, last: bool
    ) -> tuple[dict[str, Tensor], int]:
        """Forwards and backwards; the loss and its terms, and the batch's size, over all processes.

        ``parts`` batches make the step that the batch belongs to, of which it may be the last.
        """
        device = self.fabric.device
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        waits = rank_and_size()[1] > 1 and not last
        with self.fabric.no_backward_sync(self.model) if waits else nullcontext():
            out: HeadOutput = self.model(images)
            non_finite.update(out.embeddings, ids.to(device))
            off_mask = self._off_mask(out, labels, ids)
            out = out._replace(logits=all_gather_rows(out.logits), similarities=all_gather_rows(out.similarities))
            labels = all_gather_rows(labels)
            loss, terms = self.loss(out, labels, self.job.head.proto_manager, off_mask)
            self.fabric.backward(loss / parts)
        return {"loss": loss.detach(), **terms}, len(labels)

    def _off_mask(self, out: HeadOutput, labels: Tensor, ids: Tensor) -> Tensor | None:
        """Of this process's images; None where masks are not used, or images are augmented and masks are not."""
        shares = self.job.mask_shares
        if shares is None or not self.job.config.loss.off_mask or not isinstance(self.stage, Stored):
            return None
        outside = 1.0 - shares[ids].to(out.embeddings)
        return off_mask_loss(out, labels, self.job.head.proto_manager.mask(), outside)

    def _step(self, rate: float) -> None:
        set_rate(self.optimizer, rate)
        if (norm := self.config.clip_norm) is not None:
            self.fabric.clip_gradients(self.model, self.wrapped, max_norm=norm, error_if_nonfinite=False)
        self.wrapped.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update()

    def _refuse(self, non_finite: NonFinite) -> None:
        bad, smallest = non_finite.found()
        if bad:
            names = [self.job.train.samples[i].name for i in smallest]
            raise InputError(
                f"NaN or infinite features in {bad} samples of one batch: {listing(names, 10)}; expected finite ones; "
                "check these images and the weights, or lower the learning rate"
            )

    def validate(self, where: str) -> dict[str, Any] | None:
        """The metrics on the validation images, of the average where there is one; the best state is remembered."""
        with self.ema.applied() if self.ema is not None else nullcontext():
            if self.ema is not None:
                self.stage.refresh()
            metrics = on_validation(self.job, self.stage)
            self.best.see(metrics, where)
        return metrics

    def push(self, epoch: int, before: dict[str, Any] | None) -> dict[str, Any]:
        """A push after an epoch, counted from 1, guarded; its line of ``metrics.jsonl``."""
        with self.fabric.autocast():
            momentum, stage = self.job.config.push.momentum, self.stage
            report = push_shortlisted(self.job, stage) or push_now(
                self.job, stage.model, stage.train_loader, momentum, self.optimizer, stage.val_loader
            )
            resized = resize(self.job, stage, self.optimizer)
            chosen = choose(self.job, stage) if epoch else {}  # nothing is known yet before the first one
            if self.job.head.proto_manager.anchor_crops is not None:
                stage.refresh()  # the next step embeds the pixels of the new anchors
        if self.ema is not None:
            self.ema.take(self.job.head.proto_manager, *([self.job.head.bias] if chosen else []))
        if chosen:  # what more prototypes reached is no longer to be had
            self.best = Best(stage.model, self.job.head.proto_manager, self.config.select)
        return push_row(report, epoch, before, self.validate(f"epoch {epoch} after its push")) | resized | chosen

    def state_dict(self) -> dict[str, Any]:
        """All that the next epochs depend on, as plain values and tensors."""
        state = {name: part.state_dict() for name, part in self._saved().items()}
        return state | {"anchors": plain_anchors(self.job.head.proto_manager.anchors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        for name, part in self._saved().items():
            part.load_state_dict(state[name])
        self.job.head.proto_manager.anchors = anchors_from(state["anchors"])

    def _saved(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.stage.model, "optimizer": self.optimizer, "best": self.best}
        parts["scaler"] = self.fabric.strategy.precision
        return parts if self.ema is None else parts | {"ema": self.ema.averaged}
