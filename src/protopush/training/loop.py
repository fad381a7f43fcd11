"""The training loop, on Lightning Fabric: epochs with pushes, the best of them kept, then the final push."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from protopush.distributed import broadcast_from_rank_zero
from protopush.evaluation.outputs import in_short
from protopush.models.model_folder import Run, save_run
from protopush.push import PushSchedule
from protopush.runs.fabric import make_fabric, quiet
from protopush.runs.run import fresh_folder, open_run
from protopush.training.checkpoint import load_checkpoint, refuse_other_options, restoring
from protopush.training.config import RunConfig
from protopush.training.final_push import final_push
from protopush.training.limits import check_numbers
from protopush.training.phases import Frozen, Joint, Stage
from protopush.training.run_writer import Journal
from protopush.training.setup import Job, prepare
from protopush.training.tracking import check_trackers
from protopush.training.trainer import Learner

logger = logging.getLogger("protopush.training")


def train(config: RunConfig, out: str | Path, overwrite: bool = False, resume: bool = False) -> Run:
    """Train, push and save a model; nothing is written before every input was checked.

    Args:
        config: everything that decides the run.
        out: the run folder.
        overwrite: replace a run that is there.
        resume: go on where a run in ``out`` was cut off; begin it where there is none, and leave a whole one as it is.

    Raises:
        InputError: bad input, in one line.
    """
    out, trainer = Path(out), config.trainer
    check_numbers(config)
    fabric = make_fabric(trainer.device, trainer.precision, trainer.devices, trainer.num_nodes)
    with quiet():
        fabric.launch()
    if resume and broadcast_from_rank_zero(lambda: _whole(out, config)):
        logger.info("%s is whole: nothing is left to do", out)
        return open_run(out)
    broadcast_from_rank_zero(lambda: check_trackers(trainer.track))
    saved = broadcast_from_rank_zero(lambda: _saved(out, config, overwrite, resume))
    job = prepare(config, fabric)
    with Journal(out, config) as journal:
        stage = fit(job, journal, saved)
        final_push(job, stage, journal)
        run = _finish(job, out)
    logger.info("Saved %s", out)
    return run


def _whole(out: Path, config: RunConfig) -> bool:
    whole = (out / "config.json").is_file()
    if whole:
        refuse_other_options(out, config)
    return whole


def _saved(out: Path, config: RunConfig, overwrite: bool, resume: bool) -> dict[str, Any] | None:
    saved = load_checkpoint(out, config) if resume else None
    if saved is None:
        fresh_folder(out, overwrite or resume)
    return saved


def _finish(job: Job, out: Path) -> Run:
    data = job.config.data
    path = os.path.abspath(data.path) if data.path else ""  # the run may be used from another folder
    told = {"path": path, "source": data.source, "split_seed": data.split_seed}
    model = job.model.cpu().eval()
    run = Run(model, list(job.catalog.classes), job.transform, job.catalog.root.resolve(), told, out)
    broadcast_from_rank_zero(lambda: save_run(run))
    return run


class Phase(NamedTuple):
    """Epochs (from ``start``, before ``end``) of one kind of stage."""

    stage: type[Frozen] | type[Joint]
    start: int
    end: int


def phases(config: RunConfig) -> list[Phase]:
    """The head alone, then the whole model, as the run asks for them."""
    train = config.train
    if train.freeze_backbone:
        return [Phase(Frozen, 0, train.epochs)]
    both = [Phase(Frozen, 0, train.head_epochs), Phase(Joint, train.head_epochs, train.epochs)]
    return [phase for phase in both if phase.start < phase.end]


def fit(job: Job, journal: Journal, saved: dict[str, Any] | None = None) -> Stage:
    """The epochs of all phases; leaves the model at its best epoch on the validation images.

    Args:
        job: the run.
        journal: where its rows go.
        saved: a checkpoint's state to go on with.
    """
    best, done = None, saved["epoch"] if saved else 0
    for phase in phases(job.config):
        if done > phase.end:
            continue
        # Before the stage: whether features came from the cache or not must not decide the random numbers that follow.
        stage = phase.stage(job)
        job.fabric.seed_everything(job.config.train.seed, verbose=False)
        learner = Learner(job, stage, phase.start, phase.end)
        if saved and phase.start < done:
            with restoring(saved, journal.folder):
                learner.load_state_dict(saved)
            journal.go_on(saved)
        elif best is not None:  # what the head alone reached is to be beaten
            learner.best.see(best, "the head alone")
        fit_phase(learner, phase, journal, max(done, phase.start))
        learner.best.restore()
        stage.weights = learner.best.where
        logger.info("Best on validation: %s", stage.weights)
        best = learner.best.metrics
    return stage


def fit_phase(learner: Learner, phase: Phase, journal: Journal, start: int) -> None:
    """The epochs of one phase, from ``start`` on."""
    config = learner.job.config
    last = phase.end == config.train.epochs
    schedule = PushSchedule(config.push.start_epoch, config.push.interval, final_decay=config.push.final_decay)
    first = learner.push(0, None) if start == 0 and config.push.start_epoch == 0 else None
    for epoch in range(start, phase.end):
        if last and config.train.patience and learner.best.stale >= config.train.patience:
            logger.info("Stopped: no better validation score for %d epochs", learner.best.stale)
            break
        row: dict[str, Any] = {"epoch": epoch + 1, **learner.epoch(epoch)}
        if epoch == 0:  # not before: an input that fails in the first epoch leaves nothing behind
            journal.begin()
            if first is not None:
                journal.write(first)
        learner.best.stale += 1
        row["val"] = learner.validate(f"epoch {epoch + 1}")
        journal.write(row)
        _say_epoch(row, config.train.epochs)
        rate = learner.rate_after(epoch) if last else 1.0  # only the last phase's decay is final
        if schedule.due(epoch, lr=rate, peak_lr=1.0):
            journal.write(learner.push(epoch + 1, row["val"]))
        journal.checkpoint(epoch + 1, learner.state_dict())


def _say_epoch(row: dict[str, Any], epochs: int) -> None:
    text = f"Epoch {row['epoch']}/{epochs}  loss {row['loss']:.4f}"
    logger.info("%s%s", text, f"  validation: {in_short(row['val'])}" if row["val"] else "")
