"""The best state of a run so far.

A stage of a run in training: its optimizer, its average, its best state, and the steps of an epoch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from protopush.distributed import all_gather_rows, raise_on_all_ranks, rank_and_size
from protopush.errors import InputError, listing
from protopush.evaluation.outputs import score_of
from protopush.nn.head import HeadOutput
from protopush.nn.prototypes import Anchor, PrototypeManager, anchors_from, plain_anchors
from protopush.push.nearest_patches import NonFinite
from protopush.runs.progress import bar
from protopush.training.final_push import push_between
from protopush.training.optim import Ema, learning_rate_factor, make_optimizer, set_rate
from protopush.training.phases import Stage, on_validation
from protopush.training.samplers import seed_of
from protopush.training.setup import Job


class Best:
    """Remembers the best state on the validation images; without any, the last one.

    Attributes:
        score: the best one.
        metrics: what it scored with; None without validation images.
        where: the epoch, in words.
        stale: epochs since.
    """

    def __init__(self, model: nn.Module, manager: PrototypeManager, metric: str) -> None:
        self.model = model
        self.manager = manager
        self.metric = metric
        self.score = float("-inf")
        self.metrics: dict[str, Any] | None = None
        self.where = "the first weights"
        self.stale = 0
        self.state: dict[str, Tensor] = {}
        self.anchors: list[Anchor | None] = []

    def see(self, metrics: dict[str, Any] | None, where: str) -> None:
        """Compare the model as it is now; live prototypes must have been pushed once."""
        if self.manager.anchor_ids is not None and not any(self.manager.anchors):
            self.stale = 0
            return
        score = self.score if metrics is None else score_of(metrics, self.metric)
        if score > self.score or metrics is None:
            self.stale = 0
        if score >= self.score:  # of equals the last: it has learned longer
            self.score, self.metrics, self.where = score, metrics, where
            self.state = {key: value.detach().cpu().clone() for key, value in self.model.state_dict().items()}
            self.anchors = list(self.manager.anchors)

    def restore(self) -> None:
        """Put the best state back."""
        if self.state:
            self.model.load_state_dict(self.state)
            self.manager.anchors = list(self.anchors)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {
            "score": self.score,
            "metrics": self.metrics,
            "where": self.where,
            "stale": self.stale,
            "state": self.state,
            "anchors": plain_anchors(self.anchors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self.score, self.metrics, self.where = state["score"], state["metrics"], state["where"]
        self.stale = state["stale"]
        self.state, self.anchors = dict(state["state"]), anchors_from(state["anchors"])


class Learner:
    """What learns in one stage.

    Args:
        job: the run.
        stage: the model and its loaders.
        start: epochs that came before this stage.
        end: the last of its epochs.
    """

    def __init__(self, job: Job, stage: Stage, start: int, end: int) -> None:
        config = job.config.train
        self.job, self.stage, self.start = job, stage, start
        self.batches = len(stage.train_loader)
        self.steps = -(-self.batches // config.accumulate)  # of the optimizer, in an epoch
        self.total, self.warmup = (end - start) * self.steps, round(config.warmup_epochs * self.steps)
        self.optimizer = make_optimizer(stage.model, config)
        self.model, self.wrapped = job.fabric.setup(stage.model, self.optimizer)
        self.ema = Ema(stage.model, config.ema) if config.ema is not None else None
        self.best = Best(stage.model, job.head.proto_manager, config.select)
        self.loss = job.loss()

    def rate(self, step: int) -> float:
        """The share of its peak that the learning rate has at a step of the stage."""
        return learning_rate_factor(step, self.total, self.warmup)

    def rate_after(self, epoch: int) -> float:
        """The same when an epoch, counted from 0 over the run, has ended."""
        return self.rate((epoch + 1 - self.start) * self.steps)

    def epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training images, counted from 0 over the run; the mean of each loss term.

        Raises:
            InputError: embeddings became NaN or infinite; the samples are named.
        """
        self._seed(epoch)
        began, count, sums = time.perf_counter(), 0, dict[str, Tensor]()
        strange = NonFinite(self.job.fabric.device, first_batch_only=True)
        self.stage.train()
        with bar(f"Epoch {epoch + 1}", self.batches) as advance:
            for number, (images, labels, ids) in enumerate(self.stage.train_loader):
                step, place = divmod(number, self.job.config.train.accumulate)
                terms, rows = self._batch(number, images, labels, ids, strange)
                if place + 1 == self._parts(number):
                    self._step((epoch - self.start) * self.steps + step)
                for name, value in terms.items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value * rows
                count += rows
                if (number + 1) % self.job.config.push.anchor_refresh == 0 or number + 1 == self.batches:
                    self.stage.refresh()
                advance(1)
        raise_on_all_ranks(lambda: self._refuse(strange))
        means = {name: float(value) / count for name, value in sums.items()}
        return means | {"images_per_second": count / (time.perf_counter() - began)}

    def _seed(self, epoch: int) -> None:
        """An epoch's randomness depends on nothing that came before it, so that a run can go on from any epoch."""
        seed = self.job.config.train.seed
        self.stage.train_loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        own = seed_of(seed, epoch, rank_and_size()[0])
        self.stage.train_loader.generator.manual_seed(own)
        self.job.fabric.seed_everything(own, verbose=False)

    def _parts(self, number: int) -> int:
        """How many batches make the step that a batch belongs to."""
        every = self.job.config.train.accumulate
        return min(every, self.batches - number // every * every)

    def _batch(
        self, number: int, images: Tensor, labels: Tensor, ids: Tensor, strange: NonFinite
    ) -> tuple[dict[str, Tensor], int]:
        """Forwards and backwards; the loss and its terms, and the batch's size, over all processes."""
        device = self.job.fabric.device
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        parts = self._parts(number)
        waits = rank_and_size()[1] > 1 and number % self.job.config.train.accumulate + 1 < parts
        with self.job.fabric.no_backward_sync(self.model) if waits else nullcontext():
            out: HeadOutput = self.model(images)
            strange.update(out.embeddings, ids.to(device))
            out = out._replace(logits=all_gather_rows(out.logits), similarities=all_gather_rows(out.similarities))
            labels = all_gather_rows(labels)
            loss, terms = self.loss(out, labels, self.job.head.proto_manager)
            self.job.fabric.backward(loss / parts)
        return {"loss": loss.detach(), **terms}, len(labels)

    def _step(self, step: int) -> None:
        set_rate(self.optimizer, self.rate(step))
        norm = self.job.config.train.clip_norm
        if norm is not None:
            self.job.fabric.clip_gradients(self.model, self.wrapped, max_norm=norm, error_if_nonfinite=False)
        self.wrapped.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update()

    def _refuse(self, strange: NonFinite) -> None:
        bad, smallest = strange.found()
        if bad:
            names = [self.job.train.samples[i].name for i in smallest]
            raise InputError(
                f"NaN or infinite features in {bad} samples of one batch: {listing(names, 10)}; expected finite ones; "
                "look at these images and at the weights, or lower the learning rate"
            )

    def validate(self, where: str) -> dict[str, Any] | None:
        """The metrics on the validation images, of the average where there is one; the best state is remembered."""
        with self._averaged():
            metrics = on_validation(self.job, self.stage)
            self.best.see(metrics, where)
        return metrics

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        if self.ema is None:
            yield
            return
        with self.ema.applied():
            self.stage.refresh()
            yield

    def push(self, epoch: int, before: dict[str, Any] | None) -> dict[str, Any]:
        """A push after an epoch, counted from 1; its line of ``metrics.jsonl``."""

        def measured() -> dict[str, Any] | None:
            if self.ema is not None:
                self.ema.take(self.job.head.proto_manager)
            return self.validate(f"epoch {epoch} after its push")

        return push_between(self.job, self.stage, epoch, before, self.optimizer, measured)

    def state_dict(self) -> dict[str, Any]:
        """All that the next epochs depend on, as plain values and tensors."""
        return {
            "model": self.stage.model.state_dict(),
            "anchors": plain_anchors(self.job.head.proto_manager.anchors),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.job.fabric.strategy.precision.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "best": self.best.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self.stage.model.load_state_dict(state["model"])
        self.job.head.proto_manager.anchors = anchors_from(state["anchors"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.job.fabric.strategy.precision.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.best.load_state_dict(state["best"])
