"""Demo: train on solar cells, push, and leave pictures that show what the prototypes are."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from protopush.api import open_run
from protopush.metrics.glossary import metric_name, metric_text
from protopush.report.cases import select_cases
from protopush.training.config import RunConfig
from protopush.training.trainer import train

NAMES = {"right": "surest-right", "unsure": "least-sure", "wrong": "surest-wrong"}  # of the panels


def run_demo(config: RunConfig, out: Path) -> str:
    """Train, and draw three explanations; returns the closing words for the user."""
    started = time.perf_counter()
    folder = train(config, out, overwrite=True).folder
    run = open_run(folder, num_workers=config.data.num_workers, device="cpu")
    page, measured = run.report(faithfulness=24)
    samples, cases = measured.dataset.samples, select_cases(measured.probabilities, measured.labels, each=1)
    shown = [(NAMES[kind], samples[i].image) for kind, some in cases.items() for i in some]
    found = run.explain([file for _, file in shown], out / "explanations", names=[name for name, _ in shown])
    image, metrics = Path(os.path.relpath(samples[0].image)), measured.numbers["classification"]
    return closing_words(out, page, metrics, [one["panel"] for one in found], image, time.perf_counter() - started)


def closing_words(
    out: Path, page: Path, metrics: dict[str, Any], panels: list[str], image: Path, seconds: float
) -> str:
    """What to view and what to run next, with the command as it was called."""
    called = sys.argv[0] if Path(sys.argv[0]).name == "protopush" else "protopush"
    numbers = ", ".join(
        f"{metric_name(key)} {metric_text(metrics[key])}"
        for key in ("accuracy", "balanced_accuracy", "auroc")
        if metrics[key] is not None
    )
    reasons = "\n".join(f"  {panel}" for panel in panels)
    return (
        f"\nDone in {seconds:.0f} s. On {metrics['n']} test images: {numbers}.\n\n"
        f"See\n  {page}   (all that can be shown of the run, on one page)\n"
        f"  {out / 'prototypes.png'}   (what each prototype is, and where it comes from)\n{reasons}   (why)\n\n"
        f"Then try\n  {called} verify {out}\n"
        f"  {called} evaluate {out}\n"
        f"  {called} explain {out} {image} --out explained\n"
        f"  {called} train --data.path FOLDER_OF_CLASS_FOLDERS --out runs/mine"
    )
