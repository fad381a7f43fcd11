"""Parsing words: one line where they are wrong, with the nearest name that exists; and the options commands share."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn

from protopush.errors import InputError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


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
