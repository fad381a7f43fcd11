"""Accuracy, AUROC and calibration of a classifier, each with its bootstrap interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protopush._compat import ensure_torchvision
from protopush.errors import InputError
from protopush.metrics.intervals import Array, bootstrap_intervals, weighted_counts

BINS = 15
OVERALL = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece")
PER_CLASS = ("sensitivity", "specificity", "auroc")


def classification_metrics(
    probabilities: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    groups: Sequence[str | None] | None = None,
    resamples: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """n, accuracy, balanced_accuracy, macro_f1, auroc, ece, confusion, per_class and, with resamples, intervals.

    Balanced accuracy is the mean sensitivity over the classes that occur (Brodersen et al., 2010); macro F1 the mean F1
    over the classes that occur or are predicted; AUROC the mean, over classes that occur but aren't all there is, of
    one against the rest, ties counting one half (Fawcett, 2006); ECE the expected calibration error, the mean gap
    between confidence and accuracy over 15 bins of equal width (Guo et al., 2017). Confusion has a row for each true
    and a column for each predicted class. A row of ``per_class`` is n, sensitivity (the share of its samples that are
    found), specificity (the share of the others that are left alone), precision, f1 and auroc. What is undefined is
    None.

    Intervals are 95 % percentile intervals of the bootstrap (Efron, 1979), ``[low, high]``, in which a metric of a
    resample means over the classes that it has; see :func:`protopush.metrics.intervals.bootstrap_intervals`.

    Args:
        probabilities: (N, C), rows summing to 1; for all but ECE any scores that rank within a class will do.
        labels: int64 (N,).
        class_names: C names, at least two.
        groups: N names of what the images show (lesion, patient), None for one of its own: then whole groups are drawn.
        resamples: how many data sets to draw for the intervals; 0 for no intervals, 1000 is usual.
        seed: of the drawing.

    Raises:
        InputError: no samples, NaN among the probabilities, shapes that don't match, a label without a class.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
        >>> found = classification_metrics(scores, torch.tensor([0, 1, 1, 1]), ["a", "b"], resamples=1000)
        >>> found["accuracy"], round(found["balanced_accuracy"], 4), found["auroc"], found["confusion"]
        (0.75, 0.8333, 1.0, [[1, 0], [1, 2]])
        >>> found["intervals"]["accuracy"], found["per_class"]["b"]["intervals"]["auroc"]
        ([0.25, 1.0], [1.0, 1.0])
    """
    ensure_torchvision()
    from torchmetrics.functional import classification as tm

    count = len(class_names)
    _check(probabilities, labels, count)
    predicted = probabilities.argmax(dim=1)
    stat_scores = tm.multiclass_stat_scores(predicted, labels, num_classes=count, average=None)
    per_class: dict[str, dict[str, Any]] = {}
    for c, (hits, false_alarms, rejected, misses, support) in enumerate(stat_scores.tolist()):
        has_both = 0 < support < len(labels)
        per_class[class_names[c]] = {
            "n": support,
            "sensitivity": _ratio(hits, support),
            "specificity": _ratio(rejected, rejected + false_alarms),
            "precision": _ratio(hits, hits + false_alarms),
            "f1": _ratio(2 * hits, 2 * hits + false_alarms + misses),
            "auroc": float(tm.binary_auroc(_ranks(probabilities[:, c]), (labels == c).long())) if has_both else None,
        }
    found: dict[str, Any] = {
        "n": len(labels),
        "accuracy": _ratio(int((predicted == labels).sum()), len(labels)),
        "balanced_accuracy": mean_of_defined([row["sensitivity"] for row in per_class.values()]),
        "macro_f1": mean_of_defined([row["f1"] for row in per_class.values()]),
        "auroc": mean_of_defined([row["auroc"] for row in per_class.values()]),
        "ece": float(tm.multiclass_calibration_error(probabilities, labels, num_classes=count, n_bins=BINS)),
        "confusion": tm.multiclass_confusion_matrix(predicted, labels, num_classes=count).tolist(),
        "per_class": per_class,
    }
    if resamples:
        statistics = _weighted_statistics(probabilities.detach().cpu(), labels.cpu(), count)
        intervals = bootstrap_intervals(statistics, len(labels), resamples, seed, groups)
        found["intervals"] = dict(zip(OVERALL, intervals, strict=False))
        for c, row in enumerate(per_class.values()):
            row["intervals"] = dict(zip(PER_CLASS, intervals[len(OVERALL) + c :: count], strict=True))
    return found


def mean_of_defined(values: Sequence[float | None]) -> float | None:
    """The mean over the classes for which a number is defined; None where there is none."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def _weighted_statistics(probabilities: Tensor, labels: Tensor, count: int) -> Callable[[Array], Array]:
    """Weights (R, N) to values (R, 5 + 3 * C): the metrics in OVERALL, then each of PER_CLASS for all classes."""
    classes = labels.numpy()
    scores = probabilities.double().numpy()
    predicted = probabilities.argmax(dim=1).numpy()
    right = (predicted == classes).astype(np.float64)
    bins, confidence = _binned(probabilities)
    curves = [_weighted_auroc(scores[:, c], classes == c) for c in range(count)]

    def statistics(weights: Array) -> Array:
        total = weights.sum(axis=1, keepdims=True)
        support = weighted_counts(classes, count, weights)
        called = weighted_counts(predicted, count, weights)
        hits = weighted_counts(classes, count, weights * right)
        gaps = weighted_counts(bins, BINS + 1, weights * (right - confidence))
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: undefined
            sensitivity = hits / support
            specificity = (total - support - (called - hits)) / (total - support)
            f1 = 2 * hits / (support + called)
            auroc = np.stack([curve(weights) for curve in curves], axis=1)
            means = [_mean_of_defined(values) for values in (sensitivity, f1, auroc)]
        overall = [hits.sum(axis=1, keepdims=True) / total, *means, np.abs(gaps).sum(axis=1, keepdims=True) / total]
        return np.concatenate([*overall, sensitivity, specificity, auroc], axis=1)

    return statistics


def _weighted_auroc(scores: Array, positive: NDArray[np.bool_]) -> Callable[[Array], Array]:
    """Weights (R, N) to AUROC (R,): the weighted share of pairs whose positive has the higher score, ties one half.

    One sort serves all resamples: the negatives below a positive are the first so many in their order.
    """
    others, own = np.flatnonzero(~positive), np.flatnonzero(positive)
    others = others[np.argsort(scores[others], kind="stable")]
    below = np.searchsorted(scores[others], scores[own], side="left")
    up_to = np.searchsorted(scores[others], scores[own], side="right")

    def auroc(weights: Array) -> Array:
        beaten = np.cumsum(np.pad(weights[:, others], ((0, 0), (1, 0))), axis=1)
        won = (weights[:, own] * (beaten[:, below] + beaten[:, up_to])).sum(axis=1) / 2
        share: Array = won / (weights[:, own].sum(axis=1) * beaten[:, -1])
        return share

    return auroc


def _binned(probabilities: Tensor) -> tuple[NDArray[np.intp], Array]:
    """The bin (N,) and the confidence (N,) of each sample, as torchmetrics' calibration error has them."""
    shares = bool(((probabilities >= 0) & (probabilities <= 1)).all())
    confidence = (probabilities if shares else probabilities.softmax(dim=1)).amax(dim=1)
    edges = torch.linspace(0, 1, BINS + 1, dtype=confidence.dtype)
    return (torch.bucketize(confidence, edges, right=True) - 1).numpy(), confidence.double().numpy()


def _ranks(scores: Tensor) -> Tensor:
    """Scores as ranks in [0, 1], ties alike: torchmetrics would squash others with a sigmoid, and make ties of them."""
    ranks: Tensor = scores.unique(return_inverse=True)[1]  # type: ignore[no-untyped-call]
    return ranks.double() / ranks.max().clamp(min=1)


def _mean_of_defined(values: Array) -> Array:
    """As :func:`mean_of_defined`, (R, C) to (R, 1), with NaN for None."""
    defined = ~np.isnan(values)
    means: Array = np.where(defined, values, 0).sum(axis=1, keepdims=True) / defined.sum(axis=1, keepdims=True)
    return means


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _check(probabilities: Tensor, labels: Tensor, count: int) -> None:
    expected, shape = (len(labels), count), tuple(probabilities.shape)
    if not len(labels) or count < 2:
        raise InputError(f"{len(labels)} samples of {count} classes; expected at least one sample and two classes")
    if shape != expected:
        raise InputError(f"probabilities are {shape}; expected {expected}, a row a label, a column a class")
    if broken := int(probabilities.isnan().any(dim=1).sum()):
        raise InputError(
            f"{broken} of {len(labels)} rows of probabilities have NaN; expected numbers: "
            "search for NaN in the images and the weights, or lower the learning rate"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= count:
        raise InputError(f"labels are {low} to {high}; expected 0 to {count - 1}, one of the {count} classes")
