"""The page of the command line: every command's options, as its own parser tells them, so that none is ever missing."""

from __future__ import annotations

import re
from argparse import SUPPRESS
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from jsonargparse import ArgumentParser

from protopush.cli import main
from protopush.cli.commands import COMMANDS
from protopush.cli.parser import about

MARK = re.compile(r"^<!-- options: (?P<command>[\w ]+?) -->$", flags=re.M)
MEANS_SOMETHING = re.compile(r"[&<>|\[\]*_`]")  # to Markdown


def on_page_markdown(markdown: str, page: SimpleNamespace, **_: Any) -> str:
    """Called by mkdocs: fills in the options, and adds the commands that the page has no words for."""
    if page.file.src_uri != "commands.md":
        return markdown
    told = {*MARK.findall(markdown), "demo"}  # which has the options of train
    rest = "".join(f"\n## {name}\n\n{about(name)[:1].upper()}{about(name)[1:]}.\n\n<!-- options: {name} -->\n"
                   for name in COMMANDS if name not in told)  # fmt: skip
    return MARK.sub(lambda match: options_of(match["command"]), markdown + rest)


def options_of(command: str) -> str:
    """The tables of a command's options, a table for each group."""
    tables: dict[str, list[str]] = {}
    for group in parser_of(command.split())._action_groups:
        title = "" if group.title in ("positional arguments", "options") else f"**{group.title}**\n\n"
        actions = [inner for action in group._group_actions for inner in (*_fields(action), action) if _is_told(inner)]
        tables.setdefault(title, []).extend(map(_row, actions))
    head = "| option | default | what |\n| --- | --- | --- |\n"
    return "\n\n".join(title + head + "\n".join(rows) for title, rows in tables.items() if rows)


class _Read(Exception):
    """Thrown where a command would begin to work."""


def parser_of(words: list[str], read: bool = False) -> ArgumentParser:
    """The parser of a command, which does no work; ``read``: it has read the words, and refused what is wrong."""
    found: list[ArgumentParser] = []
    original = ArgumentParser.parse_args

    def stop(parser: ArgumentParser, *args: Any, **options: Any) -> None:
        if read:
            original(parser, *args, **options)
        found.append(parser)
        raise _Read

    with patch.object(ArgumentParser, "parse_args", stop):
        try:
            code = main(words)
        except _Read:
            return found[0]
    raise ValueError(f"refused with {code}: {words}")


def _fields(action: Any) -> list[Any]:
    """The options behind an option that may be null (model.windows), which has a ``--....help`` of its own."""
    inner = ArgumentParser()
    for kind in getattr(action, "_help_types", ()):
        inner.add_class_arguments(kind, action.dest.removesuffix(".help"))
    return [field for field in inner._actions if "." in field.dest]


def _is_told(action: Any) -> bool:
    return action.default != SUPPRESS and action.help not in (None, SUPPRESS)


def _row(action: Any) -> str:
    name = (action.option_strings or [action.dest])[0]
    default = "required" if _is_required(action) else _value(action.default)
    about = " ".join(str(action.help).split())
    return f"| `{name}` | {default} | {MEANS_SOMETHING.sub(lambda found: f'&#{ord(found[0])};', about)} |"


def _is_required(action: Any) -> bool:
    return bool(getattr(action, "_required", False) or action.required)


def _value(value: Any) -> str:
    if value is None or value in ("", []):
        return "-"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
