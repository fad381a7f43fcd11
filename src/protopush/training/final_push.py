"""Pushes of a run: between epochs, and the final push with what is refitted to it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protopush.distributed import broadcast_from_rank_zero
from protopush.evaluation.evaluate import in_short, predict
from protopush.metrics.classification import classification_metrics
from protopush.nn.head import HeadOptimal
from protopush.nn.priors import log_ratio
from protopush.push import PushReport, grow_prototypes, prune_prototypes, push_prototypes, refresh_anchors
from protopush.push.choice import choose_prototypes, most_per_class
from protopush.push.options import Allow
from protopush.push.push_report import PushedPrototype
from protopush.push.update import move_out
from protopush.training.phases import Stage, on_validation
from protopush.training.prior_fit import fit_prior
from protopush.training.run_writer import RunWriter
from protopush.training.setup import Job

logger = logging.getLogger("protopush.training")

FITTED = {"biases": ("bias",), "connections": ("bias", "log_temperature", "connections")}
ROW = (
    "use_local", "momentum", "min_dist", "mean_dist", "mean_dist_after", "mean_similarity_after", "duplicates_avoided",
    "notes",
)  # fmt: skip
MOMENTUM = {"hard": 0.0, "none": 1.0}  # of the final push; else the run's own


def push_now(
    job: Job, model: nn.Module, loader: Iterable[Any], momentum: float, optimizer: torch.optim.Optimizer | None = None,
    val_loader: Iterable[Any] | None = None,
) -> PushReport:  # fmt: skip
    """A push as the run's configuration asks for it; without ``val_loader`` there is no guard."""
    settings = job.config.push.settings() | {"momentum": momentum, "seed": job.config.train.seed}
    if val_loader is None:
        settings["guard"] = "off"
    local, device = _use_local(job), job.fabric.device
    return push_prototypes(
        model, loader, device, use_local=local, optimizer=optimizer, val_loader=val_loader, allow=_on_masks(job),
        **settings,
    )  # fmt: skip


def push_shortlisted(job: Job, stage: Stage) -> PushReport | None:
    """A push of live prototypes that each have an anchor: these are embedded again and stay; else None.

    Invariant: a live prototype is the embedding of its anchor, so that the cosine of the two is 1 and that of no other
    patch is larger. Anchors were taken by the rules (another image each, on masks) that hold in every push.
    """
    manager, started = job.head.proto_manager, time.perf_counter()
    slots = manager.used_slots()
    own = [(c, k, anchor) for c, k in slots if (anchor := manager.anchor(c, k)) is not None]
    if not job.config.push.shortlist or len(own) < len(slots):
        return None
    stage.refresh()
    images, classes = [0] * manager.num_classes, list(job.catalog.classes)
    for c, _ in {(c, anchor.file) for c, _, anchor in own}:
        images[c] += 1
    return PushReport(
        use_local=_use_local(job),
        momentum=0.0,
        max_patches_per_class=None,
        prototypes=[PushedPrototype(c, k, 0.0, 0.0, replace(one, similarity_after=1.0)) for c, k, one in own],
        patches_per_class=images,
        images_per_class=images,
        kept_classes=[],
        verified=True,
        notes=[f"each live prototype is nearest to its own anchor: {sum(images)} images instead of {len(job.train)}"],
        seconds=time.perf_counter() - started,
        class_names=classes,
        unique=[str(job.config.push.unique)] * len(classes),
    )


def _on_masks(job: Job) -> Allow | None:
    """The patches that may become anchors where masks decide; pooled features lie on no part of an image."""
    shares, least = job.mask_shares, job.config.push.min_mask_share
    return (lambda ids, _: shares[ids] >= least) if shares is not None and least and _use_local(job) else None


def _use_local(job: Job) -> bool:
    asked = job.config.push.use_local
    return job.head.match == "local" if asked is None else asked


def resize(job: Job, stage: Stage, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Pruning and growth as the run asks for them; what they did, for the line in ``metrics.jsonl``."""
    config, done = job.config.push, dict[str, Any]()
    args = (stage.model, stage.train_loader, job.fabric.device)
    options: dict[str, Any] = {"use_local": _use_local(job), "val_loader": stage.val_loader}
    if config.prune:  # first: growth may use the slots
        done["pruning"] = prune_prototypes(*args, max_cosine=config.prune_cosine, **options).to_dict()
    if config.grow:
        options |= {
            "quantile": config.grow_quantile,
            "min_coverage": config.grow_below,
            "optimizer": optimizer,
            "allow": _on_masks(job),
        }
        done["growth"] = grow_prototypes(*args, **options).to_dict()
    return done


def choose(job: Job, stage: Stage) -> dict[str, Any]:
    """The choice of the prototypes that stay, where a class has more than ``push.rows`` allows; what is said of it.

    As none has more afterwards, that happens once in a run, after its first push.
    """
    rows, head, manager, classes = job.config.push.rows, job.head, job.head.proto_manager, job.catalog.classes
    if rows is None:
        return {}
    used, most = manager.mask().cpu(), most_per_class(torch.tensor(job.train.labels), len(classes), rows)
    if not bool((used.sum(dim=1) > most).any()):
        return {}
    found = predict(stage.model, stage.plain_train_loader, job.fabric.device, "Choosing prototypes")
    contributions, bias = found.similarities * head.weights().detach().cpu(), head.bias.detach().cpu()
    loss_weights = cross_entropy_weights(job)
    loss_weights = None if loss_weights is None else loss_weights.cpu()
    chosen = broadcast_from_rank_zero(
        lambda: choose_prototypes(contributions, bias, found.labels, used, most, loss_weights)
    )
    removed = (used & ~chosen.kept).nonzero()
    move_out(manager, removed[:, 0] * manager.max_prototypes + removed[:, 1])
    with torch.no_grad():
        head.bias.copy_(chosen.bias)
    logger.info("Chosen: %d prototypes, %d removed", int(chosen.kept.sum()), len(removed))
    return {
        "choice": {
            "prototypes": dict(zip(classes, chosen.kept.sum(dim=1).tolist(), strict=True)),
            "removed": removed.tolist(),  # class and slot
            "loss_before": chosen.loss_before,
            "loss_after": chosen.loss_after,
        }
    }


def push_row(
    report: PushReport, epoch: int, before: dict[str, Any] | None, after: dict[str, Any] | None
) -> dict[str, Any]:
    """A push as one line of ``metrics.jsonl``."""
    guard = None if report.guard is None else asdict(report.guard)
    numbers = {name: getattr(report, name) for name in ROW}
    times = {"guard": guard, "seconds": report.seconds}
    return {"push": epoch, **numbers, **times, "val_before": before, "val_after": after}


def final_push(job: Job, stage: Stage, writer: RunWriter) -> None:
    """The last push, over the real images in full precision, and what is refitted to it."""
    config, chosen = job.config, choose(job, stage)  # where training has ended before it came to that
    before = on_validation(job, stage)
    if job.head.anchoring == "live" and any(job.head.proto_manager.anchors):
        embed_anchors(job)
        row: dict[str, Any] = {"final": "live", "val_before": before, "val_after": on_validation(job, stage)}
        moved = True
    else:
        momentum = MOMENTUM.get(config.push.final, config.push.momentum)
        report = push_now(job, job.model, job.loader(job.train), momentum)
        row = push_row(report, config.train.epochs, before, on_validation(job, stage)) | {"final": config.push.final}
        moved = momentum < 1
    if config.train.refit != "none" and moved:
        fit_to_prototypes(job, stage)
        row["val_refitted"] = on_validation(job, stage)
    if config.train.prior is not None:
        row |= fit_to_prior(job, stage)
    writer.write(row | chosen | {"weights": stage.weights})
    for name in ("val_before", "val_after", "val_refitted", "val_prior"):
        if row.get(name):
            logger.info("%-16s %s", name, in_short(row[name]))


def embed_anchors(job: Job) -> None:
    """Live prototypes are real patches already; their images are embedded once more, in full precision."""
    refresh_anchors(job.model, job.loader(job.train), job.fabric.device)


def fit_to_prototypes(job: Job, stage: Stage) -> None:
    """Fit to the prototypes, as they are, what the run's configuration says."""
    c, device = job.config.train, job.fabric.device
    train = predict(stage.model, stage.plain_train_loader, device, "Similarities")
    similarities, labels = train.similarities.to(device), train.labels.to(device)
    refit(job.head, similarities, labels, cross_entropy_weights(job), c.refit, c.refit_steps, c.refit_lr, c.refit_decay)


def cross_entropy_weights(job: Job) -> Tensor | None:
    """Class weights of a cross-entropy over all training images, each once, with the prior that training assumes."""
    weights, more = job.class_weights(), job.seen_more().float().to(job.fabric.device)
    if (more != 1).any():  # images are not drawn here, nor logits adjusted, and the prior is to stay the same
        weights = more if weights is None else weights * more
    return weights


def fit_to_prior(job: Job, stage: Stage) -> dict[str, Any]:
    """Fit biases and temperature to the stated prior on the validation images, or move the biases where there are none.

    The temperature goes into the weights of the prototypes, so that a logit stays the sum of what is shown.

    Returns:
        What is said of it in ``metrics.jsonl``; its metrics are those of images that a fit has not seen.
    """
    head, assumed, prior = job.head, job.trained_prior(), job.prior()
    said: dict[str, Any] = {"prior": dict(zip(job.catalog.classes, prior, strict=True))}
    if stage.val_loader is None or job.val is None:
        logger.warning("no validation images: the biases are moved to the prior by Bayes' rule, nothing is fitted")
        with torch.no_grad():
            head.bias.add_(log_ratio(assumed, prior).to(head.bias))
        return said
    val = predict(stage.model, stage.val_loader, job.fabric.device, "Similarities")
    weights, groups = head.weights().detach().cpu().double(), job.val.groups
    evidence = (val.similarities.double() * weights).sum(-1)
    found = fit_prior(evidence, head.bias, val.labels, groups, assumed, prior, job.config.train.seed)
    with torch.no_grad():
        head.log_temperature.add_(math.log(found.scale))
        head.bias.copy_(found.biases)
    metrics = classification_metrics(found.probabilities, val.labels, list(job.catalog.classes))
    fit = {"spread": found.spread, "temperature": 1 / found.scale, "log_loss": found.log_loss}
    return said | {"prior_fit": fit, "val_prior": metrics}


def refit(
    head: HeadOptimal, similarities: Tensor, labels: Tensor, class_weights: Tensor | None, what: str = "biases",
    steps: int = 100, lr: float = 0.02, decay: float = 0.1,
) -> None:  # fmt: skip
    """Fit biases, or all of the head but its prototypes, to fixed similarities, full batch.

    A hard push keeps the ranking of a class's images but shifts its similarities, so that the biases are off. On
    HAM10000 a fit of the biases alone, held near where they were, mended that; connections and temperature, fitted as
    well, made the model more sure than it should be.

    Args:
        head: is changed in place.
        similarities, labels: (N, num_classes, K) from the pushed model in eval mode; (N,).
        class_weights: (num_classes,) of the cross-entropy, or None.
        what: a key of :data:`FITTED`.
        steps, lr: of Adam.
        decay: weight of the squared distance of what is fitted to where it starts.

    Example:
        >>> head = HeadOptimal(4, num_classes=2, num_prototypes=1)
        >>> similarities = torch.tensor([[[0.9], [0.8]], [[0.5], [0.4]]])  # class 0 is nearer, whatever the label
        >>> refit(head, similarities, torch.tensor([1, 1]), None)
        >>> bool(head.bias[1] > head.bias[0])
        True
    """
    fitted = [getattr(head, name) for name in FITTED[what]]
    start = [parameter.detach().clone() for parameter in fitted]
    with torch.enable_grad():
        optimizer = torch.optim.Adam(fitted, lr=lr)
        for _ in range(steps):
            logits = (similarities * head.weights()).sum(-1) + head.bias
            moved = torch.stack([(now - before).square().sum() for now, before in zip(fitted, start, strict=True)])
            loss = F.cross_entropy(logits, labels, class_weights) + decay * moved.sum()
            head.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    head.zero_grad()
