"""The demo: train on solar cells, push, and leave pictures that show what the prototypes are."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from protopush.api import open_run
from protopush.training.config import RunConfig
from protopush.training.loop import train


def run_demo(config: RunConfig, out: Path) -> str:
    """Train, and draw three explanations; returns what to tell the user at the end."""
    started = time.perf_counter()
    folder = train(config, out, overwrite=True).folder
    run = open_run(folder, num_workers=config.data.num_workers, device="cpu")
    page, measured = run.report(faithfulness=24)
    samples, cases = measured.dataset.samples, telling_cases(measured.probabilities, measured.labels)
    found = run.explain([samples[index].image for index in cases.values()], out / "explanations", names=list(cases))
    image, metrics = Path(os.path.relpath(samples[0].image)), measured.numbers["classification"]
    return closing_words(out, page, metrics, [one["panel"] for one in found], image, time.perf_counter() - started)


def telling_cases(probabilities: torch.Tensor, labels: torch.Tensor) -> dict[str, int]:
    """Three images worth a look: the surest right one, the surest wrong one, and the least sure one.

    Args:
        probabilities: (N, C).
        labels: (N,).
    """
    top, predicted = probabilities.max(dim=1)
    right = predicted == labels
    cases = {
        "surest-right": int(top.masked_fill(~right, -1.0).argmax()),
        "least-sure": int(top.argmin()),
        "surest-wrong": int(top.masked_fill(right, -1.0).argmax()),
    }
    if bool(right.all()):  # then show the least sure of the right ones in its stead
        cases["surest-wrong"] = int(top.topk(min(2, len(top)), largest=False).indices[-1])
    return cases


def closing_words(
    out: Path, page: Path, metrics: dict[str, Any], panels: list[str], image: Path, seconds: float
) -> str:
    """Where to look, and what to run next, with the command as it was called."""
    called = sys.argv[0] if Path(sys.argv[0]).name == "protopush" else "protopush"
    numbers = ", ".join(
        f"{name} {metrics[key]:.3f}"
        for name, key in (("accuracy", "accuracy"), ("balanced accuracy", "balanced_accuracy"), ("AUROC", "auroc"))
        if metrics[key] is not None
    )
    looks = "\n".join(f"  {panel}" for panel in panels)
    return (
        f"\nDone in {seconds:.0f} s. On {metrics['n']} test images: {numbers}.\n\n"
        f"Look at\n  {page}   (all that can be shown of the run, on one page)\n"
        f"  {out / 'prototypes.png'}   (what each prototype is, and where it comes from)\n{looks}   (why)\n\n"
        f"Then try\n  {called} verify {out}\n"
        f"  {called} evaluate {out}\n"
        f"  {called} explain {out} {image} --out explained\n"
        f"  {called} train --data.path FOLDER_OF_CLASS_FOLDERS --out runs/mine"
    )
