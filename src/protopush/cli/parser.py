"""Parsing words: one line where they are wrong, with the nearest name that exists; and the options commands share.

What the commands share: their parsers, their log, and how they answer.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from protopush.errors import InputError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
import json
import logging
import os
from typing import TYPE_CHECKING


def parse(parser: ArgumentParser, words: list[str]) -> Any:
    """The options that the words give.

    Raises:
        InputError: they can't be parsed.
    """
    from argparse import ArgumentError

    try:
        return parser.parse_args(words)
    except ArgumentError as error:
        _refuse(parser, str(error))


def _refuse(parser: ArgumentParser, message: str) -> NoReturn:
    """One line with the nearest valid name where a name was wrong."""
    known = [option.lstrip("-") for action in parser._actions for option in action.option_strings if option[:2] == "--"]
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    option = re.search(r"(?:[Uu]nrecognized arguments?: --|Key ')([\w.]+)", message)
    wrong = f"{group[1]}.{group[2]}" if group else option[1] if option else ""
    if wrong:
        near = get_close_matches(wrong, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else f"; {parser.prog} --help lists the keys"
        raise InputError(f"unknown key {wrong!r}{hint}")
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    raise InputError(f"{' '.join(lines)}; {parser.prog} --help tells what is expected")


def add_data(parser: ArgumentParser) -> None:
    """Which images, where not those of the run."""
    parser.add_argument("--data.path", type=str | None, default=None, help="other data than the run was trained on")
    parser.add_argument("--data.source", type=str | None, default=None, help="auto, or a source of docs/data.md")
    parser.add_argument("--data.num_workers", type=int, default=2, help="processes that read images")


def add_json(parser: ArgumentParser) -> None:
    """JSON, and the device."""
    parser.add_argument("--json", action="store_true", help="print JSON to stdout")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or mps")


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
    from protopush.runs.progress import log_to_stderr

    log_to_stderr(logging.INFO if is_first() else logging.ERROR)


def is_first() -> bool:
    """Whether this is the process that speaks, of those that torchrun or Fabric started."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0


def print_json(values: Any) -> None:
    """For machines, to stdout."""
    print(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False))
