"""Docstrings for the site: ``:class:`name``` becomes a link, an example becomes code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):`(?P<name>[^`]+)`")
SEVERAL = re.compile(r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<told>.*(?:\n(?P=indent) +\S.*)*)", flags=re.M)
OPTIONAL = re.compile(r"(`+.*?`+)|\[(,\w+)\]")
EXAMPLE = re.compile(r"^(\s*)Example:$", flags=re.M)


class Roles(Extension):
    """Rewrites every docstring that griffe collects."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            text = SEVERAL.sub(_one_by_one, ROLE.sub(_linked, obj.docstring.value))
            text = OPTIONAL.sub(lambda found: found[1] or f"\\[{found[2]}\\]", text)
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", text)


def _linked(match: re.Match[str]) -> str:
    """The name as code, and as a link where the site has it."""
    name = match["name"]
    shown = name.rsplit(".", 1)[-1]
    return f'<autoref identifier="{name}" optional><code>{shown}</code></autoref>'


def _one_by_one(match: re.Match[str]) -> str:
    """``a, b: both`` as two entries, since a site's tables know one name each."""
    return "\n".join(f"{match['indent']}{name}: {match['told']}" for name in match["names"].split(", "))
