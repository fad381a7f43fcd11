"""Parsers made of the commands' signatures and docstrings; one line where words are wrong; help and completion."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from inspect import Parameter, signature
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from protopush import __version__, api
from protopush.api import Run
from protopush.cli import commands
from protopush.cli.commands import COMMANDS, is_first
from protopush.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HELP = """usage: protopush COMMAND [options]

Prototype image classifiers whose prototypes are real patches of real training images.

{commands}

  protopush COMMAND --help lists a command's options; protopush --version prints the version."""
ELSEWHERE = {"split", "names"}  # --data.split; names of pictures are for the demo
TYPES = vars(api) | vars(commands)  # what annotations name
SHARED = {"run": "a run folder", "json": "print JSON to stdout", "device": "auto, cpu, cuda or mps"}


def dispatch(words: list[str]) -> int:
    """Run the command that the words begin with, on the options that follow; returns the exit code.

    Raises:
        InputError: there is no such command, or its options are wrong.
    """
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    if not words or words[0] in ("-h", "--help"):
        print(HELP.format(commands="\n".join(f"  {name:<10} {about(name)}" for name in COMMANDS)))
        return 0 if words else 2
    if words[0] == "--version":
        print(f"protopush {__version__}")
        return 0
    name = _command(words)
    if name is None:
        hint = did_you_mean(words[0], COMMANDS, f"expected one of: {', '.join(COMMANDS)}", cutoff=0.5)
        raise InputError(f"unknown command {words[0]!r}; {hint}")
    options = read_options(name, words[len(name.split()) :])
    from protopush.runs.progress import log_to_stderr

    log_to_stderr(logging.INFO if is_first() else logging.ERROR)  # of several processes, the first reports
    return COMMANDS[name](**options)


def about(name: str) -> str:
    """The first line of a command's docstring, as a part of a list."""
    line = (COMMANDS[name].__doc__ or "").partition("\n")[0].rstrip(".")
    return line[:1].lower() + line[1:]


def _command(words: Sequence[str]) -> str | None:
    return next((name for name in COMMANDS if list(words[: len(name.split())]) == name.split()), None)


def parser_of(name: str) -> ArgumentParser:
    """The parser that a command's signature and docstring describe.

    Parameters before the star are words without a name; ``config`` is all that a recipe says; ``options`` are what the
    method of :class:`protopush.Run` with the command's name has as optional arguments.
    """
    from docstring_parser import parse as read_docstring
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"protopush {name}", description=about(name), exit_on_error=False)
    parameters = dict(signature(COMMANDS[name]).parameters)
    functions: list[Callable[..., Any]] = [COMMANDS[name]]
    if parameters.pop("options", None):
        functions.insert(0, getattr(Run, name))
        more = (one.replace(kind=Parameter.KEYWORD_ONLY) for one in signature(functions[0]).parameters.values())
        optional = {one.name: one for one in more if one.default is not Parameter.empty and one.name not in ELSEWHERE}
        parameters |= {key: one for key, one in optional.items() if key not in parameters}
    docs = [one for function in functions for one in read_docstring(function.__doc__ or "").params]
    texts = SHARED | {one.arg_name: (one.description or "").rstrip(".").replace("``", "") for one in docs}
    for one in parameters.values():
        if one.name == "config":
            from protopush.training.config import RunConfig

            parser.add_argument("--config", action="config", help="a recipe (YAML); options after it override it")
            parser.add_class_arguments(RunConfig)
            continue
        bare, many = one.kind is Parameter.POSITIONAL_OR_KEYWORD, one.annotation.startswith("list[str]")
        kind = str if bare or many else eval(one.annotation, TYPES)
        if type(None) in get_args(kind) and {*get_args(kind)} <= {str, Path, type(None)}:
            kind = str  # a class or a folder may be named null, or #1, which YAML takes for nothing
        how: dict[str, Any] = {"type": kind, "help": texts.get(one.name)}
        if many or (bare and one.default is None):
            how["nargs"] = "+" if many else "?"
        if not bare:
            how |= {"required": True} if one.default is Parameter.empty else {"default": one.default}
        parser.add_argument(one.name if bare else f"--{one.name}", **how)
    for action in parser._actions:
        if _is_flag(action) and "_ARGCOMPLETE" not in os.environ:  # there the word may be completed
            action.nargs = "?"
    return parser


def read_options(name: str, words: list[str]) -> dict[str, Any]:
    """The keyword arguments of a command.

    Raises:
        InputError: the words are wrong.
    """
    from argparse import ArgumentError

    parser = parser_of(name)
    if name == "demo" and not any(word.startswith("--config") for word in words):
        words = ["--config", str(_recipe("elpv")), *words]
    try:
        options: dict[str, Any] = vars(parser.instantiate(parser.parse_args(list(_spelled(parser, words)))))
    except ArgumentError as error:
        _refuse(parser, str(error))
    if "config" in options:
        from protopush.training.config import RunConfig

        options["config"] = RunConfig(**{group.name: options.pop(group.name) for group in fields(RunConfig)})
    return options


def _is_flag(action: Any) -> bool:
    return getattr(action, "_typehint", None) is bool


def _spelled(parser: ArgumentParser, words: Sequence[str]) -> Iterator[str]:
    """Options as the parser knows them: ``--why-not`` is ``--why_not``, and ``--narrow`` alone ``--narrow=true``."""
    known = parser._option_string_actions
    for word, after in pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        other = option[:2] + option[2:].replace("-", "_")
        option = other if other in known else option
        alone = _is_flag(known.get(option)) and not equals and after not in ("true", "false")
        yield f"{option}=true" if alone else option + equals + value


def _refuse(parser: ArgumentParser, message: str) -> NoReturn:
    """One line with the nearest valid name where a name was wrong."""
    known = [option[2:] for option in parser._option_string_actions if option[:2] == "--"]
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    option = re.search(r"(?:[Uu]nrecognized arguments?: --|Key ')([\w.-]+)", message)
    wrong = f"{group[1]}.{group[2]}" if group else option[1] if option else ""
    if wrong:
        hint = did_you_mean(wrong, known, f"{parser.prog} --help lists the keys", cutoff=0.4)
        raise InputError(f"unknown key {wrong!r}; {hint}")
    word = re.search(r'key "([\w.]+)":\s+Expected a typing\.Literal\[(.+)\]\. Got value: (.*)', message)
    if word:
        raise InputError(f"{word[1]} is {word[3]!r}; expected one of: {word[2].replace(chr(39), '')}")
    raise InputError(f"{' '.join(message.split())}; {parser.prog} --help says what is expected")


def _recipe(name: str) -> Path:
    """A recipe that ships with the package, or lies in the repository."""
    here = Path(__file__).parent.parent
    for folder in (here / "recipes", here.parent.parent / "recipes"):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise InputError(f"no recipe {name!r}; give --config FILE.yaml")


def _complete() -> None:
    """Answer a shell that completes a line (argcomplete); a command's own parser does it for its options."""
    import argparse

    import argcomplete

    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    whole = line.split()[1:] if line.endswith(" ") else line.split()[1:-1]  # the words before the one that is typed
    name = _command(whole)
    os.environ["_ARGCOMPLETE"] = str(1 + len(name.split() if name else whole))  # the words that argcomplete skips
    if name:
        parser_of(name).parse_args([])
    names = [known.split() for known in COMMANDS]
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("word", choices=[known[len(whole)] for known in names if whole == known[: len(whole)]])
    argcomplete.autocomplete(parser)
