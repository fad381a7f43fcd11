"""How good a classifier is. Shapes: probabilities (N, C), labels (N,)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from protopush._compat import ensure_torchvision


def classification_metrics(probabilities: Tensor, labels: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """n, accuracy, balanced_accuracy, macro_f1, auroc, ece, per_class.

    Balanced accuracy is the mean recall over the classes that occur (Brodersen et al., 2010); macro F1 the mean F1 over
    the classes that occur or are predicted; AUROC the mean, over classes that occur but aren't all there is, of one
    against the rest (Fawcett, 2006), None if there is no such class; ECE the expected calibration error, the mean gap
    between confidence and accuracy over 15 bins of equal width (Guo et al., 2017).

    Args:
        probabilities: (N, C), rows summing to 1; for all but ECE any scores that rank within a class will do.
        labels: int64 (N,).
        class_names: C names.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
        >>> found = classification_metrics(scores, torch.tensor([0, 1, 1, 1]), ["a", "b"])
        >>> found["accuracy"], round(found["balanced_accuracy"], 4), found["auroc"]
        (0.75, 0.8333, 1.0)
    """
    ensure_torchvision()
    from torchmetrics.functional import classification as tm

    count = len(class_names)
    predicted = probabilities.argmax(dim=1)
    counts = tm.multiclass_stat_scores(predicted, labels, num_classes=count, average="none").tolist()
    auroc = [
        float(tm.binary_auroc(probabilities[:, c].double(), (labels == c).long()))
        if 0 < support < len(labels)
        else None
        for c, (*_, support) in enumerate(counts)
    ]
    per_class = {
        name: {
            "n": support,
            "recall": _ratio(hit, support),
            "precision": _ratio(hit, hit + false_alarm),
            "f1": _ratio(2 * hit, 2 * hit + false_alarm + miss),
            "auroc": auroc[c],
        }
        for c, (name, (hit, false_alarm, _, miss, support)) in enumerate(zip(class_names, counts, strict=True))
    }
    return {
        "n": len(labels),
        "accuracy": _ratio(int((predicted == labels).sum()), len(labels)),
        "balanced_accuracy": _mean([row["recall"] for row in per_class.values()]),
        "macro_f1": _mean([row["f1"] for row in per_class.values()]),
        "auroc": _mean(auroc),
        "ece": float(tm.multiclass_calibration_error(probabilities, labels, num_classes=count, n_bins=15)),
        "per_class": per_class,
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean over classes that have the number."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
