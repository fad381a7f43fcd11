"""How good a classifier is. Shapes: probabilities (N, C), labels (N,)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from protopush._compat import ensure_torchvision


def classification_metrics(probabilities: Tensor, labels: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """n, accuracy, balanced_accuracy, macro_f1, auroc, per_class.

    Balanced accuracy is the mean recall over the classes that occur (Brodersen et al., 2010); macro F1 the mean F1 over
    the classes that occur or are predicted; AUROC the mean, over classes that occur but aren't all there is, of one
    against the rest (Fawcett, 2006), None if there is no such class.

    Args:
        probabilities: (N, C), or any scores that rank within a class.
        labels: int64 (N,).
        class_names: C names.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
        >>> found = classification_metrics(scores, torch.tensor([0, 1, 1, 1]), ["a", "b"])
        >>> found["accuracy"], round(found["balanced_accuracy"], 4), found["auroc"]
        (0.75, 0.8333, 1.0)
    """
    ensure_torchvision()
    from torchmetrics.functional import classification as tm

    count = len(class_names)
    predicted = probabilities.argmax(dim=1)
    each: dict[str, Any] = {"num_classes": count, "average": "none"}
    recall = tm.multiclass_recall(predicted, labels, **each)
    precision = tm.multiclass_precision(predicted, labels, **each)
    f1 = tm.multiclass_f1_score(predicted, labels, **each)
    support = torch.bincount(labels, minlength=count)
    guesses = torch.bincount(predicted, minlength=count)
    occurs, seen = support > 0, (support > 0) | (guesses > 0)
    auroc = [
        float(tm.binary_auroc(probabilities[:, c].double(), (labels == c).long()))
        if 0 < support[c] < len(labels)
        else None
        for c in range(count)
    ]
    known = [value for value in auroc if value is not None]
    return {
        "n": len(labels),
        "accuracy": float((predicted == labels).double().mean()),
        "balanced_accuracy": float(recall[occurs].mean()),
        "macro_f1": float(f1[seen].mean()),
        "auroc": sum(known) / len(known) if known else None,
        "per_class": {
            name: {
                "n": int(support[c]),
                "recall": float(recall[c]) if occurs[c] else None,
                "precision": float(precision[c]) if guesses[c] > 0 else None,
                "f1": float(f1[c]) if seen[c] else None,
                "auroc": auroc[c],
            }
            for c, name in enumerate(class_names)
        },
    }
