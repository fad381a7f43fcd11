"""The demo: train on solar cells, push, and leave pictures that show what the prototypes are."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from protopush.api import Measuring, explain_to, write_report
from protopush.metrics.glossary import metric_name, metric_text
from protopush.report.cases import select_cases
from protopush.training.config import RunConfig
from protopush.training.trainer import train

NAMES = {"right": "surest-right", "unsure": "least-sure", "wrong": "surest-wrong"}  # of the panels


def run_demo(config: RunConfig, out: Path) -> str:
    """Train, and draw three explanations; returns what to tell the user at the end."""
    started = time.perf_counter()
    run = train(config, out, overwrite=True)
    measuring = Measuring(asdict(config.data), faithfulness=24, num_workers=config.data.num_workers)
    page, measured = write_report(run, measuring, out / "report.html")
    samples = measured.dataset.samples
    panels = [
        explain_to(run, samples[i].image, out / "explanations", NAMES[kind], torch.device("cpu"))["panel"]
        for kind, some in select_cases(measured.probabilities, measured.labels, each=1).items()
        for i in some
    ]
    image = Path(os.path.relpath(samples[0].image))
    metrics = measured.numbers["classification"]
    return closing_words(out, page, metrics, panels, image, time.perf_counter() - started)


def closing_words(
    out: Path, page: Path, metrics: dict[str, Any], panels: list[str], image: Path, seconds: float
) -> str:
    """Where to look, and what to run next, with the command as it was called."""
    called = sys.argv[0] if Path(sys.argv[0]).name == "protopush" else "protopush"
    numbers = ", ".join(
        f"{metric_name(key)} {metric_text(metrics[key])}"
        for key in ("accuracy", "balanced_accuracy", "auroc")
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
