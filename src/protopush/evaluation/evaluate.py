"""Predictions of a model for a data set, and how good they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from protopush.data.transforms import oriented
from protopush.distributed import all_gather_objects
from protopush.errors import InputError
from protopush.metrics.classification import classification_metrics
from protopush.nn.head import HeadOutput
from protopush.nn.priors import with_prior
from protopush.preserve_state import iterate_outputs
from protopush.runs.progress import bar


class Predictions(NamedTuple):
    """Probabilities (N, C), similarities (N, C, K) and labels (N,), on the CPU.

    In the loader's order; under ``torch.distributed`` all ranks' samples in the order of their ids, each once.
    """

    probabilities: Tensor
    similarities: Tensor
    labels: Tensor


def predict(
    model: nn.Module, loader: Iterable[Any], device: torch.device | str, what: str = "Evaluating", views: int = 1
) -> Predictions:
    """Run a model over a loader of (images, labels, ids), in eval mode; ``views`` as of :func:`mean_over_views`."""
    call = model if views == 1 else lambda images: mean_over_views(model, images, views)
    source = getattr(loader, "sampler", loader)
    total = len(source) if isinstance(source, Sized) else 0  # images that the loader yields here, if it says so
    probabilities, similarities, labels, numbers = [], [], [], []
    with bar(what, total) as advance, iterate_outputs(model, loader, device, advance, call) as outputs:
        for out, target, ids in outputs:
            probabilities.append(out.logits.float().softmax(dim=1).cpu())
            similarities.append(out.similarities.float().cpu())
            labels.append(target)
            numbers.append(ids)
    ranks = all_gather_objects((probabilities, similarities, labels, numbers))
    columns = [torch.cat([batch for rank in ranks for batch in rank[column]]) for column in range(4)]
    if len(ranks) > 1:  # of samples that several have read, one
        order = columns[-1].argsort(stable=True)
        ids = columns[-1][order]
        order = order[torch.cat([ids.new_ones(1, dtype=torch.bool), ids[1:] != ids[:-1]])]
        columns = [column[order] for column in columns]
    return Predictions(*columns[:-1])


def mean_over_views(model: nn.Module, images: Tensor, views: int) -> HeadOutput:
    """The output for images (B, 3, H, W), its logits, contributions and similarities the means over orientations.

    A logit stays the exact sum of what is shown: a prototype contributes its weight times the mean of its best
    similarities, each at a patch of one orientation. ``cells`` and ``embeddings`` are the upright image's.

    Args:
        model: images to :class:`protopush.nn.head.HeadOutput`.
        views: 1, 2, 4 or 8, as of :func:`protopush.data.transforms.oriented`; of 8, images must be square.

    Example:
        >>> from protopush.models.model import ProtoModel
        >>> model = ProtoModel.create("resnet18", num_classes=2, pretrained=False).eval()
        >>> out = mean_over_views(model, torch.randn(1, 3, 64, 64), 8)
        >>> torch.allclose(out.logits, out.contributions.sum(-1) + model.head.bias, atol=1e-5)
        True
    """
    height, width = images.shape[-2:]
    if views == 8 and height != width:
        raise InputError(f"quarter turns of {width}x{height} pixels have another size; expected square; give 4 views")
    outputs: list[HeadOutput] = [model(oriented(images, view)) for view in range(views)]
    names = ("logits", "contributions", "similarities")
    return outputs[0]._replace(
        **{name: torch.stack([getattr(out, name) for out in outputs]).mean(dim=0) for name in names}
    )


def evaluate(
    model: nn.Module, loader: Iterable[Any], device: torch.device | str, class_names: list[str],
    priors: tuple[Sequence[float], Sequence[float]] | None = None, views: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """The metrics of :func:`classification_metrics` for a model on a loader.

    Args:
        priors: the one that its probabilities assume, and the one that they are to assume.
        views: orientations that logits are averaged over (:func:`mean_over_views`).
    """
    found = predict(model, loader, device, views=views)
    probabilities = found.probabilities if priors is None else with_prior(found.probabilities, *priors)
    return classification_metrics(probabilities, found.labels, class_names)


def score_of(metrics: dict[str, Any], name: str) -> float:
    """The number that chooses between models, larger is better; ``mean`` is that of balanced accuracy and AUROC."""
    parts = ("balanced_accuracy", "auroc") if name == "mean" else (name,)
    return sum(metrics[part] or 0.0 for part in parts) / len(parts)


def in_short(metrics: dict[str, Any]) -> str:
    """Balanced accuracy and AUROC for a log line."""
    auroc = metrics["auroc"]
    return f"balanced accuracy {metrics['balanced_accuracy']:.3f}" + (
        f", AUROC {auroc:.3f}" if auroc is not None else ""
    )
