"""What the commands share: their parsers, their log, and how they answer."""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

ABOUT = {
    "demo": "train, push and explain on solar cells, and leave pictures in runs/demo",
    "train": "train a prototype classifier and push it onto real patches",
    "push": "push a run's prototypes once more, into a new run",
    "evaluate": "accuracy, balanced accuracy, F1 and AUROC on a split",
    "predict": "a CSV of predictions for folders and manifests of any size, with what each image looks like",
    "explain": "show which patches of which training images an image looks like",
    "report": "one page (HTML) that shows what a run is and what it is worth",
    "compare": "runs side by side: accuracy, diversity, localisation, faithfulness",
    "verify": "embed every anchor's file again and see whether it still holds",
    "forbid": "forbid a patch, an image or a region; the next best anchor takes its place",
    "app": "a page on this computer to look at predictions and prototypes, and to decide about these",
    "data audit": "find leaks between splits, duplicates and damaged files in a data set",
    "export": "write a run as an ONNX file that needs neither PyTorch nor protopush",
}


def new_parser(command: str) -> ArgumentParser:
    """A parser that raises where words are wrong."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(prog=f"protopush {command}", description=ABOUT[command], exit_on_error=False)


def log() -> None:
    """The log goes to stderr; of several processes, the first tells all and the others their errors."""
    from protopush.training.progress import log_to_stderr

    log_to_stderr(logging.INFO if is_first() else logging.ERROR)


def is_first() -> bool:
    """Whether this is the process that speaks, of those that torchrun or Fabric started."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0


def print_json(values: Any) -> None:
    """For machines, to stdout."""
    print(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False))
