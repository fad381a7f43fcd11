"""Comparison of runs: the same numbers, measured on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from protopush.data.manifest import Catalog, DataConfig
from protopush.errors import InputError
from protopush.evaluation.measure import Measured, measure
from protopush.models.model_folder import Run
from protopush.runs.run import open_run, open_split

# What is compared: group, words, which way is better, and where the number stands.
ROWS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("accuracy", "accuracy", "higher", ("classification", "accuracy")),
    ("accuracy", "balanced accuracy", "higher", ("classification", "balanced_accuracy")),
    ("accuracy", "macro F1", "higher", ("classification", "macro_f1")),
    ("accuracy", "AUROC", "higher", ("classification", "auroc")),
    ("accuracy", "calibration error", "lower", ("classification", "ece")),
    ("prototypes", "prototypes", "", ("prototypes", "count")),
    ("prototypes", "similarity to the anchor, mean", "higher", ("prototypes", "anchor_similarity", "mean")),
    ("prototypes", "same patch as another", "lower", ("prototypes", "duplicates", "same_patch")),
    ("prototypes", "cosine above 0.99 to another", "lower", ("prototypes", "duplicates", "alike")),
    ("prototypes", "diversity within a class", "higher", ("prototypes", "diversity", "mean")),
    ("prototypes", "evenness of use", "higher", ("prototypes", "usage_entropy")),
    ("prototypes", "share never the strongest", "lower", ("prototypes", "never_used")),
    ("prototypes", "images covered", "higher", ("prototypes", "coverage", "share")),
    ("prototypes", "prototypes for 90 % of the evidence", "lower", ("prototypes", "sparsity", "local_size")),
    ("prototypes", "  in half of the images", "lower", ("prototypes", "sparsity", "local_size_median")),
    ("prototypes", "  in 95 % of the images", "lower", ("prototypes", "sparsity", "local_size_p95")),
    ("localisation", "anchors on the mask", "higher", ("localization", "anchors_on_mask")),
    ("localisation", "  by chance", "", ("localization", "anchors_mask_area")),
    ("localisation", "activation on the mask", "higher", ("localization", "activation_on_mask")),
    ("localisation", "pointing game", "higher", ("localization", "pointing_game")),
    ("localisation", "strongest box on the mask", "higher", ("localization", "peaks_on_mask")),
    ("localisation", "  all three by chance", "", ("localization", "mask_area")),
    ("localisation", "outside-inside ratio", "lower", ("localization", "outside_inside_ratio")),
    ("faithfulness", "insertion", "higher", ("faithfulness", "insertion")),
    ("faithfulness", "  in random order", "", ("faithfulness", "random_insertion")),
    ("faithfulness", "deletion", "lower", ("faithfulness", "deletion")),
    ("faithfulness", "relevance ordering", "higher", ("faithfulness", "relevance_ordering")),
    ("faithfulness", "peak leaves its box", "lower", ("faithfulness", "location_change")),
    ("faithfulness", "similarity lost by changes elsewhere", "lower", ("faithfulness", "activation_change")),
)


def measure_beside(
    run: Run, others: Sequence[str | Path], split: str, device: torch.device, num_workers: int, resamples: int,
    faithfulness: int,
) -> tuple[list[tuple[Run, Measured]], Catalog]:  # fmt: skip
    """A run and others of the same classes (folders), each measured on the data of the first; and these data."""
    if resamples < 0 or faithfulness < 0:
        raise InputError(f"--resamples {resamples}, --faithfulness {faithfulness}; expected 0 or more")
    runs = [run, *map(open_run, others)]
    if wrong := [one.folder for one in runs if one.class_names != run.class_names]:
        raise InputError(f"{wrong[0]} has other classes than {run.folder}; expected the same ones")
    found = []
    for one in runs:
        dataset, catalog = open_split(DataConfig(**run.data), split, run.class_names, one.transform, run.folder)
        known = {sample.name: sample for sample in catalog.samples}
        one.model.to(device)
        measured = measure(one, dataset, split, known, device, num_workers, resamples, faithfulness)
        found.append((one, measured))
    return found, catalog


def compare(runs: Sequence[tuple[Run, Measured]]) -> dict[str, Any]:
    """The numbers of runs, each with what was measured of it on the same images, side by side as plain values for JSON.

    Rows that no run has are left out.
    """
    measured = [one.numbers for _, one in runs]
    rows = []
    for group, words, better, path in ROWS:
        values = [_at(numbers, path) for numbers in measured]
        intervals = [_at(numbers, (*path[:-1], "intervals", path[-1])) for numbers in measured]
        if any(value is not None for value in values):
            row = {"group": group, "metric": words, "better": better, "values": values}
            rows.append(row | {"intervals": intervals})
    return {
        "split": runs[0][1].split,
        "images": [len(one.dataset) for _, one in runs],
        "runs": [_names(run) for run, _ in runs],
        "rows": rows,
    }


def _names(run: Run) -> dict[str, Any]:
    backbone, head = run.model.backbone, run.head
    return {
        "name": run.folder.name,
        "folder": str(run.folder),
        "backbone": getattr(backbone, "name", type(backbone).__name__),
        "match": head.match,
        "anchoring": head.anchoring,
    }


def _at(numbers: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = numbers
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
